"""What goes wrong on purpose, as a client sees it."""

import time

import botocore.exceptions

from common import *


def errors_have_their_names():
    ebs, ec2, sts = client(), client("ec2"), client("sts")
    some = "snap-0123456789abcdef0"
    with fails("RequestThrottledException", 400, "ACCOUNT_THROTTLED"):
        start(ebs)
    with fails("InternalServerException", 500):
        put(ebs, some, 0, block(0))
    with fails("ServiceQuotaExceededException", 402, "DEPENDENCY_SERVICE_QUOTA_EXCEEDED"):
        complete(ebs, some, 0)
    try:
        ebs.list_snapshot_blocks(SnapshotId=some)
    except ebs.exceptions.ValidationException as error:
        assert "Failed to read block data" in error.response["Error"]["Message"]
    with fails("AccessDeniedException", 403, "DEPENDENCY_ACCESS_DENIED"):
        get(ebs, some, 0, "AAAA")
    with fails("ServiceUnavailable", 503):
        ebs.list_changed_blocks(FirstSnapshotId=some, SecondSnapshotId=some)
    with fails("RequestLimitExceeded", 503):
        ec2.describe_snapshots()
    with fails("Throttling", 400):
        sts.get_caller_identity()


def answers_are_damaged():
    ebs = client()
    snapshot = write(ebs, {0: block(0)})
    answer = ebs.get_snapshot_block(
        SnapshotId=snapshot, BlockIndex=0, BlockToken=tokens(ebs, snapshot)[0]
    )
    data = answer["BlockData"].read()
    # The checksum is that of what was put, and tells.
    assert answer["Checksum"] == checksum(block(0)) != checksum(data)
    assert len(data) == BLOCK
    differing = [at for at, (is_, was) in enumerate(zip(data, block(0))) if is_ != was]
    assert len(differing) == 1, differing


def answers_are_cut_short():
    ebs = client()
    snapshot = write(ebs, {0: block(0)})
    answer = ebs.get_snapshot_block(
        SnapshotId=snapshot, BlockIndex=0, BlockToken=tokens(ebs, snapshot)[0]
    )
    try:
        answer["BlockData"].read()
    except (
        botocore.exceptions.IncompleteReadError,
        botocore.exceptions.ResponseStreamingError,
    ):
        pass
    else:
        raise AssertionError("half of a block was taken for a whole one")
    # The server goes on.
    assert tokens(ebs, snapshot).keys() == {0}


def connections_are_cut():
    ebs = client()
    snapshot = write(ebs, {0: block(0)})
    token = tokens(ebs, snapshot)[0]
    for attempts in [1, 2]:
        try:
            get(client(attempts=attempts), snapshot, 0, token)
        except botocore.exceptions.ConnectionClosedError:
            pass
        else:
            raise AssertionError("there was an answer")
    assert tokens(ebs, snapshot).keys() == {0}


def pages_are_empty():
    ebs = client()
    parent = write(ebs, {})
    snapshot = write(ebs, {index: block(0) for index in range(450)}, ParentSnapshotId=parent)
    listed = list(pages(ebs.list_snapshot_blocks, SnapshotId=snapshot, MaxResults=100))
    indexes = [found["BlockIndex"] for page in listed for found in page["Blocks"]]
    assert indexes == list(range(450))
    assert any(not page["Blocks"] and "NextToken" in page for page in listed)
    both = {"FirstSnapshotId": parent, "SecondSnapshotId": snapshot}
    listed = list(pages(ebs.list_changed_blocks, MaxResults=100, **both))
    indexes = [found["BlockIndex"] for page in listed for found in page["ChangedBlocks"]]
    assert indexes == list(range(450))
    assert any(not page["ChangedBlocks"] and "NextToken" in page for page in listed[:-1])


