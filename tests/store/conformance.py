"""What every :class:`~obsfs.store.base.ObjectStore` must do: the same checks for each implementation.

A subclass has a fixture `store`: an empty bucket.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from obsfs.errors import (
    ExistsError,
    NotFoundError,
    ObsfsError,
    RefusedError,
    UnavailableError,
    UsageError,
    VersionChangedError,
)
from obsfs.store.base import ObjectStore
from obsfs.store.parts import PART, parts_etag
from obsfs.store.types import ObjectVersion
from tests.conftest import random_bytes

_MIN_PART = 5 << 20
"""Bytes of the smallest part but the last: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html."""


def current(store: ObjectStore, key: str) -> ObjectVersion:
    return store.version(store.head(key))


def names(store: ObjectStore, prefix: str, delimiter: str = "/", page_size: int = 1000) -> list[str]:
    pages = list(store.list(prefix, delimiter=delimiter, page_size=page_size))
    assert [page.is_last for page in pages] == [False] * (len(pages) - 1) + [True]
    assert all(len(page.objects) + len(page.prefixes) <= page_size for page in pages)
    return sorted(name for page in pages for name in [*(info.key for info in page.objects), *page.prefixes])


class ObjectStoreConformance:
    etags_tell_parts = True
    """Whether an object that was uploaded in parts has the ETag of S3: the MD5 of its parts' MD5s, and their number."""
    copies_parts = True
    """Whether parts of an upload are copied inside the server."""
    pins_copies = True
    """Whether a copy of a version that is gone is refused; otherwise whichever version is there is copied."""
    is_conditional = True
    """Whether a put of a new object fails where there is one."""

    # names

    def test_what_was_put_is_found_by_every_way(self, store: ObjectStore) -> None:
        data = random_bytes(3000)
        etag = store.put("dir/key.bin", data).etag
        info = store.head("dir/key.bin")
        assert (info.key, info.size) == ("dir/key.bin", 3000)
        assert etag in ("", info.etag)
        assert [found._replace(mtime=info.mtime) for found in store.walk("")] == [info]
        assert abs(next(store.walk("")).mtime - info.mtime) < 2
        body = store.get("dir/key.bin")
        assert (body.data, body.etag) == (data, info.etag)
        version = store.version(info)
        assert (version.bucket, version.key, version.etag, version.size, version.endpoint) == (
            store.name, "dir/key.bin", info.etag, 3000, store.endpoint
        )  # fmt: skip

    def test_what_does_not_exist_is_an_error(self, store: ObjectStore) -> None:
        for ask in (store.head, store.get):
            with pytest.raises(NotFoundError):
                ask("nothing")
        assert names(store, "") == names(store, "no/such/prefix/") == []
        store.delete("nothing")

    @pytest.mark.parametrize("page_size", [1, 2, 3, 1000])
    def test_listings_roll_up_what_is_deeper_and_come_in_pages(self, store: ObjectStore, page_size: int) -> None:
        for key in ("a", "b/1", "b/2", "b/c/3", "b-", "c/1"):
            store.put(key, b"x")
        assert names(store, "", page_size=page_size) == ["a", "b-", "b/", "c/"]
        assert names(store, "b/", page_size=page_size) == ["b/1", "b/2", "b/c/"]
        assert names(store, "b/", "", page_size) == ["b/1", "b/2", "b/c/3"]
        assert [info.key for info in store.walk("b/")] == ["b/1", "b/2", "b/c/3"]

    def test_the_address_is_checked_by_its_first_page(self, store: ObjectStore) -> None:
        store.put(f"{store.address.prefix}a", b"x")
        assert [info.key for info in store.check().objects] == [f"{store.address.prefix}a"]

    # bytes

    def test_each_range_has_its_bytes(self, store: ObjectStore) -> None:
        data = random_bytes(100_003)
        store.put("key", data)
        version = current(store, "key")
        for start, stop in ((0, 1), (0, len(data)), (777, 5000), (len(data) - 1, len(data)), (5, 5)):
            assert store.read_range(version, start, stop) == data[start:stop]
        body = store.open_range(version, 1000, 3000)
        pieces = [bytearray(500) for _ in range(4)]
        for piece in pieces:
            body.readinto(memoryview(piece))
        body.close()
        assert b"".join(pieces) == data[1000:3000]

    def test_a_body_is_closed_before_its_end(self, store: ObjectStore) -> None:
        data = random_bytes(200_000)
        store.put("key", data)
        for _ in range(20):
            body = store.open_range(current(store, "key"), 0, 150_000)
            buffer = bytearray(10)
            body.readinto(memoryview(buffer))
            body.close()
            assert buffer == data[:10]

    def test_a_version_that_is_gone_is_never_another(self, store: ObjectStore) -> None:
        store.put("key", b"old data")
        old = current(store, "key")
        store.put("key", b"new data")
        for read in (lambda: store.read_range(old, 0, 4), lambda: store.open_range(old, 0, 8)):
            with pytest.raises(VersionChangedError):
                read()
        assert store.read_range(current(store, "key"), 0, 3) == b"new"
        store.delete("key")
        with pytest.raises(VersionChangedError):
            store.read_range(old, 0, 4)

    def test_a_checksum_is_of_all_bytes(self, store: ObjectStore) -> None:
        store.put("key", b"some bytes")
        version = current(store, "key")
        checksum = store.checksum(version)
        assert checksum is None or checksum.is_of(b"some bytes")
        store.put("key", b"other")
        with pytest.raises(VersionChangedError):
            store.checksum(version)

    def test_what_is_too_large_to_be_small_is_refused(self, store: ObjectStore) -> None:
        store.put("key", bytes(1000))
        assert len(store.get("key", max_bytes=1000).data) == 1000
        with pytest.raises(UsageError):
            store.get("key", max_bytes=999)

    # changes

    def test_an_object_that_should_be_new_does_not_replace(self, store: ObjectStore) -> None:
        store.put("key", b"first", new=True)
        if self.is_conditional:
            with pytest.raises(ExistsError):
                store.put("key", b"second", new=True)
            assert store.get("key").data == b"first"
        store.put("key", b"third")
        assert store.get("key").data == b"third"

    def test_a_file_is_put_with_its_md5(self, store: ObjectStore) -> None:
        data = random_bytes(PART + 5)
        store.put_file("key", len(data), lambda start, count: data[start : start + count], hashlib.md5(data).digest())
        assert store.read_range(current(store, "key"), 0, len(data)) == data
        with pytest.raises(UnavailableError):
            store.put_file("bad", 3, lambda start, count: b"abc"[start : start + count], hashlib.md5(b"x").digest())
        assert names(store, "") == ["key"]

    def test_deleting_leaves_the_others(self, store: ObjectStore) -> None:
        for key in ("a", "b", "c"):
            store.put(key, b"x")
        store.delete("a", "c", "never there")
        assert names(store, "") == ["b"]

    def test_an_upload_appears_when_it_is_completed(self, store: ObjectStore) -> None:
        pieces = [random_bytes(_MIN_PART, 1), random_bytes(_MIN_PART, 2), random_bytes(7, 3)]
        upload = store.create_upload("dir/key")
        etags = {n + 1: store.upload_part("dir/key", upload, n + 1, pieces[n]) for n in (2, 0, 1)}
        assert names(store, "dir/") == []
        assert list(store.list_uploads("dir/")) == [("dir/key", upload)]
        assert list(store.list_uploads("other/")) == []
        parts = store.list_parts("dir/key", upload)
        assert {number: part.size for number, part in parts.items()} == {1: _MIN_PART, 2: _MIN_PART, 3: 7}
        assert {number: part.etag.strip('"') for number, part in parts.items()} == {
            number: etag.strip('"') for number, etag in etags.items()
        }
        store.complete_upload("dir/key", upload, etags)
        version = current(store, "dir/key")
        assert store.read_range(version, _MIN_PART - 3, _MIN_PART + 3) == pieces[0][-3:] + pieces[1][:3]
        assert version.size == 2 * _MIN_PART + 7
        is_of_parts = version.etag.strip('"') == parts_etag(hashlib.md5(piece).digest() for piece in pieces)
        assert is_of_parts == self.etags_tell_parts
        assert list(store.list_uploads("dir/")) == []

    def test_an_upload_that_is_gone_takes_no_parts(self, store: ObjectStore) -> None:
        upload = store.create_upload("key")
        store.upload_part("key", upload, 1, b"part")
        store.abort_upload("key", upload)
        for ask in (
            lambda: store.list_parts("key", upload),
            lambda: store.upload_part("key", upload, 2, b"x"),
            lambda: store.complete_upload("key", upload, {1: '"x"'}),
        ):
            with pytest.raises((NotFoundError, RefusedError)):
                ask()
        assert names(store, "") == []

    def test_a_copy_is_of_the_version_that_was_meant(self, store: ObjectStore) -> None:
        data = random_bytes(_MIN_PART + 100)
        store.put("from", data)
        source = current(store, "from")
        store.copy(source, "to")
        assert store.read_range(current(store, "to"), 0, len(data)) == data

    def test_parts_are_copied_from_the_version_that_was_meant(self, store: ObjectStore) -> None:
        data = random_bytes(_MIN_PART + 100)
        store.put("from", data)
        source = current(store, "from")
        upload = store.create_upload("parts")
        if not self.copies_parts:
            with pytest.raises(ObsfsError):
                etag = store.upload_part_copy("parts", upload, 1, source, range(len(data)))
                store.complete_upload("parts", upload, {1: etag})
            assert names(store, "") == ["from"]
            return
        etags = {
            1: store.upload_part_copy("parts", upload, 1, source, range(_MIN_PART)),
            2: store.upload_part_copy("parts", upload, 2, source, range(_MIN_PART, len(data))),
        }
        store.complete_upload("parts", upload, etags)
        assert store.read_range(current(store, "parts"), 0, len(data)) == data

    def test_no_copy_is_made_of_a_version_that_is_gone(self, store: ObjectStore) -> None:
        store.put("from", b"new")
        wrong = replace(current(store, "from"), etag='"00000000000000000000000000000000"')
        if self.pins_copies:
            with pytest.raises(ObsfsError):
                store.copy(wrong, "to")
            assert names(store, "") == ["from"]
        else:
            store.copy(wrong, "to")
            assert store.get("to").data == b"new", "obsfs looks at each copy for the sake of such servers"

    # what it says of itself

    def test_it_knows_what_it_can_do(self, store: ObjectStore) -> None:
        assert store.capabilities.list_version in (1, 2)
        assert store.address.bucket == store.name
        stats = store.stats()
        assert stats.retries == 0
        assert [endpoint["endpoint"] for endpoint in stats.endpoints] == [store.endpoint]
