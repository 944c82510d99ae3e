"""The requests against real servers: SeaweedFS, and rclone, which answers a range with status 200."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.awsrequest import AWSPreparedRequest, AWSResponse, HeadersDict
from botocore.config import Config
from botocore.credentials import ReadOnlyCredentials
from botocore.httpsession import URLLib3Session
from botocore.utils import parse_timestamp as parse_by_botocore
from hypothesis import given
from hypothesis import strategies as st

from obsfs.errors import CorruptError, ForbiddenError, NotFoundError, UnavailableError, VersionChangedError
from obsfs.settings import Settings
from obsfs.store.address import parse_address
from obsfs.store.s3.ranges import RangeSender
from obsfs.store.s3.store import S3Store
from obsfs.store.types import ObjectVersion, parse_timestamp
from tests.conftest import MIB, Mounter, Store, random_bytes, rclone_server
from tests.faulty import FaultyServer
from tests.odd import Answer, OddServer, Request, refusal


@pytest.fixture
def ours(bucket: Store) -> S3Store:
    return S3Store(parse_address(str(bucket)), Settings.load())


def read(bucket: S3Store, key: str, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    body = bucket.open_range(bucket.version(bucket.head(key)), start, stop)
    body.readinto(memoryview(buffer))
    body.close()
    return bytes(buffer)


def test_ranges(bucket: Store, ours: S3Store) -> None:
    data = random_bytes(3 * MIB + 1)
    bucket.put("key", data)
    for start, stop in ((0, 1), (0, len(data)), (MIB, 2 * MIB), (len(data) - 1, len(data))):
        assert read(ours, "key", start, stop) == data[start:stop]


def test_a_connection_is_used_again_after_a_whole_body(bucket: Store, ours: S3Store) -> None:
    bucket.put("key", random_bytes(2 * MIB))
    for _ in range(30):
        assert len(read(ours, "key", 0, 2 * MIB)) == 2 * MIB


@pytest.mark.parametrize("algorithm", ["", "SHA256", "SHA1", "CRC32", "CRC32C", "CRC64NVME"])
def test_a_whole_object_has_the_checksum_that_the_server_keeps(bucket: Store, algorithm: str) -> None:
    data = random_bytes(3 * MIB + 1)
    given = {"ChecksumAlgorithm": algorithm} if algorithm else {}
    bucket.client.put_object(Bucket=bucket.name, Key="key", Body=data, **given)
    with FaultyServer(bucket.server.port, lambda number, _: "flipped" if number == 0 else None) as faulty:
        ours = S3Store(parse_address(str(bucket)), Settings.load(endpoint_url=faulty.endpoint, retry_timeout=0))
        version = ours.version(ours.head("key"))
        with pytest.raises(CorruptError, match=algorithm.lower() or "crc32"):
            ours.read_range(version, 0, len(data))
        assert ours.read_range(version, 0, len(data)) == data
        checksum = ours.checksum(version)
        assert checksum is not None and checksum.is_of(data)
        # Of a part of it, nobody knows.
        assert ours.read_range(version, 0, len(data) - 1) == data[:-1]


def test_a_small_object_has_its_checksum(bucket: Store) -> None:
    bucket.put("key", b"a manifest, say")
    with FaultyServer(bucket.server.port, lambda number, _: "flipped" if number == 0 else None) as faulty:
        place, endpoint = parse_address(str(bucket)), faulty.endpoint
        with pytest.raises(CorruptError):
            S3Store(place, Settings.load(endpoint_url=endpoint, retry_timeout=0)).get("key")
        assert S3Store(place, Settings.load(endpoint_url=endpoint)).get("key").data == b"a manifest, say"


def test_bytes_that_are_wrong_are_asked_for_again(bucket: Store) -> None:
    bucket.put("key", b"a manifest, say")
    with FaultyServer(bucket.server.port, lambda number, _: "flipped" if number < 2 else None) as faulty:
        ours = S3Store(parse_address(str(bucket)), Settings.load(endpoint_url=faulty.endpoint))
        assert ours.get("key").data == b"a manifest, say"
        assert ours.stats().retries == 2


def test_a_replaced_object_is_not_read(bucket: Store, ours: S3Store) -> None:
    bucket.put("key", b"old data")
    version = ours.version(ours.head("key"))
    bucket.put("key", b"new data")
    with pytest.raises(VersionChangedError):
        ours.open_range(version, 0, 8)
    bucket.client.delete_object(Bucket=bucket.name, Key="key")
    with pytest.raises(VersionChangedError):
        ours.open_range(version, 0, 8)


def test_what_is_not_there(bucket: Store, ours: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError):
        ours.head("nothing")
    with pytest.raises(NotFoundError):
        S3Store(parse_address("obs://no-such-bucket"), Settings.load()).check()
    with pytest.raises(UnavailableError):
        S3Store(parse_address(str(bucket)), Settings.load(endpoint_url="http://127.0.0.1:1")).check()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(ForbiddenError):
        S3Store(parse_address(str(bucket)), Settings.load()).check()


def test_listings_come_in_pages(bucket: Store, ours: S3Store) -> None:
    for n in range(5):
        bucket.put(f"dir/{n}", b"x" * n)
    bucket.put("dir/sub/below", b"")
    pages = list(ours.list("dir/", page_size=2))
    assert len(pages) >= 3
    assert [page.is_last for page in pages] == [False] * (len(pages) - 1) + [True]
    objects = [(info.key, info.size) for page in pages for info in page.objects]
    assert objects == [(f"dir/{n}", n) for n in range(5)]
    assert [prefix for page in pages for prefix in page.prefixes] == ["dir/sub/"]


@pytest.fixture
def rclone(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    with rclone_server(tmp_path) as found:
        yield found


def test_a_server_that_answers_ranges_with_200(
    rclone: tuple[str, Path], mount: Mounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, root = rclone
    data = random_bytes(20 * MIB + 3)
    (root / "models" / "file.bin").write_bytes(data)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    config = Config(s3={"addressing_style": "path"})
    client = botocore.session.Session().create_client("s3", endpoint_url=endpoint, config=config)
    answer = client.get_object(Bucket="models", Key="file.bin", Range="bytes=10-19")
    assert answer["ContentRange"]
    path = mount("obs://models", endpoint_url=endpoint)
    assert (path / "file.bin").read_bytes() == data


@pytest.mark.parametrize("key", ["a b/c+d&e=f.bin", "100%25 sure?#x.bin", "模型/權重~(1).bin", "üñ'\".bin", "a//b.bin"])
def test_keys_reach_the_server_as_they_are(bucket: Store, ours: S3Store, key: str) -> None:
    data = random_bytes(5000)
    client = bucket.client
    client.put_object(Bucket=bucket.name, Key=key, Body=data)
    assert client.get_object(Bucket=bucket.name, Key=key)["Body"].read() == data, "the server itself keeps it"
    etag = client.head_object(Bucket=bucket.name, Key=key)["ETag"]
    version = ObjectVersion(ours.endpoint, ours.name, key, etag, len(data))
    buffer = bytearray(1000)
    body = ours.open_range(version, 1000, 2000)
    body.readinto(memoryview(buffer))
    body.close()
    assert buffer == data[1000:2000]


SPAN = {"Range": "bytes=0-9"}


class Recorder:
    """Stands in for botocore's HTTP session: a server does not tell what it was sent."""

    def __init__(self) -> None:
        self.sent: list[AWSPreparedRequest] = []

    def send(self, request: AWSPreparedRequest) -> AWSResponse:
        self.sent.append(request)
        return AWSResponse(request.url, 206, HeadersDict({"Content-Range": "bytes 0-9/10"}), io.BytesIO(bytes(10)))


