"""The actions of EC2 and STS, and what they refuse."""

import datetime

from common import *

MISSING = "snap-00000000000000000"


def described(ec2, **parameters):
    return ec2.describe_snapshots(**parameters)["Snapshots"]


def ids(ec2, **parameters):
    return {snapshot["SnapshotId"] for snapshot in described(ec2, **parameters)}


def tag_list(**tags):
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def tags_of(ec2, snapshot):
    (shown,) = described(ec2, SnapshotIds=[snapshot])
    return {tag["Key"]: tag["Value"] for tag in shown.get("Tags", [])}


def snapshots_are_described():
    ebs, ec2 = client(), client("ec2")
    assert described(ec2) == []
    parent = write(ebs, {0: block(0), 9: block(1)}, Description="é < & >")
    child = write(ebs, {0: block(2)}, 7, ParentSnapshotId=parent, Tags=tag_list(Name="child"))
    pending = start(ebs)
    now = datetime.datetime.now(datetime.timezone.utc)
    shown = {snapshot["SnapshotId"]: snapshot for snapshot in described(ec2)}
    assert shown.keys() == {parent, child, pending}
    first = shown[parent]
    for when in [first.pop("StartTime"), first.pop("CompletionTime")]:
        assert abs(now - when) < datetime.timedelta(seconds=20)
    assert first.pop("FullSnapshotSizeInBytes", 2 * BLOCK) == 2 * BLOCK
    assert first == {
        "SnapshotId": parent,
        "VolumeId": "vol-ffffffff",
        "VolumeSize": 1,
        "State": "completed",
        "Progress": "100%",
        "OwnerId": "000000000000",
        "Description": "é < & >",
        "Encrypted": False,
        "StorageTier": "standard",
    }
    assert shown[child]["Tags"] == tag_list(Name="child") and shown[child]["VolumeSize"] == 7
    assert shown[pending]["State"] == "pending" and "CompletionTime" not in shown[pending]
    assert shown[pending]["Progress"] == "0%"
    assert ids(ec2, SnapshotIds=[child, pending]) == {child, pending}
    with fails("InvalidSnapshot.NotFound"):
        described(ec2, SnapshotIds=[parent, MISSING])
    for bad in ["snap-xyz", "vol-1", "snap"]:
        with fails("InvalidSnapshotID.Malformed"):
            described(ec2, SnapshotIds=[bad])
    for owners in [["self"], ["000000000000"], ["amazon", "self"]]:
        assert len(ids(ec2, OwnerIds=owners)) == 3
    for owners in [["amazon"], ["111111111111"]]:
        assert not ids(ec2, OwnerIds=owners) and not ids(ec2, OwnerIds=owners, SnapshotIds=[child])
    for restorable, count in [("self", 3), ("all", 3), ("111111111111", 0)]:
        assert len(ids(ec2, RestorableByUserIds=[restorable])) == count
    with fails("DryRunOperation", 412):
        described(ec2, DryRun=True)


