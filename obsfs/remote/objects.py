"""What is said of objects: their versions, how listings show them, what is in them. No client of any kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

WHOLE_BYTES = 4 << 20
"""An object of up to so many bytes is read whole, since a bucket has no checksum of a part. Each connection may hold
so much in memory until all of it is there and checked."""


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One immutable version of one object: what a block in the cache belongs to. `size` is in bytes."""

    endpoint: str
    bucket: str
    key: str
    etag: str
    size: int
    version_id: str = field(default="", compare=False)
    """By which a bucket with versioning still has it when it was replaced. Its bytes are those of its ETag."""


class ObjectInfo(NamedTuple):
    """An object as a listing or HEAD shows it: size in bytes, mtime in seconds since the epoch."""

    key: str
    size: int
    mtime: float
    etag: str


class Page(NamedTuple):
    """One page of a listing: objects directly under the prefix, and the common prefixes (ending in ``/``)."""

    objects: list[ObjectInfo]
    prefixes: list[str]
    is_last: bool = True


class Content(NamedTuple):
    """A whole object. `age` is how many seconds ago it was written, by the server's own clock."""

    data: bytes
    etag: str
    age: float


def quoted(etag: str) -> str:
    """An ETag as HTTP has it; servers leave the quotes out here and there, and one version must have one name."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag
