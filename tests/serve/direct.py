"""Snapshots are started, written and completed; and what is refused."""

import concurrent.futures
import datetime
import re
import uuid

from common import *


def a_start_answers_what_it_was_told():
    ebs, ec2 = client(), client("ec2")
    tags = [{"Key": "Name", "Value": "web <&> \"äö\""}, {"Key": "empty", "Value": ""}]
    before = datetime.datetime.now(datetime.timezone.utc)
    answer = ebs.start_snapshot(
        VolumeSize=65536,
        Description="a <b> & \"c\"",
        Tags=tags,
        ClientToken=str(uuid.uuid4()),
        Timeout=4320,
    )
    metadata = answer.pop("ResponseMetadata")
    assert metadata["HTTPStatusCode"] == 201
    uuid.UUID(metadata["RequestId"])
    parent = answer.pop("SnapshotId")
    assert re.fullmatch("snap-[0-9a-f]{17}", parent), parent
    # A store keeps its own time.
    assert abs(answer.pop("StartTime") - before) < datetime.timedelta(seconds=10)
    assert sorted(answer.pop("Tags"), key=lambda tag: tag["Key"]) == tags
    assert answer.pop("SseType") == "none"
    assert answer == {
        "OwnerId": "000000000000",
        "Status": "pending",
        "VolumeSize": 65536,
        "BlockSize": BLOCK,
        "Description": "a <b> & \"c\"",
    }
    (shown,) = ec2.describe_snapshots(SnapshotIds=[parent])["Snapshots"]
    assert shown["State"] == "pending" and shown["VolumeSize"] == 65536
    assert shown["Description"] == "a <b> & \"c\""
    assert sorted(shown["Tags"], key=lambda tag: tag["Key"]) == tags
    assert complete(ebs, parent, 0)["Status"] == "completed"
    child = ebs.start_snapshot(VolumeSize=65536, ParentSnapshotId=parent, Timeout=10)
    assert child["ParentSnapshotId"] == parent
    assert "Tags" not in child and child["Description"] == ""


def a_client_token_is_for_one_request():
    ebs = client()
    first = {"VolumeSize": 1, "ClientToken": "t" * 64, "Tags": [{"Key": "a", "Value": "b"}]}
    snapshot = start(ebs, 1, ClientToken="t" * 64, Tags=first["Tags"])
    again = ebs.start_snapshot(**first)
    assert again["SnapshotId"] == snapshot and again["ResponseMetadata"]["HTTPStatusCode"] == 201
    for other in [
        {"VolumeSize": 2},
        {"Tags": [{"Key": "a", "Value": "c"}]},
        {"Tags": []},
        {"Description": "other"},
        {"Timeout": 20},
        {"Encrypted": True},
        {"ParentSnapshotId": write(ebs, {})},
    ]:
        with fails("ConflictException", 409):
            ebs.start_snapshot(**first | other)
    # It is as good after the snapshot got its blocks, and was completed.
    put(ebs, snapshot, 0, block(0))
    assert ebs.start_snapshot(**first)["SnapshotId"] == snapshot
    complete(ebs, snapshot, 1)
    assert ebs.start_snapshot(**first)["SnapshotId"] == snapshot
    assert start(ebs, 1, ClientToken="u") != snapshot
    # boto3 makes a token of its own for each request.
    assert start(ebs) != start(ebs)


def a_start_is_refused_for_what_is_wrong_with_it():
    ebs, lax = client(), client(validate=False)
    for gib in [0, 65537, -1, 2**40]:
        with invalid("INVALID_VOLUME_SIZE"):
            start(lax, gib)
    for more in [
        {"Timeout": 9},
        {"Timeout": 4321},
        {"Description": "d" * 256},
        {"ClientToken": "t" * 65},
        {"ClientToken": "ä"},
    ]:
        with invalid("INVALID_PARAMETER_VALUE"):
            start(lax, **more)
    raw("POST", "/snapshots", body=b"{}").must_be(400, "ValidationException")
    raw("POST", "/snapshots", body=b"{").must_be(400, "SerializationException")
    raw("POST", "/snapshots", body=b'{"VolumeSize":"1"}').must_be(400, "SerializationException")
    for bad in [
        [{"Key": "k", "Value": "1"}, {"Key": "k", "Value": "2"}],
        [{"Key": "aws:k", "Value": ""}],
        [{"Key": "", "Value": ""}],
        [{"Value": "no key"}],
        [{"Key": "k" * 129, "Value": ""}],
        [{"Key": "k", "Value": "v" * 257}],
        [{"Key": f"k{n}", "Value": ""} for n in range(51)],
    ]:
        with invalid("INVALID_TAG"):
            start(lax, Tags=bad)
    start(ebs, Tags=[{"Key": f"k{n}", "Value": ""} for n in range(50)])
    pending = start(ebs)
    parent = write(ebs, {})
    with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
        start(ebs, ParentSnapshotId="snap-00000000000000000")
    with invalid("INVALID_SNAPSHOT_ID"):
        start(ebs, ParentSnapshotId=pending)
    with invalid("INVALID_SNAPSHOT_ID"):
        start(lax, ParentSnapshotId="vol-00000000000000000")
    with invalid("INVALID_PARAMETER_VALUE"):
        start(ebs, ParentSnapshotId=parent, Encrypted=True)
    with invalid("INVALID_PARAMETER_VALUE"):
        start(ebs, KmsKeyArn="arn:aws:kms:us-east-1:000000000000:key/k")
    with invalid("INVALID_CUSTOMER_KEY"):
        start(lax, Encrypted=True, KmsKeyArn="no arn")


def encryption_is_said_and_inherited():
    ebs, ec2 = client(), client("ec2")
    key = "arn:aws:kms:us-east-1:000000000000:key/12345678-1234-1234-1234-123456789012"
    for more, shown in [
        ({"KmsKeyArn": key}, key),
        ({}, "arn:aws:kms:us-east-1:000000000000:key/00000000-0000-0000-0000-000000000000"),
    ]:
        answer = ebs.start_snapshot(
            VolumeSize=1, Encrypted=True, Tags=[{"Key": "k", "Value": "v"}], **more
        )
        parent = answer["SnapshotId"]
        assert answer["KmsKeyArn"] == shown and answer["SseType"] == "sse-kms"
        assert answer["Tags"] == [{"Key": "k", "Value": "v"}], answer
        complete(ebs, parent, 0)
        answer = ebs.start_snapshot(VolumeSize=1, ParentSnapshotId=parent)
        child = answer["SnapshotId"]
        assert answer["KmsKeyArn"] == shown and answer["SseType"] == "sse-kms"
        for snapshot in [parent, child]:
            (described,) = ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"]
            assert described["Encrypted"] is True and described["KmsKeyId"] == shown
        # What remembers it is no tag that clients see, or could take away.
        ec2.delete_tags(Resources=[parent])
        (described,) = ec2.describe_snapshots(SnapshotIds=[parent])["Snapshots"]
        assert described["Encrypted"] is True and "Tags" not in described
    plain = start(ebs)
    (described,) = ec2.describe_snapshots(SnapshotIds=[plain])["Snapshots"]
    assert described["Encrypted"] is False and "KmsKeyId" not in described
    encrypted = [{"Name": "encrypted", "Values": ["true"]}]
    assert len(ec2.describe_snapshots(Filters=encrypted)["Snapshots"]) == 4


def a_put_is_checked():
    ebs, lax = client(), client(validate=False)
    snapshot, data = start(ebs), block(1)
    answer = put(ebs, snapshot, 2047, data, Progress=50)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 201
    assert answer["Checksum"] == checksum(data) and answer["ChecksumAlgorithm"] == "SHA256"
    for more in [
        {"Checksum": checksum(block(2))},
        {"BlockData": data[:-1]},
        {"BlockData": data + b"x"},
        {"BlockData": b"", "Checksum": checksum(b"")},
        {"BlockIndex": 2048},
        {"BlockIndex": 2**31 - 1},
    ]:
        with invalid("INVALID_BLOCK"):
            put(ebs, snapshot, 0, data, **more)
    for more in [
        {"DataLength": BLOCK - 1},
        {"DataLength": 4096},
        {"Progress": 101},
        {"Progress": -1},
        {"ChecksumAlgorithm": "MD5"},
        {"Checksum": "short"},
        {"BlockIndex": -1},
        {"BlockIndex": 2**31},
    ]:
        with invalid("INVALID_PARAMETER_VALUE"):
            put(lax, snapshot, 0, data, **more)
    path = f"/snapshots/{snapshot}/blocks/0"
    for name in put_headers(data):
        headers = put_headers(data)
        del headers[name]
        raw("PUT", path, headers, data).must_be(400, "ValidationException")
    for index in ["x", "+1", "1.0", "%31%20"]:
        path = f"/snapshots/{snapshot}/blocks/{index}"
        raw("PUT", path, put_headers(data), data).must_be(400, "ValidationException")
    with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
        put(ebs, "snap-00000000000000000", 0, data)
    with invalid("INVALID_SNAPSHOT_ID"):
        put(lax, "snap-NOID", 0, data)
    # Nothing of all this has left a block.
    complete(ebs, snapshot, 1)
    assert read(ebs, snapshot) == {2047: data}


def a_block_may_be_put_again_until_the_snapshot_is_completed():
    ebs = client()
    snapshot = start(ebs)
    for number in range(3):
        put(ebs, snapshot, 7, block(number))
    put(ebs, snapshot, 7, block(2))
    put(ebs, snapshot, 8, bytes(BLOCK))
    complete(ebs, snapshot, 2)
    with invalid("INVALID_SNAPSHOT_ID"):
        put(ebs, snapshot, 7, block(3))
    with invalid("INVALID_SNAPSHOT_ID"):
        put(ebs, snapshot, 9, block(3))
    # A block of zeros that was put is a block.
    assert read(ebs, snapshot) == {7: block(2), 8: bytes(BLOCK)}