def snapshots_are_filtered():
    ebs, ec2 = client(), client("ec2")
    web = write(ebs, {}, 2, Description="daily 1", Tags=tag_list(Name="web-1", Env="prod"))
    star = write(ebs, {}, 1, Description="50*%", Tags=tag_list(Name="web*2", Empty=""))
    back = start(ebs, 1, Description="a\\b?", Tags=tag_list(Name="db", Env="test"))
    times = {snapshot["SnapshotId"]: snapshot["StartTime"] for snapshot in described(ec2)}
    started = times[web].strftime("%Y-%m-%dT%H:%M:%S.") + f"{times[web].microsecond // 1000:03}Z"
    for name, values, expected in [
        ("snapshot-id", [web], {web}),
        ("snapshot-id", [web, back, MISSING], {web, back}),
        ("snapshot-id", ["snap-*"], {web, star, back}),
        ("description", ["daily 1"], {web}),
        ("description", ["daily"], set()),
        ("description", ["Daily 1"], set()),
        ("description", ["daily ?"], {web}),
        ("description", [r"50\*%"], {star}),
        ("description", [r"5?\*?"], {star}),
        ("description", [r"a\\b\?"], {back}),
        ("description", [r"a\\b\x"], set()),
        ("status", ["pending"], {back}),
        ("status", ["completed"], {web, star}),
        ("status", ["pending", "completed"], {web, star, back}),
        ("status", ["error"], set()),
        ("progress", ["100%"], {web, star}),
        ("volume-size", ["2"], {web}),
        ("volume-size", ["1", "3"], {star, back}),
        ("volume-id", ["vol-ffffffff"], {web, star, back}),
        ("volume-id", ["vol-0"], set()),
        ("encrypted", ["false"], {web, star, back}),
        ("encrypted", ["true"], set()),
        ("owner-id", ["000000000000"], {web, star, back}),
        ("owner-id", ["111111111111"], set()),
        ("owner-alias", ["amazon"], set()),
        ("storage-tier", ["standard"], {web, star, back}),
        ("storage-tier", ["archive"], set()),
        ("transfer-type", ["standard"], {web, star, back}),
        ("transfer-type", ["time-based"], set()),
        ("start-time", [started], {web}),
        ("start-time", ["20*"], {web, star, back}),
        ("completion-time", ["20*"], {web, star}),
        ("tag-key", ["Env"], {web, back}),
        ("tag-key", ["E*"], {web, star, back}),
        ("tag:Name", ["web-1"], {web}),
        ("tag:Name", ["web*"], {web, star}),
        ("tag:Name", [r"web\**"], {star}),
        ("tag:Name", ["*"], {web, star, back}),
        ("tag:Empty", [""], {star}),
        ("tag:None", ["*"], set()),
    ]:
        found = ids(ec2, Filters=[{"Name": name, "Values": values}])
        # What starts within one millisecond cannot be told apart.
        if (name, values) == ("start-time", [started]):
            assert web in found
        else:
            assert found == expected, (name, values, found)
    both = [
        {"Name": "tag:Name", "Values": ["web*"]},
        {"Name": "tag:Env", "Values": ["prod", "test"]},
    ]
    assert ids(ec2, Filters=both) == {web}
    assert ids(ec2, Filters=both, SnapshotIds=[star, back]) == set()
    with fails("InvalidParameterValue"):
        described(ec2, Filters=[{"Name": "nonsense", "Values": ["x"]}])


def snapshots_are_paged():
    ebs, ec2 = client(), client("ec2")
    snapshots = {start(ebs, Tags=tag_list(n=str(n))) for n in range(12)}
    found = ec2.get_paginator("describe_snapshots").paginate(PaginationConfig={"PageSize": 5})
    sizes, seen = [], []
    for page in found:
        sizes.append(len(page["Snapshots"]))
        seen += [snapshot["SnapshotId"] for snapshot in page["Snapshots"]]
    assert sizes == [5, 5, 2] and len(seen) == 12 and set(seen) == snapshots, (sizes, seen)
    odd = [{"Name": "tag:n", "Values": ["1", "3", "5", "7", "9", "11"]}]
    found = ec2.get_paginator("describe_snapshots").paginate(
        Filters=odd, PaginationConfig={"PageSize": 5}
    )
    assert [len(page["Snapshots"]) for page in found] == [5, 1]
    with fails("InvalidParameterCombination"):
        described(ec2, SnapshotIds=sorted(snapshots)[:6], MaxResults=5)
    for bad in [4, 1001]:
        with fails("InvalidParameterValue"):
            described(ec2, MaxResults=bad)
    assert len(described(ec2, MaxResults=1000)) == 12
    token = ec2.describe_snapshots(MaxResults=5)["NextToken"]
    for bad in ["AAAA", token[:-4] + "AAA=", "%"]:
        with fails("InvalidParameterValue"):
            described(ec2, MaxResults=5, NextToken=bad)


def tags_are_made_and_taken_away():
    ebs, ec2 = client(), client("ec2")
    one, two = write(ebs, {}, Tags=tag_list(old="1")), start(ebs)
    ec2.create_tags(Resources=[one, two], Tags=tag_list(Name="<a&b>", old="2", empty=""))
    for snapshot in [one, two]:
        assert tags_of(ec2, snapshot) == {"Name": "<a&b>", "old": "2", "empty": ""}
    # With a value only if it is that one, without one whatever it is.
    ec2.delete_tags(Resources=[one], Tags=tag_list(old="1", empty="", none="x"))
    assert tags_of(ec2, one) == {"Name": "<a&b>", "old": "2"}
    ec2.delete_tags(Resources=[one], Tags=[{"Key": "old"}])
    assert tags_of(ec2, one) == {"Name": "<a&b>"}
    ec2.delete_tags(Resources=[one, two])
    assert tags_of(ec2, one) == tags_of(ec2, two) == {}
    for call in [ec2.create_tags, ec2.delete_tags]:
        with fails("DryRunOperation", 412):
            call(Resources=[one], Tags=tag_list(a="b"), DryRun=True)
        with fails("InvalidSnapshot.NotFound"):
            call(Resources=[one, MISSING], Tags=tag_list(a="b"))
        with fails("InvalidSnapshotID.Malformed"):
            call(Resources=["snap-xyz"], Tags=tag_list(a="b"))
        with fails("InvalidID"):
            call(Resources=["vol-0123456789abcdef0"], Tags=tag_list(a="b"))
        with fails("InvalidParameterValue"):
            call(Resources=[one], Tags=[{"Key": "aws:k", "Value": "v"}])
    # Nothing of it was done by halves.
    assert tags_of(ec2, one) == {}
    lax = client("ec2", validate=False)
    for more in [{}, {"Resources": [one]}, {"Tags": tag_list(a="b")}]:
        with fails("MissingParameter"):
            lax.create_tags(**more)
    # What the child inherits is the volume, not the tags.
    ec2.create_tags(Resources=[one], Tags=tag_list(a="b"))
    assert tags_of(ec2, start(ebs, ParentSnapshotId=one)) == {}


