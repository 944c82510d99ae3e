"""Bytes of a file to the kernel without a copy through Python: splice(2), by way of a pipe.

Imports nothing of obsfs: the notification helper (:mod:`obsfs.fuse.kernel.notify_helper`) runs this file on its own.
"""

from __future__ import annotations

import errno
import fcntl
import os

GONE = (errno.ENOENT, errno.ENODEV, errno.EBADF, errno.ENOTCONN)
"""The errors of a write whose request was aborted, or whose mount is gone."""

_MAX_ROOM = 1 << 20
"""Bytes of a file in one message: FUSE_MAX_MAX_PAGES, 256 pages of 4 KiB (fs/fuse/fuse_i.h)."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Pipe:
    """A pipe that takes one whole message: a page for the header, and at most `room` bytes of a file."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()
        capacity = fcntl.fcntl(self._write_fd, fcntl.F_GETPIPE_SZ)
        # More than /proc/sys/fs/pipe-max-size is for the privileged.
        for size in (2 * _MAX_ROOM, _MAX_ROOM, _MAX_ROOM // 4):
            try:
                capacity = fcntl.fcntl(self._write_fd, fcntl.F_SETPIPE_SZ, size)
                break
            except OSError:
                continue
        pages = max(1, min(_MAX_ROOM, capacity - 2 * _PAGE) // _PAGE)
        # A power of two keeps to the borders of blocks.
        self.room = (1 << (pages.bit_length() - 1)) * _PAGE

    def fill(self, header: bytes, file_fd: int, offset: int, size: int) -> bool:
        """Take a header and bytes ``[offset, offset + size)`` of a file. Returns False if that fails."""
        os.write(self._write_fd, header)
        moved = 0
        while moved < size:
            try:
                count = os.splice(file_fd, self._write_fd, size - moved, offset_src=offset + moved)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                count = 0  # the disk cannot read it
            if not count:
                return False
            moved += count
        return True

    def send(self, fd: int, size: int) -> bool:
        """Write the message of `size` bytes to a FUSE descriptor. Returns False if the request was aborted."""
        try:
            os.splice(self.read_fd, fd, size)
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        return True

    def close(self) -> None:
        """Close the pipe, and drop what is in it."""
        os.close(self.read_fd)
        os.close(self._write_fd)