class Rotating:
    """Credentials whose token is renewed each time, as botocore's are when they expire."""

    def __init__(self) -> None:
        self.count = 0

    def current(self) -> ReadOnlyCredentials:
        self.count += 1
        return ReadOnlyCredentials("AK", "SK", f"token-{self.count}")


def test_a_range_is_signed_with_the_credentials_of_now(ours: S3Store) -> None:
    client = botocore.session.Session().create_client("s3", "us-east-1", endpoint_url="http://127.0.0.1:1")
    recorder = Recorder()
    sender = RangeSender(client, Rotating(), recorder)
    for _ in range(2):
        answer = sender.send("bucket", "key", {**SPAN, "If-Match": '"tag"'})
        assert answer is not None
        assert answer.headers["content-range"] == "bytes 0-9/10"
    first, second = (request.headers for request in recorder.sent)
    assert (first["X-Amz-Security-Token"], second["X-Amz-Security-Token"]) == ("token-1", "token-2")
    assert first["If-Match"] == '"tag"'
    assert "AWS4-HMAC-SHA256 Credential=AK/" in first["Authorization"]
    assert all("?" not in request.url for request in recorder.sent), "no credentials in the URL"
    RangeSender(client, None, recorder).send("bucket", "key", SPAN)
    assert "Authorization" not in recorder.sent[2].headers


