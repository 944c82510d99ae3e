"""One file of a publication: where it comes from, its hashes, and how far its upload is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from obsfs.library.catalog import Model
from obsfs.library.manifest import File
from obsfs.library.transfer import OrderedHash, WorkerPool
from obsfs.store.parts import COPY_PART, PART, parts_etag
from obsfs.store.types import ObjectVersion, Part, PutResult

_DIGEST = re.compile(r'"[0-9a-f]{32}(-\d+)?"')


class PublishSource(Protocol):
    """A file to publish. `size` is in bytes; `sha256` (hex) is what its origin says, or empty."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    def read(self, offset: int, size: int) -> bytes:
        """Return exactly these bytes. Raises ObsfsError."""
        ...


@dataclass
class FileUpload:
    """A file on its way into the bucket, as object `key`.

    It ends in one of three ways: *kept* (the object is there already), *copied* from a file of another version inside
    the server, or sent. `written` is set once the object is there.
    """

    source: PublishSource
    key: str
    sha256: str = ""
    upload: str = ""
    """Id of its multipart upload; empty if it has none."""
    part: int = PART
    """Bytes in a part."""
    had: dict[int, Part] = field(default_factory=dict)
    """Parts that the server has from an earlier try, by their numbers."""
    etags: dict[int, str] = field(default_factory=dict)
    """Of the parts that are done, by their numbers."""
    digest: OrderedHash | None = None
    kept: PutResult | None = None
    copied: tuple[Model, File] | None = None
    copy_md5s: list[str] = field(default_factory=list)
    """The ETag that each part must have if the server copies it correctly (MD5, hex)."""
    has_md5_etag: bool = False
    """Whether the object to copy is known to have an ETag that is made of MD5s."""
    written: PutResult | None = None

    @property
    def path(self) -> str:
        """Its path in the model."""
        return self.source.path

    @property
    def size(self) -> int:
        """Bytes."""
        return self.source.size

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """Yield index (from 0), offset and size of each part, in bytes."""
        for index, offset in enumerate(range(0, self.size, self.part)):
            yield index, offset, min(self.part, self.size - offset)

    def original(self, endpoint: str) -> ObjectVersion:
        """Return the object version that it is to be a copy of."""
        assert self.copied is not None
        model, file = self.copied
        return model.version_of(file, endpoint)


class FileHashes(NamedTuple):
    """Hashes of a whole file."""

    sha256: str
    etag: str
    """The ETag that the object has if we upload it (hex, without quotes)."""
    copy_part: int
    """Bytes in a part that is copied inside the server."""
    copy_md5s: list[str]
    """MD5 (hex) of each of those parts."""


def hash_file(file: FileUpload, pool: WorkerPool) -> FileHashes:
    """Read a whole file and return its hashes. Raises ObsfsError."""
    sha, copied = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    parts, copies = [], []
    size = file.part if file.size > PART else max(file.size, 1)
    copy_part = size * max(1, COPY_PART // size)
    for offset in range(0, max(file.size, 1), size):
        data = pool.retried(lambda offset=offset: file.source.read(offset, min(size, file.size - offset)))  # type: ignore[misc]
        sha.update(data)
        parts.append(hashlib.md5(data, usedforsecurity=False).digest())
        copied.update(data)
        if (offset + size) % copy_part == 0 or offset + size >= file.size:
            copies.append(copied.hexdigest())
            copied = hashlib.md5(usedforsecurity=False)
    return FileHashes(sha.hexdigest(), parts_etag(parts), copy_part, copies)


def digest_kind(etag: str) -> str:
    """Return which kind of digest an ETag (with its quotes) is: ``md5`` of one piece, ``md5-N`` of N parts, or ""."""
    match = _DIGEST.fullmatch(etag)
    return f"md5{match[1] or ''}" if match else ""
