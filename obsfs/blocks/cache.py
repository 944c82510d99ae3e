"""The block cache: which object versions are here, room for more blocks, and which go first.

:mod:`obsfs.blocks.layout` says how it looks on disk, and what keeps it right.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from obsfs.blocks.held import HeldBlocks
from obsfs.blocks.layout import (
    BLOCK,
    ENTRY,
    FORMAT,
    HEADER,
    LOCK_OPEN,
    CacheEntry,
    DirectoryLock,
    StoredBlock,
    block_count,
    evict_blocks,
    header,
    identity_bytes,
    is_at,
    is_linked,
    is_pinned,
    lock_range,
    map_path,
    read_blocks,
    read_entry,
    takes_holes,
    unlink,
)
from obsfs.blocks.object import CachedObject
from obsfs.blocks.pins import Pins
from obsfs.errors import CacheError, TooManyFilesError
from obsfs.limits import open_files_limit
from obsfs.remote.objects import ObjectVersion


class Cache:
    """The cache directory: opens objects, counts bytes, and evicts the least recently used blocks.

    `limit` is the most bytes of blocks to keep; `held` has what the disk does not take, `pins` what is never evicted.
    Raises CacheError when the directory cannot be used.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.limit = limit
        self.corrupt_blocks = 0
        self.evicted_bytes = 0
        self.held = HeldBlocks()
        self._root = directory / FORMAT
        self._guard = threading.Lock()
        self._evicting = threading.Lock()
        self._used = 0
        self._reserved = 0
        self._stored = 0
        self._stored_at_scan = 0
        self._next_scan = 0.0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if directory.stat().st_uid != os.geteuid():
                raise CacheError(f"cache directory {directory} belongs to another user", "choose --cache-dir")
            self._root.mkdir(mode=0o700, exist_ok=True)
            self._lock_fd = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._lock_fd, b"\n", 0)
            if not takes_holes(self._lock_fd):
                raise CacheError(
                    f"cache directory {directory} lies on a file system that takes no holes in files",
                    "choose a --cache-dir on ext4, xfs, btrfs or tmpfs",
                )
            self.exclusive = DirectoryLock(self._lock_fd)
            self.pins = Pins(self._root, limit, self.exclusive)
        except OSError as error:
            raise CacheError(
                f"cache directory {directory} cannot be used ({error.strerror})", "choose another --cache-dir"
            ) from None

    @property
    def is_strained(self) -> bool:
        """Whether blocks stay in memory at present, because the disk or the limit takes no more."""
        return len(self.held) > 0

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks in the cache, as far as this process knows."""
        return self._used

    def open(self, version: ObjectVersion) -> CachedObject:
        """The blocks of `version`, with its files made if they are not there. Raises CacheError."""
        path = map_path(self._root, version)
        size = HEADER + ENTRY * block_count(version.size)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            while True:
                data_fd, map_fd = self._open_files(path, version.size, size, identity_bytes(version))
                # Whoever evicts takes this lock alone before it unlinks; then the files are no longer at their names.
                if lock_range(map_fd, LOCK_OPEN, 1, fcntl.F_RDLCK) and is_at(map_fd, path):
                    break
                os.close(data_fd)
                os.close(map_fd)
                time.sleep(0.001)
            try:
                return CachedObject(self, version, path, data_fd, map_fd)
            except OSError:
                os.close(data_fd)
                os.close(map_fd)
                raise
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise TooManyFilesError(
                    f"{version.key} cannot be opened ({error.strerror})",
                    f"the limit is {open_files_limit()}: raise it (LimitNOFILE= of a unit, `ulimit -n`)",
                ) from None
            raise CacheError(
                f"cache directory {self.directory} cannot be used ({error.strerror})", "make room, or --cache-dir"
            ) from None

    def _open_files(self, map_path: Path, size: int, map_size: int, identity: bytes) -> tuple[int, int]:
        with self.exclusive:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            data_fd = os.open(map_path.with_suffix(".data"), flags, 0o600)
            try:
                map_fd = os.open(map_path, flags, 0o600)
            except OSError:
                os.close(data_fd)
                raise
            try:
                if not os.fstat(map_fd).st_size:
                    if os.fstat(data_fd).st_size:
                        # What was known of it is lost, and somebody may read it: by another name, or a map of it.
                        unlink(map_path)
                        return data_fd, map_fd
                    os.ftruncate(data_fd, size)
                    # Every page is allocated now: a full disk must not surface as SIGBUS when the map is written.
                    os.posix_fallocate(map_fd, 0, map_size)
                    os.pwrite(map_fd, header(b"", size, identity), 0)
                head = os.pread(map_fd, HEADER, 0)
                fits = head == header(head, size, identity) and os.fstat(map_fd).st_size == map_size
                if not fits or os.fstat(data_fd).st_size != size:
                    # Damaged. The files go, rather than shrink under a process that has them mapped.
                    unlink(map_path)
            except OSError:
                unlink(map_path)
                os.close(data_fd)
                os.close(map_fd)
                raise
            return data_fd, map_fd

    # counting

    def count_corrupt(self) -> None:
        """A block did not match its checksum."""
        with self._guard:
            self.corrupt_blocks += 1

    def settle(self, size: int, *, stored: bool) -> None:
        """A block for which room was reserved was stored, or could not be."""
        with self._guard:
            self._reserved -= size
            if stored:
                self._used += size
                self._stored += size

    def discount(self, size: int) -> None:
        """So many bytes of the cache are somebody else's now."""
        with self._guard:
            self._used = max(0, self._used - size)

    # evicting

    def reserve(self, size: int) -> bool:
        """Room for a block, to be settled. Evicts if need be, or if other processes may have added much by now.

        False when there is no room, because what is there is in use by readers in passthrough.
        """
        if self._is_scan_due():
            with self._evicting:
                if self._is_scan_due():
                    self.evict(self.limit)
        if self._take(size):
            return True
        with self._evicting:
            # What is in use stays in use for a while: a scan that freed too little is not repeated at once.
            if not self._take(size):
                if time.monotonic() < self._next_scan:
                    return False
                self.evict(self.limit - self._reserved - size)
                if not self._take(size):
                    self._next_scan = time.monotonic() + 1.0
                    return False
            return True

    def _take(self, size: int) -> bool:
        with self._guard:
            fits = self._used + self._reserved + size <= self.limit
            if fits:
                self._reserved += size
            return fits

    def _is_scan_due(self) -> bool:
        return self._stored - self._stored_at_scan >= max(self.limit // 16, 64 * BLOCK)

    def evict(self, target: int) -> None:
        """Bring the cache to `target` bytes, or to 95% of it when it has to go down at all; oldest blocks first."""
        with self.exclusive:
            stored = self._stored
            evictable = (path for path in self._maps() if not (is_pinned(path) or is_linked(path)))
            blocks = sorted(block for path in evictable for block in read_blocks(path))
            total = sum(block.size for block in blocks) + self.pins.cached_bytes()
            excess = total - target + target // 20 if total > target else 0
            oldest, freed = iter(blocks), 0
            # In rounds: what is in use by passthrough frees nothing, so that more must be chosen.
            while freed < excess and (victims := _take_bytes(oldest, excess - freed)):
                freed += sum(evict_blocks(path, of_file) for path, of_file in victims.items())
            self.evicted_bytes += freed
            total -= freed
            with self._guard:
                # What was stored during the scan may have been seen by it or not.
                self._used = total + self._stored - stored
                self._stored_at_scan = stored

    def clean(self, *, older_than: float = 0.0, prefix: tuple[str, str] | None = None) -> int:
        """Drop what was not used for `older_than` seconds, of the objects whose (bucket, key) start so; no pins.

        Returns the bytes freed. What another process has open loses its blocks and keeps its files.
        """
        horizon = (time.time() - older_than) * 1e9
        freed = 0
        with self.exclusive:
            for path in list(self._maps()):
                entry = read_entry(path)
                if entry is None:
                    unlink(path)
                    continue
                if is_pinned(path) or is_linked(path) or (prefix is not None and not _is_under(entry.version, prefix)):
                    continue
                if entry.last_used * 1e9 > horizon:
                    continue
                freed += evict_blocks(path, list(read_blocks(path)))
            self.discount(freed)
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
                data = cached.read_checked(block)
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
        path = map_path(self._root, version)
        with self.exclusive:
            if is_linked(path):
                unlink(path)
            else:
                evict_blocks(path, list(read_blocks(path)))

    def present_blocks(self, version: ObjectVersion) -> list[int]:
        """The numbers of the blocks that the cache has of a version, ascending."""
        return [block.number for block in read_blocks(map_path(self._root, version))]

    def entries(self) -> Iterator[CacheEntry]:
        """Everything in the cache."""
        for path in self._maps():
            if (entry := read_entry(path)) is not None:
                yield entry

    def _maps(self) -> Iterator[Path]:
        return self._root.glob("??/*.map")

    def close(self) -> None:
        """Close the directory's lock file."""
        os.close(self._lock_fd)

    def abandon(self) -> None:
        """As :meth:`CachedObject.abandon`."""
        with suppress(OSError):
            os.close(self._lock_fd)


def cached_sizes(directory: Path, endpoint: str, bucket: str) -> dict[tuple[str, str], int]:
    """Bytes that a cache directory has of each (key, ETag) of a bucket. Opens nothing that could be written."""
    found: dict[tuple[str, str], int] = {}
    for path in (directory / FORMAT).glob("??/*.map"):
        entry = read_entry(path)
        if entry and (entry.version.endpoint, entry.version.bucket) == (endpoint, bucket):
            found[entry.version.key, entry.version.etag] = entry.cached_bytes
    return found


def _take_bytes(blocks: Iterator[StoredBlock], size: int) -> dict[Path, list[StoredBlock]]:
    """The next blocks that have `size` bytes together, by map file; empty when there are none left."""
    taken: dict[Path, list[StoredBlock]] = {}
    while size > 0 and (block := next(blocks, None)) is not None:
        taken.setdefault(block.path, []).append(block)
        size -= block.size
    return taken


def _is_under(version: ObjectVersion, prefix: tuple[str, str]) -> bool:
    bucket, key = prefix
    return version.bucket == bucket and (
        version.key == key or version.key.startswith(key.rstrip("/") + "/" if key else "")
    )
