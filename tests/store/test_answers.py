"""A server that is broken or hostile: one bad entry costs that entry, and no answer fills the memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from obsfs.errors import NotFoundError, ObsfsError, UnavailableError, UsageError
from obsfs.settings import Settings
from obsfs.store.address import parse_address
from obsfs.store.base import MAX_SMALL
from obsfs.store.bounds import MAX_ANSWER, MAX_ERROR
from obsfs.store.s3.store import S3Store
from obsfs.store.types import ObjectInfo
from tests.conftest import Mounter, status
from tests.store.hostile import Answer, HostileServer, endless, entry, listing


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


def _bucket(server: HostileServer) -> S3Store:
    return S3Store(parse_address("s3://bucket"), Settings.load(endpoint_url=server.endpoint, retry_timeout=0))


def test_one_bad_entry_costs_that_entry() -> None:
    page = listing(
        entry("a", "9" * 400), entry("b", -1), entry("c", 1 << 64), entry("d", "x"), entry("good", 5),
        entry("undated", 6, modified="0001-01-01T00:00:00Z"), entry("odd", 7, modified="soon"),
    )  # fmt: skip
    with HostileServer(lambda *_: page) as server:
        bucket = _bucket(server)
        (found,) = bucket.list("")
        assert [(info.key, info.size) for info in found.objects] == [("good", 5), ("undated", 6), ("odd", 7)]
        assert [info.mtime for info in found.objects] == [1767225600.0, 0.0, 0.0]
        assert found.bad == 4
        assert [info.key for info in bucket.walk("")] == ["good", "undated", "odd"]


def test_keys_of_another_place_are_left_out() -> None:
    with HostileServer(lambda *_: listing(entry("dir/a"), entry("../etc/passwd"), entry("di"))) as server:
        (found,) = _bucket(server).list("dir/")
        assert [info.key for info in found.objects] == ["dir/a"]
        assert found.bad == 2


@pytest.mark.parametrize("page", [{"token": "t"}, {"is_truncated": True}])
@pytest.mark.parametrize("entries", [(), (entry("k"),)])
def test_a_listing_without_end_is_an_error(page: dict[str, object], entries: tuple[str, ...]) -> None:
    with HostileServer(lambda *_: listing(*entries, **page)) as server:  # type: ignore[arg-type]
        with pytest.raises(ObsfsError, match="without an end"):
            list(_bucket(server).walk(""))
        assert len(server.requests) <= 3


def test_a_listing_of_any_length_is_cut_off() -> None:
    with HostileServer(lambda *_: Answer(200, endless())) as server:
        with pytest.raises(ObsfsError, match="longer than 16 MiB"):
            list(_bucket(server).list(""))
        assert server.sent < 4 * MAX_ANSWER


def test_an_error_of_any_length_is_cut_off() -> None:
    with HostileServer(lambda *_: Answer(403, endless(b"<Error><Code>" + b"C" * 100_000))) as server:
        with pytest.raises(ObsfsError) as caught:
            list(_bucket(server).list(""))
        assert len(str(caught.value)) < 300
        assert server.sent < 500 * MAX_ERROR


@pytest.mark.parametrize("size", [200, 60_000, 200_000])
def test_an_error_code_of_any_length_is_cut(size: int) -> None:
    body = b"<Error><Code>" + b"\xc2\x9b" + b"C" * size + b"</Code></Error>"
    with HostileServer(lambda *_: Answer(400, body)) as server:
        with pytest.raises(ObsfsError) as caught:
            list(_bucket(server).list(""))
        assert len(caught.value.message) < 300
        assert caught.value.message.isprintable()


def test_an_object_of_any_length_is_cut_off() -> None:
    with HostileServer(lambda *_: Answer(200, endless(), {"ETag": '"e"'})) as server:
        with pytest.raises(UsageError, match="too large"):
            _bucket(server).get("manifest")
        assert server.sent < 2 * MAX_SMALL


def test_entities_are_refused_at_once() -> None:
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10 if i else "a" * 10}">' for i in range(10))
    body = (
        f"<!DOCTYPE l [{entities}]><ListBucketResult><Contents><Key>&e9;</Key></Contents></ListBucketResult>".encode()
    )
    began = time.monotonic()
    with HostileServer(lambda *_: Answer(200, body)) as server, pytest.raises(ObsfsError, match="entities"):
        S3Store(parse_address("s3://bucket"), Settings.load(endpoint_url=server.endpoint, retry_timeout=60)).check()
    assert time.monotonic() - began < 30  # it is not tried again for a minute


@pytest.mark.parametrize("length", ["-5", "9" * 400, str(1 << 64), "x"])
def test_a_length_that_none_can_be_is_no_size(length: str) -> None:
    answer = Answer(200, b"", {"Content-Length": length, "ETag": '"e"'})
    with HostileServer(lambda *_: answer) as server, pytest.raises(UnavailableError, match="how large"):
        _bucket(server).head("k")


@pytest.mark.parametrize("date", ["never", "Mon, 01 Jan 0001 00:00:00 GMT", "9" * 400])
def test_a_date_that_nobody_can_read_costs_no_file(date: str) -> None:
    headers = {"Content-Length": "3", "ETag": '"e"', "Last-Modified": date, "Expires": date}
    with HostileServer(lambda *_: Answer(200, b"abc", headers)) as server:
        bucket = _bucket(server)
        info = bucket.head("k")
        assert (info.size, info.mtime) == (3, 0.0)
        assert bucket.get("k").data == b"abc"
        assert bucket.get("k").age == 0.0
        assert bucket.read_range(bucket.version(info), 0, 3) == b"abc"


@pytest.mark.parametrize("span", ["bytes 0-1/" + "9" * 5000, "bytes -1-1/3", "bytes 0-1/x"])
def test_a_range_of_an_impossible_object_is_an_error(span: str) -> None:
    headers = {"ETag": '"e"', "Content-Range": span}
    with HostileServer(lambda *_: Answer(206, b"ab", headers)) as server:
        bucket = _bucket(server)
        version = bucket.version(ObjectInfo("k", 3, 0.0, '"e"'))
        with pytest.raises(ObsfsError):
            bucket.read_range(version, 0, 2)


def test_a_part_that_cannot_be_read_is_no_part() -> None:
    good = "<Part><PartNumber>2</PartNumber><Size>5</Size><ETag>b</ETag></Part>"
    bad = "<Part><PartNumber>1</PartNumber><Size>-1</Size><ETag>a</ETag></Part>"
    body = f"<ListPartsResult><IsTruncated>false</IsTruncated>{bad}{good}</ListPartsResult>".encode()
    with HostileServer(lambda *_: Answer(200, body)) as server:
        assert list(_bucket(server).list_parts("k", "upload")) == [2]


def test_a_404_of_any_length_is_not_there() -> None:
    with HostileServer(lambda *_: Answer(404, endless(b"<Error><Code>NoSuchKey</Code>" + b"x" * 100_000))) as server:
        with pytest.raises(NotFoundError):
            _bucket(server).get("k")
        assert server.sent < 500 * MAX_ERROR


def test_a_mount_shows_the_rest_and_counts(mount: Mounter, tmp_path: Path) -> None:
    def answer(method: str, key: str, query: dict[str, str]) -> Answer | None:
        if key == "good":
            return Answer(200, b"12345", {"ETag": '"e"'})
        return None if key else listing(entry("good", 5), entry("bad", -1), entry("huge", 10**400))

    with HostileServer(answer) as server:
        path = mount("s3://bucket", endpoint_url=server.endpoint, retry_timeout=2, cache_dir=tmp_path / "cache")
        assert os.listdir(path) == ["good"]
        assert (path / "good").read_bytes() == b"12345"
        assert status(path)["bad_entries"] == 2
