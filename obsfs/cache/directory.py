"""The block cache: which object versions are here, room for more blocks, and which go first.

:mod:`obsfs.cache.layout` says how it looks on disk, and what keeps it right.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path

from obsfs import private
from obsfs.cache.layout import (
    BLOCK,
    FORMAT,
    HEADER,
    IN_USE_LOCK,
    CacheEntry,
    DirectoryLock,
    StoredBlock,
    evict_blocks,
    header,
    identity_bytes,
    is_file_at,
    is_linked,
    is_pinned,
    lock_range,
    map_path,
    map_paths,
    map_size,
    read_blocks,
    read_entry,
    read_map,
    remove_empty,
    supports_holes,
    unlink,
)
from obsfs.cache.object import CachedObject, MapDescriptors
from obsfs.cache.overflow import OverflowBuffer
from obsfs.cache.pins import Pins
from obsfs.errors import CacheError, TooManyFilesError
from obsfs.limits import open_files_limit
from obsfs.settings import Settings
from obsfs.store.types import ObjectVersion
from obsfs.text import visible

log = logging.getLogger(__name__)

_MIN_FREE_SHARE = 0.05
_MIN_FREE = 1 << 30
_MAX_SLACK = 8 << 30
"""Bytes that one eviction frees, at most, beyond what is needed now."""
_MAX_ESTIMATED = 20_000
"""Objects whose files are looked at when a process starts: 0.1 s."""
_OPEN_ATTEMPTS = 2000
_COMPLAINT_SECONDS = 60.0
_DISK_REFUSES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a disk says that is full, read-only or broken. What is there already may still be readable."""
_NOT_OURS = (errno.ELOOP, errno.EPERM, errno.ENOTDIR, errno.EISDIR)


