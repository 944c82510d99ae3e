"""What is said of objects: their versions, how listings show them, what is in them. No client of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

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
    """A whole object, and the headers that it came with."""

    data: bytes
    headers: Mapping[str, str]

    @property
    def etag(self) -> str:
        """As the server gave it."""
        return self.headers.get("etag", "")

    @property
    def age(self) -> float:
        """How many seconds ago it was written, by the server's own clock. (Few ask, and dates are slow to read.)"""
        now, then = (self.headers.get(name) for name in ("date", "last-modified"))
        return max(0.0, (parse_time(now) - parse_time(then)).total_seconds()) if now and then else 0.0


def quoted(etag: str) -> str:
    """An ETag as HTTP has it; servers leave the quotes out here and there, and one version must have one name."""
    return f'"{etag}"' if etag and not etag.endswith('"') else etag


def parse_time(value: Any) -> datetime:
    """A time as botocore reads it, whose own way to do so takes four fifths of the computing for a page of names."""
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        from botocore.utils import parse_timestamp  # large, and not needed for what servers usually say

        return cast(datetime, parse_timestamp(value))
    return found if found.tzinfo else found.replace(tzinfo=UTC)