def a_completion_counts_and_compares():
    ebs, ec2 = client(), client("ec2")
    blocks = {index: block(index % 3) for index in [5, 0, 1000, 7]}
    snapshot = start(ebs)
    for index, data in blocks.items():
        put(ebs, snapshot, index, data)
    put(ebs, snapshot, 5, block(9))
    blocks[5] = block(9)
    three = {
        "Checksum": linear(blocks),
        "ChecksumAlgorithm": "SHA256",
        "ChecksumAggregationMethod": "LINEAR",
    }

    def is_refused(wrong):
        count, sum_ = wrong
        with invalid("INVALID_SNAPSHOT_ID"):
            complete(ebs, snapshot, count, **three | {"Checksum": sum_})

    # Each waits for other servers to save what they may have.
    good = linear(blocks)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(is_refused, [(0, good), (3, good), (5, good), (4, checksum(b""))]))
    # None of these was its end.
    answer = complete(ebs, snapshot, 4, **three)
    assert answer["Status"] == "completed"
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 202
    (shown,) = ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"]
    assert shown["State"] == "completed" and shown["Progress"] == "100%"
    assert shown["CompletionTime"] >= shown["StartTime"]
    with invalid("INVALID_SNAPSHOT_ID"):
        complete(ebs, snapshot, 4, **three)
    assert read(ebs, snapshot) == blocks
    # A child counts and sums what was put into it alone.
    child = start(ebs, ParentSnapshotId=snapshot)
    put(ebs, child, 1, block(4))
    complete(ebs, child, 1, **three | {"Checksum": linear({1: block(4)})})
    assert read(ebs, child) == blocks | {1: block(4)}


def a_completion_is_refused_for_what_is_wrong_with_it():
    ebs, lax = client(), client(validate=False)
    snapshot = start(ebs)
    three = {
        "Checksum": checksum(b""),
        "ChecksumAlgorithm": "SHA256",
        "ChecksumAggregationMethod": "LINEAR",
    }
    for name in three:
        two = {other: value for other, value in three.items() if other != name}
        for some in [two, {name: three[name]}]:
            with invalid("INVALID_PARAMETER_VALUE"):
                complete(ebs, snapshot, 0, **some)
    for more in [
        {"Checksum": "x"},
        {"ChecksumAlgorithm": "SHA512"},
        {"ChecksumAggregationMethod": "TREE"},
        {"ChangedBlocksCount": -1},
        {"ChangedBlocksCount": 2**31},
    ]:
        with invalid("INVALID_PARAMETER_VALUE"):
            lax.complete_snapshot(**{"SnapshotId": snapshot, "ChangedBlocksCount": 0} | three | more)
    path = f"/snapshots/completion/{snapshot}"
    raw("POST", path).must_be(400, "ValidationException")
    with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
        complete(ebs, "snap-00000000000000000", 0)
    with invalid("INVALID_SNAPSHOT_ID"):
        complete(lax, "snap-NOID", 0)
    complete(ebs, snapshot, 0, **three)
    assert read(ebs, snapshot) == {}


def eight_writers_of_one_snapshot():
    ebs = client()
    snapshot = start(ebs)
    # Each puts blocks of its own, and one that all put alike.
    own = {writer: range(writer, 160, 8) for writer in range(8)}

    def writer(number):
        mine = client()
        for index in own[number]:
            put(mine, snapshot, index, block(index))
            put(mine, snapshot, 200 + index % 5, block("shared"))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(writer, range(8)))
    blocks = {index: block(index) for index in range(160)}
    blocks |= {200 + index: block("shared") for index in range(5)}
    complete(
        ebs,
        snapshot,
        len(blocks),
        Checksum=linear(blocks),
        ChecksumAlgorithm="SHA256",
        ChecksumAggregationMethod="LINEAR",
    )
    assert read(ebs, snapshot) == blocks


def what_proxies_read_otherwise_is_refused():
    ebs, ec2 = client(), client("ec2")
    snapshot = write(ebs, {0: block(0)})
    raw("HEAD", f"/snapshots/{snapshot}/blocks").must_be(404, "UnknownOperationException")
    # It would be an action by another name.
    path = f"/?Action=DeleteSnapshot&SnapshotId={snapshot}"
    assert raw("HEAD", path, service="ec2").status >= 400
    assert ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"]
    headers = signed("GET", f"/snapshots/{snapshot}/blocks")
    host = ("Host", urllib.parse.urlsplit(URL).netloc)
    for twice in [("Authorization", headers["Authorization"]), host, ("Host", "other")]:
        connection = http.client.HTTPConnection(host[1], timeout=30)
        with contextlib.closing(connection):
            connection.putrequest("GET", f"/snapshots/{snapshot}/blocks", skip_host=True)
            for name, value in [*headers.items(), host, twice]:
                connection.putheader(name, value)
            connection.endheaders()
            Answer(connection.getresponse()).must_be(400, "BadRequest")
    for body in [b"[1]", b"", b"null", b"7", b'{"VolumeSize":1']:
        raw("POST", "/snapshots", body=body).must_be(400, "SerializationException")


if __name__ == "__main__":
    main(globals())
