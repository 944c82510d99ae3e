"""The block cache: which object versions it has, and opening them.

:mod:`obsfs.cache.layout` describes it on disk, and what keeps it right.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from obsfs.blocks import BLOCK
from obsfs.cache.faults import DiskFaults
from obsfs.cache.files import CacheFiles
from obsfs.cache.layout import FORMAT, CacheEntry, is_linked, map_path, map_paths, read_blocks, read_entry
from obsfs.cache.map_file import MapDescriptors
from obsfs.cache.object import CachedObject, SharedParts
from obsfs.cache.overflow import OverflowBuffer
from obsfs.cache.removal import evict_blocks, unlink
from obsfs.cache.room import Room
from obsfs.errors import CacheError, TooManyFilesError
from obsfs.limits import open_files_limit
from obsfs.settings import Settings
from obsfs.store.types import ObjectVersion


class Cache:
    """A cache directory: opens objects, and evicts the least recently used blocks.

    `overflow` has blocks that the disk does not take, `pins` objects that are never evicted. Where the directory takes
    no files, objects are opened in memory. Safe to use from many threads and processes.

    Args:
        limit: The most bytes to keep, including the map files. None: what the disk can give.
        min_free: Bytes of the disk to leave free. None: the larger of 5 % and 1 GiB, but at most half of the disk.

    Raises:
        CacheError: The directory cannot be used, or other users could read or change what is in it.
    """

    def __init__(self, directory: Path, limit: int | None = None, *, min_free: int | None = None) -> None:
        files = CacheFiles(directory)
        self.directory = directory
        self.root = files.root
        self.directory_lock = files.directory_lock
        """Held for a moment to make, remove or pin a file: every open waits for it."""
        self.faults = DiskFaults(directory)
        self.room = Room(files, limit, min_free)
        self.pins = self.room.pins
        self.overflow = OverflowBuffer(self.room.reserve_and_write)
        self._files = files
        self._shared = SharedParts(files, self.room, self.overflow, self.faults, MapDescriptors())
        if error := files.prepare():
            self.faults.log_error(error)
        self.room.estimate()

    @classmethod
    def of(cls, settings: Settings) -> Cache:
        """Return the cache that these settings describe. Raises CacheError."""
        return cls(settings.cache_dir, settings.cache_size, min_free=settings.cache_min_free)

    def subscribe(
        self, *, on_removed: Callable[[], None] | None = None, on_room_needed: Callable[[], None] | None = None
    ) -> None:
        """Call back from now on, as :meth:`obsfs.cache.room.Room.subscribe`."""
        self.room.subscribe(on_removed=on_removed, on_room_needed=on_room_needed)

    # what it holds

    @property
    def is_overflowing(self) -> bool:
        """Whether blocks stay in memory now, because the disk or the limit takes no more."""
        return len(self.overflow) > 0

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks in the cache that this process knows of."""
        return self.room.used_bytes

    @property
    def evicted_bytes(self) -> int:
        """Bytes that this process has evicted so far."""
        return self.room.evicted_bytes

    @property
    def corrupt_blocks(self) -> int:
        """Blocks that this process found damaged so far."""
        return self.faults.corrupt_blocks

    @property
    def limit(self) -> int:
        """The most bytes that the cache may hold now: the setting, or less if the disk has less."""
        return self.room.limit

    @property
    def how_to_enlarge(self) -> str:
        """What a user must do so that the cache may hold more."""
        return self.room.how_to_enlarge

    @property
    def min_free(self) -> int:
        """Bytes of the disk that the cache leaves free."""
        return self.room.min_free

    def present_blocks(self, version: ObjectVersion) -> list[int]:
        """Return the numbers of the blocks that are cached of a version, ascending."""
        return [block.number for block in read_blocks(map_path(self.root, version))]

    def entries(self) -> Iterator[CacheEntry]:
        """Yield everything in the cache."""
        for path in map_paths(self.root):
            if (entry := read_entry(path)) is not None:
                yield entry

    # opening

    def open(self, version: ObjectVersion) -> CachedObject:
        """Open a version. Its files are made if they are not there; where none can be made, it is opened in memory.

        Raises:
            TooManyFilesError: No descriptor is left.
            CacheError: No memory is left either.
        """
        data_fd = map_fd = -1
        try:
            try:
                data_fd, map_fd = self._files.open_files(version)
                return CachedObject(self._shared, version, data_fd, map_fd)
            except OSError as error:
                if data_fd >= 0:
                    os.close(data_fd)
                    os.close(map_fd)
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    raise
                self.faults.log_error(error)
                return CachedObject(self._shared, version, self._files.memory_file(), -1)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise TooManyFilesError(
                    f"{version.key} cannot be opened ({error.strerror})",
                    f"the limit is {open_files_limit()}: raise it (LimitNOFILE= of a unit, `ulimit -n`)",
                ) from None
            raise CacheError(f"a file of the cache cannot be opened ({error.strerror})", "see the log") from None

    def check(self, version: ObjectVersion, advance: Callable[[int], None]) -> tuple[str, list[int]]:
        """Read all that is cached of a version, and verify it, whether it was verified before or not.

        Args:
            advance: Called with the bytes of each block, cached or not.

        Returns:
            The SHA-256 (hex) if the version is fully cached and right, else ``""``; and the offsets (bytes) of damaged
            blocks, which are absent now.

        Raises:
            CacheError: It cannot be opened.
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

    # removing

    def trim(self) -> None:
        """Evict until the cache is within its limit, as :meth:`obsfs.cache.room.Room.trim`."""
        self.room.trim()

    def clean(self, *, older_than: float = 0.0, selects: Callable[[ObjectVersion], bool] | None = None) -> int:
        """Drop what was not used for a while, as :meth:`obsfs.cache.room.Room.clean`."""
        return self.room.clean(older_than=older_than, selects=selects)

    def drop(self, version: ObjectVersion) -> None:
        """Drop all that is cached of a version."""
        path = map_path(self.root, version)
        with self.directory_lock:
            if is_linked(path):
                unlink(path)
            else:
                evict_blocks(path, read_blocks(path))

    # the end

    def close(self) -> None:
        """Close the lock files."""
        self.directory_lock.close()
        self.room.close()

    def abandon(self) -> None:
        """In a forked child: close the lock files, and leave all locks as the parent has them, which shares them."""
        self.directory_lock.abandon()
        self.room.abandon()


def cached_sizes(directory: Path, endpoint: str, bucket: str) -> dict[tuple[str, str, int], int]:
    """Return what a cache directory has of a bucket, without opening anything for writing.

    The size tells versions apart where a server gives no ETags, or the same one twice. A map file whose data file is
    gone, or was truncated, does not count.

    Returns:
        The cached bytes of each (key, ETag, size).
    """
    found: dict[tuple[str, str, int], int] = {}
    for path in map_paths(directory / FORMAT):
        entry = read_entry(path)
        if entry and (entry.version.endpoint, entry.version.bucket) == (endpoint, bucket):
            with suppress(OSError):
                if entry.path.stat().st_size == entry.version.size:
                    found[entry.version.key, entry.version.etag, entry.version.size] = entry.cached_bytes
    return found
