"""The data file of one open object: its bytes, whether the disk still has them, and its locks."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

from obsfs.blocks import BLOCK
from obsfs.cache.faults import DiskFaults
from obsfs.cache.layout import PASSTHROUGH_LOCK, current_seal
from obsfs.cache.syscalls import has_lost_writes, is_file_at, lock_range


class DataFile:
    """A descriptor of the data file, open for as long as the object is. Safe to use from many threads.

    Its number stays the same when another file takes the place of a damaged one, so that users need not know.

    Args:
        fd: The descriptor.
        in_memory: Whether it is of memory, as no file could be made. Then nothing is ever stored in it.
    """

    def __init__(self, fd: int, faults: DiskFaults, *, in_memory: bool) -> None:
        self.fd = fd
        self.in_memory = in_memory
        self._faults = faults
        self._is_lost = False
        self._error_guard = threading.Lock()

    def replace(self, fd: int, *, in_memory: bool) -> None:
        """Go on with another file under the same descriptor number. Takes over `fd`."""
        self.in_memory = in_memory
        self._is_lost = False
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset` on: fewer if the file was truncated, none if the disk fails."""
        try:
            return os.pread(self.fd, size, offset)
        except OSError as error:
            self._faults.log_error(error)
            return b""

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Read into `buffer`, and return how many bytes; see `read`."""
        try:
            return os.preadv(self.fd, [buffer], offset)
        except OSError as error:
            self._faults.log_error(error)
            return 0

    def write_block(self, block: int, data: memoryview) -> None:
        """Write a block. Raises OSError, also if the disk takes only a part."""
        if os.pwrite(self.fd, data, block * BLOCK) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @property
    def size(self) -> int:
        """Its length in bytes. Raises OSError."""
        return os.fstat(self.fd).st_size

    def is_at(self, path: Path) -> bool:
        """Return whether it is still the file at a path."""
        return is_file_at(self.fd, path)

    @property
    def is_lost(self) -> bool:
        """Whether the disk was found to have lost something that was written: nothing in the file counts any more."""
        return self._is_lost

    def declare_lost(self) -> None:
        """Note that the disk has lost something of the file."""
        self._is_lost = True

    def check_lost(self) -> bool:
        """Ask the kernel whether the disk has lost something that was written. Waits for nothing.

        Ask after bytes were taken: the kernel notes the error before it gives up the page that the disk did not take.
        """
        if not self.in_memory:
            with self._error_guard:  # the kernel says it once
                self._is_lost = self._is_lost or has_lost_writes(self.fd)
        return self._is_lost

    def current_seal(self) -> tuple[int, int, int, int] | None:
        """As :func:`obsfs.cache.layout.current_seal`."""
        return current_seal(self.fd)

    def lock_for_kernel(self) -> bool:
        """Keep the file from being punched while the kernel reads it; False if a process evicts from it now."""
        return lock_range(self.fd, PASSTHROUGH_LOCK, 1, fcntl.F_RDLCK)

    def unlock_for_kernel(self) -> None:
        """Undo `lock_for_kernel`. The kernel keeps a lock of its own for as long as it reads."""
        lock_range(self.fd, PASSTHROUGH_LOCK, 1, fcntl.F_UNLCK)

    def prefault(self, blocks: range) -> None:
        """Have the kernel read blocks into its page cache. Waits only to ask."""
        for block in blocks:
            # Block by block: a longer range would be cut to the disk's own read-ahead.
            os.posix_fadvise(self.fd, block * BLOCK, BLOCK, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the descriptor."""
        # In this order: a second call must not close what others have opened since.
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
