"""Room in the cache: how many bytes it may hold, and which blocks go first when there are too many."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from obsfs.blocks import BLOCK
from obsfs.cache.files import CacheFiles
from obsfs.cache.layout import StoredBlock, is_linked, is_pinned, map_paths, read_blocks, read_entry, read_map
from obsfs.cache.locks import DirectoryLock
from obsfs.cache.pins import Pins
from obsfs.cache.removal import evict_blocks, remove_empty, unlink
from obsfs.store.types import ObjectVersion

_MIN_FREE_SHARE = 0.05
_MIN_FREE = 1 << 30
_MAX_SLACK = 8 << 30
"""Bytes that one eviction frees, at most, beyond what is needed now."""
_MAX_ESTIMATED = 20_000
"""Objects whose files are counted when a process starts: 0.1 s."""


class Room:
    """Counts the bytes of a cache, and evicts the least recently used blocks. Safe to use from many threads.

    Args:
        limit: The most bytes to keep, including the map files. None: what the disk can give.
        min_free: Bytes of the disk to leave free. None: the larger of 5 % and 1 GiB, but at most half of the disk.
    """

    def __init__(self, files: CacheFiles, limit: int | None, min_free: int | None) -> None:
        self.root = files.root
        self.evicted_bytes = 0
        self._directory = files.directory
        self._directory_lock = files.directory_lock
        self._fixed_limit = limit
        self._fixed_min_free = min_free
        self._guard = threading.Lock()
        self._used = 0
        self._room_of_maps = 0
        self._reserved = 0
        self._stored = 0
        self._stored_at_scan = 0
        self._next_scan = 0.0
        self._evicting = DirectoryLock(self.root / "evicting", files.make)
        """Held while room is made, for as long as it takes to read all maps: by one process at a time."""
        self._on_room_needed: list[Callable[[], None]] = []
        self._on_removed: list[Callable[[], None]] = []
        self.pins = Pins(self.root, lambda: self.limit, lambda: self.how_to_enlarge, self._directory_lock)

    def subscribe(
        self, *, on_removed: Callable[[], None] | None = None, on_room_needed: Callable[[], None] | None = None
    ) -> None:
        """Call back from now on, from any thread, with no lock held.

        Args:
            on_removed: Files were evicted whole. They keep their room for as long as somebody has them open.
            on_room_needed: Have another thread call `trim` soon. Without a subscriber, threads that store blocks
                trim the cache themselves.
        """
        if on_removed is not None:
            self._on_removed.append(on_removed)
        if on_room_needed is not None:
            self._on_room_needed.append(on_room_needed)

    def estimate(self) -> None:
        """Count roughly what is in the directory, before all maps have been read."""
        data = maps = 0
        for path in islice(map_paths(self.root), _MAX_ESTIMATED):
            with suppress(OSError):
                maps += path.lstat().st_blocks * 512
                found = path.with_suffix(".data").lstat()
                data += found.st_blocks * 512 if found.st_nlink == 1 else 0
        self._used, self._room_of_maps = data, maps

    # how much

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks in the cache that this process knows of."""
        return self._used

    @property
    def limit(self) -> int:
        """The most bytes that the cache may hold now: the setting, or less if the disk has less."""
        able = self._disk_capacity()
        return able if self._fixed_limit is None else min(self._fixed_limit, able)

    @property
    def how_to_enlarge(self) -> str:
        """What a user must do so that the cache may hold more."""
        if self._fixed_limit is not None and self._fixed_limit < self._disk_capacity():
            return "raise --cache-size"
        return f"make room on the disk of {self._directory}, or choose another --cache-dir"

    def _disk_capacity(self) -> int:
        """Return the most bytes that the disk can give."""
        return self._used + self._room_of_maps + max(0, self._free_bytes() - self.min_free)

    @property
    def min_free(self) -> int:
        """Bytes of the disk that the cache leaves free."""
        return self._disk()[1]

    def _free_bytes(self) -> int:
        return self._disk()[0]

    def _disk(self) -> tuple[int, int]:
        """Return the bytes that the file system of the cache has free, and those to leave free."""
        try:
            disk = os.statvfs(self._directory)
        except OSError:
            return 0, 0
        size = disk.f_blocks * disk.f_frsize
        least = max(int(size * _MIN_FREE_SHARE), min(_MIN_FREE, size // 2))
        return disk.f_bavail * disk.f_frsize, least if self._fixed_min_free is None else self._fixed_min_free

    # counting

    def reserve_and_write(self, size: int, write: Callable[[], bool]) -> bool:
        """Make room for a block, and have it written.

        The caller holds no lock: making room may close files, which waits for threads that write to them.

        Args:
            size: Bytes of the block.
            write: Writes it, and returns whether it did.

        Returns:
            Whether the block was written. Its room is given back if it was not, or if `write` raises.
        """
        if not self.reserve(size):
            return False
        is_stored = False
        try:
            is_stored = write()
        finally:
            self._finish_reservation(size, is_stored)
        return is_stored

    def _finish_reservation(self, size: int, is_stored: bool) -> None:
        with self._guard:
            self._reserved -= size
            if is_stored:
                self._used += size
                self._stored += size

    def uncount(self, size: int) -> None:
        """Count so many bytes (`size`) no longer: they have left the cache, or belong to somebody else."""
        with self._guard:
            self._used = max(0, self._used - size)

    # evicting

    def reserve(self, size: int) -> bool:
        """Reserve room for a block. Evicts if needed, or if other processes may have added much by now.

        Args:
            size: Bytes of the block.

        Returns:
            False if there is no room, because passthrough readers use what is there.
        """
        if self._is_scan_due():
            for callback in self._on_room_needed:
                callback()
            if not self._on_room_needed:
                with self._evicting:
                    is_removed = self._is_scan_due() and self._evict(0)
                self._notify_removed(is_removed)
        if self._try_reserve(size):
            return True
        with self._evicting:
            if self._try_reserve(size):
                return True
            # Files in use stay in use for a while: a scan that freed too little is not repeated at once.
            if time.monotonic() < self._next_scan:
                return False
            is_removed = self._evict(size)
            is_taken = self._try_reserve(size)
            if not is_taken:
                self._next_scan = time.monotonic() + 1.0
        self._notify_removed(is_removed)
        return is_taken or (is_removed and self._try_reserve(size))

    @property
    def _hard_limit(self) -> int:
        return sys.maxsize if self._fixed_limit is None else self._fixed_limit

    def _try_reserve(self, size: int) -> bool:
        shortfall = self._shortfall(size)
        with self._guard:
            fits = shortfall <= 0 and self._used + self._room_of_maps + self._reserved + size <= self._hard_limit
            if fits:
                self._reserved += size
            return fits

    def _shortfall(self, size: int) -> int:
        """Return how many bytes the disk lacks to take `size` more and still leave free what it must."""
        free, least = self._disk()
        return least + self._reserved + size - free

    def _is_scan_due(self) -> bool:
        limit = min(self._hard_limit, self.limit)
        stored = self._stored - self._stored_at_scan
        if stored >= max(limit // 16, 64 * BLOCK):
            return True
        # Early, so that nobody waits for room; but not repeatedly where nothing can be evicted.
        ahead = self._headroom(limit)
        is_near = limit - self._used - self._room_of_maps < ahead
        return bool(self._on_room_needed) and stored >= ahead // 2 and is_near

    def _headroom(self, limit: int) -> int:
        """Return the bytes to free before they are needed: what arrives while all maps are read."""
        return min(limit // 32, _MAX_SLACK) if self._on_room_needed else 0

    def trim(self) -> None:
        """Evict the least recently used blocks until the cache is within its limit, and the disk has enough free."""
        with self._evicting:
            is_removed = self._evict(self._headroom(min(self._hard_limit, self.limit)))
        self._notify_removed(is_removed)

    def _notify_removed(self, is_removed: bool) -> None:
        """Tell subscribers. Hold no lock: they close files, which waits for writers, and these may wait for room."""
        if is_removed:
            for callback in self._on_removed:
                callback()

    def _evict(self, size: int) -> bool:
        """Evict until there is room for `size` bytes; if anything has to go, for 5 % more.

        Files are locked one by one, so that an open waits for at most one of them. The caller holds `_evicting`.
        Returns whether any file was evicted whole.
        """
        stored = self._stored
        blocks: list[StoredBlock] = []
        rooms: dict[Path, int] = {}
        shares: dict[Path, int] = {}
        for path in map_paths(self.root):
            found = read_map(path)
            if not found.is_readable:
                with suppress(OSError), self._directory_lock:
                    remove_empty(path)
            rooms[path] = found.room
            shares[path] = found.room // max(1, len(found.blocks))
            if not (is_pinned(path) or is_linked(path)):
                blocks += found.blocks
        blocks.sort()
        total = sum(block.size for block in blocks) + self.pins.cached_bytes()
        target = self._hard_limit - self._reserved - size
        excess = max(total + sum(rooms.values()) - target, self._shortfall(size))
        if excess > 0:
            excess += min(max(0, total - excess) // 20, _MAX_SLACK)
        oldest, freed, is_removed = iter(blocks), 0, False
        # In rounds: files in passthrough free nothing, so that more blocks must be chosen.
        while freed < excess and (victims := _take_bytes(oldest, excess - freed, shares)):
            for path, of_file in victims.items():
                with self._directory_lock:
                    size_freed = evict_blocks(path, of_file)
                self.evicted_bytes += size_freed
                total -= size_freed
                freed += size_freed
                if not path.exists():
                    freed += rooms.pop(path, 0)
                    is_removed = True
        with self._guard:
            # What was stored during the scan may have been seen by it or not.
            self._used = total + self._stored - stored
            self._room_of_maps = sum(rooms.values())
            self._stored_at_scan = stored
        return is_removed

    def clean(self, *, older_than: float = 0.0, selects: Callable[[ObjectVersion], bool] | None = None) -> int:
        """Drop what was not used for a while, except pinned objects. Open objects lose their blocks, not their files.

        Args:
            older_than: Seconds.
            selects: Which objects; None: all.

        Returns:
            The bytes freed.
        """
        horizon = (time.time() - older_than) * 1e9
        freed = 0
        for path in map_paths(self.root):
            # One by one: every open waits for this lock.
            with self._directory_lock:
                entry = read_entry(path)
                if entry is None:
                    unlink(path)
                elif not (
                    is_pinned(path)
                    or is_linked(path)
                    or (selects is not None and not selects(entry.version))
                    or entry.last_used * 1e9 > horizon
                ):
                    freed += evict_blocks(path, read_blocks(path))
        self.uncount(freed)
        return freed

    def close(self) -> None:
        """Close the lock file."""
        self._evicting.close()

    def abandon(self) -> None:
        """In a forked child: close the lock file, and leave the lock as the parent has it."""
        self._evicting.abandon()


def _take_bytes(blocks: Iterator[StoredBlock], size: int, shares: Mapping[Path, int]) -> dict[Path, list[StoredBlock]]:
    """Take the next blocks until they have `size` bytes together.

    Args:
        shares: The bytes of a map file that each of its blocks accounts for.

    Returns:
        The blocks by map file; empty if there are none left.
    """
    taken: dict[Path, list[StoredBlock]] = {}
    while size > 0 and (block := next(blocks, None)) is not None:
        taken.setdefault(block.path, []).append(block)
        size -= block.size + shares.get(block.path, 0)
    return taken
