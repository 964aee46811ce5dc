"""Listings, differences and blocks of the EBS direct APIs, and what they refuse."""

import datetime

from common import *


def pages_of_blocks():
    ebs, lax = client(), client(validate=False)
    blocks = {index: block(0) for index in range(0, 2048, 8)}
    snapshot = write(ebs, blocks, 3)
    page = ebs.list_snapshot_blocks(SnapshotId=snapshot)
    assert page["VolumeSize"] == 3 and page["BlockSize"] == BLOCK
    assert int(page["ResponseMetadata"]["HTTPHeaders"]["content-length"]) > 256 * 50
    now = datetime.datetime.now(datetime.timezone.utc)
    assert datetime.timedelta(days=6.9) < page["ExpiryTime"] - now < datetime.timedelta(days=7.1)
    assert [listed["BlockIndex"] for listed in page["Blocks"]] == list(blocks)
    assert "NextToken" not in page
    assert all(len(listed["BlockToken"]) <= 256 for listed in page["Blocks"])
    sizes = [
        len(page["Blocks"])
        for page in pages(ebs.list_snapshot_blocks, SnapshotId=snapshot, MaxResults=100)
    ]
    assert sizes == [100, 100, 56], sizes
    # Fewer than a hundred are a hundred.
    for few in [1, 99]:
        page = lax.list_snapshot_blocks(SnapshotId=snapshot, MaxResults=few)
        assert len(page["Blocks"]) == 100
    ebs.list_snapshot_blocks(SnapshotId=snapshot, MaxResults=10000)
    for bad in [0, -1, 10001]:
        with invalid("INVALID_PARAMETER_VALUE"):
            lax.list_snapshot_blocks(SnapshotId=snapshot, MaxResults=bad)
    with invalid("INVALID_PARAMETER_VALUE"):
        lax.list_snapshot_blocks(SnapshotId=snapshot, StartingBlockIndex=-1)
    for first, expected in [(0, 0), (1, 8), (8, 8), (2040, 2040)]:
        page = ebs.list_snapshot_blocks(SnapshotId=snapshot, StartingBlockIndex=first)
        assert page["Blocks"][0]["BlockIndex"] == expected
    for first in [2041, 6143, 6144, 2**31 - 1]:
        page = ebs.list_snapshot_blocks(SnapshotId=snapshot, StartingBlockIndex=first)
        assert page["Blocks"] == [] and "NextToken" not in page
    # A token wins over an index.
    page = ebs.list_snapshot_blocks(SnapshotId=snapshot, MaxResults=100)
    page = ebs.list_snapshot_blocks(
        SnapshotId=snapshot, NextToken=page["NextToken"], StartingBlockIndex=2040
    )
    assert page["Blocks"][0]["BlockIndex"] == 800


def page_tokens_are_for_one_listing():
    ebs = client()
    blocks = {index: block(0) for index in range(101)}
    one = write(ebs, blocks)
    two = write(ebs, {index: block(1) for index in blocks}, ParentSnapshotId=one)
    listing = ebs.list_snapshot_blocks(SnapshotId=one, MaxResults=100)
    changes = ebs.list_changed_blocks(FirstSnapshotId=one, SecondSnapshotId=two, MaxResults=100)
    token, other = listing["NextToken"], changes["NextToken"]
    assert len(token) <= 256 and len(other) <= 256
    changed = token[:-4] + ("AAA=" if token[-4:] != "AAA=" else "BBB=")
    blocktoken = listing["Blocks"][0]["BlockToken"]
    for bad in [changed, other, blocktoken, "AAAA", "%%%", "x" * 256]:
        with invalid("INVALID_PAGE_TOKEN"):
            ebs.list_snapshot_blocks(SnapshotId=one, NextToken=bad)
    with invalid("INVALID_PAGE_TOKEN"):
        ebs.list_snapshot_blocks(SnapshotId=two, NextToken=token)
    for bad in [token, other[:-4] + "AAA="]:
        with invalid("INVALID_PAGE_TOKEN"):
            ebs.list_changed_blocks(FirstSnapshotId=one, SecondSnapshotId=two, NextToken=bad)
    with invalid("INVALID_PAGE_TOKEN"):
        ebs.list_changed_blocks(FirstSnapshotId=two, SecondSnapshotId=one, NextToken=other)
    # As often as one likes.
    for _ in range(2):
        page = ebs.list_snapshot_blocks(SnapshotId=one, NextToken=token)
        assert [listed["BlockIndex"] for listed in page["Blocks"]] == [100]


