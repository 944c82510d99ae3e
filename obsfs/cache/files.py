"""The directory of the cache: making it, and opening the two files of an object version in it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

from obsfs import private
from obsfs.cache.layout import FORMAT, HEADER, IN_USE_LOCK, header, identity_bytes, map_path, map_size
from obsfs.cache.locks import DirectoryLock
from obsfs.cache.removal import unlink
from obsfs.cache.syscalls import is_file_at, lock_range, supports_holes
from obsfs.errors import CacheError
from obsfs.store.types import ObjectVersion
from obsfs.text import visible

log = logging.getLogger(__name__)

_OPEN_ATTEMPTS = 2000
"""With 1 ms between them."""
_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""Errors of a disk that is full, read-only or broken. What is there already may still be readable."""
_NOT_OURS = (errno.ELOOP, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


class CacheFiles:
    """The files of one cache directory. Safe to use from many threads and processes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / FORMAT
        self.directory_lock = DirectoryLock(self.root / "lock", self.make)
        """Held for a moment to make, remove or pin a file: every open waits for it."""
        self._was_made = False

    def make(self) -> None:
        """Make the directory, also again: somebody may have removed it.

        Raises:
            CacheError: Other users could read or change what is in it.
            OSError: It cannot be made.
        """
        if self._was_made:
            log.warning("somebody has removed what was in %s: it is made again", self.directory)
        private.make_directory(self.directory, "cache directory", "choose another --cache-dir", CacheError)
        private.make_level(self.root)
        self._was_made = True

    def prepare(self) -> OSError | None:
        """Make the directory, and try whether it can be used.

        Returns:
            What a full, read-only or broken disk says: what is there already may still be read.

        Raises:
            CacheError: The directory cannot be used.
        """
        try:
            self.make()
            self.directory_lock.open()
            if not self._supports_holes():
                raise CacheError(
                    f"cache directory {self.directory} lies on a file system that takes no holes in files",
                    "choose a --cache-dir on ext4, xfs, btrfs or tmpfs",
                )
        except OSError as error:
            if error.errno not in _DISK_REFUSES:
                raise CacheError(
                    f"cache directory {self.directory} cannot be used ({error.strerror})", "choose another --cache-dir"
                ) from None
            return error
        return None

    def _supports_holes(self) -> bool:
        try:
            os.pwrite(self.directory_lock.fd, b"\n", 0)
        except OSError as error:
            if error.errno in _DISK_REFUSES:
                return True
            raise
        return supports_holes(self.directory_lock.fd)

    def open_files(self, version: ObjectVersion) -> tuple[int, int]:
        """Open the data file and the map file of a version. They are made if they are not there.

        Returns:
            Their descriptors, which the caller closes.

        Raises:
            OSError: The disk refuses, or no descriptor is left.
        """
        path = map_path(self.root, version)
        for _ in range(_OPEN_ATTEMPTS):
            data_fd, map_fd = self._open_once(path, version)
            # Eviction takes this lock exclusively before it unlinks; then the files are no longer at their names.
            is_locked = lock_range(data_fd, IN_USE_LOCK, 1, fcntl.F_RDLCK)
            if is_locked and is_file_at(map_fd, path) and is_file_at(data_fd, path.with_suffix(".data")):
                return data_fd, map_fd
            os.close(data_fd)
            os.close(map_fd)
            time.sleep(0.001)
        raise OSError(errno.EBUSY, "others keep removing it")

    def memory_file(self) -> int:
        """Return a descriptor to use in place of a data file. Nothing is ever stored in it. Raises OSError."""
        return os.memfd_create("obsfs-data", os.MFD_CLOEXEC)

    def _open_once(self, path: Path, version: ObjectVersion) -> tuple[int, int]:
        with self.directory_lock:
            # Somebody may have put a link in its place.
            private.make_level(self.root)
            try:
                private.make_level(path.parent)
                data_fd = private.open_file(path.with_suffix(".data"))
                try:
                    map_fd = private.open_file(path)
                except OSError:
                    os.close(data_fd)
                    raise
            except OSError as error:
                if error.errno not in _NOT_OURS:
                    raise
                log.warning("there is something in %s that is not a cache file: it is removed", path.parent)
                _remove_foreign(path)
                raise
            try:
                self._initialize(path, version, data_fd, map_fd)
            except OSError:
                with suppress(OSError):
                    unlink(path)
                os.close(data_fd)
                os.close(map_fd)
                raise
            return data_fd, map_fd

    def _initialize(self, path: Path, version: ObjectVersion, data_fd: int, map_fd: int) -> None:
        """Fill in new files, and unlink damaged ones: the caller checks whether the files are still at their names."""
        identity, length = identity_bytes(version), map_size(version.size)
        if not os.fstat(map_fd).st_size:
            if os.fstat(data_fd).st_size:
                # Its map is lost, and somebody may read it: by another name, or a memory map of it.
                unlink(path)
                return
            os.ftruncate(data_fd, version.size)
            os.ftruncate(map_fd, length)
            os.pwrite(map_fd, header(b"", version.size, identity), 0)
        head = os.pread(map_fd, HEADER, 0)
        fits = head == header(head, version.size, identity) and os.fstat(map_fd).st_size == length
        if not fits or os.fstat(data_fd).st_size != version.size:
            log.warning("a cache file of %s is damaged: it is fetched again", visible(version.key))
            # The files go, rather than shrink under a process that has them open.
            unlink(path)


def _remove_foreign(path: Path) -> None:
    with suppress(OSError):
        if path.parent.is_symlink() or not path.parent.is_dir():
            path.parent.unlink()
        else:
            unlink(path)
