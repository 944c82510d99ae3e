"""What obsfs asks of a bucket: the :class:`ObjectStore` protocol, and what a server can do, as data.

:func:`obsfs.store.open_store` returns the implementation for a bucket; :class:`obsfs.store.memory.MemoryStore` is one
for tests. Every failure is one of :mod:`obsfs.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict

from obsfs.store.address import Address
from obsfs.store.checksums import Checksum
from obsfs.store.types import ObjectBody, ObjectInfo, ObjectVersion, Page, Part, PutResult

PAGE_SIZE = 1000
"""Names in a page of a listing; S3 sends no more (ListObjectsV2, MaxKeys)."""
MAX_SMALL = 64 << 20
"""Bytes of an object that is read whole, such as a manifest: one of 100,000 files has 40 MiB."""


@dataclass(frozen=True)
class Capabilities:
    """What is known of a server before it is asked. Where a request may fail all the same, its method says how."""

    list_version: int = 2
    """2: ListObjectsV2 with continuation tokens; 1: ListObjects with markers."""
    url_encoding: bool = True
    """Listings can send keys percent-encoded (``encoding-type=url``), so that any key fits into XML."""
    conditional_put: bool = True
    """``If-None-Match: *`` is honoured, so that only one of several writers creates an object."""
    etag_kinds: frozenset[str] = frozenset({"md5", "parts"})
    """``md5``: an object that was put whole has its MD5 as ETag; ``parts``: one that was uploaded in parts has the MD5
    of their MD5s, and their number; ``opaque``: any other text."""
    part_copy: bool = True
    """Parts of an upload can be copied inside the server (UploadPartCopy)."""
    versions: bool = True
    """The bucket may keep old versions (ListObjectVersions)."""
    rename: bool = False
    """An object can be renamed in one request."""
    append: bool = False
    """Bytes can be appended to an object."""
    checksums: bool = True
    """The server sends ``x-amz-checksum-*`` of a whole object on request."""


class EndpointHealth(TypedDict):
    """What ``obsfs status --json`` shows of an endpoint."""

    endpoint: str
    latency: float | None
    """Moving average of the seconds to the first byte; None while it is unknown."""
    failures: int
    """Failures in a row."""
    lagging: int
    """How often it did not have a version yet."""


class StoreStats(NamedTuple):
    """What a store counts from its start."""

    retries: int
    """Repeated requests for names and small objects."""
    endpoints: list[EndpointHealth]


class RangeReader(Protocol):
    """The body of one range request, read in order. Close it when done, also when it was read in part."""

    def readinto(self, buffer: memoryview, /) -> None:
        """Fill `buffer` whole. Raises UnavailableError when the body stalls, breaks off or ends early."""

    def close(self) -> None:
        """Release the connection."""


class ObjectStore(Protocol):
    """One bucket, and a place in it. Safe to use from many threads.

    Each method raises ObsfsError: UnavailableError is worth another try, every other one is final. Methods that change
    the bucket do not repeat requests by themselves; their callers do.
    """

    address: Address
    """The bucket and the prefix that it was opened with."""
    endpoint: str
    """The URL that names its versions: of the first endpoint, where everything is written."""

    @property
    def name(self) -> str:
        """The bucket's name."""

    @property
    def capabilities(self) -> Capabilities:
        """What the server can do."""

    def stats(self) -> StoreStats:
        """Return what was counted."""

    # names

    def check(self) -> Page:
        """Return the first page of the address. Raises if the bucket does not exist or may not be listed."""

    def list(self, prefix: str, *, page_size: int = PAGE_SIZE, delimiter: str = "/") -> Iterator[Page]:
        """Yield pages of what lies under `prefix`, in the server's order.

        Args:
            prefix: What all keys begin with; empty, or ends with ``/``.
            page_size: Names in a page, at most.
            delimiter: Where deeper keys are rolled up into common prefixes; empty to list all keys.
        """

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield all objects under a prefix, however deep."""

    def head(self, key: str) -> ObjectInfo:
        """Return the object at `key` as it is now. Raises NotFoundError."""

    def list_versions(self, key: str) -> Iterator[ObjectBody]:
        """Yield the versions of a small object that the bucket keeps, the newest first; none if it keeps none."""

    def version(self, info: ObjectInfo) -> ObjectVersion:
        """Return the identity of what `info` describes. Asks nobody."""

    # bytes

    def get(self, key: str, *, max_bytes: int = MAX_SMALL) -> ObjectBody:
        """Read a small object whole, as it is now.

        Raises:
            NotFoundError: It does not exist.
            UsageError: It has more than `max_bytes` bytes.
        """

    def open_range(self, version: ObjectVersion, start: int, stop: int) -> RangeReader:
        """Ask for the bytes ``[start, stop)`` of exactly this version, once.

        The bucket is that of `version`. A small object that is read whole is checked against the server's checksum
        before the first byte is returned.

        Raises:
            VersionChangedError: The object was replaced or deleted.
            UnavailableError: The server does not answer, or sends another range.
        """

    def read_range(self, version: ObjectVersion, start: int, stop: int) -> bytes:
        """Return the bytes that :meth:`open_range` reads; ask again while the server does not answer."""

    def checksum(self, version: ObjectVersion) -> Checksum | None:
        """Return the checksum that the server has of all bytes of this version, if any. Raises as `open_range`."""

    # changes

    def put(self, key: str, data: bytes, *, new: bool = False) -> PutResult:
        """Write a whole object, which appears whole or not at all.

        Args:
            key: Where.
            data: Its bytes.
            new: Refuse to replace an object, if the server can tell (`Capabilities.conditional_put`).

        Raises:
            ExistsError: It exists and should be `new`.
        """

    def put_file(self, key: str, size: int, read: Callable[[int, int], bytes], md5: bytes) -> PutResult:
        """Write a whole object that does not fit into memory.

        Args:
            key: Where.
            size: Its bytes; at most `obsfs.store.parts.MAX_PUT`.
            read: Returns `count` bytes from `offset` on: ``read(offset, count)``.
            md5: The MD5 of all of it (16 bytes), which the server checks.
        """

    def create_upload(self, key: str) -> str:
        """Begin a multipart upload, which nobody sees until it is completed. Returns its id."""

    def upload_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """Send part `number` (from 1) of an upload. Returns its ETag. Raises NotFoundError when the upload is gone."""

    def list_uploads(self, prefix: str) -> Sequence[tuple[str, str]]:
        """Return key and id of each unfinished upload under a prefix, whoever began it."""

    def list_parts(self, key: str, upload: str) -> dict[int, Part]:
        """Return the parts of an upload by their numbers. Raises NotFoundError when the upload is gone."""

    def complete_upload(self, key: str, upload: str, etags: Mapping[int, str]) -> PutResult:
        """Make an object of the parts with these numbers and ETags."""

    def abort_upload(self, key: str, upload: str) -> None:
        """Drop an upload and its parts."""

    def copy(self, source: ObjectVersion, key: str) -> PutResult:
        """Copy exactly this version, a small one, inside the server.

        Some servers copy whichever version is there, and some return no ETag: look at the result.

        Returns:
            The new object; its ETag is empty if the server does not send it.

        Raises:
            VersionChangedError: The version is gone.
            ObsfsError: The server does not copy it.
        """

    def upload_part_copy(self, key: str, upload: str, number: int, source: ObjectVersion, span: range) -> str:
        """Copy a span of bytes of exactly this version as part `number`. Returns its ETag. Raises as `copy`."""

    def delete(self, *keys: str) -> None:
        """Delete objects; keys that do not exist are no error."""
