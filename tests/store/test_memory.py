"""The bucket in memory: it does what every store does, and what its hooks say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.errors import NotFoundError, UnavailableError, VersionChangedError
from obsfs.store.base import Capabilities, ObjectStore
from obsfs.store.memory import MemoryStore, Request
from tests.store.conformance import ObjectStoreConformance, current, names


class TestMemoryStore(ObjectStoreConformance):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return MemoryStore()


class TestMemoryStoreOfVersions(ObjectStoreConformance):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return MemoryStore(keeps_versions=True, page_size=2)


class TestMemoryStoreWithoutConditions(ObjectStoreConformance):
    is_conditional = False

    @pytest.fixture
    def store(self) -> ObjectStore:
        return MemoryStore(capabilities=Capabilities(conditional_put=False))


@given(
    keys=st.sets(st.text("ab/-", min_size=1, max_size=6)), size=st.integers(1, 5), prefix=st.sampled_from(["", "a/"])
)
def test_a_listing_is_the_same_whatever_the_pages(keys: set[str], size: int, prefix: str) -> None:
    store = MemoryStore(dict.fromkeys(keys, b""), page_size=size)
    below = [key[len(prefix) :] for key in keys if key.startswith(prefix)]
    rolled = {prefix + "".join(key.partition("/")[:2]) for key in below}
    assert names(store, prefix) == sorted(rolled)
    assert names(store, prefix, "") == sorted(prefix + key for key in below)


def test_old_versions_are_read_by_their_ids() -> None:
    store = MemoryStore(keeps_versions=True, now=lambda: 1.7e9)
    written = [store.put("key", text) for text in (b"one", b"two")]
    assert [body.data for body in store.list_versions("key")] == [b"two", b"one"]
    version = store.version(store.head("key"))
    old = version.__class__(version.endpoint, version.bucket, "key", written[0].etag, 3, written[0].version_id)
    assert store.read_range(old, 0, 3) == b"one"
    store.delete("key")
    assert store.read_range(old, 0, 3) == b"one"
    with pytest.raises(NotFoundError):
        store.head("key")


def test_a_hook_raises_in_place_of_an_answer_and_small_requests_are_repeated() -> None:
    store = MemoryStore({"key": b"data"}, retry_seconds=20)
    assert store.head("key").size == 4
    failures = [UnavailableError("busy"), UnavailableError("busy")]

    def fail(request: Request) -> None:
        if failures:
            raise failures.pop()

    store.before = fail
    assert store.get("key").data == b"data"
    assert store.stats().retries == 2
    version = current(store, "key")
    failures.append(UnavailableError("busy"))
    with pytest.raises(UnavailableError):
        store.open_range(version, 0, 4)
    assert [request.operation for request in store.requests[-2:]] == ["head", "open_range"]


def test_what_changes_while_an_answer_is_on_its_way_is_not_in_it() -> None:
    store = MemoryStore({"a": b"1", "b": b"1"}, page_size=1)
    store.after = lambda request: request.operation == "page" and store.delete("b")
    assert [info.key for page in store.list("") for info in page.objects] == ["a"]
    store.after = lambda request: request.operation == "head" and store.delete("a")
    version = current(store, "a")
    with pytest.raises(VersionChangedError):
        store.read_range(version, 0, 1)


def test_a_body_breaks_off_where_the_hook_says() -> None:
    store = MemoryStore({"key": bytes(100)})
    body = store.open_range(current(store, "key"), 0, 100)
    body.readinto(memoryview(bytearray(50)))

    def fail(request: Request) -> None:
        raise UnavailableError(f"broken off at {request.start}")

    store.reading = fail
    with pytest.raises(UnavailableError, match="broken off at 0"):
        body.readinto(memoryview(bytearray(50)))
