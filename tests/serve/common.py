"""What the scripts share: clients of the server under test, blocks, and errors that have to come."""

import base64
import concurrent.futures
import contextlib
import datetime
import hashlib
import http.client
import os
import sys
import urllib.parse
from unittest import mock

import boto3
import botocore.auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

BLOCK = 512 * 1024
URL = os.environ["AWS_ENDPOINT_URL_EBS"]
KEY = os.environ["AWS_ACCESS_KEY_ID"]
SECRET = os.environ["AWS_SECRET_ACCESS_KEY"]
REGION = os.environ["AWS_REGION"]


def main(functions):
    """Calls the function that the command line names, with the arguments behind it."""
    functions[sys.argv[1]](*sys.argv[2:])


def client(service="ebs", attempts=1, validate=True, url=None, **more):
    """A client that asks once, unless told otherwise, and waits for no answer for ever."""
    config = Config(
        retries={"total_max_attempts": attempts, "mode": "standard"},
        connect_timeout=10,
        read_timeout=30,
        max_pool_connections=16,
        parameter_validation=validate,
    )
    if url:
        more["endpoint_url"] = url
    return boto3.client(service, config=config, **more)


def block(number):
    """A block that no other number has."""
    return hashlib.sha256(str(number).encode()).digest() * (BLOCK // 32)


def checksum(data):
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def linear(blocks):
    """The checksum of a whole snapshot: that of the checksums of its blocks, in their order."""
    digests = (hashlib.sha256(blocks[index]).digest() for index in sorted(blocks))
    return checksum(b"".join(digests))


def start(ebs, gib=1, **more):
    return ebs.start_snapshot(VolumeSize=gib, **more)["SnapshotId"]


def put(ebs, snapshot, index, data, **more):
    """Puts a block; whatever is given besides wins over what is right."""
    parameters = {
        "SnapshotId": snapshot,
        "BlockIndex": index,
        "BlockData": data,
        "DataLength": BLOCK,
        "Checksum": checksum(data),
        "ChecksumAlgorithm": "SHA256",
    }
    return ebs.put_snapshot_block(**parameters | more)


def complete(ebs, snapshot, count, **more):
    return ebs.complete_snapshot(SnapshotId=snapshot, ChangedBlocksCount=count, **more)


def write(ebs, blocks, gib=1, **more):
    """A completed snapshot with these blocks."""
    snapshot = start(ebs, gib, **more)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: put(ebs, snapshot, index, blocks[index]), blocks))
    complete(ebs, snapshot, len(blocks))
    return snapshot


def pages(ask, **parameters):
    """All pages of a listing: only the want of a token ends it."""
    while True:
        page = ask(**parameters)
        yield page
        if "NextToken" not in page:
            return
        parameters["NextToken"] = page["NextToken"]


def tokens(ebs, snapshot, **more):
    """The token of each block, by index; ascending, and none twice."""
    listed = [
        (listed["BlockIndex"], listed["BlockToken"])
        for page in pages(ebs.list_snapshot_blocks, SnapshotId=snapshot, **more)
        for listed in page["Blocks"]
    ]
    indexes = [index for index, _ in listed]
    assert indexes == sorted(set(indexes)), indexes
    return dict(listed)


def get(ebs, snapshot, index, token):
    """Reads a block, and checks what its headers say of it."""
    answer = ebs.get_snapshot_block(SnapshotId=snapshot, BlockIndex=index, BlockToken=token)
    data = answer["BlockData"].read()
    assert len(data) == answer["DataLength"] == BLOCK
    assert answer["Checksum"] == checksum(data)
    assert answer["ChecksumAlgorithm"] == "SHA256"
    return data


def read(ebs, snapshot):
    """All blocks of a snapshot."""
    return {index: get(ebs, snapshot, index, token) for index, token in tokens(ebs, snapshot).items()}


@contextlib.contextmanager
def fails(code, status=400, reason=None):
    """What is done in here must be refused like this."""
    try:
        yield
    except ClientError as error:
        said = error.response
        assert said["Error"]["Code"] == code, said
        assert said["Error"]["Message"], said
        assert said["ResponseMetadata"]["HTTPStatusCode"] == status, said
        assert said.get("Reason") == reason, said
        assert len(said["ResponseMetadata"]["RequestId"]) == 36, said
    else:
        raise AssertionError(f"it succeeded, and should have been refused with {code}")


def invalid(reason):
    return fails("ValidationException", 400, reason)


class Signer(botocore.auth.SigV4Auth):
    """Signs as botocore does, but for what a test wants otherwise."""

    def __init__(self, key, secret, session, service, region, hash_, leave_out):
        super().__init__(Credentials(key, secret, session), service, region)
        self.hash, self.leave_out = hash_, leave_out

    def payload(self, request):
        return self.hash

    def headers_to_sign(self, request):
        headers = super().headers_to_sign(request)
        for name in self.leave_out:
            del headers[name]
        return headers


def signed(
    method,
    path,
    headers=None,
    body=b"",
    service="ebs",
    key=KEY,
    secret=SECRET,
    session=None,
    region=REGION,
    unsigned=False,
    over=None,
    minutes=0,
    leave_out=(),
    url=URL,
):
    """The headers of a signed request; by default it is signed as it has to be."""
    hash_ = hashlib.sha256(body if over is None else over).hexdigest()
    if unsigned:
        hash_ = "UNSIGNED-PAYLOAD"
        headers = {**(headers or {}), "X-Amz-Content-SHA256": hash_}
    request = AWSRequest(method, url + path, headers=headers, data=body)
    now = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=minutes)
    signer = Signer(key, secret, session, service, region, hash_, leave_out)
    with mock.patch("botocore.auth.get_current_datetime", return_value=now):
        signer.add_auth(request)
    return dict(request.headers.items())


class Answer:
    """What came back to a raw request."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()
        # EC2 and STS say it in XML.
        self.code = response.headers.get("x-amzn-errortype") or between(self.body, "Code")

    def must_be(self, status, code=None):
        told = (self.status, self.code, self.body[:500])
        assert (self.status, self.code) == (status, code), f"{told}, and not {(status, code)}"
        return self


def between(body, tag):
    start, _, rest = body.decode(errors="replace").partition(f"<{tag}>")
    return rest.partition("</")[0] or None


def send(method, path, headers, body=b"", url=URL):
    """Sends a request as it is given."""
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=30)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        return Answer(connection.getresponse())


def raw(method, path, headers=None, body=b"", url=URL, **signing):
    """Sends a signed request that the clients would not send."""
    return send(method, path, signed(method, path, headers, body, url=url, **signing), body, url)


def put_headers(data, **more):
    headers = {
        "x-amz-Data-Length": str(BLOCK),
        "x-amz-Checksum": checksum(data),
        "x-amz-Checksum-Algorithm": "SHA256",
    }
    return headers | more