def a_snapshot_is_not_known_at_once():
    ebs = client()
    started = time.monotonic()
    snapshot = start(ebs)
    with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
        put(ebs, snapshot, 0, block(0))
    with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
        complete(ebs, snapshot, 0)
    time.sleep(max(0, started + 2.2 - time.monotonic()))
    put(ebs, snapshot, 0, block(0))
    complete(ebs, snapshot, 1)


def tokens_end_early():
    ebs = client()
    snapshot = write(ebs, {index: block(0) for index in range(101)})
    page = ebs.list_snapshot_blocks(SnapshotId=snapshot, MaxResults=100)
    token = page["Blocks"][0]["BlockToken"]
    left = page["ExpiryTime"].timestamp() - time.time()
    assert left < 2.1, left
    get(ebs, snapshot, 0, token)
    time.sleep(2.3)
    with invalid("INVALID_BLOCK_TOKEN"):
        get(ebs, snapshot, 0, token)
    with invalid("INVALID_PAGE_TOKEN"):
        ebs.list_snapshot_blocks(SnapshotId=snapshot, NextToken=page["NextToken"])
    # As documented: list anew, and go on.
    page = ebs.list_snapshot_blocks(SnapshotId=snapshot, StartingBlockIndex=100)
    assert get(ebs, snapshot, 100, page["Blocks"][0]["BlockToken"]) == block(0)


def a_rate_is_kept():
    ebs = client()
    snapshot = write(ebs, {index: block(0) for index in range(8)})
    token = tokens(ebs, snapshot)[0]
    outcomes = []
    for _ in range(12):
        try:
            get(ebs, snapshot, 0, token)
            outcomes.append("good")
        except ClientError as error:
            assert error.response["Error"]["Code"] == "RequestThrottledException"
            outcomes.append(error.response["Reason"])
    assert outcomes[:5] == ["good"] * 5 and "ACCOUNT_THROTTLED" in outcomes, outcomes
    # Each snapshot has a rate of its own.
    one, two = start(ebs), start(ebs)
    for snapshot in [one, two]:
        for index in range(10):
            put(ebs, snapshot, index, block(0))
        with fails("RequestThrottledException", 400, "RESOURCE_LEVEL_THROTTLE"):
            put(ebs, snapshot, 10, block(0))
            put(ebs, snapshot, 11, block(0))


def retries_bring_the_right_bytes():
    ebs = client(attempts=15)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        blocks = {index: block(index) for index in range(30)}
        snapshot = start(ebs)
        list(pool.map(lambda index: put(ebs, snapshot, index, blocks[index]), blocks))
        three = {"ChecksumAlgorithm": "SHA256", "ChecksumAggregationMethod": "LINEAR"}
        complete(ebs, snapshot, 30, Checksum=linear(blocks), **three)
        listed = tokens(ebs, snapshot)
        found = list(pool.map(lambda index: get(ebs, snapshot, index, listed[index]), listed))
    assert dict(zip(listed, found)) == blocks
    # It was not for want of faults.
    tried = client(attempts=1)
    refused = 0
    for index in range(30):
        try:
            get(tried, snapshot, index, listed[index])
        except (ClientError, botocore.exceptions.BotoCoreError):
            refused += 1
    assert 3 <= refused <= 20, refused


def what_happens():
    """Prints how each of many requests ended."""
    ebs = client()
    snapshot = write(ebs, {index: block(index) for index in range(40)})
    listed = tokens(ebs, snapshot)
    outcomes = {}

    def ask(index):
        try:
            answer = ebs.get_snapshot_block(
                SnapshotId=snapshot, BlockIndex=index, BlockToken=listed[index]
            )
            good = checksum(answer["BlockData"].read()) == answer["Checksum"]
            outcomes[index] = "good" if good else "wrong"
        except ClientError as error:
            outcomes[index] = error.response["Error"]["Code"]

    # In which order they come makes no difference.
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, listed))
    print(*(outcomes[index] for index in sorted(outcomes)), sep="\n")


if __name__ == "__main__":
    main(globals())
