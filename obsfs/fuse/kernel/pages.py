"""How bytes of a cache file become the kernel's pages without passing through Python: by splice(2), through a pipe."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import queue
import threading

from obsfs.blocks.layout import BLOCK
from obsfs.blocks.reader import Reader
from obsfs.fuse.kernel import wire
from obsfs.fuse.kernel.notifier import Notifier
from obsfs.fuse.operations import Operations

log = logging.getLogger(__name__)

_MOST = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
_QUEUE = 512
GONE = (errno.ENOENT, errno.ENODEV, errno.EBADF, errno.ENOTCONN)
"""What a write says when nobody waits for it: the request was aborted meanwhile, or the mount is gone."""


class Pipe:
    """A pipe that takes one whole message: a page for the header, and at most `room` bytes of a file."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()
        capacity = fcntl.fcntl(self._write_fd, fcntl.F_GETPIPE_SZ)
        # More than /proc/sys/fs/pipe-max-size is for the privileged.
        for size in (2 * _MOST, _MOST, _MOST // 4):
            try:
                capacity = fcntl.fcntl(self._write_fd, fcntl.F_SETPIPE_SZ, size)
                break
            except OSError:
                continue
        pages = max(1, min(_MOST, capacity - 2 * _PAGE) // _PAGE)
        # A power of two keeps to the borders of blocks.
        self.room = (1 << (pages.bit_length() - 1)) * _PAGE

    def fill(self, header: bytes, file_fd: int, offset: int, size: int) -> bool:
        """Take a header and bytes ``[offset, offset + size)`` of a file; False when the file ends before."""
        os.write(self._write_fd, header)
        moved = 0
        while moved < size:
            count = os.splice(file_fd, self._write_fd, size - moved, offset_src=offset + moved)
            if not count:
                return False
            moved += count
        return True

    def send(self, fd: int, size: int) -> bool:
        """Write the message of `size` bytes to a FUSE descriptor; False when nobody waits for it any more."""
        try:
            os.splice(self.read_fd, fd, size)
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        return True

    def close(self) -> None:
        """Close it, with what is in it."""
        os.close(self.read_fd)
        os.close(self._write_fd)


class Storer:
    """A thread that puts blocks into the page cache of the files that are open, before anybody asks for them.

    Page faults of a memory map come one after the other, each with a wait for an answer; on pages that are there they
    cost a tenth. The kernel waits for pages that are locked by a read in flight, which may wait for the network: so
    no thread that answers reads may ever wait for this one.
    """

    def __init__(self, fd: int, operations: Operations) -> None:
        self._notifier = Notifier(fd)
        self._operations = operations
        self._blocks: queue.Queue[tuple[Reader, int] | None] = queue.Queue(_QUEUE)
        self._pipe = Pipe()
        self._thread = threading.Thread(target=self._run, name="obsfs-pages", daemon=True)
        self._thread.start()

    def put(self, reader: Reader, block: int) -> None:
        """Store a block soon, or never when too many are waiting: it is read all the same."""
        try:
            self._blocks.put_nowait((reader, block))
        except queue.Full:
            log.debug("block %d of %s is not stored: too many are waiting", block, reader.version.key)

    def close(self) -> None:
        """End the thread, which may be held up by a read, after the connection has ended."""
        try:
            self._blocks.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout=1)
        self._notifier.close()

    def _run(self) -> None:
        while (task := self._blocks.get()) is not None:
            reader, block = task
            try:
                with self._operations.engine.borrowed(reader) as alive:
                    for node in self._operations.open_nodes(reader) if alive else ():
                        self._store(reader, block, node)
            except Exception:
                log.exception("block %d of %s could not be stored", block, reader.version.key)
                self._renew_pipe()

    def _store(self, reader: Reader, block: int, node: int) -> None:
        cached, pipe = reader.cached, self._pipe
        start = block * BLOCK
        stop = start + cached.length_of(block)
        for offset in range(start, stop, pipe.room):
            size = min(pipe.room, stop - offset)
            message = wire.store(node, offset, size)
            is_whole = pipe.fill(message, cached.data_fd, offset, size)
            # Asked after the bytes were taken: an evicted block reads as zeros.
            if not is_whole or not cached.is_trusted(block) or not self._tell(len(message) + size):
                self._renew_pipe()
                return

    def _tell(self, size: int) -> bool:
        try:
            self._notifier.splice(self._pipe.read_fd, size)
        except OSError as error:
            log.debug("a block is not stored: %s", error)  # the file was closed, mostly
            return False
        return True

    def _renew_pipe(self) -> None:
        self._pipe.close()
        self._pipe = Pipe()