def tags_are_described():
    ebs, ec2 = client(), client("ec2")
    one = start(ebs, Tags=tag_list(Name="one", Env="prod"))
    many = start(ebs, Tags=tag_list(**{f"k{n:02}": f"v{n}" for n in range(20)}))
    start(ebs)

    def found(**parameters):
        return [
            (tag["ResourceId"], tag["Key"], tag["Value"])
            for tag in ec2.describe_tags(**parameters)["Tags"]
        ]

    everything = found()
    assert len(everything) == 22 and (one, "Name", "one") in everything
    assert all(tag["ResourceType"] == "snapshot" for tag in ec2.describe_tags()["Tags"])
    for name, values, expected in [
        ("resource-id", [one], {"Name", "Env"}),
        ("resource-type", ["volume"], set()),
        ("resource-type", ["snapshot", "volume"], {key for _, key, _ in everything}),
        ("key", ["k0?"], {f"k0{n}" for n in range(10)}),
        ("key", ["Name", "k11"], {"Name", "k11"}),
        ("value", ["prod"], {"Env"}),
        ("value", ["v1*"], {"k01"} | {f"k{n}" for n in range(10, 20)}),
        ("tag:Env", ["prod"], {"Env"}),
    ]:
        shown = {key for _, key, _ in found(Filters=[{"Name": name, "Values": values}])}
        assert shown == expected, (name, values, shown)
    with fails("InvalidParameterValue"):
        found(Filters=[{"Name": "nonsense", "Values": ["x"]}])
    pager = ec2.get_paginator("describe_tags").paginate
    for filters in [[], [{"Name": "resource-id", "Values": [many]}]]:
        shown = [page["Tags"] for page in pager(Filters=filters, PaginationConfig={"PageSize": 6})]
        every = [(t["ResourceId"], t["Key"], t["Value"]) for page in shown for t in page]
        assert every == found(Filters=filters) and all(len(page) <= 6 for page in shown)
        assert len(shown) == 4
    with fails("InvalidParameterValue"):
        ec2.describe_tags(NextToken="AAAA")


def there_are_fifty_tags_at_most():
    ebs, ec2 = client(), client("ec2")
    snapshot = start(ebs)
    ec2.create_tags(Resources=[snapshot], Tags=tag_list(**{f"k{n}": "v" for n in range(49)}))
    with fails("TagLimitExceeded"):
        ec2.create_tags(Resources=[snapshot], Tags=tag_list(x="", y=""))
    ec2.create_tags(Resources=[snapshot], Tags=tag_list(k0="w", x=""))
    with fails("TagLimitExceeded"):
        ec2.create_tags(Resources=[snapshot], Tags=tag_list(y=""))
    assert len(tags_of(ec2, snapshot)) == 50 and tags_of(ec2, snapshot)["k0"] == "w"
    for bad in [{"Key": "k" * 129, "Value": ""}, {"Key": "k", "Value": "v" * 257}, {"Key": ""}]:
        with fails("InvalidParameterValue"):
            ec2.create_tags(Resources=[start(ebs)], Tags=[bad])


