"""The blocks of one object version that is open: reading what is cached, and storing more.

Reads never fail because of the cache. Where no files can be made (the disk is full or read-only), an object lives in
memory until they can. Where its files were truncated or cannot be read, it goes on with new ones. Both swap the
descriptors in place, so that users of the object need not know.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from obsfs.blocks import BLOCK, block_count
from obsfs.cache.data_file import DataFile
from obsfs.cache.faults import DiskFaults
from obsfs.cache.files import CacheFiles
from obsfs.cache.layout import PRESENT, checksum, map_path
from obsfs.cache.lending import Lender, Lent, StateWordRef
from obsfs.cache.map_file import MapDescriptors, MapFile
from obsfs.cache.overflow import Drained, OverflowBuffer
from obsfs.cache.removal import punch_block, remove_empty, unlink
from obsfs.cache.room import Room
from obsfs.store.types import ObjectVersion
from obsfs.text import visible

log = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
"""Between two attempts to make files where none could be made."""
_TOUCH_SECONDS = 0.5
"""A second use of the same blocks within this time is not noted."""


@dataclass(frozen=True)
class SharedParts:
    """What all open objects of a cache share."""

    files: CacheFiles
    room: Room
    overflow: OverflowBuffer
    faults: DiskFaults
    map_descriptors: MapDescriptors


class CachedObject:
    """The blocks of one object version. Safe to use from many threads; made by ``Cache.open``.

    It always keeps the data file open, and the map file while that is in use.

    Args:
        data_fd: Descriptor of the data file.
        map_fd: Descriptor of the map file; -1 where no files could be made, and `data_fd` is of memory.

    Raises:
        OSError: The descriptors stay open.
    """

    def __init__(self, shared: SharedParts, version: ObjectVersion, data_fd: int, map_fd: int) -> None:
        self.version = version
        self.size = version.size
        self.blocks = block_count(version.size)
        self.path = map_path(shared.files.root, version)
        """Its map file."""
        self._files, self._room = shared.files, shared.room
        self._overflow, self._faults = shared.overflow, shared.faults
        self._data = DataFile(data_fd, shared.faults, in_memory=map_fd < 0)
        self._map = MapFile(self.path, self._data.is_at, shared.map_descriptors)
        self._lender = Lender(self._name, self.size, self._map, self._data, shared.faults)
        self._is_unlinked = False
        self._is_reported = False
        self._next_try = time.monotonic() + _RETRY_SECONDS
        self._touched: tuple[range, float] = range(0), 0.0
        self._passthrough_users = 0
        self._guard = threading.Lock()
        # Else threads that wait for the kernel's lock of the file spin: a twentieth of the CPU time was measured.
        self._writing = threading.Lock()
        self._map.use(map_fd)
        self._lender.trust_seal()

    @property
    def _name(self) -> str:
        return visible(f"obs://{self.version.bucket}/{self.version.key}")

    @property
    def data_fd(self) -> int:
        """The descriptor of the data file; -1 once the object is closed. Take bytes from it by `lend`."""
        return self._data.fd

    # what is here

    def is_present(self, block: int) -> bool:
        """Return whether the map says that a block is in the file. It may be damaged."""
        return bool(self._map.present_word(block))

    def present_word(self, block: int) -> int:
        """Return the state word of a block that the map says is in the file; else 0."""
        return self._map.present_word(block)

    def is_trusted(self, block: int) -> bool:
        """Return whether a block is in the file, and was verified by this process or sealed."""
        return self._lender.is_trusted(block)

    def are_verified(self, blocks: range) -> bool:
        """Return whether all these blocks are in the file, verified, and not lost by the disk."""
        return self._lender.are_verified(blocks)

    def is_fully_verified(self) -> bool:
        """Return whether all blocks are in the file and verified."""
        return self._lender.are_verified(range(self.blocks))

    def is_fully_present(self) -> bool:
        """Return whether the map says that all blocks are in the file, verified or not."""
        return self._lender.are_present(range(self.blocks))

    @property
    def cached_bytes(self) -> int:
        """Bytes of this version that are in the file."""
        return sum(block.size for block in self._map.stored_blocks())

    def length_of(self, block: int) -> int:
        """Return the bytes of a block: BLOCK, or fewer for the last."""
        return self._lender.block_size(block)

    # reading

    def ensure_verified(self, block: int) -> bool:
        """Return whether a block can be served now. One that is present but not yet verified is read and verified."""
        return self.is_trusted(block) or self._overflow.get(self, block) is not None or self.verify(block)

    def verify(self, block: int) -> bool:
        """Return whether a block is in the file and right. One that is not yet verified is read and verified."""
        return self.is_trusted(block) or self.read_verified(block) is not None

    def read_verified(self, block: int) -> bytes | None:
        """Return a block that is in the file if it matches its checksum. One that does not is absent afterwards."""
        return self._lender.read_verified(block)

    def matches_checksum(self, block: int, data: bytes | memoryview) -> bool:
        """Return whether `data` are the bytes of a block, by its checksum."""
        return self._lender.matches_checksum(block, data)

    def drop_damaged(self, block: int, word: int) -> bool:
        """Mark a block absent that did not match its checksum when its state word was `word`.

        False if it was evicted while it was read, so that nothing is known of it.
        """
        return self._lender.drop_damaged(block, word)

    def check(self, advance: Callable[[int], None] = lambda size: None) -> int:
        """Read and verify every block in the file, sealed or not. Damaged ones are absent afterwards.

        Args:
            advance: Called with the bytes of each block.

        Returns:
            How many were damaged.
        """
        damaged = 0
        for block in self._map.stored_blocks():
            damaged += self.read_verified(block.number) is None and not self.is_present(block.number)
            advance(block.size)
        return damaged

    def read(self, offset: int, size: int) -> bytes | None:
        """Return bytes ``[offset, offset + size)``, or None if a block of them is not cached. Within the object."""
        data = self._lender.read(offset, size)
        if data is not None:
            return data
        parts = []
        for block in range(offset // BLOCK, block_count(offset + size)):
            start = max(offset - block * BLOCK, 0)
            stop = min(offset + size - block * BLOCK, BLOCK)
            if (overflowed := self._overflow.get(self, block)) is not None:
                parts.append(overflowed[start:stop])
            elif self.verify(block) and (part := self._lender.read(block * BLOCK + start, stop - start)) is not None:
                parts.append(part)
            else:
                return None
        return b"".join(parts)

    def readinto(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the bytes from `offset` on; False if their blocks are not all in the file and verified."""
        return self._lender.readinto(offset, buffer)

    def lend(self, offset: int, size: int, take: Callable[[int, int, int], bool]) -> Lent:
        """Have bytes taken by descriptor, as :meth:`obsfs.cache.lending.Lender.lend`."""
        return self._lender.lend(offset, size, take)

    def state_word_ref(self, block: int) -> StateWordRef | None:
        """Return what another process needs to check a block, as :meth:`obsfs.cache.lending.Lender.state_word_ref`."""
        return self._lender.state_word_ref(block)

    def prefault(self, blocks: range) -> None:
        """Have the kernel read blocks of the data file into its page cache. Waits only to ask."""
        self._data.prefault(blocks)

    def touch(self, blocks: range) -> None:
        """Note that blocks were used now."""
        now = time.monotonic()
        if self._touched[0] == blocks and now < self._touched[1] + _TOUCH_SECONDS:
            return
        self._touched = blocks, now
        used, trusted = time.time_ns(), self._lender.trusted
        for block in blocks:
            # Others have no entry yet, which would take room.
            if trusted[block]:
                self._map.set_last_used(block, used)

    # writing

    def claim(self, blocks: range) -> bool:
        """Claim blocks for fetching, among processes; False if another process fetches one of them."""
        if not self._has_files():
            self._replace_files()
        try:
            return self._map.claim(blocks)
        except OSError:
            return True  # without a map there is nothing that other processes could share

    def release_claim(self, blocks: range) -> None:
        """Give up a claim."""
        self._map.release_claim(blocks)

    def store_block(self, block: int, data: memoryview) -> None:
        """Store a block that was fetched under a claim. If the disk takes no more, it stays in memory."""
        write = partial(self._write_block, block, data)
        if not self._data.in_memory and self._room.reserve_and_write(len(data), write):
            self._overflow.drain_one()
        else:
            self._overflow.add(self, block, bytes(data))

    def write_overflowed(self, block: int, data: bytes) -> Drained:
        """Write a block that was kept in memory. There is room for it."""
        claimed = range(block, block + 1)
        if not self.claim(claimed):
            return Drained.REFUSED
        try:
            # A block that is written twice would be counted twice.
            if self.verify(block):
                return Drained.ALREADY_THERE
            return Drained.WRITTEN if self._write_block(block, memoryview(data)) else Drained.REFUSED
        finally:
            self.release_claim(claimed)

    def _write_block(self, block: int, data: memoryview) -> bool:
        """Write a block that is claimed, and for which there is room; False if the disk takes no more."""
        digest = checksum(data)
        # Held, so that nobody swaps the files meanwhile.
        with self._writing:
            return self._write_in_order(block, data, digest)

    def _write_in_order(self, block: int, data: memoryview, digest: int) -> bool:
        """Write the bytes, then the checksum, then the state word."""
        if self._data.in_memory or not self._has_files():
            return False
        trusted, word = self._lender.trusted, self._map.word(block)
        try:
            if not word & PRESENT:
                # First of all, so that a full disk refuses the entry before the bytes have taken room.
                self._map.write_entry(block, digest, word)
            self._data.write_block(block, data)
            if word & PRESENT:
                self._map.write_entry(block, digest)
            word = (word | PRESENT) + 2
            self._map.set_word(block, word)
        except OSError as error:
            self._faults.log_error(error)
            if not word & PRESENT and not self._map.was_handed_to_kernel:
                with suppress(OSError):
                    punch_block(self._data.fd, block)
            return False
        trusted[block] = word
        self._lender.break_seal()
        return True

    def seal(self) -> None:
        """If every block is verified, sync the file and note that, so that a later process need not verify again."""
        if not self.is_fully_verified() or self._lender.is_sealed() or self._data.current_seal() is None:
            return
        try:
            os.fsync(self._data.fd)
        except OSError as error:
            self._faults.log_error(error)
            self._declare_lost()
            self.recover_if_damaged()
            return
        try:
            self._lender.seal()
        except OSError as error:
            self._faults.log_error(error)

    # files that others, or the disk, have damaged

    def _has_files(self) -> bool:
        """Return whether the files are as long as they were made; for an object in memory, whether it stays there.

        Somebody may have truncated them. An object in memory tries again to make files every few seconds.
        """
        if self._data.in_memory:
            return time.monotonic() < self._next_try
        if self._data.is_lost:
            return False
        try:
            return self._data.size == self.size and self._map.has_size_for(self.size)
        except OSError:
            return False

    def _replace_files(self) -> None:
        """Go on with other files, as these were truncated, or are memory. What was in them will be fetched again."""
        with self._writing, self._guard:
            if self._has_files() or self._passthrough_users:
                return
            data = self._data
            if data.is_lost:
                self._declare_lost()
            if not data.in_memory:
                if not data.is_lost:
                    log.warning("the cache file of %s has another length: it is fetched again", self._name)
                # Readers that are about to take bytes of it look at these words once more.
                for block in self._map.stored_blocks():
                    self._map.drop_word(block.number, block.word)
            self._next_try = time.monotonic() + _RETRY_SECONDS
            try:
                data_fd, map_fd = self._files.open_files(self.version)
            except OSError as error:
                self._faults.log_error(error)
                if data.in_memory:
                    return
                try:
                    data_fd, map_fd = self._files.memory_file(), -1
                except OSError:  # no descriptor is left: blocks stay in memory until one is
                    return
            # Before the data: from here on no block of the old file is right.
            self._lender.distrust_all()
            self._is_unlinked = False
            data.replace(data_fd, in_memory=map_fd < 0)
            self._map.use(map_fd)

    def recover_if_damaged(self) -> None:
        """Go on with another file if this one was truncated, or its disk lost something, before a reader finds out.

        While the kernel reads the file by itself it cannot be swapped; then the log says so.
        """
        data = self._data
        if data.in_memory:
            return
        if data.check_lost():
            self._declare_lost()
        if not data.is_lost and data.size == self.size:
            return
        if self._passthrough_users and not self._is_reported:
            self._is_reported = True
            log.error(
                "the cache file of %s is spoiled, and the kernel reads it for who has it open: they may see an early "
                "end or damaged bytes until they open it again; who opens it now gets another one",
                self._name,
            )
        self._replace_files()

    def _declare_lost(self) -> None:
        """Give up the file, as the disk lost something of it, and nobody can tell what. Logged and unlinked once."""
        self._data.declare_lost()
        if self._is_unlinked:
            return
        self._is_unlinked = True
        log.error("the disk has lost what was written to the cache file of %s: it is fetched again", self._name)
        with suppress(OSError), self._files.directory_lock:
            if self.is_in_cache:
                unlink(self.path)

    @property
    def is_cut_off(self) -> bool:
        """Whether somebody changed the length of the files, or the disk lost something of them."""
        return not self._data.in_memory and not self._has_files()

    @property
    def is_beyond_repair(self) -> bool:
        """Whether the files are damaged while the kernel reads them by itself, so that they cannot be swapped."""
        return self._passthrough_users > 0 and self.is_cut_off

    @property
    def is_in_cache(self) -> bool:
        """Whether the files are still at their names: they may be evicted, as a whole, while they are open."""
        return self._map.is_at_its_name() and self._data.is_at(self.path.with_suffix(".data"))

    # files that others read

    def link(self, path: Path) -> bool:
        """Give the data file a second name, if every block is verified. From then on it is kept, and not counted.

        Returns:
            Whether it has that name.

        Raises:
            OSError: The name cannot be given.
        """
        with self._files.directory_lock:
            if not self.is_in_cache or not self._lender.link(path):
                return False
        self._room.uncount(self.size)
        return True

    def acquire_passthrough(self, *, is_reopen: bool = False) -> bool:
        """Keep the data file as it is while the kernel reads it by itself; False if it is not fully verified.

        Args:
            is_reopen: The kernel reads it already, maybe for a process that has died. Then its blocks were verified,
                and only those that were found damaged since are absent.
        """
        self.recover_if_damaged()
        with self._guard:
            if not self._passthrough_users and not self._data.lock_for_kernel():
                return False
            self._passthrough_users += 1
        if self._has_files() and self._lender.lend_to_kernel(is_reopen=is_reopen):
            # It is evicted whole: one block stands for all.
            self.touch(range(1))
            return True
        self.release_passthrough()
        if not self._has_files():
            self._replace_files()
        return False

    def release_passthrough(self) -> None:
        """Undo one `acquire_passthrough`."""
        with self._guard:
            self._passthrough_users -= 1
            if not self._passthrough_users:
                self.touch(range(1))
                self._data.unlock_for_kernel()

    def open_takeover_lock(self) -> int:
        """Return a descriptor that marks this object as open for as long as any process has it.

        The caller closes it. -1 if the file is no longer in the cache, or no descriptor is left.
        """
        return self._map.open_takeover_lock()

    # the end

    def close(self) -> None:
        """Close the files, and remove them if nothing is in them. The object must not be used afterwards."""
        self._overflow.forget(self)
        is_empty = not self._data.in_memory and not self._map.stored_blocks()
        self._map.close()
        self._data.close()
        if is_empty:
            # A leftover on a read-only disk is no reason to fail.
            with suppress(OSError), self._files.directory_lock:
                remove_empty(self.path)

    def abandon(self) -> None:
        """In a forked child: close the files, and leave all locks as the parent has them, which shares them."""
        self._map.abandon()
        with suppress(OSError):
            self._data.close()
