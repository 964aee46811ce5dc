"""Who may ask: signatures, and what is wrong with them."""

import os

from common import *

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
REGIONS = b"Action=DescribeRegions&Version=2016-11-15"
IDENTITY = b"Action=GetCallerIdentity&Version=2011-06-15"


def wrong_keys_are_refused():
    for more, direct, ec2_code, sts_code in [
        (
            {"aws_secret_access_key": SECRET[:-1] + "!"},
            "InvalidSignatureException",
            "AuthFailure",
            "SignatureDoesNotMatch",
        ),
        (
            {"aws_access_key_id": "AKIAUNKNOWN"},
            "UnrecognizedClientException",
            "AuthFailure",
            "InvalidClientTokenId",
        ),
        (
            {"aws_session_token": "unexpected"},
            "UnrecognizedClientException",
            "AuthFailure",
            "InvalidClientTokenId",
        ),
    ]:
        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET} | more
        with fails(direct, 403):
            start(client(**keys))
        with fails(ec2_code, 401):
            client("ec2", **keys).describe_snapshots()
        with fails(sts_code, 403):
            client("sts", **keys).get_caller_identity()


def a_request_without_a_signature_is_refused():
    data = block(0)
    for method, path, body in [
        ("POST", "/snapshots", b'{"VolumeSize":1}'),
        ("PUT", "/snapshots/snap-0a/blocks/0", data),
        ("GET", "/snapshots/snap-0a/blocks", b""),
        ("GET", "/nothing", b""),
    ]:
        answer = send(method, path, put_headers(data), body)
        answer.must_be(403, "MissingAuthenticationTokenException")
    send("POST", "/", FORM, REGIONS).must_be(401, "AuthFailure")
    for bad in [
        "",
        "Bearer x",
        "AWS4-HMAC-SHA256",
        "AWS4-HMAC-SHA256 Credential=x",
        f"AWS4-HMAC-SHA256 Credential={KEY}/20200101/us-east-1/ebs/aws4_request",
        f"AWS4-HMAC-SHA256 Credential={KEY}/20200101/us-east-1/ebs/aws4_request, Signature=0",
        "AWS4-HMAC-SHA256 " + "a=b," * 2000,
    ]:
        answer = send("GET", "/snapshots/snap-0a/blocks", {"Authorization": bad})
        answer.must_be(403, "IncompleteSignatureException")
    # A signature in the address, as in a link, is none.
    path = f"/snapshots/snap-0a/blocks?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={KEY}"
    send("GET", path, {}).must_be(403, "MissingAuthenticationTokenException")


def a_clock_may_be_five_minutes_off():
    start_one = ("POST", "/snapshots", {}, b'{"VolumeSize":1}')
    for minutes in [-10, 10, 60 * 24, -60 * 24]:
        raw(*start_one, minutes=minutes).must_be(403, "InvalidSignatureException")
        raw("POST", "/", FORM, REGIONS, service="ec2", minutes=minutes).must_be(401, "AuthFailure")
    for minutes in [-4, 0, 4]:
        raw(*start_one, minutes=minutes).must_be(201)
    # The date is signed.
    headers = signed(*start_one, minutes=-10)
    headers["X-Amz-Date"] = signed(*start_one)["X-Amz-Date"]
    send("POST", "/snapshots", headers, start_one[3]).must_be(403, "InvalidSignatureException")


def a_signature_is_for_one_request():
    path, body = "/snapshots", b'{"VolumeSize":1}'
    for service in ["ec2", "s3", "sts", ""]:
        answer = raw("POST", path, {}, body, service=service)
        answer.must_be(403, "InvalidSignatureException")
    raw("POST", "/", FORM, REGIONS, service="ebs").must_be(401, "AuthFailure")
    # EC2 and STS share an address, and their signatures.
    raw("POST", "/", FORM, IDENTITY, service="ec2").must_be(200)
    raw("POST", path, {}, body, over=b'{"VolumeSize":2}').must_be(403, "InvalidSignatureException")
    headers = signed("POST", path, {}, body)
    send("POST", path, headers, body).must_be(201)
    for method, other, changed in [
        ("POST", path, b'{"VolumeSize":3}'),
        ("PUT", path, body),
        ("POST", path + "/", body),
        ("POST", path + "?x=y", body),
    ]:
        send(method, other, headers, changed).must_be(403, "InvalidSignatureException")
    headers["Authorization"] = headers["Authorization"].replace("us-east-1", "eu-west-1")
    send("POST", path, headers, body).must_be(403, "InvalidSignatureException")
    # Any region will do, as long as it is the one that was signed for.
    raw("POST", path, {}, body, region="eu-west-1").must_be(201)
    headers = signed("POST", path, {}, body) | {"Host": "localhost"}
    send("POST", path, headers, body).must_be(403, "InvalidSignatureException")


