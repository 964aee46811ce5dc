"""Snapshots that boto3 writes for an `ebs:` store to read, and reads after one wrote them."""

import os

from common import *
from interplay import of_file

GIB = 2048 * BLOCK


def listed(ebs, snapshot):
    """The token of each block, by index. Not every service lists them in order."""
    found = [
        (block["BlockIndex"], block["BlockToken"])
        for page in pages(ebs.list_snapshot_blocks, SnapshotId=snapshot)
        for block in page["Blocks"]
    ]
    assert len(dict(found)) == len(found), found
    return dict(found)


def numbers(text):
    return [int(number) for number in text.split(",") if number]


def writes(image, indexes, parent):
    """Writes blocks of an image in no order, some of them twice; prints the id of the snapshot."""
    ebs = client()
    gib = -(-os.path.getsize(image) // GIB)
    # From behind every second one, then the others.
    indexes = numbers(indexes)[::-1]
    indexes = indexes[::2] + indexes[1::2]
    tags = [{"Key": "Name", "Value": "by boto"}, {"Key": "role", "Value": "boto"}]
    more = {"ParentSnapshotId": parent} if parent else {}
    snapshot = start(ebs, gib, Tags=tags, Description="of boto3", **more)
    for index in indexes[::5]:
        put(ebs, snapshot, index, block("is written again"))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: put(ebs, snapshot, index, of_file(image, index)), indexes))
    complete(ebs, snapshot, len(indexes))
    print(snapshot)


def reads(snapshot, image, indexes):
    """Compares all of a snapshot with an image, block by block; these are the blocks that it has."""
    ebs = client()
    found = listed(ebs, snapshot)
    assert sorted(found) == numbers(indexes), sorted(found)
    size = os.path.getsize(image)
    with open(image, "rb") as file:
        for index in range(-(-size // BLOCK)):
            expected = file.read(BLOCK).ljust(BLOCK, b"\0")
            data = get(ebs, snapshot, index, found[index]) if index in found else bytes(BLOCK)
            assert data == expected, index
    (shown,) = client("ec2").describe_snapshots(SnapshotIds=[snapshot])["Snapshots"]
    assert (shown["VolumeSize"], shown["State"]) == (-(-size // GIB), "completed"), shown


def differ(parent, child, indexes):
    """A child has a lineage with its parent, and these blocks of its own."""
    asked = {"FirstSnapshotId": parent, "SecondSnapshotId": child}
    found = [
        block["BlockIndex"]
        for page in pages(client().list_changed_blocks, **asked)
        for block in page["ChangedBlocks"]
    ]
    assert found == numbers(indexes), found


if __name__ == "__main__":
    main(globals())
