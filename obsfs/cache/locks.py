"""A lock of the whole cache directory, among threads and processes."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from obsfs import private
from obsfs.cache.syscalls import is_file_at
from obsfs.errors import ObsfsError


class DirectoryLock:
    """A reentrant lock, held with ``with``. Where its file cannot be made, it only excludes threads of this process.

    Args:
        path: The file that is locked.
        prepare: Makes the directory of that file, if somebody removed the whole cache.
    """

    def __init__(self, path: Path, prepare: Callable[[], None]) -> None:
        self.path = path
        self._prepare = prepare
        self._threads = threading.RLock()
        self._fd = -1
        self._depth = 0

    def open(self) -> None:
        """Open the file, again if it was removed. Raises OSError, and what `prepare` raises."""
        with self._threads:
            if self._fd >= 0 and is_file_at(self._fd, self.path):
                return
            if self.path.parent.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path.parent))
            try:
                fd = private.open_file(self.path)
            except FileNotFoundError:
                self._prepare()
                fd = private.open_file(self.path)
            self.close()
            self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor of a file on the file system of the cache; -1 if there is none."""
        return self._fd

    def __enter__(self) -> None:
        self._threads.acquire()
        self._depth += 1
        try:
            if self._depth == 1:
                with suppress(OSError, ObsfsError):
                    self.open()
                if self._fd >= 0:
                    # A broken disk may refuse it: then only threads of this process exclude each other.
                    with suppress(OSError):
                        fcntl.flock(self._fd, fcntl.LOCK_EX)
        except BaseException:
            # Ctrl-C while another process holds the lock: no __exit__ follows, so other threads would wait forever.
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        try:
            if not self._depth and self._fd >= 0:
                with suppress(OSError):
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._threads.release()

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def abandon(self) -> None:
        """In a forked child: close the file, and leave the lock as the parent has it."""
        with suppress(OSError):
            self.close()
