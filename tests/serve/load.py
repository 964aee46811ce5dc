"""Clients that are slow or ask for too much, and listings that are long."""

import socket
import struct
import time

from common import *

HOST, PORT = urllib.parse.urlsplit(URL).netloc.split(":")


def connect():
    return socket.create_connection((HOST, int(PORT)), timeout=10)


def request(method, path, headers):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {HOST}:{PORT}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def slow_clients():
    ebs = client()
    snapshot, data = start(ebs), block(0)
    done = write(ebs, {0: data})
    path = f"/snapshots/{snapshot}/blocks/1"
    headers = signed("PUT", path, put_headers(data), data) | {"Content-Length": str(BLOCK)}
    half_body = request("PUT", path, headers) + data[: BLOCK // 2]
    half_head = request("PUT", path, headers)[:100]
    token = urllib.parse.quote(tokens(ebs, done)[0], safe="")
    path = f"/snapshots/{done}/blocks/0?blockToken={token}"
    whole = request("GET", path, signed("GET", path)) * 8
    held = []
    for number in range(300):
        connection = connect()
        if number % 3 == 2:
            # Their answers fill what the kernel keeps for them, and are not read.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with contextlib.suppress(OSError):
            connection.sendall([half_head, half_body, whole][number % 3])
        held.append(connection)
    began = time.monotonic()
    # Connections that were opened before may have given way to others.
    other = client(attempts=3)
    blocks = {index: block(index) for index in range(20)}
    new = start(other)
    for index, data in blocks.items():
        put(other, new, index, data)
    complete(other, new, 20)
    assert read(other, new) == blocks
    took = time.monotonic() - began
    assert took < 15, took
    # A body that never came to its end was not put.
    complete(other, snapshot, 0)
    metrics = send("GET", "/metrics", {}).must_be(200).body.decode()
    evicted = [line for line in metrics.splitlines() if "evicted_total " in line][-1]
    assert int(evicted.split()[1]) > 0, evicted
    for connection in held:
        # Ends it at once, whatever is under way.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert read(other, new) == blocks


def answer_to(data):
    """The status of the answer to these bytes; None if the connection ends without one."""
    with connect() as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        try:
            line = connection.makefile("rb").readline()
        except ConnectionResetError:
            return None
    return int(line.split()[1]) if line else None


def too_large():
    ebs = client()
    snapshot, data = start(ebs), block(0)
    get_it = f"/snapshots/{snapshot}/blocks"
    for headers in [
        {"X-Long": "x" * 20000},
        {"X-Long": "x" * (1 << 20)},
        {f"X-{number}": "y" for number in range(10000)},
        {f"X-{number}": "y" for number in range(70)},
    ]:
        status = answer_to(request("GET", get_it, headers))
        assert status in [431, None], status
    assert answer_to(request("GET", "/" + "x" * 20000, {})) in [414, 431, None]
    assert answer_to(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100) in [400, None]
    assert answer_to(b"nonsense\r\n\r\n") == 400
    both = {"Content-Length": "5", "Transfer-Encoding": "chunked"}
    assert answer_to(request("POST", "/snapshots", both) + b"0\r\n\r\n") in [400, 403, None]
    assert answer_to(request("POST", "/snapshots", {"Content-Length": "-1"})) == 400
    # What a body says to be is not waited for.
    path = f"/snapshots/{snapshot}/blocks/0"
    for method, path, headers, status in [
        ("POST", "/snapshots", {}, 413),
        ("PUT", path, put_headers(data), 400),
    ]:
        for length in [10**9, 2**63]:
            signed_headers = signed(method, path, headers, b"") | {"Content-Length": str(length)}
            head = request(method, path, signed_headers)
            with connect() as connection:
                connection.sendall(head)
                connection.shutdown(socket.SHUT_WR)
                line = connection.makefile("rb").readline()
            assert line.startswith(b"HTTP/1.1 %d" % status), (method, length, line)
    # Nor is one without a length read for ever.
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    for method, path, headers, status in [
        ("POST", "/snapshots", {}, 413),
        ("PUT", path, put_headers(data), 400),
    ]:
        head = signed(method, path, headers, b"") | {"Transfer-Encoding": "chunked"}
        assert answer_to(request(method, path, head) + chunk * 12 + b"0\r\n\r\n") == status
    # A block may come in chunks.
    path = f"/snapshots/{snapshot}/blocks/3"
    head = signed("PUT", path, put_headers(data), data) | {"Transfer-Encoding": "chunked"}
    chunks = b"".join(b"8000\r\n" + data[at : at + 32768] + b"\r\n" for at in range(0, BLOCK, 32768))
    assert answer_to(request("PUT", path, head) + chunks + b"0\r\n\r\n") == 201
    complete(ebs, snapshot, 1)
    assert read(ebs, snapshot) == {3: data}


def a_tebibyte():
    ebs = client()
    # The stock parser of JSON is fast enough; boto3's own objects for each time are not needed.
    one, two = "snap-00000000000100001", "snap-00000000000100002"
    expected = 0
    for page in pages(ebs.list_snapshot_blocks, SnapshotId=two, MaxResults=10000):
        assert page["VolumeSize"] == 1024
        for found in page["Blocks"]:
            assert found["BlockIndex"] == expected
            expected += 1
    assert expected == 2097152
    both = {"FirstSnapshotId": one, "SecondSnapshotId": two}
    changed = [
        found["BlockIndex"]
        for page in pages(ebs.list_changed_blocks, MaxResults=10000, **both)
        for found in page["ChangedBlocks"]
    ]
    assert len(changed) == 25000 and changed == sorted(set(changed))
    # Anywhere in it at once.
    page = ebs.list_snapshot_blocks(SnapshotId=one, StartingBlockIndex=2097151)
    assert [found["BlockIndex"] for found in page["Blocks"]] == [2097151]
    data = get(ebs, one, 2097151, page["Blocks"][0]["BlockToken"])
    assert struct.unpack("<QII", data[:16]) == (2097151, 1, 1)


def a_store_that_is_only_read():
    ebs, ec2 = client(), client("ec2")
    shown = ec2.describe_snapshots()["Snapshots"]
    assert len(shown) == 4 and all(snapshot["State"] == "completed" for snapshot in shown)
    one, other = "snap-00000000000100001", "snap-00000000000200001"
    for index, data in read(ebs, one).items():
        assert struct.unpack("<QII", data[:16]) == (index, 1, 1)
    with invalid("UNRELATED_SNAPSHOTS"):
        ebs.list_changed_blocks(FirstSnapshotId=one, SecondSnapshotId=other)
    for refused in [
        lambda: start(ebs),
        lambda: start(ebs, ParentSnapshotId=one),
        lambda: start(ebs, Encrypted=True),
        lambda: put(ebs, one, 0, block(0)),
        lambda: complete(ebs, one, 0),
        lambda: ec2.create_tags(Resources=[one], Tags=[{"Key": "a", "Value": "b"}]),
        lambda: ec2.delete_snapshot(SnapshotId=one),
    ]:
        try:
            refused()
        except ClientError as error:
            assert 400 <= error.response["ResponseMetadata"]["HTTPStatusCode"] < 500, error.response
        else:
            raise AssertionError("it was written")
    assert len(ec2.describe_snapshots()["Snapshots"]) == 4


if __name__ == "__main__":
    main(globals())
