"""Bounds on what a server sends: numbers, dates, headers, bodies, listings. No I/O but the reading of bodies.

A value out of bounds is None, or costs its entry of a listing; it never costs the other entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, MutableMapping
from datetime import datetime
from typing import Any, Protocol
from xml.etree import ElementTree

from obsfs.errors import ObsfsError, UnavailableError
from obsfs.store.types import parse_timestamp

MAX_SIZE = 1 << 46
"""Bytes of an object: 64 TiB. OBS takes 48.8 TiB, S3 50 TB."""
MAX_ANSWER = 16 << 20
"""Bytes of a listing, or of any other answer that is not an object. A page has 1000 keys of 1024 bytes, each of which
may be escaped in three; with everything else, that is 4 MiB."""
MAX_ERROR = 64 << 10
"""Bytes of an error's answer; the rest is not read."""
_MAX_NUMBER = 1 << 62
_COUNT = re.compile(r"\s*([0-9]{1,19})\s*")
_PIECE = 64 << 10


class Stream(Protocol):
    """A body that is being received, such as urllib3's."""

    def read(self, size: int, /) -> bytes: ...
    def close(self) -> None: ...


def parse_count(text: str | None, max_value: int = _MAX_NUMBER) -> int | None:
    """Return a decimal number from 0 to `max_value`; None for any other text."""
    found = _COUNT.fullmatch(text or "")
    number = int(found[1]) if found else -1
    return number if 0 <= number <= max_value else None


def parse_date(text: Any) -> datetime | None:
    """Return a date as botocore reads it; None if it cannot be read."""
    try:
        return parse_timestamp(text)
    except ValueError:
        return None


def read_at_most(stream: Stream, max_bytes: int) -> bytes | None:
    """Return all of a body; None if it has more than `max_bytes` bytes, and then close it."""
    pieces: list[bytes] = []
    left = max_bytes
    while piece := stream.read(_PIECE):
        left -= len(piece)
        if left < 0:
            stream.close()
            return None
        pieces.append(piece)
    return b"".join(pieces)


def read_start(stream: Stream, max_bytes: int) -> bytes:
    """Return the first `max_bytes` bytes of a body; close a longer one."""
    data = b""
    while len(data) < max_bytes and (piece := stream.read(min(_PIECE, max_bytes - len(data)))):
        data += piece
    if len(data) >= max_bytes:
        stream.close()
    return data


def drop_unreadable(headers: MutableMapping[str, str], kinds: Mapping[str, str]) -> None:
    """Remove headers that botocore could not parse.

    Args:
        headers: Of an answer; changed in place.
        kinds: Names of headers, and their types as botocore's model names them.
    """
    for name, kind in kinds.items():
        value = headers.get(name)
        if value is None:
            continue
        if (kind in ("integer", "long") and parse_count(value) is None) or (
            kind == "timestamp" and parse_date(value) is None
        ):
            del headers[name]


def parse_listing(body: bytes, root_name: str) -> dict[str, Any]:
    """Read a listing of objects, versions or parts; the keys of the result are botocore's.

    Args:
        body: XML.
        root_name: The name of the outermost element: a proxy's page must not read as an empty bucket.

    Returns:
        What botocore would return, and ``BadEntries``: how many entries have no key, or an impossible size or number.
        These are left out. A date that cannot be read is None.

    Raises:
        UnavailableError: It cannot be read as a whole.
    """
    try:
        if b"<!DOCTYPE" in body:
            raise ValueError("it has a document type")
        root = ElementTree.fromstring(body)
        if _local(root) != root_name:
            raise ValueError(f"it is a {_local(root)!r}")
    except (ElementTree.ParseError, ValueError, LookupError, RecursionError) as error:
        raise UnavailableError(f"the server's listing cannot be read ({error})") from None
    found: dict[str, Any] = {"BadEntries": 0}
    for element in root:
        name = _local(element)
        if name in _ENTRIES:
            key, read = _ENTRIES[name]
            entry = read({_local(one): one.text or "" for one in element})
            if entry is None:
                found["BadEntries"] += 1
            else:
                found.setdefault(key, []).append(entry)
        elif name == "IsTruncated":
            found[name] = _is_true(element.text)
        elif name == "NextPartNumberMarker":
            if (number := parse_count(element.text)) is not None:
                found[name] = number
        elif name in _TEXTS and element.text:
            found[name] = element.text
    return found


_TEXTS = frozenset({
    "Name", "Prefix", "Delimiter", "EncodingType", "Marker", "NextMarker", "StartAfter", "ContinuationToken",
    "NextContinuationToken", "KeyMarker", "VersionIdMarker", "NextKeyMarker", "NextVersionIdMarker", "Key", "UploadId",
})  # fmt: skip


_KEPT = ("Key", "ETag", "StorageClass", "VersionId")


def _object(fields: dict[str, str]) -> dict[str, Any] | None:
    size = parse_count(fields.get("Size"), MAX_SIZE)
    if not fields.get("Key") or size is None:
        return None
    kept: dict[str, Any] = {name: fields[name] for name in _KEPT if name in fields}
    if "IsLatest" in fields:
        kept["IsLatest"] = _is_true(fields["IsLatest"])
    return {**kept, "Size": size, "LastModified": parse_date(fields.get("LastModified", ""))}


def _is_true(text: str | None) -> bool:
    return (text or "").strip().lower() == "true"


def _prefix(fields: dict[str, str]) -> dict[str, Any] | None:
    return {"Prefix": fields["Prefix"]} if fields.get("Prefix") else None


def _part(fields: dict[str, str]) -> dict[str, Any] | None:
    number, size = parse_count(fields.get("PartNumber")), parse_count(fields.get("Size"), MAX_SIZE)
    if number is None or size is None or not fields.get("ETag"):
        return None
    return {"PartNumber": number, "Size": size, "ETag": fields["ETag"]}


_ENTRIES: dict[str, tuple[str, Callable[[dict[str, str]], dict[str, Any] | None]]] = {
    "Contents": ("Contents", _object),
    "Version": ("Versions", _object),
    "CommonPrefixes": ("CommonPrefixes", _prefix),
    "Part": ("Parts", _part),
}


def _local(element: ElementTree.Element) -> str:
    """Return the name without its namespace."""
    return str(element.tag).rpartition("}")[2]


def too_long(what: str, max_bytes: int) -> ObsfsError:
    """Return the error of an answer without end, which is no reason to try again."""
    return ObsfsError(f"the server's answer to {what} is longer than {max_bytes >> 20} MiB", "this is no S3 server's")
