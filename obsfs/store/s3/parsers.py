"""Bound what botocore's client reads: answers of limited length, without fields that it cannot parse.

botocore reads a body of any length into memory, and one field that it cannot parse (a size, a date) costs the whole
page. Its public events run before it: ``before-send`` receives the body, ``before-parse`` reads listings by
:mod:`obsfs.store.bounds` and leaves out entries that cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from botocore.awsrequest import AWSResponse

from obsfs.errors import BrokenOffError, ObsfsError
from obsfs.store.bounds import (
    MAX_ANSWER,
    MAX_ERROR,
    drop_unreadable,
    parse_count,
    parse_listing,
    read_at_most,
    read_start,
    too_long,
)

_LISTINGS = {
    "ListObjectsV2": "ListBucketResult",
    "ListObjects": "ListBucketResult",
    "ListObjectVersions": "ListVersionsResult",
    "ListParts": "ListPartsResult",
}
"""Operations whose answers are read here, and the name of the outermost element of each."""
_OK = range(200, 300)
_EMPTY = b"<Empty/>"


class _Body:
    """A body that has been received, for :class:`~botocore.awsrequest.AWSResponse`."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def stream(self, **_: object) -> Iterator[bytes]:
        yield self._data


def install_bounds(client: Any, session: Any) -> None:
    """Have an S3 client of botocore send its requests by `session`, and bound what it reads.

    Args:
        client: A client for S3.
        session: A ``botocore.httpsession.URLLib3Session`` for the same endpoint.
    """

    def send(request: Any, **_: object) -> Any:
        is_streamed, request.stream_output = request.stream_output, True
        answer = session.send(request)
        if answer.status_code not in _OK:
            data = read_start(answer.raw, MAX_ERROR)
        elif is_streamed:
            return answer
        else:
            data = _whole(request, answer)
        return AWSResponse(answer.url, answer.status_code, answer.headers, _Body(data))

    def read(
        operation_model: Any, response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: object
    ) -> None:
        if response_dict["status_code"] not in _OK:
            return
        drop_unreadable(response_dict["headers"], _header_kinds(operation_model))
        root = _LISTINGS.get(operation_model.name)
        if root is not None:
            customized_response_dict.update(parse_listing(response_dict["body"], root))
            response_dict["body"] = _EMPTY

    client.meta.events.register("before-send.s3", send)
    client.meta.events.register_last("before-parse.s3", read)


def _whole(request: Any, answer: AWSResponse) -> bytes:
    data = read_at_most(answer.raw, MAX_ANSWER)
    if data is None:
        raise too_long(_place(request), MAX_ANSWER)
    if b"<!ENTITY" in data:
        raise ObsfsError(f"the server's answer to {_place(request)} defines entities", "this is no S3 server's")
    length = parse_count(answer.headers.get("content-length"))
    if length is not None and len(data) < length and request.method != "HEAD":
        raise BrokenOffError("the server closed a body early")
    return data


def _place(request: Any) -> str:
    """Return the URL of a request without its query, which may hold a signature."""
    return str(request.url).partition("?")[0]


def _header_kinds(operation_model: Any) -> dict[str, str]:
    """Return the headers of an operation's answer that botocore reads as numbers or dates, with their types."""
    shape = operation_model.output_shape
    members = shape.members.values() if shape is not None else ()
    return {
        member.serialization["name"].lower(): member.type_name
        for member in members
        if member.serialization.get("location") == "header" and member.type_name in ("integer", "long", "timestamp")
    }
