"""Types that describe objects: versions, listings, bodies, results of writes. How ETags and times are read. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

WHOLE_BYTES = 4 << 20
"""Bytes of an object that is read whole, because a server has no checksum of a part. Each connection may hold as many
in memory until all have arrived and are checked."""


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One immutable version of one object: what a block in the cache belongs to."""

    endpoint: str
    bucket: str
    key: str
    etag: str
    size: int
    version_id: str = field(default="", compare=False)
    """Of a bucket with versioning, which keeps the version after it was replaced; else empty."""
    modified: float = field(default=0.0, compare=False)
    """When it was written, in seconds since the epoch; 0 if unknown. Pins it where answers have no ETag."""


class ObjectInfo(NamedTuple):
    """An object as a listing or HEAD shows it."""

    key: str
    size: int
    """In bytes."""
    mtime: float
    """In seconds since the epoch; 0 if unknown."""
    etag: str
    """As `version_tag` returns it."""


class Page(NamedTuple):
    """One page of a listing: objects directly under the prefix, and common prefixes (ending in ``/``)."""

    objects: list[ObjectInfo]
    prefixes: list[str]
    is_last: bool = True
    bad: int = 0
    """Entries that cannot be read, and are left out."""

    @property
    def last_name(self) -> str:
        """The last object or common prefix; empty in a page without any."""
        return max([info.key for info in self.objects[-1:]] + self.prefixes[-1:], default="")


class ObjectBody(NamedTuple):
    """A whole object, and the headers that it came with."""

    data: bytes
    headers: Mapping[str, str]

    @property
    def etag(self) -> str:
        """The ETag, or what stands for it (see `version_tag`)."""
        return version_tag(self.headers.get("etag"), last_modified(self.headers))

    @property
    def age(self) -> float:
        """How many seconds ago it was written, by the server's own clock. Parsed on demand: dates are slow to read."""
        try:
            now, then = (parse_timestamp(self.headers[name]) for name in ("date", "last-modified"))
            # Go's zero time, of the year 1, is no date.
            return max(0.0, (now - then).total_seconds()) if then.year >= _UNIX_YEAR else 0.0
        except (KeyError, ValueError):
            return 0.0


class PutResult(NamedTuple):
    """An object that was written."""

    etag: str
    """As HTTP has it, in quotes; empty where the server does not send it."""
    version_id: str
    """Empty where the bucket keeps no versions."""


class Part(NamedTuple):
    """A part of an upload that the server has."""

    size: int
    """In bytes."""
    etag: str


_MODIFIED = "last-modified:"
"""Begins the tag of an object without an ETag. The rest is its Last-Modified, in whole seconds as HTTP has it."""


def quote_etag(etag: str) -> str:
    """Return an ETag in quotes, as HTTP has it; empty for an empty one.

    Some servers leave the quotes out, and one version must have one name.
    """
    if not etag.strip('"'):
        return ""
    return etag if etag.endswith('"') else f'"{etag}"'


def version_tag(etag: str | None, modified: float) -> str:
    """Return the name of a version: its ETag, or if the server has none, when it was written.

    Args:
        etag: As the server sent it, with or without quotes, or None.
        modified: Last-Modified, in seconds since the epoch; 0 if unknown.
    """
    return quote_etag(etag or "") or f"{_MODIFIED}{int(modified)}"


def modified_of(etag: str) -> int | None:
    """Return the Last-Modified in a tag, in seconds since the epoch; None if the tag is an ETag."""
    found = etag.removeprefix(_MODIFIED)
    return int(found) if found != etag and found.lstrip("-").isdecimal() else None


def last_modified(headers: Mapping[str, str]) -> float:
    """Return the Last-Modified of an answer in seconds since the epoch; 0 if it has none that can be read."""
    try:
        return epoch(parse_timestamp(headers["last-modified"]))
    except (KeyError, ValueError):
        return 0.0


MAX_TIME = 253402300799.0
"""Seconds since the epoch: the end of the year 9999."""


def epoch(value: datetime | None) -> float:
    """Return seconds since the epoch; 0 for an unknown time, or an earlier one (Go's zero time is of the year 1)."""
    try:
        return min(max(value.timestamp(), 0.0), MAX_TIME) if value else 0.0
    except (ValueError, OverflowError, OSError):
        return 0.0


_UNIX_YEAR = 1970
MAX_DATE = 64
"""Characters of a date."""
_HTTP_DATE = re.compile(r"[A-Z][a-z]{2}, ([0-9]{2}) ([A-Z][a-z]{2}) ([0-9]{4}) ([0-9]{2}):([0-9]{2}):([0-9]{2}) GMT")
"""RFC 9110, section 5.6.7. Others read the year 0001, which servers written in Go send for none, as 2001."""
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def parse_timestamp(value: Any) -> datetime:
    """Return a time as botocore reads it, faster: its own parser takes four fifths of the CPU time of a listing.

    Raises:
        ValueError: It is not a time.
    """
    if len(str(value)) > MAX_DATE:
        raise ValueError("too long for a date")
    if (said := _HTTP_DATE.fullmatch(str(value))) and said[2] in _MONTHS:
        day, year, hour, minute, second = (int(said[number]) for number in (1, 3, 4, 5, 6))
        return datetime(year, _MONTHS.index(said[2]) + 1, day, hour, minute, second, tzinfo=UTC)
    try:
        found = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        from botocore.utils import (
            parse_timestamp as parse_by_botocore,  # large, and not needed for what servers usually say
        )

        try:
            found = cast(datetime, parse_by_botocore(value))
        except Exception as error:  # it asks dateutil at last, which raises whatever happens to it
            raise ValueError(f"{value!r} is no date") from error
    return found if found.tzinfo else found.replace(tzinfo=UTC)
