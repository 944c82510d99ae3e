"""Never bytes of two versions, whatever a server says of them: ETags, dates, or nothing."""

from __future__ import annotations

import time
from email.utils import formatdate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.errors import ObsfsError, RefusedError, UnavailableError, VersionChangedError
from obsfs.settings import Settings
from obsfs.store.address import parse_address
from obsfs.store.s3.pins import Pin
from obsfs.store.s3.store import S3Store
from obsfs.store.types import ObjectVersion, modified_of, version_tag
from tests.conftest import MIB, Mounter, random_bytes
from tests.odd import OLD, OddServer, Thing


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AK")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SK")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def bucket(server: OddServer) -> S3Store:
    return S3Store(parse_address("obs://models"), Settings.load(endpoint_url=server.endpoint, retry_timeout=0))


SIZE = 6 * MIB
FIRST, SECOND = b"A" * SIZE, b"B" * SIZE
SERVERS = {
    "ETags": (True, ()),
    "ETags in listings only": (True, ("etag",)),
    "dates only": (False, ()),
    "ETags, dates in listings only": (True, ("last-modified",)),
    "nothing with answers": (True, ("etag", "last-modified")),
    "no ETag, and no date with answers": (False, ("last-modified",)),
}


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("ignores_pins", [False, True])
def test_no_two_versions_are_mixed(kind: str, ignores_pins: bool) -> None:
    has_etag, forgets = SERVERS[kind]
    things = {"w.bin": Thing(FIRST, has_etag=has_etag), "small": Thing(b"old", has_etag=has_etag)}
    with OddServer(things, ignores_pins=ignores_pins, forgets=forgets) as server:
        ours = bucket(server)
        versions = {info.key: ours.version(info) for page in ours.list("") for info in page.objects}
        is_told = kind not in ("nothing with answers", "no ETag, and no date with answers")
        if is_told:
            assert ours.read_range(versions["w.bin"], 0, MIB) == FIRST[:MIB]
            assert ours.read_range(versions["small"], 0, 3) == b"old"
        else:
            with pytest.raises(RefusedError, match="no ETag"):
                ours.read_range(versions["w.bin"], 0, MIB)
        server.things = {
            "w.bin": Thing(SECOND, modified=OLD + 1, has_etag=has_etag),
            "small": Thing(b"new", modified=OLD + 1, has_etag=has_etag),
        }
        for key, size in (("w.bin", 2 * MIB), ("small", 3)):
            with pytest.raises(VersionChangedError if is_told else (VersionChangedError, RefusedError)):
                ours.read_range(versions[key], 0, size)
        fresh = {info.key: ours.version(info) for page in ours.list("") for info in page.objects}
        assert all(fresh[key] != versions[key] for key in fresh), "the cache knows them by other names"


@pytest.mark.parametrize("forgets", [(), ("etag",)])
def test_what_replaces_an_object_without_etag_is_seen_on_a_mount(forgets: tuple[str, ...], mount: Mounter) -> None:
    with OddServer({"config.json": Thing(b"old-old", has_etag=bool(forgets))}, forgets=forgets) as server:
        options: dict[str, Any] = {"endpoint_url": server.endpoint, "metadata_ttl": "0s", "retry_timeout": 1}
        path = mount("obs://models", **options)
        assert (path / "config.json").read_bytes() == b"old-old"
        server.things["config.json"] = Thing(b"new-new", OLD + 60, has_etag=bool(forgets))
        assert (path / "config.json").read_bytes() == b"new-new"
        assert (mount("obs://models", **options) / "config.json").read_bytes() == b"new-new"


def test_an_object_without_etag_is_not_read_in_the_second_of_its_writing() -> None:
    """Its date would be that of one that replaces it in the same second."""
    with OddServer({"new": Thing(b"data", modified=time.time(), has_etag=False)}) as server:
        ours = bucket(server)
        version = ours.version(ours.head("new"))
        with pytest.raises(UnavailableError, match="just now"):
            ours.read_range(version, 0, 4)
        deadline = time.monotonic() + 20
        while True:
            try:
                assert ours.read_range(version, 0, 4) == b"data"
                break
            except UnavailableError:
                assert time.monotonic() < deadline
                time.sleep(0.2)


@given(etag=st.text(max_size=40), modified=st.floats(0, 4e9))
def test_a_tag_is_an_etag_or_a_date(etag: str, modified: float) -> None:
    found = version_tag(etag, modified)
    assert found
    if etag.strip('"'):
        assert modified_of(found) is None
        assert version_tag(found, 1.0) == found
    else:
        assert modified_of(found) == int(modified)
    version = ObjectVersion("http://e", "b", "k", found, 1, modified=modified)
    headers = {"etag": etag, "last-modified": formatdate(modified, usegmt=True), "date": formatdate(modified + 60)}
    if int(modified):
        Pin.of(version).check_version(headers, "k")


@given(
    st.dictionaries(st.sampled_from(["etag", "last-modified", "date", "content-range", "content-length"]), st.text())
)
def test_hostile_headers_are_errors_of_ours(headers: dict[str, str]) -> None:
    pin = Pin.of(ObjectVersion("http://e", "b", "k", '"tag"', 10, modified=OLD))
    try:
        pin.check_version(headers, "k")
        assert headers["etag"].strip('"') == "tag"
    except ObsfsError:
        pass


# bodies without a length


def test_bodies_that_come_in_chunks(mount: Mounter) -> None:
    big = random_bytes(SIZE)
    with OddServer({"big": Thing(big), "small": Thing(b"hello"), "empty": Thing(b"")}, is_chunked=True) as server:
        ours = bucket(server)
        version = ours.version(ours.head("big"))
        for start, stop in ((0, 1), (5, 70_000), (0, SIZE), (SIZE - 1, SIZE)):
            assert ours.read_range(version, start, stop) == big[start:stop]
        path = mount("obs://models", endpoint_url=server.endpoint, retry_timeout=2)
        assert (path / "big").read_bytes() == big
        assert (path / "small").read_bytes() == b"hello"
        assert (path / "empty").read_bytes() == b""


@pytest.mark.parametrize("change", [b"more", b""])
def test_chunks_of_another_length_are_not_believed(change: bytes) -> None:
    big = random_bytes(5 * MIB)

    def choose(request: object) -> object:
        answer = server._answer(request)  # type: ignore[arg-type]
        if answer.status == 206:
            answer.body = answer.body + change if change else answer.body[:-1]
        return answer

    with OddServer({"big": Thing(big)}, choose, is_chunked=True) as server:  # type: ignore[arg-type]
        ours = bucket(server)
        with pytest.raises(UnavailableError):
            ours.read_range(ours.version(ours.head("big")), 0, MIB)
