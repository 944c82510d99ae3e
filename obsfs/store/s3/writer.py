"""The requests that change a bucket: put, multipart uploads, copies, deletes. They all go to its first endpoint.

An object that is put, or completed from parts, appears whole or not at all; until then a multipart upload is seen by
nobody who lists or reads.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from obsfs.errors import ExistsError, VersionChangedError
from obsfs.store.s3.client import Bucket
from obsfs.store.s3.failures import map_errors
from obsfs.store.s3.pins import Pin
from obsfs.store.types import ObjectVersion, quoted

PART = 8 << 20
"""Bytes in a part of an upload."""
_MOST_PARTS = 10_000
"""https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html; OBS has the same limit."""
_MIB = 1 << 20
MAX_PUT = 5 << 30
"""Bytes of an object that is put in one request (the same pages)."""
COPY_PART = 64 << 20
"""Bytes in a part that is copied inside the server: no more than it copies well within a request's timeout."""


class PutResult(NamedTuple):
    """An object that was written. `version_id` is empty where the bucket keeps no versions."""

    etag: str
    version_id: str


class Part(NamedTuple):
    """A part that the server has. `size` in bytes."""

    size: int
    etag: str


def part_size(size: int) -> int:
    """Bytes in each part (but the last) of an object of `size` bytes."""
    least = -(-size // _MOST_PARTS)
    return max(PART, -(-least // _MIB) * _MIB)


def parts_etag(digests: Iterable[bytes]) -> str:
    """The ETag of an object that was uploaded in parts with these MD5 digests; of one, if it was put whole."""
    found = list(digests)
    if len(found) == 1:
        return found[0].hex()
    return f"{hashlib.md5(b''.join(found), usedforsecurity=False).hexdigest()}-{len(found)}"


class _Body(io.RawIOBase):
    """Bytes that are read as they are sent."""

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


class Writer:
    """Writes to a bucket. Safe to use from many threads.

    Raises ForbiddenError when it may not, UnavailableError when it is worth another try.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self._name = bucket.name

    @property
    def _client(self) -> Any:
        return self.bucket.client  # asked each time: the bucket may have learnt where it is

    def _map_errors(self, key: str) -> Any:
        return map_errors(f"{self.bucket.address.scheme}://{self._name}/{key}")

    def put(self, key: str, data: bytes, *, new: bool = False) -> PutResult:
        """Write a whole object. Raises ExistsError when it is there and should be `new`, if the server can tell."""
        condition = {"IfNoneMatch": "*"} if new else {}
        # The server checks what it has received: SeaweedFS was seen to keep an empty object of one who was killed.
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        try:
            with self._map_errors(key):
                answer = self._client.put_object(Bucket=self._name, Key=key, Body=data, ContentMD5=digest, **condition)
        except VersionChangedError:
            raise ExistsError(f"{key} is there already") from None
        return _written(answer)

    def put_file(self, key: str, size: int, read: Callable[[int, int], bytes], md5: bytes) -> PutResult:
        """Write a whole object of any size up to `MAX_PUT`.

        Args:
            key: Where.
            size: Its bytes.
            read: Gives so many bytes from an offset on.
            md5: What all of it must have, which the server checks.
        """
        digest = base64.b64encode(md5).decode()
        body = io.BufferedReader(_Body(size, read), PART)
        with self._map_errors(key):
            answer = self._client.put_object(Bucket=self._name, Key=key, Body=body, ContentMD5=digest)
        return _written(answer)

    def begin(self, key: str) -> str:
        """Begin an upload in parts; its id."""
        with self._map_errors(key):
            upload: str = self._client.create_multipart_upload(Bucket=self._name, Key=key)["UploadId"]
        return upload

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        """Send part `number` (from 1) of an upload; its ETag. Raises NotFoundError when the upload is gone."""
        with self._map_errors(key):
            answer = self._client.upload_part(Bucket=self._name, Key=key, UploadId=upload, PartNumber=number, Body=data)
        # A server without ETags takes the one that it should have given.
        return quoted(answer.get("ETag", "")) or quoted(hashlib.md5(data, usedforsecurity=False).hexdigest())

    def uploads(self, prefix: str) -> list[tuple[str, str]]:
        """Key and id of each upload that is under way under a prefix, whoever began it."""
        found: list[tuple[str, str]] = []
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self._name, Prefix=prefix)
        with self._map_errors(prefix):
            for page in pages:
                found += ((upload["Key"], upload["UploadId"]) for upload in page.get("Uploads", ()))
        return found

    def parts(self, key: str, upload: str) -> dict[int, Part]:
        """The parts that an upload has. Raises NotFoundError when it is gone."""
        found: dict[int, Part] = {}
        marker = 0
        while True:
            with self._map_errors(key):
                answer = self._client.list_parts(Bucket=self._name, Key=key, UploadId=upload, PartNumberMarker=marker)
            for part in answer.get("Parts", ()):
                found[part["PartNumber"]] = Part(part["Size"], part.get("ETag", ""))
            following = max(answer.get("NextPartNumberMarker", 0), *found, 0, 0)
            if not answer.get("IsTruncated") or following <= marker:
                return found
            marker = following

    def complete(self, key: str, upload: str, etags: Mapping[int, str]) -> PutResult:
        """Make an object of the parts with these numbers."""
        parts = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
        with self._map_errors(key):
            answer = self._client.complete_multipart_upload(
                Bucket=self._name, Key=key, UploadId=upload, MultipartUpload={"Parts": parts}
            )
        return _written(answer)

    def abort(self, key: str, upload: str) -> None:
        """Drop an upload and its parts."""
        with self._map_errors(key):
            self._client.abort_multipart_upload(Bucket=self._name, Key=key, UploadId=upload)

    def copy(self, source: ObjectVersion, key: str) -> PutResult:
        """Copy exactly this version, a small one, inside the server.

        Servers are known that copy whichever version is there, and that say nothing of what they have made: look at it.

        Returns:
            The new object; its ETag is empty where the server does not say it.

        Raises:
            VersionChangedError: The version is gone.
            ObsfsError: The server does not copy it.
        """
        with map_errors(source.key, pinned=True):
            answer = self._client.copy_object(Bucket=self._name, Key=key, **_copied(source))
        return PutResult(quoted(answer.get("CopyObjectResult", {}).get("ETag", "")), answer.get("VersionId", ""))

    def copy_part(self, key: str, upload: str, number: int, source: ObjectVersion, span: range) -> str:
        """As :meth:`put_part`, of a span of bytes of exactly this version, inside the server; as :meth:`copy`."""
        with map_errors(source.key, pinned=True):
            answer = self._client.upload_part_copy(
                Bucket=self._name,
                Key=key,
                UploadId=upload,
                PartNumber=number,
                CopySourceRange=f"bytes={span.start}-{span.stop - 1}",
                **_copied(source),
            )
        return quoted(answer.get("CopyPartResult", {}).get("ETag", ""))

    def delete(self, *keys: str) -> None:
        """Delete objects; those that are not there are none the less gone."""
        for key in keys:
            with self._map_errors(key):
                self._client.delete_object(Bucket=self._name, Key=key)


def _copied(source: ObjectVersion) -> dict[str, Any]:
    pins = {f"CopySource{name}": value for name, value in Pin.of(source).options.items() if name != "VersionId"}
    return {"CopySource": {"Bucket": source.bucket, "Key": source.key}, **pins}


def _written(answer: Mapping[str, Any]) -> PutResult:
    return PutResult(quoted(answer.get("ETag", "")), answer.get("VersionId", ""))
