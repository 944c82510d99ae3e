"""The checksum that a server has of a whole object: ``x-amz-checksum-*``, or an ETag that is its MD5. No I/O.

Names and encodings are those of S3: "Checking object integrity" in its user guide, and ``GetObject`` in its reference.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

_BYTES = {"sha256": 32, "sha1": 20, "crc64nvme": 8, "crc32c": 4, "crc32": 4}
"""Bytes of each checksum that S3 knows; the first that an object has is taken."""
_MD5 = re.compile(r"[0-9a-f]{32}")
_ENCRYPTION = ("x-amz-server-side-encryption", "x-obs-server-side-encryption")
_KIND = ("x-obs-object-type", "x-oss-object-type")


class Hasher(Protocol):
    """A hash object, as :mod:`hashlib` makes them."""

    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Crc:
    def __init__(self, function: Callable[[bytes | memoryview, int], int], size: int) -> None:
        self._function, self._digits = function, 2 * size
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = self._function(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:0{self._digits}x}"


class Checksum(NamedTuple):
    """A checksum of a whole object, in hexadecimal digits, by an algorithm that :meth:`hasher` knows."""

    algorithm: str
    hexdigest: str

    def hasher(self) -> Hasher:
        """Return a new hash object for the bytes to check."""
        hasher = _hasher(self.algorithm)
        assert hasher is not None
        return hasher

    def is_of(self, data: bytes | memoryview) -> bool:
        """Return whether these bytes, all of the object, have this checksum."""
        hasher = self.hasher()
        hasher.update(data)
        return hasher.hexdigest() == self.hexdigest


def _hasher(algorithm: str) -> Hasher | None:
    """Return a hash object; None if the algorithm needs a library that is not installed (``botocore[crt]``)."""
    if algorithm == "crc32":
        return _Crc(zlib.crc32, _BYTES[algorithm])
    if algorithm in ("crc32c", "crc64nvme"):
        try:
            from awscrt import checksums
        except ImportError:
            return None
        return _Crc(getattr(checksums, algorithm), _BYTES[algorithm])
    return hashlib.new(algorithm, usedforsecurity=False)


def checksum_from_headers(headers: Mapping[str, str], *, md5_etags: bool) -> Checksum | None:
    """Return the checksum that the headers of a whole object give of its bytes; None if they give none.

    Checksums of checksums, which multipart uploads have, do not count. An ETag of 32 digits is the MD5 of an object
    that was put whole (not of one that was appended to), if it was not encrypted with a key of KMS or of the client.

    Args:
        headers: Of an answer with the whole object, never with a range of it; names in lower case.
        md5_etags: Take an ETag for an MD5 where the server sends nothing better.
    """
    if headers.get("x-amz-checksum-type", "FULL_OBJECT") == "FULL_OBJECT":
        for algorithm, size in _BYTES.items():
            value = _decoded(headers.get(f"x-amz-checksum-{algorithm}", ""))
            if len(value) == size and _hasher(algorithm):
                return Checksum(algorithm, value.hex())
    etag = headers.get("etag", "").strip('"')
    is_encrypted = any(
        headers.get(name, "AES256") != "AES256" or f"{name}-customer-algorithm" in headers for name in _ENCRYPTION
    )
    is_put = all(headers.get(name, "Normal") == "Normal" for name in _KIND)
    return Checksum("md5", etag) if md5_etags and is_put and not is_encrypted and _MD5.fullmatch(etag) else None


def _decoded(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        return b""
