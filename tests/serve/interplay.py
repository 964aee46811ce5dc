"""Snapshots that others read or wrote, and servers that end or share a store."""

import itertools
import threading
import time

from botocore.exceptions import BotoCoreError

from common import *


def of_file(image, index):
    with open(image, "rb") as file:
        file.seek(index * BLOCK)
        return file.read(BLOCK)


def writes(image, indexes, parent):
    """Writes blocks of an image; prints the id of the snapshot."""
    blocks = {int(index): of_file(image, int(index)) for index in indexes.split(",")}
    print(write(client(), blocks, **({"ParentSnapshotId": parent} if parent else {})))


def reads(snapshot, image, parent):
    """Compares a snapshot with an image, the whole of it; and its parent with what changed."""
    ebs = client()
    blocks = read(ebs, snapshot)
    before = read(ebs, parent)
    page = ebs.list_changed_blocks(FirstSnapshotId=parent, SecondSnapshotId=snapshot)
    differ = {index for index in blocks if blocks[index] != before.get(index)}
    assert {changed["BlockIndex"] for changed in page["ChangedBlocks"]} == differ
    (shown,) = client("ec2").describe_snapshots(SnapshotIds=[snapshot])["Snapshots"]
    with open(image, "rb") as file:
        for index in range(shown["VolumeSize"] * 2048):
            assert file.read(BLOCK) == blocks.get(index, bytes(BLOCK)), index
        assert not file.read(1)


def two_servers(other):
    """What is begun at one server is gone on with at the other."""
    a, b = client(), client(url=other)
    blocks = {index: block(index) for index in range(40)}
    parent = write(a, {index: block("parent") for index in range(200)})
    snapshot = start(a, ParentSnapshotId=parent, ClientToken="one")
    assert start(b, ParentSnapshotId=parent, ClientToken="one") == snapshot
    with fails("ConflictException", 409):
        start(b, 2, ParentSnapshotId=parent, ClientToken="one")
    for server, index in zip(itertools.cycle([a, b]), blocks):
        put(server, snapshot, index, blocks[index])
    # Who got no answer of the one asks the other.
    for server, index in zip(itertools.cycle([b, a]), range(0, 40, 5)):
        put(server, snapshot, index, blocks[index])
    complete(
        b,
        snapshot,
        40,
        Checksum=linear(blocks),
        ChecksumAlgorithm="SHA256",
        ChecksumAggregationMethod="LINEAR",
    )
    time.sleep(1.1)  # what a server remembers of a snapshot
    page = a.list_snapshot_blocks(SnapshotId=snapshot, MaxResults=100)
    rest = b.list_snapshot_blocks(SnapshotId=snapshot, NextToken=page["NextToken"])
    listed = page["Blocks"] + rest["Blocks"]
    assert [found["BlockIndex"] for found in listed] == list(range(200))
    for found in listed[:50]:
        index = found["BlockIndex"]
        expected = blocks.get(index, block("parent"))
        for server in [a, b]:
            assert get(server, snapshot, index, found["BlockToken"]) == expected
    many = {"FirstSnapshotId": parent, "SecondSnapshotId": snapshot}
    assert len(b.list_changed_blocks(**many)["ChangedBlocks"]) == 40
    ec2, other_ec2 = client("ec2"), client("ec2", url=other)
    for _ in range(6):
        start(a)
    page = ec2.describe_snapshots(MaxResults=5)
    rest = other_ec2.describe_snapshots(MaxResults=5, NextToken=page["NextToken"])
    seen = [shown["SnapshotId"] for shown in page["Snapshots"] + rest["Snapshots"]]
    assert len(seen) == len(set(seen)) == 8
    other_ec2.create_tags(Resources=[snapshot], Tags=[{"Key": "Name", "Value": "b"}])
    (shown,) = ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"]
    assert shown["Tags"] == [{"Key": "Name", "Value": "b"}]
    other_ec2.delete_snapshot(SnapshotId=snapshot)
    time.sleep(1.1)
    with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
        tokens(a, snapshot)


def the_later_put_counts(other):
    """Whichever server it came through, if the earlier was answered before."""
    a, b = client(), client(url=other)
    for order in [(a, b, a), (b, a, b), (a, a, b), (b, b, a)]:
        snapshot = start(a)
        put(a, snapshot, 1, block("a"))
        put(b, snapshot, 2, block("b"))
        for number, server in enumerate(order):
            put(server, snapshot, 0, block(number))
        complete(order[0], snapshot, 3)
        time.sleep(1.1)  # what a server remembers of a snapshot
        assert read(b, snapshot) == {0: block(2), 1: block("a"), 2: block("b")}


def writes_until_it_ends(path):
    """Puts blocks with four threads until the server is gone; notes what was acknowledged."""
    ebs = client()
    snapshot = start(ebs)
    numbers = itertools.count()
    lock = threading.Lock()
    # The next one may be there already: a put whose answer was lost is not noted.
    with open(path, "w") as notes:

        def writer():
            mine = client()
            with contextlib.suppress(BotoCoreError):
                for index in numbers:
                    # Each fourth put is of a block that was put before.
                    index = index // 2 if index % 4 == 3 else index
                    with lock:
                        print("try", index, file=notes, flush=True)
                    put(mine, snapshot, index, block(index))
                    with lock:
                        print("put", index, file=notes, flush=True)

        print("snapshot", snapshot, file=notes, flush=True)
        threads = [threading.Thread(target=writer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def completes_what_was_acknowledged(path):
    with open(path) as notes:
        lines = [line.split() for line in notes]
    ((_, snapshot),) = [line for line in lines if line[0] == "snapshot"]
    acknowledged = {int(index) for what, index in lines if what == "put"}
    uncertain = {int(index) for what, index in lines if what == "try"} - acknowledged
    assert len(acknowledged) > 10
    ebs = client()
    # Of those without an answer each is there or not.
    for count in range(len(acknowledged), len(acknowledged) + len(uncertain) + 1):
        try:
            complete(ebs, snapshot, count)
        except ClientError as error:
            assert error.response["Reason"] == "INVALID_SNAPSHOT_ID", error.response
        else:
            break
    found = read(ebs, snapshot)
    assert acknowledged <= found.keys() <= acknowledged | uncertain
    assert all(data == block(index) for index, data in found.items())


def stays_pending():
    ebs, ec2 = client(), client("ec2")
    snapshot = start(ebs)
    put(ebs, snapshot, 0, block(0))
    assert complete(ebs, snapshot, 1)["Status"] == "pending"
    completed = time.monotonic()
    (shown,) = ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"]
    assert shown["State"] == "pending" and "CompletionTime" not in shown
    with invalid("INVALID_SNAPSHOT_ID"):
        tokens(ebs, snapshot)
    with invalid("INVALID_SNAPSHOT_ID"):
        start(ebs, ParentSnapshotId=snapshot)
    # It only looks pending: nothing can be put any more.
    with invalid("INVALID_SNAPSHOT_ID"):
        put(ebs, snapshot, 1, block(1))
    waiter = ec2.get_waiter("snapshot_completed")
    waiter.wait(SnapshotIds=[snapshot], WaiterConfig={"Delay": 1, "MaxAttempts": 15})
    assert time.monotonic() - completed > 1.5
    assert read(ebs, snapshot) == {0: block(0)}


if __name__ == "__main__":
    main(globals())
