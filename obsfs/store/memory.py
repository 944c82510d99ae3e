""":class:`MemoryStore`: a bucket in memory, for tests and simulations.

It keeps the promises of :class:`~obsfs.store.base.ObjectStore` as a real server does: ETags, pinned versions,
conditional writes, uploads in parts, listings in pages that see what changes in between. Hooks add faults and delays.
"""

from __future__ import annotations

import hashlib
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from email.utils import formatdate
from functools import lru_cache, partial
from typing import NamedTuple, TypeVar

from obsfs.errors import (
    BrokenOffError,
    ExistsError,
    MovedError,
    NotFoundError,
    ObsfsError,
    RefusedError,
    UnavailableError,
    UsageError,
    VersionChangedError,
)
from obsfs.store.address import Address
from obsfs.store.base import MAX_SMALL, PAGE_SIZE, Capabilities, StoreStats
from obsfs.store.checksums import Checksum, checksum_from_headers
from obsfs.store.failover import Failover
from obsfs.store.parts import PART
from obsfs.store.types import ObjectBody, ObjectInfo, ObjectVersion, Page, Part, PutResult, quote_etag

_T = TypeVar("_T")

_END = chr(0x10FFFF)
"""Sorts after every character of a key."""


class Request(NamedTuple):
    """What a hook is told of a request."""

    operation: str
    """The store's method; ``page`` for each page of a listing."""
    key: str
    """Or the prefix of a listing."""
    start: int = 0
    stop: int = 0
    """Of a range, in bytes."""


Hook = Callable[[Request], object]


def _ignore(request: Request) -> None:
    pass


class _Stored(NamedTuple):
    data: bytes
    etag: str
    mtime: float
    version_id: str

    @property
    def headers(self) -> dict[str, str]:
        return {
            "etag": self.etag,
            "content-length": str(len(self.data)),
            "last-modified": formatdate(self.mtime, usegmt=True),
        }


class _Upload(NamedTuple):
    key: str
    parts: dict[int, bytes]


@lru_cache(maxsize=8)
def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class _Server:
    """The one endpoint, and the pool that it is in. Nothing of it moves or expires."""

    number = 0
    url = "memory://"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> _Server:
        return self

    def prepare(self, number: int) -> None:
        """Do nothing."""

    def renew(self, number: int) -> None:
        """Do nothing."""

    def follow(self, number: int, moved: MovedError) -> bool:
        """Stay."""
        return False

    def explain(self, error: ObsfsError) -> ObsfsError:
        """Return the error."""
        return error


