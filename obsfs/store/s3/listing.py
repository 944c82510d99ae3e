"""Pages of a listing, asked for in whichever way a server knows: ListObjectsV2, or the older ListObjects (V1).

A server that does not know ``list-type=2`` ignores it and answers as V1 does: there is more, and no token that leads
to it. Then the next page is asked for by the last name (``marker``). A listing that does not advance ends with an
error, so that no server can keep anybody asking for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from obsfs.errors import RefusedError
from obsfs.store.s3.failures import map_errors
from obsfs.store.types import ObjectInfo, Page, epoch, tag

_MAX_EMPTY_PAGES = 100
"""Empty pages in a row; S3 sends one here and there, where what was deleted has left gaps."""


def pages(
    client: Callable[[int], Any],
    ask: Callable[[Callable[[int], tuple[int, bool, dict[str, Any]]]], tuple[int, bool, dict[str, Any]]],
    bucket: str,
    prefix: str,
    *,
    what: str,
    page_size: int,
    delimiter: str,
) -> Iterator[Page]:
    """Yield the pages of what lies under `prefix`, in the server's order.

    Args:
        client: Gives botocore's client for an endpoint, by its number.
        ask: Asks the endpoints, known by their numbers, until one can answer.
        bucket: The bucket's name.
        prefix: What all keys begin with.
        what: The place, as an error names it.
        page_size: Names in a page, at most.
        delimiter: At which deeper keys are rolled up; empty to list them all.

    Raises:
        RefusedError: The server sends a page that does not lead on.
        ObsfsError: What the server says.
    """
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": page_size}
    if delimiter:
        request["Delimiter"] = delimiter
    on: dict[str, str] = {}
    asked, by_marker, last, empty = -1, False, "", 0
    seen: set[int] = set()

    def ask_page(number: int) -> tuple[int, bool, dict[str, Any]]:
        with map_errors(what):
            if by_marker:
                return number, True, client(number).list_objects(**request, Marker=last)
            # A token is understood by the endpoint that gave it; another one goes on after the last name.
            place = on if number == asked else {"StartAfter": last} if last else {}
            return number, False, client(number).list_objects_v2(**request, **place)

    while True:
        number, was_marked, answer = ask(ask_page)
        listed, shared = answer.get("Contents", ()), answer.get("CommonPrefixes", ())
        objects = [
            ObjectInfo(entry["Key"], entry["Size"], modified, tag(entry.get("ETag"), modified))
            for entry in listed
            if entry["Key"].startswith(prefix)
            for modified in (epoch(entry.get("LastModified")),)
        ]
        prefixes = [entry["Prefix"] for entry in shared if entry["Prefix"].startswith(prefix)]
        bad = answer.get("BadEntries", 0) + len(listed) - len(objects) + len(shared) - len(prefixes)
        is_last = not answer.get("IsTruncated")
        if was_marked:
            # A server that takes the marker as the first name of a page, not as the last one before it.
            objects = [info for info in objects if info.key != last]
            prefixes = [name for name in prefixes if name != last]
        yield Page(objects, prefixes, is_last, bad)
        if is_last:
            return
        names = [info.key for info in objects] + prefixes
        empty = 0 if names else empty + 1
        token = answer.get("NextContinuationToken", "")
        end = max([info.key for info in objects[-1:]] + prefixes[-1:], default=last)
        if token:
            goes_on = hash((number, token)) not in seen and (not names or end != last)
            seen.add(hash((number, token)))
        else:
            end = max(end, answer.get("NextMarker", ""))
            by_marker, goes_on = True, end > last
        if not goes_on or empty > _MAX_EMPTY_PAGES:
            raise RefusedError(
                f"the server lists {what} without an end: a page leads to itself",
                "the server pages wrongly; see whether it has a newer version, or a setting for ListObjectsV2",
            )
        asked, on, last = number, {"ContinuationToken": token}, end
