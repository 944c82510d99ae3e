"""The blocks of one object version that is open: which are in its file and right, and putting more there."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from obsfs.blocks.layout import (
    BLOCK,
    ENTRY,
    GIVEN_AT,
    HEADER,
    LOCK_OPEN,
    LOCK_WHOLE,
    PRESENT,
    SEAL,
    SEAL_AT,
    STATE_AT,
    block_count,
    checksum,
    entry_at,
    lock_range,
    remove_empty,
    seal_of,
)
from obsfs.blocks.mapped import MappedFile
from obsfs.remote.objects import ObjectVersion

if TYPE_CHECKING:
    from obsfs.blocks.cache import Cache


class CachedObject:
    """The blocks of one object version. Safe to use from many threads; made by ``Cache.open``.

    Raises OSError, and leaves both descriptors open then. It keeps one of them, of the data file: descriptors are
    scarce. The map keeps the lock of `map_fd`, and whoever claims blocks has a descriptor for that long.
    """

    def __init__(self, cache: Cache, version: ObjectVersion, path: Path, data_fd: int, map_fd: int) -> None:
        self.version = version
        self.size = version.size
        self.blocks = block_count(version.size)
        self.data_fd = data_fd
        self._cache = cache
        self._path = path
        self._mapped = MappedFile(map_fd, HEADER + ENTRY * self.blocks)
        self._map = self._mapped.view
        self._words = self._map[HEADER:].cast("Q")
        # While it is mapped, no other file has this inode.
        self._inode = os.fstat(map_fd)
        os.close(map_fd)
        # The state word at which a block was verified or written by us; 0 means not yet.
        self._trusted = array("Q", bytes(8 * self.blocks))
        self._whole_users = 0
        self._claims_fd = -1
        self._claimed: set[int] = set()
        self._is_gone = False
        self._guard = threading.Lock()
        # Else whoever has to wait for the kernel's lock of the file spins: a twentieth of the CPU time was measured.
        self._writing = threading.Lock()
        if self._is_sealed():
            for block in range(self.blocks):
                self._trusted[block] = self._present_word(block)

    def _present_word(self, block: int) -> int:
        word = self._words[3 * block + 2]
        return word if word & PRESENT else 0

    def _is_sealed(self) -> bool:
        seal = SEAL.unpack_from(self._map, SEAL_AT)
        return any(seal) and seal == seal_of(self.data_fd)

    # reading

    def is_present(self, block: int) -> bool:
        """Whether the map says that the block is in the file; says nothing about its being right."""
        return bool(self._present_word(block))

    def is_trusted(self, block: int) -> bool:
        """Whether the block is in the file and was verified by this process, or sealed."""
        return 0 != self._trusted[block] == self._words[3 * block + 2]

    def witness(self, block: int) -> tuple[int, int, int] | None:
        """By what another process sees that bytes of a block are right, which it has taken from the file.

        A descriptor, without our locks, which the caller closes; an offset; and the 64 bits to be found there, which
        are others once the block is evicted. None for a block that is not trusted, or no longer in the cache.
        """
        word = self._trusted[block]
        if not word:
            return None
        try:
            fd = self._open_map(os.O_RDONLY)
        except OSError:
            return None
        return (fd, entry_at(block) + STATE_AT, word) if fd >= 0 else None

    def has(self, block: int) -> bool:
        """Whether the block can be served now; a present block not yet verified is verified first (reads it)."""
        return self.is_trusted(block) or self._cache.held.get(self, block) is not None or self._verify(block)

    def _verify(self, block: int) -> bool:
        return self.read_checked(block) is not None

    def read_checked(self, block: int) -> bytes | None:
        """A block that is in the file, if it matches its checksum; one that does not is gone afterwards."""
        word = self._present_word(block)
        if not word:
            return None
        length = self.length_of(block)
        data = os.pread(self.data_fd, length, block * BLOCK)
        if len(data) == length and checksum(data) == self._words[3 * block]:
            self._trusted[block] = word
            return data
        if self._words[3 * block + 2] == word:
            self._cache.count_corrupt()
            self._words[3 * block + 2] = word + 1  # absent, next generation
        return None

    def check(self, advance: Callable[[int], None] = lambda size: None) -> int:
        """Read every block that is in the file, sealed or not, and tell `advance` of each. Returns how many were
        damaged: they are gone then, and will be fetched again."""
        damaged = 0
        for block in range(self.blocks):
            if self.is_present(block):
                damaged += self.read_checked(block) is None and not self.is_present(block)
                advance(self.length_of(block))
        return damaged

    def length_of(self, block: int) -> int:
        """Bytes in this block: BLOCK, or less for the last."""
        return min(BLOCK, self.size - block * BLOCK)

    def read(self, offset: int, size: int) -> bytes | None:
        """Bytes ``[offset, offset + size)``, which lie in the file, or None when a block of them is not there."""
        blocks = range(offset // BLOCK, block_count(offset + size))
        if self.in_file(blocks):
            data = os.pread(self.data_fd, size, offset)
            if self.in_file(blocks) and len(data) == size:
                return data
        parts = []
        for block in blocks:
            held = self._cache.held.get(self, block)
            start = max(offset - block * BLOCK, 0)
            stop = min(offset + size - block * BLOCK, BLOCK)
            if held is not None:
                parts.append(held[start:stop])
            elif self.has(block):
                part = os.pread(self.data_fd, stop - start, block * BLOCK + start)
                if not self.is_trusted(block):
                    return None
                parts.append(part)
            else:
                return None
        return b"".join(parts)

    def readinto(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the bytes from `offset` on, if their blocks are all in the file."""
        blocks = range(offset // BLOCK, block_count(offset + len(buffer)))
        if not self.in_file(blocks):
            return False
        return os.preadv(self.data_fd, [buffer], offset) == len(buffer) and self.in_file(blocks)

    def in_file(self, blocks: range) -> bool:
        """Whether all these blocks lie verified in the data file. Ask again after the bytes were taken."""
        return all(0 != self._trusted[block] == self._words[3 * block + 2] for block in blocks)

    def touch(self, blocks: range) -> None:
        """Note that these blocks were used now."""
        now = time.time_ns()
        for block in blocks:
            self._words[3 * block + 1] = now

    # writing

    def lock(self, blocks: range) -> bool:
        """Claim blocks for fetching, among processes; False when another process fetches one of them."""
        with self._guard:
            if self._claims_fd < 0 and not self._is_gone:
                try:
                    self._claims_fd = self._open_map(os.O_RDWR)
                except OSError:
                    return False
                if self._claims_fd < 0:
                    # Evicted as a whole, or removed: whoever evicts finds it no more, once this lock was free.
                    with self._cache.exclusive:
                        self._is_gone = True
            is_ours = self._is_gone or lock_range(
                self._claims_fd, entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_WRLCK
            )
            if is_ours:
                self._claimed.update(blocks)
            self._close_claims()
            return is_ours

    def unlock(self, blocks: range) -> None:
        """Give up a claim."""
        with self._guard:
            if self._claims_fd >= 0:
                lock_range(self._claims_fd, entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_UNLCK)
            self._claimed.difference_update(blocks)
            self._close_claims()

    def _close_claims(self) -> None:
        if not self._claimed and self._claims_fd >= 0:
            # In this order: a child that is forked in between must not close it a second time.
            fd, self._claims_fd = self._claims_fd, -1
            os.close(fd)

    def _open_map(self, flags: int) -> int:
        """The map file, opened once more, without the locks that we have on it; -1 when it is not at its name.

        Raises OSError.
        """
        try:
            fd = os.open(self._path, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            return -1
        if os.path.samestat(os.fstat(fd), self._inode):
            return fd
        os.close(fd)
        return -1

    def put(self, block: int, data: memoryview) -> None:
        """Store a block that was fetched under a claim. A disk that takes no more makes it stay in memory."""
        if self.store(block, data):
            self._cache.held.relieve()
        else:
            self._cache.held.add(self, block, bytes(data))

    def store(self, block: int, data: memoryview) -> bool:
        """Write a block that was claimed to the file; False when there is no room for it."""
        digest = checksum(data)
        if not self._cache.reserve(len(data)):
            return False
        try:
            with self._writing:
                written = os.pwrite(self.data_fd, data, block * BLOCK)
        except OSError:
            written = 0
        if written != len(data):
            self._cache.settle(len(data), stored=False)
            return False
        base = 3 * block
        self._words[base] = digest
        self._words[base + 1] = time.time_ns()
        word = (self._words[base + 2] | PRESENT) + 2
        self._words[base + 2] = word
        self._trusted[block] = word
        self._cache.settle(len(data), stored=True)
        return True

    def seal(self) -> None:
        """If every block is verified, sync the data and note it, so that a later process need not verify again."""
        if not self.is_complete() or self._is_sealed():
            return
        os.fsync(self.data_fd)
        seal = seal_of(self.data_fd)
        if self.is_complete():
            SEAL.pack_into(self._map, SEAL_AT, *seal)

    def link(self, path: Path) -> bool:
        """Give the data file a second name, if every block is verified and in it; says whether it has one.

        From then on it is kept, and no longer counted. Raises OSError when the name cannot be given.
        """
        with self._cache.exclusive:
            if not self.is_complete() or not self.is_in_cache:
                return False
            was_sealed = self._is_sealed()
            os.link(self._path.with_suffix(".data"), path)
            if was_sealed:
                # The link has changed the inode's ctime, and nothing else.
                SEAL.pack_into(self._map, SEAL_AT, *seal_of(self.data_fd))
        self._cache.discount(self.size)
        return True

    def is_complete(self) -> bool:
        """Whether all blocks are verified and in the file."""
        return self.in_file(range(self.blocks))

    def is_full(self) -> bool:
        """Whether all blocks are in the file, verified or not."""
        return all(map(self.is_present, range(self.blocks)))

    @property
    def cached_bytes(self) -> int:
        """Bytes of this version that are in the file."""
        blocks = sum(1 for block in range(self.blocks) if self.is_present(block))
        if blocks and self.is_present(self.blocks - 1):
            return (blocks - 1) * BLOCK + self.length_of(self.blocks - 1)
        return blocks * BLOCK

    def hold_whole(self, *, again: bool = False) -> bool:
        """Keep the data file as it is while the kernel reads it by itself; False when it is not complete.

        `again`: somebody holds it already, maybe for a process that has died. Then its blocks were verified, and only
        those that were found damaged since are none.
        """
        with self._guard:
            if not self._whole_users and not lock_range(self.data_fd, LOCK_WHOLE, 1, fcntl.F_RDLCK):
                return False
            self._whole_users += 1
        if self.is_full() if again else self.is_complete():
            self._map[GIVEN_AT] = 1
            self.touch(range(self.blocks))
            return True
        self.release_whole()
        return False

    @property
    def is_in_cache(self) -> bool:
        """Whether the file is still at its name: it may be evicted while it is open, as a whole."""
        try:
            return os.path.samestat(self._inode, self._path.stat())
        except FileNotFoundError:
            return False

    def open_lock(self) -> int:
        """A descriptor that says that this object is open, for as long as anybody has it.

        The caller closes it. -1 for a file that is no longer in the cache, and when no more can be opened.
        """
        try:
            fd = self._open_map(os.O_RDWR)
        except OSError:
            return -1
        if fd >= 0 and not lock_range(fd, LOCK_OPEN, 1, fcntl.F_RDLCK):
            os.close(fd)
            return -1
        return fd

    def warm(self, blocks: range) -> None:
        """Have the kernel read these blocks of the data file into its page cache; waits only to ask."""
        for block in blocks:
            # Block by block: a longer piece would be cut to the disk's own read-ahead.
            os.posix_fadvise(self.data_fd, block * BLOCK, BLOCK, os.POSIX_FADV_WILLNEED)

    def release_whole(self) -> None:
        """The end of one :meth:`hold_whole`."""
        with self._guard:
            self._whole_users -= 1
            if not self._whole_users:
                self.touch(range(self.blocks))
                lock_range(self.data_fd, LOCK_WHOLE, 1, fcntl.F_UNLCK)

    def close(self) -> None:
        """Close the files, and remove them if nothing is in them; the object must not be used afterwards."""
        self._cache.held.forget(self)
        is_empty = not any(map(self.is_present, range(self.blocks)))
        self._words.release()
        self._mapped.close()
        for fd in (self._claims_fd, self.data_fd):
            if fd >= 0:
                os.close(fd)
        if is_empty:
            # Litter on a disk that takes no changes is no reason to fail.
            with suppress(OSError), self._cache.exclusive:
                remove_empty(self._path)

    def abandon(self) -> None:
        """In a forked child: close the files, and leave all locks as the parent has them; it shares them."""
        try:
            self._words.release()
            self._map.nbytes  # noqa: B018 - fails when it was closed before
        except ValueError:
            return
        self._mapped.close()
        for fd in (self._claims_fd, self.data_fd):
            if fd >= 0:
                os.close(fd)