def what_decides_has_to_be_signed():
    ebs = client()
    snapshot, data = start(ebs), block(0)
    path = f"/snapshots/{snapshot}/blocks/0"
    for name in put_headers(data):
        answer = raw("PUT", path, put_headers(data), data, leave_out=[name.lower()])
        answer.must_be(403, "InvalidSignatureException")
    answer = raw("PUT", path, put_headers(data), data, leave_out=["host"])
    answer.must_be(403, "InvalidSignatureException")
    # What is added on the way changes what the request does.
    headers = signed("POST", f"/snapshots/completion/{snapshot}", {"x-amz-ChangedBlocksCount": "0"})
    headers["x-amz-Checksum"] = checksum(b"")
    answer = send("POST", f"/snapshots/completion/{snapshot}", headers)
    answer.must_be(403, "InvalidSignatureException")
    # Others may be added, and be signed.
    odd = put_headers(data) | {"X-Odd": "  two   spaces  ", "X-Empty": ""}
    raw("PUT", path, odd, data).must_be(201)
    headers = signed("PUT", path, put_headers(data), data) | {"Via": "1.1 proxy"}
    send("PUT", path, headers, data).must_be(201)


def only_a_block_may_be_unsigned():
    ebs = client()
    snapshot, data = start(ebs), block(0)
    path = f"/snapshots/{snapshot}/blocks/0"
    raw("PUT", path, put_headers(data), data, unsigned=True).must_be(201)
    for name in ["x-amz-checksum", "x-amz-content-sha256"]:
        answer = raw("PUT", path, put_headers(data), data, unsigned=True, leave_out=[name])
        answer.must_be(403, "InvalidSignatureException")
    # The checksum answers for the data.
    headers = signed("PUT", path, put_headers(data), data, unsigned=True)
    send("PUT", path, headers, block(1)).must_be(400, "ValidationException")
    headers["x-amz-Checksum"] = checksum(block(1))
    send("PUT", path, headers, block(1)).must_be(403, "InvalidSignatureException")
    body = b'{"VolumeSize":1}'
    answer = raw("POST", "/snapshots", {}, body, unsigned=True)
    answer.must_be(403, "InvalidSignatureException")
    answer = raw("POST", "/", FORM, REGIONS, service="ec2", unsigned=True)
    answer.must_be(401, "AuthFailure")
    answer = raw("GET", f"/snapshots/{snapshot}/blocks", unsigned=True)
    answer.must_be(403, "InvalidSignatureException")
    complete(ebs, snapshot, 1)
    assert read(ebs, snapshot) == {0: data}


def it_is(key):
    """The environment names this key, and it is good for all APIs."""
    assert KEY == key, KEY
    assert client("sts").get_caller_identity()["Account"] == os.environ.get("ACCOUNT", "000000000000")
    ebs = client()
    assert read(ebs, write(ebs, {3: block(3)})) == {3: block(3)}


def both_profiles_are_good(first, second):
    for key in [first, second]:
        start(client(aws_access_key_id=key, aws_secret_access_key=f"secret of {key}"))
    with fails("InvalidSignatureException", 403):
        start(client(aws_access_key_id=first, aws_secret_access_key=f"secret of {second}"))
    # A token that was given to one is good for the other: they ask the same server.
    one = client()
    snapshot = write(one, {0: block(0)})
    two = client(aws_access_key_id=second, aws_secret_access_key=f"secret of {second}")
    assert get(two, snapshot, 0, tokens(one, snapshot)[0]) == block(0)


def with_a_session(token):
    start(client())
    for wrong in [None, "", "other", token + "x"]:
        answer = raw("POST", "/snapshots", {}, b'{"VolumeSize":1}', session=wrong)
        answer.must_be(403, "UnrecognizedClientException")
    raw("POST", "/snapshots", {}, b'{"VolumeSize":1}', session=token).must_be(201)


def everybody_on_this_machine():
    ebs = client()
    snapshot = write(ebs, {0: block(0)})
    assert read(ebs, snapshot) == {0: block(0)}
    other = client(aws_access_key_id="any", aws_secret_access_key="thing")
    assert tokens(other, snapshot).keys() == {0}
    address = urllib.parse.urlsplit(URL).netloc
    port = address.rpartition(":")[2]
    for host in [address, f"localhost:{port}", f"[::1]:{port}"]:
        send("POST", "/?Action=DescribeRegions", {"Host": host}).must_be(200)
    # An image in a page is fetched like this.
    send("GET", "/?Action=DescribeRegions", {"Host": address}).must_be(403, "UnauthorizedOperation")
    for headers in [
        {"Host": "evil.example"},
        {"Host": f"evil.example:{port}"},
        {"Host": f"localhost.evil.example:{port}"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://evil.example"},
        {"Origin": f"http://{address}"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ]:
        answer = send("POST", "/snapshots", headers, b'{"VolumeSize":1}')
        answer.must_be(403, "AccessDeniedException")
        answer = send("POST", "/", FORM | headers, REGIONS)
        answer.must_be(403, "UnauthorizedOperation")


if __name__ == "__main__":
    main(globals())
