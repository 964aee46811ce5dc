"""A TLS server that passes everything on to a service, and a proxy that leads to it.

    tls.py HOST:PORT

writes ca.pem, the certificate to trust, into the current directory, and prints the ports of both. The
proxy is asked by CONNECT, wants the name `me` and the password `secret`, and is the only way to NAME.
"""

import asyncio
import base64
import datetime
import ipaddress
import ssl
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NAME = "ebs.example.internal"
KNOWN = b"Basic " + base64.b64encode(b"me:secret")


def certify():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "of the tests")])
    now = datetime.datetime.now(datetime.timezone.utc)
    names = [x509.DNSName(NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority of the tests")])

    def certificate(subject, public, is_authority):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if not is_authority:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(authority_key, hashes.SHA256())

    pem = serialization.Encoding.PEM
    with open("ca.pem", "wb") as file:
        file.write(certificate(authority_name, authority_key.public_key(), True).public_bytes(pem))
    with open("server.pem", "wb") as file:
        plain = serialization.NoEncryption()
        file.write(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        file.write(certificate(name, key.public_key(), False).public_bytes(pem))


async def copy(source, target):
    try:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    except OSError:
        pass
    finally:
        target.close()


async def join(reader, writer, host, port):
    """Connects a client with what listens there."""
    there = await asyncio.open_connection(host, port)
    await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))


async def listen(handle, context=None):
    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    return server, server.sockets[0].getsockname()[1]


async def main(target):
    host, port = target.split(":")
    certify()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("server.pem")
    server, tls = await listen(lambda reader, writer: join(reader, writer, host, int(port)), context)

    async def connect(reader, writer):
        lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        fields = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
        given = {name.lower(): value for name, value in fields.items()}.get(b"proxy-authorization")
        if given != KNOWN:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        elif not lines[0].startswith(b"CONNECT " + NAME.encode()):
            writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 Connection Established\r\n\r\n")
            return await join(reader, writer, "127.0.0.1", tls)
        await writer.drain()
        writer.close()

    proxy, proxied = await listen(connect)
    print(tls, proxied, flush=True)
    async with server, proxy:
        await asyncio.Event().wait()


asyncio.run(main(sys.argv[1]))
