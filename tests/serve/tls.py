"""A TLS server that passes everything on to a service, and a proxy that leads to it.

    tls.py HOST:PORT

writes ca.pem, the certificate to trust, into the current directory, and prints the ports of both. The
proxy is asked by CONNECT, wants the name `me` and the password `secret`, and is the only way to NAME.
"""

import base64
import datetime
import ipaddress
import socket
import ssl
import sys
import threading

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


def copy(source, target):
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
    except OSError:
        pass
    finally:
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def join(one, other):
    threading.Thread(target=copy, args=(one, other), daemon=True).start()
    copy(other, one)


def listen(handle):
    server = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            client, _ = server.accept()
            threading.Thread(target=handle, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return server.getsockname()[1]


def main(target):
    host, port = target.split(":")
    certify()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("server.pem")

    def serve(client):
        try:
            # One thread reads and one writes, which the ssl module allows.
            join(context.wrap_socket(client, server_side=True), socket.create_connection((host, int(port))))
        except OSError:
            client.close()

    tls = listen(serve)

    def connect(client):
        head = b""
        while b"\r\n\r\n" not in head and (data := client.recv(4096)):
            head += data
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        if fields.get(b"proxy-authorization") != KNOWN.lower():
            client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        elif not head.startswith(b"CONNECT " + NAME.encode()):
            client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
        else:
            client.sendall(b"HTTP/1.1 200 Connection Established\r\n\r\n")
            return join(client, socket.create_connection(("127.0.0.1", tls)))
        client.close()

    print(tls, listen(connect), flush=True)
    sys.stdin.read()


main(sys.argv[1])
