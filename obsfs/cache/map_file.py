"""The map file of one open object: state words, checksums, last uses, the seal, and claims of blocks to fetch."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from obsfs import private
from obsfs.cache.layout import (
    ENTRY,
    HANDED_TO_KERNEL_AT,
    LAST_USED_AT,
    PRESENT,
    SEAL,
    SEAL_AT,
    STATE_AT,
    TAKEOVER_LOCK,
    WORD,
    StoredBlock,
    entry_at,
    map_size,
    stored_blocks,
)
from obsfs.cache.syscalls import lock_range
from obsfs.limits import open_files_limit

_MAX_OPEN = 256
"""Map files that are open at the same time; an eighth of the limit of open files, if that is less."""


class MapDescriptors:
    """The map files that are open at present: a bounded number, as descriptors are scarce."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._open: OrderedDict[MapFile, None] = OrderedDict()

    def add(self, owner: MapFile) -> None:
        """Note that a map file was opened, and close others if there are too many."""
        limit = max(1, min(_MAX_OPEN, open_files_limit() // 8))
        with self._guard:
            self._open[owner] = None
            self._close(len(self._open) - limit, owner)

    def forget(self, owner: MapFile) -> None:
        """Note that a map file was closed for good."""
        with self._guard:
            self._open.pop(owner, None)

    def close_unused(self) -> None:
        """Close all that are not in use: the process has no descriptor left."""
        with self._guard:
            self._close(len(self._open), None)

    def _close(self, excess: int, spared: MapFile | None) -> None:
        for other in list(self._open) if excess > 0 else ():
            if excess > 0 and other is not spared and other.close_until_needed():
                del self._open[other]
                excess -= 1


class MapFile:
    """The map of one object version, opened when it is needed. Safe to use from many threads.

    Reads never fail: what was truncated, or cannot be read, counts as zeros, which mean that nothing is cached.

    Args:
        path: Where the map file is. The data file lies next to it.
        is_data_at: Whether the open data file is still at the path that it is given.
        descriptors: The map files of the cache that are open.
    """

    def __init__(self, path: Path, is_data_at: Callable[[Path], bool], descriptors: MapDescriptors) -> None:
        self.path = path
        self._is_data_at = is_data_at
        self._descriptors = descriptors
        self._fd = -1
        self._inode: os.stat_result | None = None
        self._guard = threading.RLock()
        self._claimed: set[int] = set()

    # the descriptor

    def use(self, fd: int) -> None:
        """Take a descriptor of the map file from now on, and forget all claims. -1: there is no map file."""
        with self._guard:
            self._claimed.clear()
            self.close_until_needed()
            self._inode = os.fstat(fd) if fd >= 0 else None
            self._fd = fd
        if fd >= 0:
            self._descriptors.add(self)

    def open_again(self, flags: int = os.O_RDWR) -> int:
        """Open the map file once more. The caller closes it. -1 if it is no longer at its name. Raises OSError."""
        try:
            fd = private.open_file(self.path, flags)
        except FileNotFoundError:
            return -1
        # The number of an inode that is gone may be another file's. That of our data file is not gone.
        is_ours = self._inode is not None and os.path.samestat(os.fstat(fd), self._inode)
        if is_ours and self._is_data_at(self.path.with_suffix(".data")):
            return fd
        os.close(fd)
        return -1

    def _open(self) -> int:
        """Return the descriptor. The caller holds the guard. Raises OSError, also if the file is not there."""
        if self._fd < 0 and self._inode is not None:
            try:
                self._fd = self.open_again()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                self._descriptors.close_unused()
                self._fd = self.open_again()
            if self._fd >= 0:
                self._descriptors.add(self)
        if self._fd < 0:
            raise FileNotFoundError(errno.ENOENT, "the map file is not there")
        return self._fd

    def close_until_needed(self) -> bool:
        """Close the descriptor; the next use opens it again. False if it is in use."""
        if not self._guard.acquire(blocking=False):
            return False
        try:
            if self._claimed:
                return False
            # In this order: a child that is forked in between must not close it a second time.
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
            return True
        finally:
            self._guard.release()

    def close(self) -> None:
        """Close the descriptor for good."""
        self.use(-1)
        self._descriptors.forget(self)

    def abandon(self) -> None:
        """In a forked child: close the descriptor without taking a lock."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def is_at_its_name(self) -> bool:
        """Return whether the file is still the one at its path."""
        try:
            return self._inode is not None and os.path.samestat(self._inode, self.path.lstat())
        except OSError:
            return False

    def has_size_for(self, size: int) -> bool:
        """Return whether the map file is as long as for an object of `size` bytes. Raises OSError."""
        with self._guard:
            return os.fstat(self._open()).st_size == map_size(size)

    # what is in it

    def _read(self, offset: int, size: int) -> bytes:
        try:
            with self._guard:
                data = os.pread(self._open(), size, offset)
        except OSError:
            data = b""
        return data.ljust(size, b"\0")

    def _write(self, data: bytes, offset: int) -> None:
        with self._guard:
            os.pwrite(self._open(), data, offset)

    def word(self, block: int) -> int:
        """Return the state word of a block."""
        word: int = WORD.unpack(self._read(entry_at(block) + STATE_AT, WORD.size))[0]
        return word

    def present_word(self, block: int) -> int:
        """Return the state word of a block that the map says is in the data file; else 0."""
        word = self.word(block)
        return word if word & PRESENT else 0

    def words(self, blocks: range) -> array[int]:
        """Return the state words of blocks."""
        return array("Q", self._read(entry_at(blocks.start), ENTRY * len(blocks)))[2::3]

    def checksum(self, block: int) -> int:
        """Return the checksum that a block must have."""
        digest: int = WORD.unpack(self._read(entry_at(block), WORD.size))[0]
        return digest

    def write_entry(self, block: int, digest: int, word: int | None = None) -> None:
        """Write the checksum of a block, that it was used now, and its state word if given. Raises OSError."""
        state = b"" if word is None else WORD.pack(word)
        self._write(WORD.pack(digest) + WORD.pack(time.time_ns()) + state, entry_at(block))

    def set_word(self, block: int, word: int) -> None:
        """Write the state word of a block. Raises OSError."""
        self._write(WORD.pack(word), entry_at(block) + STATE_AT)

    def drop_word(self, block: int, word: int) -> bool:
        """Mark a block absent if its state word is still `word`. True for the one thread that did it."""
        # Under the guard: several readers find the same damage at the same moment, and it is counted once.
        with self._guard:
            if not word or self.word(block) != word:
                return False
            with suppress(OSError):  # the disk is read-only: the block is found damaged again next time
                self.set_word(block, word + 1)
            return True

    def set_last_used(self, block: int, used: int) -> None:
        """Note when a block was used (ns since the epoch). A disk that refuses is ignored."""
        with suppress(OSError):
            self._write(WORD.pack(used), entry_at(block) + LAST_USED_AT)

    def stored_blocks(self) -> list[StoredBlock]:
        """Return the blocks that the map says are in the data file."""
        try:
            with self._guard:
                return list(stored_blocks(self._open(), self.path))
        except OSError:
            return []

    @property
    def seal(self) -> tuple[int, ...]:
        """The seal: inode, size, mtime and ctime of the data file when it was sealed. All 0: none."""
        return SEAL.unpack(self._read(SEAL_AT, SEAL.size))

    def write_seal(self, seal: tuple[int, int, int, int]) -> None:
        """Write the seal. Raises OSError."""
        self._write(SEAL.pack(*seal), SEAL_AT)

    @property
    def was_handed_to_kernel(self) -> bool:
        """Whether the kernel was ever given the data file."""
        return self._read(HANDED_TO_KERNEL_AT, 1) != b"\0"

    def note_handed_to_kernel(self) -> None:
        """Note that the kernel is given the data file. Raises OSError."""
        self._write(b"\1", HANDED_TO_KERNEL_AT)

    # locks among processes

    def claim(self, blocks: range) -> bool:
        """Lock the entries of blocks; False if another process holds one of them. Raises OSError."""
        with self._guard:
            if not lock_range(self._open(), entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_WRLCK):
                return False
            self._claimed.update(blocks)
            return True

    def release_claim(self, blocks: range) -> None:
        """Unlock the entries of blocks."""
        with self._guard:
            self._claimed.difference_update(blocks)
            if self._fd >= 0:
                lock_range(self._fd, entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_UNLCK)

    def open_takeover_lock(self) -> int:
        """Open the map file and lock it as in use, for a process that outlives this one.

        Returns:
            The descriptor, which the caller closes; -1 if the file is not there, or no descriptor is left.
        """
        try:
            fd = self.open_again()
        except OSError:
            return -1
        if fd >= 0 and not lock_range(fd, TAKEOVER_LOCK, 1, fcntl.F_RDLCK):
            os.close(fd)
            return -1
        return fd