def changes(ebs, first, second, **more):
    """What differs: for each index, whether the first and the second snapshot have a block."""
    found = {}
    for page in pages(
        ebs.list_changed_blocks, FirstSnapshotId=first, SecondSnapshotId=second, **more
    ):
        assert page["BlockSize"] == BLOCK and "ExpiryTime" in page
        for changed in page["ChangedBlocks"]:
            index = changed["BlockIndex"]
            assert not found or index > max(found)
            found[index] = (changed.get("FirstBlockToken"), changed.get("SecondBlockToken"))
    return found


def differences_of_a_lineage():
    ebs = client()
    a = {index: block(index) for index in range(4)}
    one = write(ebs, a)
    two = write(ebs, {1: block(10), 5: block(50)}, ParentSnapshotId=one)
    three = write(ebs, {2: block(20), 2048: block(60)}, 2, ParentSnapshotId=two)
    b = a | {1: block(10), 5: block(50)}
    c = b | {2: block(20), 2048: block(60)}
    assert ebs.list_changed_blocks(FirstSnapshotId=one, SecondSnapshotId=three)["VolumeSize"] == 2
    for first, before, second, after in [(one, a, two, b), (one, a, three, c), (two, b, three, c)]:
        found = changes(ebs, first, second)
        differ = {index for index in after if before.get(index) != after[index]}
        assert found.keys() == differ, found
        for index, (old, new) in found.items():
            assert get(ebs, second, index, new) == after[index]
            # A block that is new has no token of the first.
            assert (old is None) == (index not in before)
            if old:
                assert get(ebs, first, index, old) == before[index]
        back = changes(ebs, second, first)
        assert back.keys() == differ
        for index, (old, new) in back.items():
            assert get(ebs, second, index, old) == after[index]
            assert (new is None) == (index not in before)
    assert changes(ebs, two, two) == {}
    # Two children of one parent are of its lineage.
    sibling = write(ebs, {0: block(70)}, ParentSnapshotId=one)
    assert changes(ebs, two, sibling).keys() == {0, 1, 5}


def differences_are_paged():
    ebs, lax = client(), client(validate=False)
    one = write(ebs, {})
    two = write(ebs, {index: block(0) for index in range(250)}, ParentSnapshotId=one)
    parameters = {"FirstSnapshotId": one, "SecondSnapshotId": two}
    sizes = [
        len(page["ChangedBlocks"])
        for page in pages(ebs.list_changed_blocks, MaxResults=100, **parameters)
    ]
    # The last page may be empty: only the want of a token ends a listing.
    assert sum(sizes) == 250 and sizes[:3] == [100, 100, 50], sizes
    found = changes(ebs, one, two, MaxResults=100, StartingBlockIndex=120)
    assert list(found) == list(range(120, 250))
    assert all(old is None for old, _ in found.values())
    assert len(lax.list_changed_blocks(MaxResults=5, **parameters)["ChangedBlocks"]) == 100
    for bad in [{"MaxResults": 10001}, {"MaxResults": 0}, {"StartingBlockIndex": -1}]:
        with invalid("INVALID_PARAMETER_VALUE"):
            lax.list_changed_blocks(**parameters, **bad)


