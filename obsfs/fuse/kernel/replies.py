"""Answers to the kernel: a header and parts, or a header and bytes of a cache file by splice(2)."""

from __future__ import annotations

import os
import threading
from functools import partial

from obsfs.cache.lending import Lent
from obsfs.fetch.reader import Reader
from obsfs.fuse.kernel import wire
from obsfs.fuse.kernel.pending import Pending
from obsfs.fuse.kernel.splice import GONE, Pipe

_SPLICE_FROM_BYTES = 32 << 10
"""Shorter reads are copied: that costs less than the calls of a splice."""


def reply(fd: int, unique: int, *parts: bytes) -> None:
    """Answer a request."""
    size = wire.OUT_HEADER.size + sum(map(len, parts))
    send(fd, [wire.OUT_HEADER.pack(size, 0, unique), *parts])


def reply_error(fd: int, unique: int, number: int) -> None:
    """Answer a request with an errno."""
    send(fd, [wire.OUT_HEADER.pack(wire.OUT_HEADER.size, -number, unique)])


def send(fd: int, parts: list[bytes]) -> None:
    """Write a whole message; drop it if its request was aborted."""
    try:
        os.writev(fd, parts)
    except OSError as error:
        if error.errno not in GONE:
            raise


class ReadReplies:
    """Answers reads from cache files. Each thread has a pipe of its own."""

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self._local = threading.local()

    @property
    def max_bytes(self) -> int:
        """The longest read that one answer takes."""
        return self._pipe().room

    def send(self, fd: int, unique: int, reader: Reader, offset: int, size: int) -> bool:
        """Answer a pending read, unless it was interrupted. Returns False when the bytes are no longer there."""
        if size >= _SPLICE_FROM_BYTES:
            lent = self._splice(fd, unique, reader, offset, size)
            if lent is not Lent.ABSENT:
                return lent is Lent.TAKEN
        data = reader.cached.read(offset, size)
        if data is None:
            return False
        if self._pending.claim(unique):
            reply(fd, unique, data)
        return True

    def _splice(self, fd: int, unique: int, reader: Reader, offset: int, size: int) -> Lent:
        """Answer a pending read by splice, if all its blocks are in the cache file."""
        header = wire.OUT_HEADER.pack(wire.OUT_HEADER.size + size, 0, unique)
        pipe = self._pipe()
        is_empty = False
        try:
            lent = reader.cached.lend(offset, size, partial(pipe.fill, header))
            if lent is Lent.ABSENT:
                is_empty = True
            elif lent is Lent.TAKEN:
                is_empty = self._pending.claim(unique) and pipe.send(fd, len(header) + size)
            return lent
        finally:
            # Bytes that are left in it must not become part of the next reply, whatever went wrong.
            if not is_empty:
                self._drop_pipe(pipe)

    def _pipe(self) -> Pipe:
        pipe: Pipe | None = getattr(self._local, "pipe", None)
        if pipe is None:
            pipe = self._local.pipe = Pipe()
        return pipe

    def _drop_pipe(self, pipe: Pipe) -> None:
        pipe.close()
        self._local.pipe = None