def snapshots_are_deleted():
    ebs, ec2 = client(), client("ec2")
    blocks = {0: block(0), 5: block(5)}
    parent = write(ebs, blocks)
    child = write(ebs, {1: block(1)}, ParentSnapshotId=parent)
    token = tokens(ebs, parent)[0]
    pending = start(ebs)
    put(ebs, pending, 0, block(0))
    with fails("DryRunOperation", 412):
        ec2.delete_snapshot(SnapshotId=parent, DryRun=True)
    assert len(ids(ec2)) == 3
    ec2.delete_snapshot(SnapshotId=pending)
    for call in [
        lambda: put(ebs, pending, 1, block(0)),
        lambda: complete(ebs, pending, 1),
    ]:
        with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
            call()
    ec2.delete_snapshot(SnapshotId=parent)
    assert ids(ec2) == {child}
    with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
        get(ebs, parent, 0, token)
    with fails("ResourceNotFoundException", 404, "SNAPSHOT_NOT_FOUND"):
        tokens(ebs, parent)
    # What the child shows of the parent stays.
    assert read(ebs, child) == blocks | {1: block(1)}
    # As does the lineage, without those between.
    between = write(ebs, {2: block(2)}, ParentSnapshotId=child)
    last = write(ebs, {5: block(6)}, ParentSnapshotId=between)
    ec2.delete_snapshot(SnapshotId=between)
    page = ebs.list_changed_blocks(FirstSnapshotId=child, SecondSnapshotId=last)
    assert [changed["BlockIndex"] for changed in page["ChangedBlocks"]] == [2, 5]
    ec2.delete_snapshot(SnapshotId=last)
    for gone in [parent, pending, MISSING]:
        for dry in [False, True]:
            with fails("InvalidSnapshot.NotFound"):
                ec2.delete_snapshot(SnapshotId=gone, DryRun=dry)
    with fails("InvalidSnapshotID.Malformed"):
        ec2.delete_snapshot(SnapshotId="snap-xyz")


def where_and_who_one_is():
    ec2, sts = client("ec2"), client("sts")
    (region,) = ec2.describe_regions()["Regions"]
    assert region["RegionName"] == REGION and REGION in region["Endpoint"]
    assert ec2.describe_regions(RegionNames=[REGION])["Regions"] == [region]
    with fails("InvalidParameterValue"):
        ec2.describe_regions(RegionNames=["eu-north-1"])
    none = [{"Name": "region-name", "Values": ["eu-*"]}]
    assert ec2.describe_regions(Filters=none)["Regions"] == []
    identity = sts.get_caller_identity()
    assert identity["Account"] == "000000000000" and identity["UserId"]
    assert identity["Arn"].startswith("arn:aws:iam::000000000000:")
    assert len(identity["ResponseMetadata"]["RequestId"]) == 36


def what_is_no_action_is_refused():
    ec2, sts = client("ec2"), client("sts")
    with fails("InvalidAction"):
        ec2.describe_volumes()
    with fails("InvalidAction"):
        sts.get_session_token()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for service in ["ec2", "sts"]:
        raw("POST", "/", form, b"Version=1", service=service).must_be(400, "MissingAction")
        raw("GET", "/?Action=", service=service).must_be(400, "MissingAction")
    # A query in the address is as good.
    raw("GET", "/?Action=DescribeRegions", service="ec2").must_be(200)
    huge = b"Action=DescribeSnapshots&" + b"x" * (256 << 10)
    raw("POST", "/", form, huge, service="ec2").must_be(413, "RequestEntityTooLarge")
    many = b"Action=DescribeSnapshots" + b"".join(b"&SnapshotId.%d=a" % n for n in range(2000))
    raw("POST", "/", form, many, service="ec2").must_be(400, "InvalidParameterValue")


def any_text_is_described():
    ebs, ec2 = client(), client("ec2")
    for text, shown_as in [
        ("  x  ", None),
        (" ", None),
        ("a\tb\nc\rd\r\n", None),
        ("]]><!--&#1;&amp;\x7f😀", None),
        # XML has no way to say these.
        ("\x01a\x0b\x1f\ufffe", "\ufffda\ufffd\ufffd\ufffd"),
    ]:
        snapshot = start(ebs, Description=text, Tags=tag_list(k=text))
        ec2.create_tags(Resources=[snapshot], Tags=tag_list(j=text))
        (shown,) = described(ec2, SnapshotIds=[snapshot])
        shown_as = shown_as or text
        assert shown["Description"] == shown_as, shown
        assert tags_of(ec2, snapshot) == {"k": shown_as, "j": shown_as}
        ours = [{"Name": "resource-id", "Values": [snapshot]}]
        assert {tag["Value"] for tag in ec2.describe_tags(Filters=ours)["Tags"]} == {shown_as}
    assert len(described(ec2)) == 5


if __name__ == "__main__":
    main(globals())