def unrelated_snapshots_have_no_differences():
    ebs = client()
    one, two = write(ebs, {0: block(0)}), write(ebs, {0: block(1)})
    with invalid("UNRELATED_SNAPSHOTS"):
        ebs.list_changed_blocks(FirstSnapshotId=one, SecondSnapshotId=two)
    with invalid("INVALID_PARAMETER_VALUE"):
        ebs.list_changed_blocks(SecondSnapshotId=two)
    pending = start(ebs, ParentSnapshotId=one)
    missing = "snap-00000000000000000"
    for first, second in [(one, pending), (pending, one)]:
        with invalid("INVALID_SNAPSHOT_ID"):
            ebs.list_changed_blocks(FirstSnapshotId=first, SecondSnapshotId=second)
    for first, second in [(one, missing), (missing, one)]:
        with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
            ebs.list_changed_blocks(FirstSnapshotId=first, SecondSnapshotId=second)


def a_block_is_read_with_its_token():
    ebs = client()
    blocks = {0: block(0), 1: block(1), 2: bytes(BLOCK)}
    one, two = write(ebs, blocks), write(ebs, blocks)
    found, others = tokens(ebs, one), tokens(ebs, two)
    assert read(ebs, one) == blocks
    page = ebs.list_snapshot_blocks(SnapshotId=one)
    token = found[0]
    for index, bad in [
        (1, token),
        (0, others[0]),
        (0, token[:-4] + ("AAA=" if token[-4:] != "AAA=" else "BBB=")),
        (0, token[:-1]),
        (0, "AAAA"),
        (5, token),
    ]:
        with invalid("INVALID_BLOCK_TOKEN"):
            get(ebs, one, index, bad)
    with invalid("INVALID_BLOCK"):
        get(ebs, one, 2048, token)
    raw("GET", f"/snapshots/{one}/blocks/0").must_be(400, "ValidationException")
    # They outlive another listing.
    assert get(ebs, one, 0, token) == blocks[0]
    assert page["Blocks"][1]["BlockIndex"] == 1
    assert get(ebs, one, 1, page["Blocks"][1]["BlockToken"]) == blocks[1]


def a_token_is_for_one_snapshot_of_an_id():
    ebs, ec2 = client(), client("ec2")
    first = start(ebs, ClientToken="again")
    put(ebs, first, 0, block("first"))
    complete(ebs, first, 1)
    old = tokens(ebs, first)[0]
    page = ebs.list_snapshot_blocks(SnapshotId=write(ebs, {n: block(0) for n in range(150)}), MaxResults=100)
    ec2.delete_snapshot(SnapshotId=first)
    assert start(ebs, ClientToken="again") == first
    put(ebs, first, 0, block("second"))
    complete(ebs, first, 1)
    with invalid("INVALID_BLOCK_TOKEN"):
        get(ebs, first, 0, old)
    assert read(ebs, first) == {0: block("second")}
    with invalid("INVALID_PAGE_TOKEN"):
        ebs.list_snapshot_blocks(SnapshotId=first, NextToken=page["NextToken"])


def what_is_not_there_or_not_complete_is_not_read():
    ebs, lax = client(), client(validate=False)
    pending, missing = start(ebs), "snap-00000000000000000"
    put(ebs, pending, 0, block(0))
    for call in [
        lambda snapshot: ebs.list_snapshot_blocks(SnapshotId=snapshot),
        lambda snapshot: ebs.get_snapshot_block(
            SnapshotId=snapshot, BlockIndex=0, BlockToken="AAAA"
        ),
    ]:
        with invalid("INVALID_SNAPSHOT_ID"):
            call(pending)
        with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
            call(missing)
    with invalid("INVALID_SNAPSHOT_ID"):
        lax.list_snapshot_blocks(SnapshotId="snap-x")
    for method, path in [("GET", "/nothing"), ("DELETE", f"/snapshots/{pending}"), ("PUT", "/snapshots")]:
        raw(method, path).must_be(404, "UnknownOperationException")


if __name__ == "__main__":
    main(globals())