@pytest.fixture(scope="module")
def asking() -> Any:
    keys = {"aws_access_key_id": "AK", "aws_secret_access_key": "SK"}
    return botocore.session.Session().create_client("s3", "us-east-1", endpoint_url="http://127.0.0.1:1", **keys)


@given(key=st.text(st.characters(codec="utf-8"), min_size=1))
def test_a_key_is_asked_for_where_the_client_would(asking: Any, key: str) -> None:
    recorder = Recorder()
    assert RangeSender(asking, None, recorder).send("bucket", key, SPAN) is not None
    signed = asking.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": key})
    assert recorder.sent[0].url == signed.partition("?")[0]


def test_what_is_not_there_costs_one_request(bucket: Store, ours: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("gone", b"soon")
    version = ours.version(ours.head("gone"))
    bucket.client.delete_object(Bucket=bucket.name, Key="gone")
    sent = []
    send = URLLib3Session.send
    monkeypatch.setattr(
        URLLib3Session, "send", lambda session, request: sent.append(request.url) or send(session, request)
    )
    with pytest.raises(NotFoundError, match="none does not exist"):
        ours.get("none")
    with pytest.raises(VersionChangedError):
        ours.read_range(version, 0, 4)
    assert len(sent) == 2
    nowhere = S3Store(parse_address("obs://no-such-bucket-at-all"), Settings.load())
    with pytest.raises(NotFoundError, match="bucket of"):
        nowhere.get("key")


def test_what_is_no_plain_request_is_left_to_the_client() -> None:
    client = botocore.session.Session().create_client("s3", "us-east-1", endpoint_url="http://127.0.0.1:1")
    assert RangeSender(client, Rotating(), Recorder()).send("name--usw2-az1--x-s3", "key", SPAN) is None
    client = botocore.session.Session().create_client(
        "s3", "us-east-1", endpoint_url="http://127.0.0.1:1", config=Config(signature_version="s3")
    )
    assert RangeSender(client, Rotating(), Recorder()).send("bucket", "key", SPAN) is None


@pytest.mark.parametrize(
    "text",
    ["2026-11-26T08:00:00.123Z", "2026-11-26T08:00:00Z", "2026-11-26T08:00:00+05:30", "Thu, 26 Nov 2026 08:00:00 GMT",
     "2026-11-26T08:00:00", "20261126T080000Z", "1795680000", 1795680000],
)  # fmt: skip
def test_times_are_read_as_botocore_reads_them(text: str | int) -> None:
    assert parse_timestamp(text).timestamp() == parse_by_botocore(text).timestamp()


@pytest.mark.parametrize("may_list", [True, False])
def test_a_bucket_that_is_not_there_is_named_with_its_nearest(may_list: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    names = "".join(f"<Bucket><Name>{name}</Name></Bucket>" for name in ("models", "other"))
    body = f"<ListAllMyBucketsResult><Buckets>{names}</Buckets></ListAllMyBucketsResult>".encode()

    def choose(request: Request) -> Answer:
        if "list-type" in request.query:
            return refusal(404, "NoSuchBucket")
        return Answer(200, body) if may_list else refusal(403, "AccessDenied")

    with OddServer({}, choose) as server:
        bucket = S3Store(parse_address("obs://modles"), Settings.load(endpoint_url=server.endpoint))
        for _ in range(2):
            with pytest.raises(NotFoundError) as caught:
                bucket.check()
            said = "there is obs://models; check the name" if may_list else "does not exist: check the name"
            assert said in str(caught.value)
        assert len(server.asked) == 3  # the list of buckets is asked for once