class MemoryStore:
    """A bucket in memory; implements :class:`~obsfs.store.base.ObjectStore`. Safe to use from many threads.

    Attributes:
        requests: Every request so far, in order.
        before: Called with each request before it is answered. It may raise an error in place of an answer, or wait.
        after: Called when an answer or a refusal is on its way: it does not show what the hook changes in the store.
        page_size: Names in a page of a listing, at most.
        reading: Called before each piece of the body of a range is read. It may raise, or wait.
    """

    def __init__(
        self,
        objects: Mapping[str, bytes] | None = None,
        *,
        address: Address | None = None,
        page_size: int = PAGE_SIZE,
        keeps_versions: bool = False,
        retry_seconds: float = 0.0,
        capabilities: Capabilities | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Make a bucket.

        Args:
            objects: What is in it at first, by key.
            address: Its name, and a prefix.
            page_size: Names in a page of a listing, at most.
            keeps_versions: Old versions stay.
            retry_seconds: How long requests for names and small objects are repeated while they fail.
            capabilities: What it can do; by default, all that it implements.
            now: The time in seconds since the epoch.
        """
        self.address = address or Address("obs", "memory")
        self.endpoint = _Server.url
        self.capabilities = capabilities or Capabilities(versions=keeps_versions)
        self.requests: list[Request] = []
        self.before: Hook = _ignore
        self.after: Hook = _ignore
        self.reading: Hook = _ignore
        self.page_size = page_size
        self._keeps_versions = keeps_versions
        self._now = now
        self._failover: Failover[_Server] = Failover(_Server(), retry_seconds)
        self._guard = threading.RLock()
        self._objects: dict[str, _Stored] = {}
        self._keys: list[str] = []
        self._history: dict[str, list[_Stored]] = {}
        self._uploads: dict[str, _Upload] = {}
        self._count = 0
        for key, data in sorted((objects or {}).items()):
            self._store(key, data)

    @property
    def name(self) -> str:
        """The bucket's name."""
        return self.address.bucket

    @property
    def keys(self) -> Sequence[str]:
        """The keys of all objects, sorted. Makes no request."""
        with self._guard:
            return list(self._keys)

    def __contains__(self, key: str) -> bool:
        """Return whether an object exists. Makes no request."""
        return key in self._objects

    def stats(self) -> StoreStats:
        """Return what was counted."""
        return self._failover.stats()

    def _once(self, request: Request, answer: Callable[[], _T]) -> _T:
        """Answer one request, with its hooks."""
        with self._guard:
            self.requests.append(request)
        self.before(request)
        try:
            with self._guard:
                return answer()
        finally:
            self.after(request)

    def _ask(self, request: Request, answer: Callable[[], _T]) -> _T:
        """As `_once`, and again while it fails."""
        return self._failover.ask(lambda server: self._once(request, answer))

    def _next_id(self) -> str:
        self._count += 1
        return f"{self._count:08}"

    def _store(self, key: str, data: bytes, etag: str = "") -> PutResult:
        if not key or len(key.encode("utf-8", "surrogatepass")) > 1024:
            raise UsageError(f"{key!r} is not a key", "keys have 1 to 1024 bytes")
        version_id = self._next_id() if self._keeps_versions else ""
        stored = _Stored(data, quote_etag(etag or _md5(data)), self._now(), version_id)
        if key not in self._objects:
            insort(self._keys, key)
        self._objects[key] = stored
        if self._keeps_versions:
            self._history.setdefault(key, []).append(stored)
        return PutResult(stored.etag, version_id)

    def _find(self, key: str) -> _Stored:
        if key not in self._objects:
            raise NotFoundError(f"{self._what(key)} does not exist", "check the name")
        return self._objects[key]

    def _find_version(self, version: ObjectVersion) -> _Stored:
        """Return exactly this version. Raises VersionChangedError."""
        current = self._objects.get(version.key) if version.bucket == self.name else None
        old = self._history.get(version.key, []) if version.version_id else []
        for stored in [*([current] if current else []), *old]:
            if (stored.etag, len(stored.data)) == (version.etag, version.size):
                return stored
        raise VersionChangedError(
            f"{self._what(version.key)} was replaced or deleted while it was open", "open it again"
        )

    def _what(self, key: str) -> str:
        return f"{self.address.scheme}://{self.name}/{key}"

    # names

    def check(self) -> Page:
        """Return the first page of the address."""
        return next(self.list(self.address.prefix))

    def list(self, prefix: str, *, page_size: int = PAGE_SIZE, delimiter: str = "/") -> Iterator[Page]:
        """Yield pages of what lies under `prefix`."""
        after, is_last = "", False
        while not is_last:
            size = min(page_size, self.page_size)
            page = self._ask(Request("page", prefix), partial(self.page, prefix, after, size, delimiter))
            yield page
            after, is_last = page.last_name or after, page.is_last

    def page(self, prefix: str, after: str, page_size: int, delimiter: str = "/") -> Page:
        """Return one page of a listing, as a server makes it. Makes no request.

        Args:
            prefix: What all keys begin with.
            after: The last name of the page before; empty for the first page.
            page_size: Names in the page, at most.
            delimiter: Where deeper keys are rolled up; empty to list all keys.
        """
        with self._guard:
            objects: list[ObjectInfo] = []
            prefixes: list[str] = []
            keys = self._keys
            at = bisect_left(keys, prefix)
            if after:
                is_rolled_up = delimiter and after.endswith(delimiter) and after != prefix
                at = bisect_right(keys, after + _END if is_rolled_up else after)
            while at < len(keys) and keys[at].startswith(prefix):
                if len(objects) + len(prefixes) == page_size:
                    return Page(objects, prefixes, is_last=False)
                name, found, _ = keys[at][len(prefix) :].partition(delimiter) if delimiter else (keys[at], "", "")
                if found:
                    prefixes.append(f"{prefix}{name}{found}")
                    at = bisect_right(keys, prefixes[-1] + _END)
                else:
                    objects.append(self._info(keys[at]))
                    at += 1
            return Page(objects, prefixes)

    def _info(self, key: str) -> ObjectInfo:
        stored = self._find(key)
        return ObjectInfo(key, len(stored.data), stored.mtime, stored.etag)

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield all objects under a prefix."""
        for page in self.list(prefix, delimiter=""):
            yield from page.objects

    def head(self, key: str) -> ObjectInfo:
        """Return the object at `key` as it is now."""
        return self._ask(Request("head", key), lambda: self._info(key))

    def list_versions(self, key: str) -> Iterator[ObjectBody]:
        """Yield the versions of an object that the bucket keeps, the newest first."""
        versions = self._once(Request("list_versions", key), lambda: self._history.get(key, [])[::-1])
        return (self._body(stored) for stored in versions)

    def _body(self, stored: _Stored) -> ObjectBody:
        return ObjectBody(stored.data, {**stored.headers, "date": formatdate(self._now(), usegmt=True)})

    def version(self, info: ObjectInfo) -> ObjectVersion:
        """Return the identity of what `info` describes."""
        return ObjectVersion(self.endpoint, self.name, info.key, info.etag, info.size, modified=info.mtime)

    # bytes

    def get(self, key: str, *, max_bytes: int = MAX_SMALL) -> ObjectBody:
        """Read a small object whole, as it is now."""
        body = self._ask(Request("get", key), lambda: self._body(self._find(key)))
        if len(body.data) > max_bytes:
            raise UsageError(f"{self._what(key)} is too large to be what it should be", "look at it")
        return body

    def open_range(self, version: ObjectVersion, start: int, stop: int) -> MemoryReader:
        """Ask for the bytes ``[start, stop)`` of exactly this version, once."""
        return self._failover.ask_once(lambda server: self._open(version, start, stop))

    def _open(self, version: ObjectVersion, start: int, stop: int) -> MemoryReader:
        request = Request("open_range", version.key, start, stop)
        stored = self._once(request, lambda: self._find_version(version))
        return MemoryReader(memoryview(stored.data)[start:stop], lambda: self.reading(request))

    def read_range(self, version: ObjectVersion, start: int, stop: int) -> bytes:
        """Return the bytes that `open_range` reads; ask again while that fails."""
        if stop <= start:
            return b""
        buffer = bytearray(stop - start)

        def read(_: _Server) -> bytes:
            with closing(self._open(version, start, stop)) as body:
                body.readinto(memoryview(buffer))
            return bytes(buffer)

        return self._failover.ask(read)

    def checksum(self, version: ObjectVersion) -> Checksum | None:
        """Return the checksum of all bytes of this version: that of its ETag."""
        stored = self._ask(Request("checksum", version.key), lambda: self._find_version(version))
        return checksum_from_headers(stored.headers, md5_etags=True)

    # changes

    def put(self, key: str, data: bytes, *, new: bool = False) -> PutResult:
        """Write a whole object."""

        def store() -> PutResult:
            if new and self.capabilities.conditional_put and key in self._objects:
                raise ExistsError(f"{key} is there already")
            return self._store(key, bytes(data))

        return self._once(Request("put", key), store)

    def put_file(self, key: str, size: int, read: Callable[[int, int], bytes], md5: bytes) -> PutResult:
        """Write a whole object from its pieces."""
        data = b"".join(read(start, min(PART, size - start)) for start in range(0, size, PART))

        def store() -> PutResult:
            if hashlib.md5(data, usedforsecurity=False).digest() != md5:
                raise UnavailableError(f"server answered 400 BadDigest for {self._what(key)}")
            return self._store(key, data)

        return self._once(Request("put_file", key), store)

    def _upload(self, key: str, upload: str) -> _Upload:
        found = self._uploads.get(upload)
        if found is None or found.key != key:
            raise NotFoundError(f"the upload of {self._what(key)} is gone", "begin again")
        return found

    def create_upload(self, key: str) -> str:
        """Begin a multipart upload."""

        def begin() -> str:
            upload = f"upload-{self._next_id()}"
            self._uploads[upload] = _Upload(key, {})
            return upload

        return self._once(Request("create_upload", key), begin)

    def upload_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """Send part `number` of an upload."""

        def store() -> str:
            self._upload(key, upload).parts[number] = bytes(data)
            return quote_etag(_md5(bytes(data)))

        return self._once(Request("upload_part", key), store)

    def list_uploads(self, prefix: str) -> Sequence[tuple[str, str]]:
        """Return key and id of each unfinished upload under a prefix."""
        return self._once(
            Request("list_uploads", prefix),
            lambda: sorted((found.key, id) for id, found in self._uploads.items() if found.key.startswith(prefix)),
        )

    def list_parts(self, key: str, upload: str) -> dict[int, Part]:
        """Return the parts of an upload by their numbers."""
        return self._once(
            Request("list_parts", key),
            lambda: {
                number: Part(len(data), quote_etag(_md5(data)))
                for number, data in sorted(self._upload(key, upload).parts.items())
            },
        )

    def complete_upload(self, key: str, upload: str, etags: Mapping[int, str]) -> PutResult:
        """Make an object of the parts with these numbers and ETags."""

        def complete() -> PutResult:
            parts = self._upload(key, upload).parts
            if not etags or any(
                n not in parts or quote_etag(_md5(parts[n])) != quote_etag(tag) for n, tag in etags.items()
            ):
                raise RefusedError(f"the server refused {self._what(key)} (400 InvalidPart)")
            pieces = [parts[number] for number in sorted(etags)]
            digest = hashlib.md5(b"".join(bytes.fromhex(_md5(piece)) for piece in pieces), usedforsecurity=False)
            del self._uploads[upload]
            return self._store(key, b"".join(pieces), f"{digest.hexdigest()}-{len(pieces)}")

        return self._once(Request("complete_upload", key), complete)

    def abort_upload(self, key: str, upload: str) -> None:
        """Drop an upload and its parts."""

        def abort() -> None:
            self._upload(key, upload)
            del self._uploads[upload]

        self._once(Request("abort_upload", key), abort)

    def copy(self, source: ObjectVersion, key: str) -> PutResult:
        """Copy exactly this version."""
        return self._once(Request("copy", key), lambda: self._store(key, self._find_version(source).data))

    def upload_part_copy(self, key: str, upload: str, number: int, source: ObjectVersion, span: range) -> str:
        """Copy a span of bytes of exactly this version as part `number`."""

        def copy() -> str:
            data = self._find_version(source).data[span.start : span.stop]
            self._upload(key, upload).parts[number] = data
            return quote_etag(_md5(data))

        return self._once(Request("upload_part_copy", key, span.start, span.stop), copy)

    def delete(self, *keys: str) -> None:
        """Delete objects."""

        def remove(key: str) -> None:
            if self._objects.pop(key, None):
                del self._keys[bisect_left(self._keys, key)]

        for key in keys:
            self._once(Request("delete", key), partial(remove, key))


class MemoryReader:
    """The body of a range."""

    def __init__(self, data: memoryview, reading: Callable[[], object]) -> None:
        self._left = data
        self._reading = reading

    def readinto(self, buffer: memoryview, /) -> None:
        """Fill `buffer` whole. Raises BrokenOffError when the body is shorter, and what the hook raises."""
        self._reading()
        if len(self._left) < len(buffer):
            raise BrokenOffError(f"the server closed a body {len(buffer) - len(self._left)} bytes early")
        buffer[:] = self._left[: len(buffer)]
        self._left = self._left[len(buffer) :]

    def close(self) -> None:
        """Forget the bytes."""
        self._left = self._left[:0]
