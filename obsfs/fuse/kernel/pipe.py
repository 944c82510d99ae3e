"""How bytes of a cache file become the kernel's pages without passing through Python: by splice(2), through a pipe."""

from __future__ import annotations

import errno
import fcntl
import os

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
