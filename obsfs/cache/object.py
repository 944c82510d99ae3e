"""The blocks of one object version that is open: which are in its file and right, and putting more there.

Reads never fail for the cache's sake. Where no files can be made (a full disk, one that takes no changes), an object
lives in memory until they can; where its files were cut off or cannot be read, it goes on with new ones. Both swap the
descriptors in place, so that who holds the object need not know.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from obsfs import private
from obsfs.cache.layout import (
    BLOCK,
    ENTRY,
    HANDED_TO_KERNEL_AT,
    LAST_USED_AT,
    PASSTHROUGH_LOCK,
    PRESENT,
    SEAL,
    SEAL_AT,
    STATE_AT,
    TAKEOVER_LOCK,
    WORD,
    StoredBlock,
    block_count,
    checksum,
    current_seal,
    entry_at,
    has_lost_writes,
    is_file_at,
    lock_range,
    map_size,
    punch_block,
    remove_empty,
    stored_blocks,
    unlink,
)
from obsfs.limits import open_files_limit
from obsfs.store.types import ObjectVersion
from obsfs.text import visible

if TYPE_CHECKING:
    from obsfs.cache.directory import Cache

log = logging.getLogger(__name__)

_CHUNK = 4096
"""Blocks whose trust is noted together: 32 KiB of memory for each 4 GiB of an object that are touched."""
_MAX_MAPS = 256
"""Map files that have a descriptor at the same time; an eighth of the limit of open files, if that is less."""
_RETRY_SECONDS = 5.0
"""How often it is tried again to make files where none could be made."""
_TOUCH_SECONDS = 0.5
"""Within so long a second use of the same blocks is not noted."""


class _Trust:
    """The state word at which each block was verified or written by this process; 0 means not yet."""

    def __init__(self, blocks: int) -> None:
        self._length = min(_CHUNK, blocks)
        self._chunks: dict[int, array[int]] = {}

    def __getitem__(self, block: int) -> int:
        chunk = self._chunks.get(block // _CHUNK)
        return chunk[block % _CHUNK] if chunk else 0

    def __setitem__(self, block: int, word: int) -> None:
        chunk = self._chunks.get(block // _CHUNK)
        if chunk is None:
            chunk = self._chunks.setdefault(block // _CHUNK, array("Q", bytes(8 * self._length)))
        chunk[block % _CHUNK] = word

    def part(self, blocks: range) -> array[int] | None:
        """The words of blocks of one chunk; None when none of them was verified."""
        chunk = self._chunks.get(blocks.start // _CHUNK)
        first = blocks.start % _CHUNK
        return chunk[first : first + len(blocks)] if chunk else None


class MapDescriptors:
    """The objects whose map files have a descriptor at present: a bounded number, as descriptors are scarce."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._open: OrderedDict[CachedObject, None] = OrderedDict()

    def add(self, owner: CachedObject) -> None:
        """Note that an object has opened its map file, and have others close theirs if there are too many."""
        limit = max(1, min(_MAX_MAPS, open_files_limit() // 8))
        with self._guard:
            self._open[owner] = None
            self._close(len(self._open) - limit, owner)

    def forget(self, owner: CachedObject) -> None:
        """Note that an object has closed its map file."""
        with self._guard:
            self._open.pop(owner, None)

    def close_all(self) -> None:
        """Have all close theirs, as far as they are not in use: there is no descriptor left."""
        with self._guard:
            self._close(len(self._open), None)

    def _close(self, excess: int, spared: CachedObject | None) -> None:
        for other in list(self._open) if excess > 0 else ():
            if excess > 0 and other is not spared and other.close_map():
                del self._open[other]
                excess -= 1


class CachedObject:
    """The blocks of one object version. Safe to use from many threads; made by ``Cache.open``.

    It keeps one descriptor all the time, of the data file, and one of the map file as long as that is in use.

    Args:
        path: Its map file.
        map_fd: Its descriptor; -1 where no files could be made, and `data_fd` is of memory.

    Raises:
        OSError: The descriptors stay open.
    """

    def __init__(self, cache: Cache, version: ObjectVersion, path: Path, data_fd: int, map_fd: int) -> None:
        self.version = version
        self.size = version.size
        self.blocks = block_count(version.size)
        self.data_fd = data_fd
        self._cache = cache
        self._path = path
        self._in_memory = map_fd < 0
        self._is_lost = False
        """Whether the disk has lost some of what was written to the file: nothing in it is believed any more."""
        self._is_unlinked = False
        self._error_guard = threading.Lock()
        self._is_reported = False
        self._map_fd = -1
        self._map_inode: os.stat_result | None = None
        self._map_guard = threading.RLock()
        self._claimed: set[int] = set()
        self._next_try = time.monotonic() + _RETRY_SECONDS
        self._trusted = _Trust(self.blocks)
        self._touched: tuple[range, float] = range(0), 0.0
        self._passthrough_users = 0
        self._guard = threading.Lock()
        # Else whoever has to wait for the kernel's lock of the file spins: a twentieth of the CPU time was measured.
        self._writing = threading.Lock()
        self._take_map(map_fd)
        self._was_sealed = self._is_sealed()
        if self._was_sealed:
            for block in self._stored():
                self._trusted[block.number] = block.word

    # the map file

    def _take_map(self, fd: int) -> None:
        with self._map_guard:
            self._map_inode = os.fstat(fd) if fd >= 0 else None
            self._map_fd = fd
        if fd >= 0:
            self._cache.map_descriptors.add(self)

    def _open_map(self, flags: int = os.O_RDWR) -> int:
        """The map file, opened once more; -1 when it is not at its name. Raises OSError."""
        try:
            fd = private.open_file(self._path, flags)
        except FileNotFoundError:
            return -1
        # The number of an inode that is gone may be another file's; ours of the data file is not gone.
        is_ours = self._map_inode is not None and os.path.samestat(os.fstat(fd), self._map_inode)
        if is_ours and is_file_at(self.data_fd, self._path.with_suffix(".data")):
            return fd
        os.close(fd)
        return -1

    def _map(self) -> int:
        """The descriptor of the map file. The caller holds its guard. Raises OSError, also when it is not there."""
        if self._map_fd < 0 and self._map_inode is not None:
            try:
                self._map_fd = self._open_map()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                self._cache.map_descriptors.close_all()
                self._map_fd = self._open_map()
            if self._map_fd >= 0:
                self._cache.map_descriptors.add(self)
        if self._map_fd < 0:
            raise FileNotFoundError(errno.ENOENT, "the map file is not there")
        return self._map_fd

    def close_map(self) -> bool:
        """Close the descriptor of the map file until it is needed; False when it is needed now."""
        if not self._map_guard.acquire(blocking=False):
            return False
        try:
            if self._claimed:
                return False
            # In this order: a child that is forked in between must not close it a second time.
            fd, self._map_fd = self._map_fd, -1
            if fd >= 0:
                os.close(fd)
            return True
        finally:
            self._map_guard.release()

    def _map_bytes(self, offset: int, size: int) -> bytes:
        """Bytes of the map file. What was cut off, or cannot be read, says that nothing is there."""
        try:
            with self._map_guard:
                data = os.pread(self._map(), size, offset)
        except OSError:
            data = b""
        return data.ljust(size, b"\0")

    def _write_map(self, data: bytes, offset: int) -> None:
        with self._map_guard:
            os.pwrite(self._map(), data, offset)

    def _word(self, block: int) -> int:
        word: int = WORD.unpack(self._map_bytes(entry_at(block) + STATE_AT, WORD.size))[0]
        return word

    def present_word(self, block: int) -> int:
        """The state word of a block that the map says is in the file; else 0."""
        word = self._word(block)
        return word if word & PRESENT else 0

    def _words(self, blocks: range) -> array[int]:
        return array("Q", self._map_bytes(entry_at(blocks.start), ENTRY * len(blocks)))[2::3]

    def _set_word(self, block: int, word: int) -> None:
        self._write_map(WORD.pack(word), entry_at(block) + STATE_AT)

    def _drop_word(self, block: int, word: int) -> bool:
        """Mark a block absent if its state word is still `word`. True for the one thread that did it."""
        # Under the guard: several readers find the same damage at the same moment, and it is counted once.
        with self._map_guard:
            if not word or self._word(block) != word:
                return False
            with suppress(OSError):  # a disk that takes no changes: the block is found damaged again next time
                self._set_word(block, word + 1)
            return True

    def _stored(self) -> list[StoredBlock]:
        try:
            with self._map_guard:
                return list(stored_blocks(self._map(), self._path))
        except OSError:
            return []

    def _is_sealed(self) -> bool:
        seal = SEAL.unpack(self._map_bytes(SEAL_AT, SEAL.size))
        return any(seal) and seal == current_seal(self.data_fd)

    def _write_seal(self, seal: tuple[int, int, int, int]) -> None:
        self._write_map(SEAL.pack(*seal), SEAL_AT)
        self._was_sealed = True

    # reading

    def is_present(self, block: int) -> bool:
        """Whether the map says that the block is in the file; says nothing about its being right."""
        return bool(self.present_word(block))

    def is_trusted(self, block: int) -> bool:
        """Whether the block is in the file and was verified by this process, or sealed."""
        return 0 != self._trusted[block] == self._word(block) and not self._is_lost

    def state_word_ref(self, block: int) -> tuple[int, int, int] | None:
        """By what another process sees that bytes of a block are right, which it has taken from the file.

        A descriptor, without our locks, which the caller closes; an offset; and the 64 bits to be found there, which
        are others once the block is evicted. None for a block that is not trusted, or no longer in the cache.
        """
        word = self._trusted[block]
        if not word or self._lost_writes():
            return None
        try:
            fd = self._open_map(os.O_RDONLY)
        except OSError:
            return None
        return (fd, entry_at(block) + STATE_AT, word) if fd >= 0 else None

    def ensure_verified(self, block: int) -> bool:
        """Whether the block can be served now; a present block not yet verified is verified first (reads it)."""
        return self.is_trusted(block) or self._cache.overflow.get(self, block) is not None or self.verify(block)

    def verify(self, block: int) -> bool:
        """Whether the block is in the file and right; one not yet verified is verified (reads it)."""
        return self.is_trusted(block) or self.read_verified(block) is not None

    def read_verified(self, block: int) -> bytes | None:
        """A block that is in the file, if it matches its checksum; one that does not is gone afterwards."""
        word = self.present_word(block)
        if not word or self._is_lost:
            return None
        trusted = self._trusted
        data = self._data(block * BLOCK, self.length_of(block))
        if not self.matches_checksum(block, data):
            self.drop_damaged(block, word)
            return None
        trusted[block] = word
        return data

    def matches_checksum(self, block: int, data: bytes | memoryview) -> bool:
        """Whether these are the bytes of a block, by its checksum."""
        (digest,) = WORD.unpack(self._map_bytes(entry_at(block), WORD.size))
        return len(data) == self.length_of(block) and checksum(data) == digest

    def drop_damaged(self, block: int, word: int) -> bool:
        """A block whose state word was `word` did not match: it is gone from now on. False when it was evicted while it
        was read, so that nothing can be said of it."""
        if not self._drop_word(block, word):
            return False
        self._cache.count_corrupt_block()
        log.warning("block %d of %s is damaged in the cache: it will be fetched again", block, self._name)
        return True

    def check(self, advance: Callable[[int], None] = lambda size: None) -> int:
        """Read every block that is in the file, sealed or not, and tell `advance` of each. Returns how many were
        damaged: they are gone then, and will be fetched again."""
        damaged = 0
        for block in self._stored():
            damaged += self.read_verified(block.number) is None and not self.is_present(block.number)
            advance(block.size)
        return damaged

    @property
    def _name(self) -> str:
        return visible(f"obs://{self.version.bucket}/{self.version.key}")

    def length_of(self, block: int) -> int:
        """Bytes in this block: BLOCK, or less for the last."""
        return min(BLOCK, self.size - block * BLOCK)

    def read(self, offset: int, size: int) -> bytes | None:
        """Bytes ``[offset, offset + size)``, which lie in the file, or None when a block of them is not there."""
        blocks = range(offset // BLOCK, block_count(offset + size))
        if self.are_verified(blocks):
            data = self._data(offset, size)
            if self.are_verified(blocks):
                if len(data) == size:
                    return data
                self.mark_lost(blocks)
                return None
        parts = []
        for block in blocks:
            held = self._cache.overflow.get(self, block)
            start = max(offset - block * BLOCK, 0)
            stop = min(offset + size - block * BLOCK, BLOCK)
            if held is not None:
                parts.append(held[start:stop])
            elif self.ensure_verified(block):
                part = self._data(block * BLOCK + start, stop - start)
                if self._lost_writes() or not self.is_trusted(block):
                    return None
                if len(part) != stop - start:
                    self.mark_lost(range(block, block + 1))
                    return None
                parts.append(part)
            else:
                return None
        return b"".join(parts)

    def _data(self, offset: int, size: int) -> bytes:
        """Bytes of the data file; fewer where it was cut off, none where the disk fails."""
        try:
            return os.pread(self.data_fd, size, offset)
        except OSError as error:
            self._cache.log_disk_error(error)
            return b""

    def readinto(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the bytes from `offset` on, if their blocks are all in the file."""
        blocks = range(offset // BLOCK, block_count(offset + len(buffer)))
        if not self.are_verified(blocks):
            return False
        try:
            return os.preadv(self.data_fd, [buffer], offset) == len(buffer) and self.are_verified(blocks)
        except OSError:
            return False

    def are_verified(self, blocks: range) -> bool:
        """Whether all these blocks lie verified in the data file. Ask again after the bytes were taken."""
        trusted = self._trusted
        if len(blocks) == 1:
            return 0 != trusted[blocks.start] == self._word(blocks.start) and not self._lost_writes()
        for part in _chunks(blocks):
            words = trusted.part(part)
            if words is None or 0 in words or words != self._words(part):
                return False
        return not self._lost_writes()

    def _lost_writes(self) -> bool:
        """Whether the disk has lost some of what was written to the file. Waits for nothing.

        Ask after bytes were taken: the kernel notes the error before it gives up the page that the disk did not take.
        """
        if not self._in_memory:
            with self._error_guard:  # the kernel says it once
                self._is_lost = self._is_lost or has_lost_writes(self.data_fd)
        return self._is_lost

    def mark_lost(self, blocks: range) -> None:
        """The file does not have the bytes of verified blocks: it was cut off, or the disk fails. They are absent from
        now on, and will be fetched again."""
        lost = {block: word for block in blocks if (word := self._trusted[block])}
        if lost:
            log.warning("bytes of %s are gone from its cache file: they will be fetched again", self._name)
        for block, word in lost.items():
            self._trusted[block] = 0
            self._drop_word(block, word)

    def touch(self, blocks: range) -> None:
        """Note that these blocks were used now."""
        now = time.monotonic()
        if self._touched[0] == blocks and now < self._touched[1] + _TOUCH_SECONDS:
            return
        self._touched = blocks, now
        used = WORD.pack(time.time_ns())
        for block in blocks:
            # Others have no entry yet, which would take room.
            if self._trusted[block]:
                with suppress(OSError):
                    self._write_map(used, entry_at(block) + LAST_USED_AT)

    # writing

    def claim(self, blocks: range) -> bool:
        """Claim blocks for fetching, among processes; False when another process fetches one of them."""
        if not self._has_files():
            self._replace_files()
        try:
            with self._map_guard:
                if not lock_range(self._map(), entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_WRLCK):
                    return False
                self._claimed.update(blocks)
        except OSError:
            pass  # without a map there is nothing that other processes could share
        return True

    def release_claim(self, blocks: range) -> None:
        """Give up a claim."""
        with self._map_guard:
            self._claimed.difference_update(blocks)
            if self._map_fd >= 0:
                lock_range(self._map_fd, entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_UNLCK)

    def store_block(self, block: int, data: memoryview) -> None:
        """Store a block that was fetched under a claim. A disk that takes no more makes it stay in memory."""
        if not self._in_memory and self._cache.store(len(data), partial(self.write_block, block, data)):
            self._cache.overflow.drain_one()
        else:
            self._cache.overflow.add(self, block, bytes(data))

    def write_block(self, block: int, data: memoryview) -> bool:
        """Write a block that was claimed, and for which there is room, to the file; False when it takes no more."""
        digest = checksum(data)
        with self._writing:
            return self._write_claimed(block, data, digest)

    def _write_claimed(self, block: int, data: memoryview, digest: int) -> bool:
        """Bytes, then checksum, then state. The caller keeps the files from being swapped."""
        if self._in_memory or not self._has_files():
            return False
        trusted, word = self._trusted, self._word(block)
        entry = WORD.pack(digest) + WORD.pack(time.time_ns())
        try:
            if not word & PRESENT:
                # First of all, so that a full disk refuses the entry before the bytes have taken room.
                self._write_map(entry + WORD.pack(word), entry_at(block))
            if os.pwrite(self.data_fd, data, block * BLOCK) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if word & PRESENT:
                self._write_map(entry, entry_at(block))
            word = (word | PRESENT) + 2
            self._set_word(block, word)
        except OSError as error:
            self._cache.log_disk_error(error)
            if not word & PRESENT and self._map_bytes(HANDED_TO_KERNEL_AT, 1) == b"\0":
                with suppress(OSError):
                    punch_block(self.data_fd, block)
            return False
        trusted[block] = word
        self._was_sealed = False
        return True

    def _has_files(self) -> bool:
        """Whether the files are as long as they were made; for an object in memory, whether to try again to make some.

        Somebody may have cut them off.
        """
        if self._in_memory:
            return time.monotonic() < self._next_try
        if self._is_lost:
            return False
        try:
            with self._map_guard:
                sizes = os.fstat(self.data_fd).st_size, os.fstat(self._map()).st_size
        except OSError:
            return False
        return sizes == (self.size, map_size(self.size))

    def _replace_files(self) -> None:
        """Go on with other files, as these were cut off, or are memory. What was in them will be fetched again."""
        with self._writing, self._guard:
            if self._has_files() or self._passthrough_users:
                return
            if self._is_lost:
                self._abandon_files()
            if not self._in_memory:
                if not self._is_lost:
                    log.warning("the cache file of %s has another length: it is fetched again", self._name)
                # Whoever is about to take bytes of it looks at these words once more.
                for block in self._stored():
                    self._drop_word(block.number, block.word)
            self._next_try = time.monotonic() + _RETRY_SECONDS
            try:
                data_fd, map_fd = self._cache.open_files(self.version)
            except OSError as error:
                self._cache.log_disk_error(error)
                if self._in_memory:
                    return
                try:
                    data_fd, map_fd = self._cache.memory_file(), -1
                except OSError:  # no descriptor is left: blocks are held in memory until one is
                    return
            self._in_memory = map_fd < 0
            self._is_lost = self._is_unlinked = False
            self._trusted = _Trust(self.blocks)
            self._was_sealed = False
            os.dup2(data_fd, self.data_fd, inheritable=False)
            os.close(data_fd)
            with self._map_guard:
                self._claimed.clear()
                self.close_map()
            self._take_map(map_fd)

    def recover_if_damaged(self) -> None:
        """See whether the data file was cut off, or its disk has lost what was written to it, before a reader does."""
        if self._in_memory:
            return
        if self._lost_writes():
            self._abandon_files()
        if not self._is_lost and os.fstat(self.data_fd).st_size == self.size:
            return
        if self._passthrough_users and not self._is_reported:
            self._is_reported = True
            log.error(
                "the cache file of %s is spoiled, and the kernel reads it for who has it open: they may see an early "
                "end or damaged bytes until they open it again; who opens it now gets another one",
                self._name,
            )
        self._replace_files()

    def _abandon_files(self) -> None:
        """The disk has lost something of the file, and nobody can tell what: it is nobody's any more. Once."""
        self._is_lost = True
        if self._is_unlinked:
            return
        self._is_unlinked = True
        log.error("the disk has lost what was written to the cache file of %s: it is fetched again", self._name)
        with suppress(OSError), self._cache.directory_lock:
            if self.is_in_cache:
                unlink(self._path)

    def seal(self) -> None:
        """If every block is verified, sync the data and note it, so that a later process need not verify again."""
        if not self.is_fully_verified() or self._is_sealed() or current_seal(self.data_fd) is None:
            return
        try:
            os.fsync(self.data_fd)
        except OSError as error:
            self._cache.log_disk_error(error)
            self._abandon_files()
            self.recover_if_damaged()
            return
        seal = current_seal(self.data_fd)
        if seal is not None and self.is_fully_verified():
            try:
                self._write_seal(seal)
            except OSError as error:
                self._cache.log_disk_error(error)

    def link(self, path: Path) -> bool:
        """Give the data file a second name, if every block is verified and in it; says whether it has one.

        From then on it is kept, and no longer counted. Raises OSError when the name cannot be given.
        """
        with self._cache.directory_lock:
            if not self.is_fully_verified() or not self.is_in_cache:
                return False
            was_sealed = self._is_sealed()
            os.link(self._path.with_suffix(".data"), path)
            if was_sealed and (seal := current_seal(self.data_fd)):
                # The link has changed the inode's ctime, and nothing else.
                self._write_seal(seal)
        self._cache.uncount(self.size)
        return True

    def is_fully_verified(self) -> bool:
        """Whether all blocks are verified and in the file."""
        return self.are_verified(range(self.blocks))

    def is_fully_present(self) -> bool:
        """Whether all blocks are in the file, verified or not."""
        return all(word & PRESENT for part in _chunks(range(self.blocks)) for word in self._words(part))

    @property
    def cached_bytes(self) -> int:
        """Bytes of this version that are in the file."""
        return sum(block.size for block in self._stored())

    def acquire_passthrough(self, *, is_reopen: bool = False) -> bool:
        """Keep the data file as it is while the kernel reads it by itself; False when it is not complete.

        `is_reopen`: somebody holds it already, maybe for a process that has died. Then its blocks were verified, and
        only those that were found damaged since are absent.
        """
        self.recover_if_damaged()
        with self._guard:
            if not self._passthrough_users and not lock_range(self.data_fd, PASSTHROUGH_LOCK, 1, fcntl.F_RDLCK):
                return False
            self._passthrough_users += 1
        if (self.is_fully_present() if is_reopen else self.is_fully_verified()) and self._is_untouched():
            with suppress(OSError):
                self._write_map(b"\1", HANDED_TO_KERNEL_AT)
                # It is evicted whole: one block stands for all.
                self.touch(range(1))
                return True
        self.release_passthrough()
        if not self._has_files():
            self._replace_files()
        return False

    def _is_untouched(self) -> bool:
        """Whether nobody has changed the data file, as far as its inode tells. Else nothing of it is trusted."""
        if not self._has_files():
            return False
        if not self._was_sealed or self._is_sealed():
            return True
        log.warning("somebody has touched the cache file of %s: it is verified again", self._name)
        self._trusted, self._was_sealed = _Trust(self.blocks), False
        return False

    @property
    def is_cut_off(self) -> bool:
        """Whether somebody has changed the length of the files, or the disk has lost some of them."""
        return not self._in_memory and not self._has_files()

    @property
    def is_beyond_repair(self) -> bool:
        """Whether the files were cut off while the kernel reads them by itself, so that they cannot be swapped."""
        return self._passthrough_users > 0 and self.is_cut_off

    @property
    def is_in_cache(self) -> bool:
        """Whether the file is still at its name: it may be evicted while it is open, as a whole."""
        try:
            is_there = self._map_inode is not None and os.path.samestat(self._map_inode, self._path.lstat())
        except OSError:
            return False
        return is_there and is_file_at(self.data_fd, self._path.with_suffix(".data"))

    def open_takeover_lock(self) -> int:
        """A descriptor that says that this object is open, for as long as anybody has it.

        The caller closes it. -1 for a file that is no longer in the cache, and when no more can be opened.
        """
        try:
            fd = self._open_map()
        except OSError:
            return -1
        if fd >= 0 and not lock_range(fd, TAKEOVER_LOCK, 1, fcntl.F_RDLCK):
            os.close(fd)
            return -1
        return fd

    def prefault(self, blocks: range) -> None:
        """Have the kernel read these blocks of the data file into its page cache; waits only to ask."""
        for block in blocks:
            # Block by block: a longer piece would be cut to the disk's own read-ahead.
            os.posix_fadvise(self.data_fd, block * BLOCK, BLOCK, os.POSIX_FADV_WILLNEED)

    def release_passthrough(self) -> None:
        """The end of one :meth:`acquire_passthrough`."""
        with self._guard:
            self._passthrough_users -= 1
            if not self._passthrough_users:
                self.touch(range(1))
                lock_range(self.data_fd, PASSTHROUGH_LOCK, 1, fcntl.F_UNLCK)

    def close(self) -> None:
        """Close the files, and remove them if nothing is in them; the object must not be used afterwards."""
        self._cache.overflow.forget(self)
        is_empty = not self._in_memory and not self._stored()
        with self._map_guard:
            self._claimed.clear()
            self.close_map()
            self._map_inode = None
        self._cache.map_descriptors.forget(self)
        fd, self.data_fd = self.data_fd, -1
        os.close(fd)
        if is_empty:
            # Litter on a disk that takes no changes is no reason to fail.
            with suppress(OSError), self._cache.directory_lock:
                remove_empty(self._path)

    def abandon(self) -> None:
        """In a forked child: close the files, and leave all locks as the parent has them; it shares them."""
        # In this order: a second call must not close what others have opened since.
        fds = self._map_fd, self.data_fd
        self._map_fd = self.data_fd = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def _chunks(blocks: range) -> Iterator[range]:
    """The same blocks, so that none of the ranges lies across two chunks."""
    start = blocks.start
    while start < blocks.stop:
        stop = min(blocks.stop, start - start % _CHUNK + _CHUNK)
        yield range(start, stop)
        start = stop