class Cache:
    """The cache directory: opens objects, counts bytes, and evicts the least recently used blocks.

    `held` has what the disk does not take, `pins` what is never evicted. Where the directory takes no files, objects
    are opened in memory.

    Args:
        limit: The most bytes to keep, with what the map files take. None: what the disk can give.
        min_free: Bytes of the disk to leave free. None: the larger of 5 % and 1 GiB, but at most half of the disk.

    Raises:
        CacheError: The directory cannot be used, or other users could read or change what is in it.
    """

    def __init__(self, directory: Path, limit: int | None = None, *, min_free: int | None = None) -> None:
        self.directory = directory
        self.corrupt_blocks = 0
        self.evicted_bytes = 0
        self.overflow = OverflowBuffer(self.store)
        self.map_descriptors = MapDescriptors()
        self.root = directory / FORMAT
        self._fixed_limit = limit
        self._fixed_min_free = min_free
        self._guard = threading.Lock()
        self._used = 0
        self._room_of_maps = 0
        self._reserved = 0
        self._stored = 0
        self._stored_at_scan = 0
        self._next_scan = 0.0
        self._next_complaint = 0.0
        self._was_made = False
        self.directory_lock = DirectoryLock(self.root / "lock", self._make)
        """Held for a moment by who makes, removes or pins a file: every open waits for it."""
        self._evicting = DirectoryLock(self.root / "evicting", self._make)
        """Held by who makes room, which takes as long as it takes to read all maps: one process at a time."""
        self.trim_soon: Callable[[], None] | None = None
        """Has somebody call :meth:`trim` soon. Without it, whoever stores a block has to."""
        self.on_removed: Callable[[], None] = lambda: None
        """Called when files were evicted whole: they keep their room for as long as somebody has them open."""
        self.pins = Pins(self.root, lambda: self.limit, lambda: self.how_to_enlarge, self.directory_lock)
        try:
            self._make()
            self.directory_lock.open()
            if not self._supports_holes():
                raise CacheError(
                    f"cache directory {directory} lies on a file system that takes no holes in files",
                    "choose a --cache-dir on ext4, xfs, btrfs or tmpfs",
                )
        except OSError as error:
            if error.errno not in _DISK_REFUSES:
                raise CacheError(
                    f"cache directory {directory} cannot be used ({error.strerror})", "choose another --cache-dir"
                ) from None
            self.log_disk_error(error)
        self._used, self._room_of_maps = self._estimate()

    @classmethod
    def of(cls, settings: Settings) -> Cache:
        """The cache that these settings describe. Raises CacheError."""
        return cls(settings.cache_dir, settings.cache_size, min_free=settings.cache_min_free)

    def _make(self) -> None:
        """Make the directory, also again: somebody may have removed it."""
        if self._was_made:
            log.warning("somebody has removed what was in %s: it is made again", self.directory)
        private.make_directory(self.directory, "cache directory", "choose another --cache-dir", CacheError)
        private.make_level(self.root)
        self._was_made = True

    def _supports_holes(self) -> bool:
        try:
            os.pwrite(self.directory_lock.fd, b"\n", 0)
        except OSError as error:
            if error.errno in _DISK_REFUSES:
                return True
            raise
        return supports_holes(self.directory_lock.fd)

    @property
    def is_overflowing(self) -> bool:
        """Whether blocks stay in memory at present, because the disk or the limit takes no more."""
        return len(self.overflow) > 0

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks in the cache, as far as this process knows."""
        return self._used

    @property
    def limit(self) -> int:
        """The most bytes that the cache may hold at present: the setting, or less if the disk cannot give it."""
        able = self._disk_capacity()
        return able if self._fixed_limit is None else min(self._fixed_limit, able)

    @property
    def how_to_enlarge(self) -> str:
        """What to do so that the cache may hold more: whatever it is that limits it."""
        if self._fixed_limit is not None and self._fixed_limit < self._disk_capacity():
            return "raise --cache-size"
        return f"make room on the disk of {self.directory}, or choose another --cache-dir"

    def _disk_capacity(self) -> int:
        """The most bytes that the disk can give."""
        return self._used + self._room_of_maps + max(0, self._free_bytes() - self.min_free)

    @property
    def min_free(self) -> int:
        """Bytes of the disk that the cache leaves free."""
        return self._disk()[1]

    def _free_bytes(self) -> int:
        return self._disk()[0]

    def _disk(self) -> tuple[int, int]:
        """Bytes that the cache's file system has free, and those to leave free."""
        try:
            disk = os.statvfs(self.directory)
        except OSError:
            return 0, 0
        size = disk.f_blocks * disk.f_frsize
        least = max(int(size * _MIN_FREE_SHARE), min(_MIN_FREE, size // 2))
        return disk.f_bavail * disk.f_frsize, least if self._fixed_min_free is None else self._fixed_min_free

    def log_disk_error(self, error: OSError) -> None:
        """The directory did not take or give something. The log says so, once in a while."""
        now = time.monotonic()
        if now >= self._next_complaint:
            self._next_complaint = now + _COMPLAINT_SECONDS
            log.warning(
                "cache directory %s: %s; what it does not take is read from memory", self.directory, error.strerror
            )

    def open(self, version: ObjectVersion) -> CachedObject:
        """The blocks of `version`, with its files made if they are not there; in memory, where none can be.

        Raises CacheError when there is no memory or no descriptor for it either.
        """
        path = map_path(self.root, version)
        data_fd = -1
        try:
            try:
                data_fd, map_fd = self.open_files(version)
                return CachedObject(self, version, path, data_fd, map_fd)
            except OSError as error:
                if data_fd >= 0:
                    os.close(data_fd)
                    os.close(map_fd)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise
                self.log_disk_error(error)
                return CachedObject(self, version, path, self.memory_file(), -1)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise TooManyFilesError(
                    f"{version.key} cannot be opened ({error.strerror})",
                    f"the limit is {open_files_limit()}: raise it (LimitNOFILE= of a unit, `ulimit -n`)",
                ) from None
            raise CacheError(f"a file of the cache cannot be opened ({error.strerror})", "see the log") from None

    def open_files(self, version: ObjectVersion) -> tuple[int, int]:
        """Descriptors of the data file and the map file of a version. Raises OSError."""
        path = map_path(self.root, version)
        for _ in range(_OPEN_ATTEMPTS):
            data_fd, map_fd = self._open_files(path, version)
            # Whoever evicts takes this lock alone before it unlinks; then the files are no longer at their names.
            is_ours = lock_range(data_fd, IN_USE_LOCK, 1, fcntl.F_RDLCK) and is_file_at(map_fd, path)
            if is_ours and is_file_at(data_fd, path.with_suffix(".data")):
                return data_fd, map_fd
            os.close(data_fd)
            os.close(map_fd)
            time.sleep(0.001)
        raise OSError(errno.EBUSY, "others keep removing it")

    def memory_file(self) -> int:
        """A descriptor in place of that of a data file. Nothing is ever stored in it. Raises OSError."""
        return os.memfd_create("obsfs-data", os.MFD_CLOEXEC)

    def _open_files(self, path: Path, version: ObjectVersion) -> tuple[int, int]:
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
                # Somebody has put something else there: it goes.
                log.warning("there is something in %s that is not a cache file: it is removed", path.parent)
                self._remove_foreign(path)
                raise
            try:
                self._check_files(path, version, data_fd, map_fd)
            except OSError:
                with suppress(OSError):
                    unlink(path)
                os.close(data_fd)
                os.close(map_fd)
                raise
            return data_fd, map_fd

    def _remove_foreign(self, path: Path) -> None:
        with suppress(OSError):
            if path.parent.is_symlink() or not path.parent.is_dir():
                path.parent.unlink()
            else:
                unlink(path)

    def _check_files(self, path: Path, version: ObjectVersion, data_fd: int, map_fd: int) -> None:
        """Make what is new, and unlink what is damaged: the caller looks whether the files are still at their names."""
        identity, length = identity_bytes(version), map_size(version.size)
        if not os.fstat(map_fd).st_size:
            if os.fstat(data_fd).st_size:
                # What was known of it is lost, and somebody may read it: by another name, or a map of it.
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

    # counting

    def count_corrupt_block(self) -> None:
        """A block did not match its checksum."""
        with self._guard:
            self.corrupt_blocks += 1

    def store(self, size: int, write: Callable[[], bool]) -> bool:
        """Make room for a block and have it written.

        The caller holds no lock: to make room may close files, which waits for everyone who writes to them.

        Args:
            size: Bytes of the block.
            write: Writes it, and says whether it did.

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
        """So many bytes of the cache are somebody else's now."""
        with self._guard:
            self._used = max(0, self._used - size)

    # evicting

    def reserve(self, size: int) -> bool:
        """Room for a block (see `store`). Evicts if need be, or if other processes may have added much by now.

        False when there is no room, because what is there is in use by readers in passthrough.
        """
        if self._is_scan_due():
            if self.trim_soon is not None:
                self.trim_soon()
            else:
                with self._evicting:
                    is_removed = self._is_scan_due() and self._evict(0)
                self._notify_removed(is_removed)
        if self._try_reserve(size):
            return True
        with self._evicting:
            if self._try_reserve(size):
                return True
            # What is in use stays in use for a while: a scan that freed too little is not repeated at once.
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
        """Bytes that the disk lacks to take so many more, and keep free what is to be left free."""
        free, least = self._disk()
        return least + self._reserved + size - free

    def _is_scan_due(self) -> bool:
        limit = min(self._hard_limit, self.limit)
        stored = self._stored - self._stored_at_scan
        if stored >= max(limit // 16, 64 * BLOCK):
            return True
        # In time, so that nobody has to wait for room; but not over and over where nothing can be evicted.
        ahead = self._headroom(limit)
        return self.trim_soon is not None and stored >= ahead // 2 and limit - self._used - self._room_of_maps < ahead

    def _headroom(self, limit: int) -> int:
        """Bytes of room to have at hand before they are needed: what arrives while all maps are read."""
        return min(limit // 32, _MAX_SLACK) if self.trim_soon is not None else 0

    def trim(self) -> None:
        """Bring the cache to its limit, and give the disk back what it is to have free; oldest blocks go first."""
        with self._evicting:
            is_removed = self._evict(self._headroom(min(self._hard_limit, self.limit)))
        self._notify_removed(is_removed)

    def _notify_removed(self, is_removed: bool) -> None:
        """Called with no lock held: who closes files waits for those who write to them, and these may wait for room."""
        if is_removed:
            self.on_removed()

    def _evict(self, size: int) -> bool:
        """Evict so that the cache and its disk take `size` bytes more; 5 % more than that, if anything has to go.

        Files are locked one by one, so that an open waits for one of them at most. The caller holds the lock for it.
        Returns whether any file was evicted whole.
        """
        stored = self._stored
        blocks: list[StoredBlock] = []
        rooms: dict[Path, int] = {}
        shares: dict[Path, int] = {}
        for path in map_paths(self.root):
            found = read_map(path)
            if not found.is_readable:
                with suppress(OSError), self.directory_lock:
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
        # In rounds: what is in use by passthrough frees nothing, so that more must be chosen.
        while freed < excess and (victims := _take_bytes(oldest, excess - freed, shares)):
            for path, of_file in victims.items():
                with self.directory_lock:
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

    def _estimate(self) -> tuple[int, int]:
        """About how many bytes the data files and the map files take, before all of them have been read."""
        data = maps = 0
        for path in islice(map_paths(self.root), _MAX_ESTIMATED):
            with suppress(OSError):
                maps += path.lstat().st_blocks * 512
                found = path.with_suffix(".data").lstat()
                data += found.st_blocks * 512 if found.st_nlink == 1 else 0
        return data, maps

    def clean(self, *, older_than: float = 0.0, selects: Callable[[ObjectVersion], bool] | None = None) -> int:
        """Drop what was not used for `older_than` seconds, of the objects that are meant (by default all); no pins.

        Returns the bytes freed. What another process has open loses its blocks and keeps its files.
        """
        horizon = (time.time() - older_than) * 1e9
        freed = 0
        for path in map_paths(self.root):
            # One by one: every open waits for this lock.
            with self.directory_lock:
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

    def check(self, version: ObjectVersion, advance: Callable[[int], None]) -> tuple[str, list[int]]:
        """Read all that is cached of a version and compare it with its checksums, whatever was trusted until now.

        Returns the SHA-256 (hex) if it is whole, else ``""``; and where damaged blocks began (bytes). Those are gone
        now. `advance` is told of the bytes of all blocks, cached or not. Raises CacheError.
        """
        cached = self.open(version)
        try:
            digest, bad, is_whole = hashlib.sha256(), [], True
            for block in range(cached.blocks):
                was_present = cached.is_present(block)
                data = cached.read_verified(block)
                if was_present and data is None:
                    bad.append(block * BLOCK)
                is_whole = is_whole and data is not None
                digest.update(data or b"")
                advance(cached.length_of(block))
            return digest.hexdigest() if is_whole else "", bad
        finally:
            cached.close()

    def drop(self, version: ObjectVersion) -> None:
        """Forget all that is cached of a version."""
        path = map_path(self.root, version)
        with self.directory_lock:
            if is_linked(path):
                unlink(path)
            else:
                evict_blocks(path, read_blocks(path))

    def present_blocks(self, version: ObjectVersion) -> list[int]:
        """The numbers of the blocks that the cache has of a version, ascending."""
        return [block.number for block in read_blocks(map_path(self.root, version))]

    def entries(self) -> Iterator[CacheEntry]:
        """Everything in the cache."""
        for path in map_paths(self.root):
            if (entry := read_entry(path)) is not None:
                yield entry

    def close(self) -> None:
        """Close the directory's lock files."""
        self.directory_lock.close()
        self._evicting.close()

    def abandon(self) -> None:
        """As :meth:`CachedObject.abandon`."""
        self.directory_lock.abandon()
        self._evicting.abandon()


def cached_sizes(directory: Path, endpoint: str, bucket: str) -> dict[tuple[str, str, int], int]:
    """Bytes that a cache directory has of each (key, ETag, size) of a bucket. Opens nothing that could be written.

    The size tells versions apart where a server gives no ETags, or the same one twice. A map file whose data file is
    gone, or was cut off, stands for nothing.
    """
    found: dict[tuple[str, str, int], int] = {}
    for path in map_paths(directory / FORMAT):
        entry = read_entry(path)
        if entry and (entry.version.endpoint, entry.version.bucket) == (endpoint, bucket):
            with suppress(OSError):
                if entry.path.stat().st_size == entry.version.size:
                    found[entry.version.key, entry.version.etag, entry.version.size] = entry.cached_bytes
    return found


def _take_bytes(blocks: Iterator[StoredBlock], size: int, shares: Mapping[Path, int]) -> dict[Path, list[StoredBlock]]:
    """The next blocks that have `size` bytes together, by map file; empty when there are none left.

    `shares`: the bytes that each block of a map file has of that file.
    """
    taken: dict[Path, list[StoredBlock]] = {}
    while size > 0 and (block := next(blocks, None)) is not None:
        taken.setdefault(block.path, []).append(block)
        size -= block.size + shares.get(block.path, 0)
    return taken
