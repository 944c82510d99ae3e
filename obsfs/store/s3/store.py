""":class:`S3Store`: a bucket that is spoken to in S3's protocol, through botocore.

Every failure becomes one of :mod:`obsfs.errors`, so that no package above knows botocore.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from obsfs.errors import BrokenOffError, ExistsError, UnavailableError, UsageError, VersionChangedError
from obsfs.settings import Settings
from obsfs.store.address import Address
from obsfs.store.base import MAX_SMALL, PAGE_SIZE, Capabilities, StoreStats
from obsfs.store.bounds import MAX_SIZE, parse_count, read_at_most
from obsfs.store.checksums import Checksum, checksum_from_headers
from obsfs.store.credentials import Keys
from obsfs.store.failover import Failover
from obsfs.store.parts import PART
from obsfs.store.s3.endpoint import Endpoint, EndpointPool
from obsfs.store.s3.failures import map_errors
from obsfs.store.s3.listing import pages
from obsfs.store.s3.pins import Pin
from obsfs.store.s3.ranges import CheckedBody, RangeAnswer, RangeBody, wrong_bytes
from obsfs.store.types import (
    WHOLE_BYTES,
    ObjectBody,
    ObjectInfo,
    ObjectVersion,
    Page,
    Part,
    PutResult,
    epoch,
    quote_etag,
    version_tag,
)

log = logging.getLogger(__name__)


class S3Store:
    """A bucket behind one or several endpoints; implements :class:`~obsfs.store.base.ObjectStore`, which describes
    the methods.

    Several endpoints are taken to hold the same objects (:mod:`obsfs.store.replicas`). Versions carry the name of the
    first one, whichever serves them, and all changes go to it.
    """

    def __init__(
        self, address: Address, settings: Settings, *, keys: Keys | None = None, is_known: bool = False
    ) -> None:
        """Open a bucket; see :func:`obsfs.store.open_store`."""
        self.address = address
        self._md5_etags = settings.md5_etags
        self._pool = EndpointPool(address, settings, keys, is_known=is_known)
        self._failover: Failover[Endpoint] = Failover(self._pool, settings.retry_timeout, has_answered=is_known)
        self.endpoint: str = self._pool[0].url

    @property
    def name(self) -> str:
        """The bucket's name."""
        return self.address.bucket

    @property
    def capabilities(self) -> Capabilities:
        """What the first endpoint can do."""
        return self._pool[0].capabilities

    def stats(self) -> StoreStats:
        """Return what was counted."""
        return self._failover.stats()

    def _what(self, key: str, bucket: str = "") -> str:
        return f"{self.address.scheme}://{bucket or self.name}/{key}"

    # names

    def check(self) -> Page:
        """Return the first page of the address."""
        return next(self.list(self.address.prefix))

    def list(self, prefix: str, *, page_size: int = PAGE_SIZE, delimiter: str = "/") -> Iterator[Page]:
        """Yield pages of what lies under `prefix`."""
        return pages(
            self._failover.ask, self.name, prefix, what=self._what(prefix), page_size=page_size, delimiter=delimiter
        )

    def walk(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield all objects under a prefix."""
        bad = 0
        for page in self.list(prefix, delimiter=""):
            bad += page.bad
            yield from page.objects
        if bad:
            log.warning("left out entries of the listing of %s that cannot be read: %d", self._what(prefix), bad)

    def head(self, key: str) -> ObjectInfo:
        """Return the object at `key` as it is now."""

        def ask(endpoint: Endpoint) -> dict[str, Any]:
            with map_errors(self._what(key)):
                answer: dict[str, Any] = endpoint.client.head_object(Bucket=self.name, Key=key)
            return answer

        answer = self._failover.ask(ask)
        size, modified = answer.get("ContentLength", -1), epoch(answer.get("LastModified"))
        if not 0 <= size <= MAX_SIZE:
            raise UnavailableError(f"the server does not say how large {self._what(key)} is")
        return ObjectInfo(key, size, modified, version_tag(answer.get("ETag"), modified))

    def list_versions(self, key: str) -> Iterator[ObjectBody]:
        """Yield the versions of a small object, the newest first."""
        with map_errors(self._what(key)):
            answer = self._pool[0].client.list_object_versions(Bucket=self.name, Prefix=key)
            versions = [version for version in answer.get("Versions", ()) if version["Key"] == key]
            for version in sorted(versions, key=lambda version: epoch(version.get("LastModified")), reverse=True):
                if (version.get("VersionId") or "null") != "null":
                    got = self._pool[0].get(self.name, key, pin=Pin(version_id=version["VersionId"]))
                    yield self._read_whole(got, key, MAX_SMALL)

    def version(self, info: ObjectInfo) -> ObjectVersion:
        """Return the identity of what `info` describes."""
        etag = info.etag or version_tag(None, info.mtime)
        return ObjectVersion(self.endpoint, self.name, info.key, etag, info.size, modified=info.mtime)

    # bytes

    def get(self, key: str, *, max_bytes: int = MAX_SMALL) -> ObjectBody:
        """Read a small object whole, as it is now."""

        def ask(endpoint: Endpoint) -> ObjectBody:
            with map_errors(self._what(key)):
                return self._read_whole(endpoint.get(self.name, key), key, max_bytes)

        return self._failover.ask(ask, may_lag=True)

    def _read_whole(self, answer: RangeAnswer, key: str, max_bytes: int) -> ObjectBody:
        """Read a whole object and check it: here and not by botocore, which does not check MD5 ETags."""
        length = parse_count(answer.headers.get("content-length"))
        with closing(answer.stream) as stream:
            data = read_at_most(stream, max_bytes) if (length or 0) <= max_bytes else None
        if data is None:
            raise UsageError(f"{self._what(key)} is too large to be what it should be", "look at it")
        if length is not None and len(data) != length:
            raise BrokenOffError(f"the server closed the body of {key} early")
        checksum = self._checksum_of(answer.headers)
        if checksum and not checksum.is_of(data):
            raise wrong_bytes(self._what(key), checksum)
        return ObjectBody(data, answer.headers)

    def open_range(self, version: ObjectVersion, start: int, stop: int) -> RangeBody | CheckedBody:
        """Ask for the bytes ``[start, stop)`` of exactly this version, once.

        The answer is checked, whatever its status: Content-Range, length and ETag must be those that were asked for.
        """
        return self._failover.ask_once(lambda endpoint: self._open_range(endpoint, version, start, stop), may_lag=True)

    def read_range(self, version: ObjectVersion, start: int, stop: int) -> bytes:
        """Return the bytes that `open_range` reads; ask again while the server does not answer."""
        if stop <= start:
            return b""

        def ask(endpoint: Endpoint) -> bytes:
            buffer = bytearray(stop - start)
            with closing(self._open_range(endpoint, version, start, stop)) as body:
                body.readinto(memoryview(buffer))
            return bytes(buffer)

        return self._failover.ask(ask, may_lag=True)

    def _open_range(self, endpoint: Endpoint, version: ObjectVersion, start: int, stop: int) -> RangeBody | CheckedBody:
        what = self._what(version.key, version.bucket)
        # S3 sends no checksum with a range, whatever it covers.
        is_whole = (start, stop) == (0, version.size) and stop <= WHOLE_BYTES
        span = "" if is_whole else f"bytes={start}-{stop - 1}"
        pin = Pin.of(version)
        with map_errors(what, pinned=True):
            answer = endpoint.get(version.bucket, version.key, span, pin)
            is_framed = pin.check_range(answer.headers, range(start, stop), what, answer.stream)
            on_failure = partial(self._failover.failed, endpoint.number)
            body = RangeBody(answer.stream, stop - start, on_failure, is_framed=is_framed)
        checksum = self._checksum_of(answer.headers) if is_whole else None
        return CheckedBody(body, stop, checksum, what) if checksum else body

    def checksum(self, version: ObjectVersion) -> Checksum | None:
        """Return the checksum that the server has of all bytes of this version, if any."""
        pin, what = Pin.of(version), self._what(version.key, version.bucket)

        def ask(endpoint: Endpoint) -> Mapping[str, str]:
            with map_errors(what, pinned=True):
                answer = endpoint.client.head_object(
                    Bucket=version.bucket, Key=version.key, **pin.options, **endpoint.checksum_options
                )
                headers: Mapping[str, str] = answer["ResponseMetadata"]["HTTPHeaders"]
                pin.check_version(headers, what)
            return headers

        return self._checksum_of(self._failover.ask(ask, may_lag=True))

    def _checksum_of(self, headers: Mapping[str, str]) -> Checksum | None:
        return checksum_from_headers(headers, md5_etags=self._md5_etags)

    # changes

    @property
    def _writer(self) -> Any:
        """botocore's client for the first endpoint; asked for each time, as the endpoint may be replaced."""
        return self._pool[0].client

    def put(self, key: str, data: bytes, *, new: bool = False) -> PutResult:
        """Write a whole object."""
        condition = {"IfNoneMatch": "*"} if new else {}
        # The server checks what it received: SeaweedFS was seen to keep an empty object of a killed client.
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        try:
            with map_errors(self._what(key)):
                answer = self._writer.put_object(Bucket=self.name, Key=key, Body=data, ContentMD5=digest, **condition)
        except VersionChangedError:
            raise ExistsError(f"{key} is there already") from None
        return _put_result(answer)

    def put_file(self, key: str, size: int, read: Callable[[int, int], bytes], md5: bytes) -> PutResult:
        """Write a whole object that does not fit into memory."""
        digest = base64.b64encode(md5).decode()
        body = io.BufferedReader(_Body(size, read), PART)
        with map_errors(self._what(key)):
            answer = self._writer.put_object(Bucket=self.name, Key=key, Body=body, ContentMD5=digest)
        return _put_result(answer)

    def create_upload(self, key: str) -> str:
        """Begin a multipart upload."""
        with map_errors(self._what(key)):
            upload: str = self._writer.create_multipart_upload(Bucket=self.name, Key=key)["UploadId"]
        return upload

    def upload_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """Send part `number` of an upload."""
        with map_errors(self._what(key)):
            answer = self._writer.upload_part(Bucket=self.name, Key=key, UploadId=upload, PartNumber=number, Body=data)
        # A server without ETags takes the one that it should have sent.
        return quote_etag(answer.get("ETag", "")) or quote_etag(hashlib.md5(data, usedforsecurity=False).hexdigest())

    def list_uploads(self, prefix: str) -> Sequence[tuple[str, str]]:
        """Return key and id of each unfinished upload under a prefix."""
        uploads: list[tuple[str, str]] = []
        found_pages = self._writer.get_paginator("list_multipart_uploads").paginate(Bucket=self.name, Prefix=prefix)
        with map_errors(self._what(prefix)):
            for page in found_pages:
                uploads += ((upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", ()))
        return uploads

    def list_parts(self, key: str, upload: str) -> dict[int, Part]:
        """Return the parts of an upload by their numbers."""
        parts: dict[int, Part] = {}
        marker = 0
        while True:
            with map_errors(self._what(key)):
                answer = self._writer.list_parts(Bucket=self.name, Key=key, UploadId=upload, PartNumberMarker=marker)
            for part in answer.get("Parts", ()):
                parts[part["PartNumber"]] = Part(part["Size"], part.get("ETag", ""))
            following = max(answer.get("NextPartNumberMarker", 0), *parts, 0, 0)
            if not answer.get("IsTruncated") or following <= marker:
                return parts
            marker = following

    def complete_upload(self, key: str, upload: str, etags: Mapping[int, str]) -> PutResult:
        """Make an object of the parts with these numbers and ETags."""
        parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
        with map_errors(self._what(key)):
            answer = self._writer.complete_multipart_upload(
                Bucket=self.name, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        return _put_result(answer)

    def abort_upload(self, key: str, upload: str) -> None:
        """Drop an upload and its parts."""
        with map_errors(self._what(key)):
            self._writer.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload)

    def copy(self, source: ObjectVersion, key: str) -> PutResult:
        """Copy exactly this version inside the server."""
        with map_errors(source.key, pinned=True):
            answer = self._writer.copy_object(Bucket=self.name, Key=key, **_copy_source(source))
        return PutResult(quote_etag(answer.get("CopyObjectResult", {}).get("ETag", "")), answer.get("VersionId", ""))

    def upload_part_copy(self, key: str, upload: str, number: int, source: ObjectVersion, span: range) -> str:
        """Copy a span of bytes of exactly this version as part `number`."""
        with map_errors(source.key, pinned=True):
            answer = self._writer.upload_part_copy(
                Bucket=self.name,
                Key=key,
                UploadId=upload,
                PartNumber=number,
                CopySourceRange=f"bytes={span.start}-{span.stop - 1}",
                **_copy_source(source),
            )
        return quote_etag(answer.get("CopyPartResult", {}).get("ETag", ""))

    def delete(self, *keys: str) -> None:
        """Delete objects."""
        for key in keys:
            with map_errors(self._what(key)):
                self._writer.delete_object(Bucket=self.name, Key=key)


class _Body(io.RawIOBase):
    """The body of a request, read from its source while it is sent."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._source, self._offset = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        return self._offset

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(self._size - self._offset, len(buffer)))
        buffer[:count] = self._source(self._offset, count) if count else b""
        self._offset += count
        return count


def _copy_source(source: ObjectVersion) -> dict[str, Any]:
    pins = {f"CopySource{name}": value for name, value in Pin.of(source).options.items() if name != "VersionId"}
    return {"CopySource": {"Bucket": source.bucket, "Key": source.key}, **pins}


def _put_result(answer: Mapping[str, Any]) -> PutResult:
    return PutResult(quote_etag(answer.get("ETag", "")), answer.get("VersionId", ""))
