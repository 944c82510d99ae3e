"""Pages of a listing, by the version of the API that the server knows: ListObjectsV2, or ListObjects (V1).

A server that does not know ``list-type=2`` ignores it and answers as V1 does: the listing is truncated, and there is no
continuation token. Then the next page is asked for by the last name (``marker``). A listing that does not advance ends
with an error, so that no server can keep a client asking forever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from obsfs.errors import RefusedError
from obsfs.store.s3.endpoint import Endpoint
from obsfs.store.s3.failures import map_errors
from obsfs.store.types import ObjectInfo, Page, epoch, version_tag

_MAX_EMPTY_PAGES = 100
"""Empty pages in a row. S3 sends one now and then, where deleted objects have left gaps."""


class _Answer(NamedTuple):
    """One page, as a server sent it."""

    endpoint: int
    """The number of the endpoint: only it understands its continuation token."""
    by_marker: bool
    """Asked for by V1."""
    fields: Mapping[str, Any]
    """botocore's."""


def pages(
    ask: Callable[[Callable[[Endpoint], _Answer]], _Answer],
    bucket: str,
    prefix: str,
    *,
    what: str,
    page_size: int,
    delimiter: str,
) -> Iterator[Page]:
    """Yield the pages of what lies under `prefix`, in the server's order.

    Args:
        ask: Asks the endpoints until one can answer.
        bucket: The bucket's name.
        prefix: What all keys begin with.
        what: The listing, as an error names it.
        page_size: Names in a page, at most.
        delimiter: Where deeper keys are rolled up; empty to list them all.

    Raises:
        RefusedError: The server sends a page that does not lead to the next one.
        ObsfsError: As `ask`.
    """
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": page_size}
    if delimiter:
        request["Delimiter"] = delimiter
    continuation: dict[str, str] = {}
    last_endpoint, by_marker, last_name, empty_pages = -1, False, "", 0
    seen: set[int] = set()

    def ask_page(endpoint: Endpoint) -> _Answer:
        with map_errors(what):
            if by_marker:
                return _Answer(endpoint.number, True, endpoint.client.list_objects(**request, Marker=last_name))
            # A token is understood by the endpoint that gave it; another one continues after the last name.
            after = {"StartAfter": last_name} if last_name else {}
            start = continuation if endpoint.number == last_endpoint else after
            return _Answer(endpoint.number, False, endpoint.client.list_objects_v2(**request, **start))

    while True:
        answer = ask(ask_page)
        page = _read(answer, prefix, last_name)
        yield page
        if page.is_last:
            return
        names = [info.key for info in page.objects] + page.prefixes
        empty_pages = 0 if names else empty_pages + 1
        token = answer.fields.get("NextContinuationToken", "")
        end = max([info.key for info in page.objects[-1:]] + page.prefixes[-1:], default=last_name)
        if token:
            advances = hash((answer.endpoint, token)) not in seen and (not names or end != last_name)
            seen.add(hash((answer.endpoint, token)))
        else:
            end = max(end, answer.fields.get("NextMarker", ""))
            by_marker, advances = True, end > last_name
        if not advances or empty_pages > _MAX_EMPTY_PAGES:
            raise RefusedError(
                f"the server lists {what} without an end: a page leads to itself",
                "the server pages wrongly; see whether it has a newer version, or a setting for ListObjectsV2",
            )
        last_endpoint, continuation, last_name = answer.endpoint, {"ContinuationToken": token}, end


def _read(answer: _Answer, prefix: str, last_name: str) -> Page:
    """Return the entries of a page that lie under the prefix; the others count as bad."""
    contents, common = answer.fields.get("Contents", ()), answer.fields.get("CommonPrefixes", ())
    objects = [
        ObjectInfo(entry["Key"], entry["Size"], modified, version_tag(entry.get("ETag"), modified))
        for entry in contents
        if entry["Key"].startswith(prefix)
        for modified in (epoch(entry.get("LastModified")),)
    ]
    prefixes = [entry["Prefix"] for entry in common if entry["Prefix"].startswith(prefix)]
    bad = answer.fields.get("BadEntries", 0) + len(contents) - len(objects) + len(common) - len(prefixes)
    if answer.by_marker:
        # Some servers take the marker as the first name of a page, and not as the last one before it.
        objects = [info for info in objects if info.key != last_name]
        prefixes = [name for name in prefixes if name != last_name]
    return Page(objects, prefixes, not answer.fields.get("IsTruncated"), bad)
