"""How large the parts of a multipart upload are, and which ETag the result has. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

PART = 8 << 20
"""Bytes in a part of an upload."""
_MAX_PARTS = 10_000
"""https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html; OBS has the same limit."""
_MIB = 1 << 20
MAX_PUT = 5 << 30
"""Bytes of an object that is put in one request (the same page)."""
COPY_PART = 64 << 20
"""Bytes in a part that is copied inside the server: few enough to be copied within a request's timeout."""


def part_size(size: int) -> int:
    """Return the bytes in each part (but the last) of an object of `size` bytes."""
    smallest = -(-size // _MAX_PARTS)
    return max(PART, -(-smallest // _MIB) * _MIB)


def parts_etag(digests: Iterable[bytes]) -> str:
    """Return the ETag (without quotes) of an object that was uploaded in parts.

    Args:
        digests: The MD5 of each part, 16 bytes each. One digest is that of an object that was put whole.
    """
    md5s = list(digests)
    if len(md5s) == 1:
        return md5s[0].hex()
    return f"{hashlib.md5(b''.join(md5s), usedforsecurity=False).hexdigest()}-{len(md5s)}"
