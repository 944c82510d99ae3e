"""The block cache: which blocks of an object version are here, room for more, and which go first.

:mod:`obsfs.blocks.layout` says how it looks on disk, and what keeps it right.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from obsfs.blocks.layout import (
    BLOCK,
    ENTRY,
    FORMAT,
    HEADER,
    LOCK_OPEN,
    LOCK_WHOLE,
    PRESENT,
    SEAL,
    SEAL_AT,
    CacheEntry,
    DirectoryLock,
    StoredBlock,
    block_count,
    checksum,
    entry_at,
    evict_blocks,
    header,
    is_at,
    is_linked,
    is_pinned,
    lock_range,
    pin_path,
    read_blocks,
    read_entry,
    seal_of,
    takes_holes,
    unlink,
)
from obsfs.errors import CacheError
from obsfs.remote.objects import ObjectVersion

_OVERFLOW_BYTES = 64 << 20
_MOST_PINNED = 0.9


class CachedObject:
    """The blocks of one object version. Safe to use from many threads; made by :meth:`Cache.open`."""

    def __init__(self, cache: Cache, version: ObjectVersion, path: Path, data_fd: int, map_fd: int) -> None:
        self.version = version
        self.size = version.size
        self.blocks = block_count(version.size)
        self.data_fd = data_fd
        self._cache = cache
        self._path = path
        self._map_fd = map_fd
        self._map = mmap.mmap(map_fd, HEADER + ENTRY * self.blocks)
        self._words = memoryview(self._map)[HEADER:].cast("Q")
        # The state word at which a block was verified or written by us; 0 means not yet.
        self._trusted = array("Q", bytes(8 * self.blocks))
        self._overflow: dict[int, bytes] = {}
        self._whole_users = 0
        self._guard = threading.Lock()
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

    def has(self, block: int) -> bool:
        """Whether the block can be served now; a present block not yet verified is verified first (reads it)."""
        return self.is_trusted(block) or block in self._overflow or self._verify(block)

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
            held = self._overflow.get(block)
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
        return lock_range(self._map_fd, entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_WRLCK)

    def unlock(self, blocks: range) -> None:
        """Give up a claim."""
        lock_range(self._map_fd, entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_UNLCK)

    def put(self, block: int, data: memoryview) -> None:
        """Store a block that was fetched under a claim. A disk that takes no more makes it stay in memory."""
        if self.store(block, data):
            self._cache.relieve()
        else:
            self._cache.hold(self, block, bytes(data))

    def store(self, block: int, data: memoryview) -> bool:
        """Write a block that was claimed to the file; False when there is no room for it."""
        digest = checksum(data)
        if not self._cache.reserve(len(data)):
            return False
        try:
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
            if not self.is_complete() or not is_at(self._map_fd, self._path):
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

    @property
    def cached_bytes(self) -> int:
        """Bytes of this version that are in the file."""
        blocks = sum(1 for block in range(self.blocks) if self.is_present(block))
        if blocks and self.is_present(self.blocks - 1):
            return (blocks - 1) * BLOCK + self.length_of(self.blocks - 1)
        return blocks * BLOCK

    def hold_whole(self) -> bool:
        """Keep the data file as it is while the kernel reads it by itself; False when it is not complete."""
        with self._guard:
            if not self._whole_users and not lock_range(self._map_fd, LOCK_WHOLE, 1, fcntl.F_RDLCK):
                return False
            self._whole_users += 1
        if self.is_complete():
            self.touch(range(self.blocks))
            return True
        self.release_whole()
        return False

    @property
    def lock_fd(self) -> int:
        """The descriptor that holds the locks of this object; a duplicate keeps them when this process dies."""
        return self._map_fd

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
                lock_range(self._map_fd, LOCK_WHOLE, 1, fcntl.F_UNLCK)

    def close(self) -> None:
        """Close the files, and remove them if nothing is in them; the object must not be used afterwards."""
        self._cache.forget_held(self)
        is_alone = lock_range(self._map_fd, LOCK_OPEN, 1, fcntl.F_WRLCK)
        if is_alone and not any(map(self.is_present, range(self.blocks))):
            # Litter on a disk that takes no changes is no reason to fail, and files that took our place are not ours.
            with suppress(OSError), self._cache.exclusive:
                if is_at(self._map_fd, self._path):
                    unlink(self._path)
        self._words.release()
        self._map.close()
        os.close(self._map_fd)
        os.close(self.data_fd)


class Cache:
    """The cache directory: opens objects, counts bytes, and evicts the least recently used blocks.

    `limit` is the most bytes of blocks to keep. Raises CacheError when the directory cannot be used.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory = directory
        self.limit = limit
        self.corrupt_blocks = 0
        self.evicted_bytes = 0
        self.write_errors = 0
        self._root = directory / FORMAT
        self._guard = threading.Lock()
        self._evicting = threading.Lock()
        self._relieving = threading.Lock()
        self._held: OrderedDict[tuple[CachedObject, int], int] = OrderedDict()
        self._held_bytes = 0
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
        except OSError as error:
            raise CacheError(
                f"cache directory {directory} cannot be used ({error.strerror})", "choose another --cache-dir"
            ) from None

    @property
    def is_strained(self) -> bool:
        """Whether blocks stay in memory at present, because the disk or the limit takes no more."""
        return bool(self._held)

    @property
    def used_bytes(self) -> int:
        """Bytes of blocks in the cache, as far as this process knows."""
        return self._used

    def open(self, version: ObjectVersion) -> CachedObject:
        """The blocks of `version`, with its files made if they are not there. Raises CacheError."""
        identity = _identity_bytes(version)
        path = self._map_path(version)
        size = HEADER + ENTRY * block_count(version.size)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            while True:
                data_fd, map_fd = self._open_files(path, version.size, size, identity)
                # Whoever evicts takes this lock alone before it unlinks; then the files are no longer at their names.
                if lock_range(map_fd, LOCK_OPEN, 1, fcntl.F_RDLCK) and is_at(map_fd, path):
                    break
                os.close(data_fd)
                os.close(map_fd)
                time.sleep(0.001)
            return CachedObject(self, version, path, data_fd, map_fd)
        except OSError as error:
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
                    if os.fstat(data_fd).st_nlink > 1:
                        # What was known of it is lost, and by its other name it is somebody's.
                        unlink(map_path)
                        return data_fd, map_fd
                    # Every page is allocated now: a full disk must not surface as SIGBUS when the map is written.
                    if os.fstat(data_fd).st_size:
                        # ext4 takes what is cut to nothing for a file being rewritten, and writes it out on close.
                        os.ftruncate(data_fd, 0)
                    os.ftruncate(data_fd, size)
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

    def hold(self, owner: CachedObject, block: int, data: bytes) -> None:
        """Keep a block in memory that the disk did not take (64 MiB of them at most, oldest go first)."""
        with self._guard:
            self.write_errors += 1
            owner._overflow[block] = data
            self._held[owner, block] = len(data)
            self._held_bytes += len(data)
            while self._held_bytes > _OVERFLOW_BYTES:
                (old, index), size = self._held.popitem(last=False)
                old._overflow.pop(index, None)
                self._held_bytes -= size

    def relieve(self) -> None:
        """The disk takes blocks, perhaps again: write one that is held in memory."""
        if not self._held or not self._relieving.acquire(blocking=False):
            return
        try:
            with self._guard:
                owner, block = next(iter(self._held), (None, 0))
                data = owner._overflow.get(block) if owner else None
            if owner is None or data is None or not owner.lock(claim := range(block, block + 1)):
                return
            try:
                is_stored = owner.store(block, memoryview(data))
            finally:
                owner.unlock(claim)
            if is_stored:
                with self._guard:
                    owner._overflow.pop(block, None)
                    self._held_bytes -= self._held.pop((owner, block), 0)
        finally:
            self._relieving.release()

    def forget_held(self, owner: CachedObject) -> None:
        """Drop what is held in memory for an object that is closed."""
        # Nobody writes to its file any more when this returns.
        with self._relieving, self._guard:
            for block in list(owner._overflow):
                self._held_bytes -= self._held.pop((owner, block), 0)
            owner._overflow.clear()

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
            total = sum(block.size for block in blocks) + self.pinned_bytes()
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
        path = self._map_path(version)
        with self.exclusive:
            if is_linked(path):
                unlink(path)
            else:
                evict_blocks(path, list(read_blocks(path)))

    def present_blocks(self, version: ObjectVersion) -> list[int]:
        """The numbers of the blocks that the cache has of a version, ascending."""
        return [block.number for block in read_blocks(self._map_path(version))]

    def entries(self) -> Iterator[CacheEntry]:
        """Everything in the cache."""
        for path in self._maps():
            if (entry := read_entry(path)) is not None:
                yield entry

    def pin(self, version: ObjectVersion) -> None:
        """Keep what is cached of a version, now and later, until it is unpinned. Raises CacheError.

        Pins that would leave no room for anything else are refused.
        """
        with self.exclusive:
            path = self._map_path(version)
            if not is_pinned(path) and self.pinned_size() + version.size > self.limit * _MOST_PINNED:
                raise CacheError(
                    f"pins would fill more than {_MOST_PINNED:.0%} of the cache", "unpin others, or --cache-size"
                )
            try:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                pin_path(path).write_text(json.dumps(_identity(version)))
            except OSError as error:
                raise CacheError(
                    f"cache directory {self.directory} cannot be used ({error.strerror})", "make room"
                ) from None

    def unpin(self, is_meant: Callable[[ObjectVersion], bool]) -> int:
        """Undo the pins of these objects; how many there were."""
        count = 0
        with self.exclusive:
            for version, path in self._pins():
                if is_meant(version):
                    path.unlink(missing_ok=True)
                    count += 1
        return count

    def pinned_size(self) -> int:
        """Bytes of all pinned objects, once they are wholly cached."""
        return sum(version.size for version, _ in self._pins())

    def pinned_bytes(self) -> int:
        """Bytes of them that are cached."""
        maps = (path.with_suffix(".map") for _, path in self._pins())
        return sum(block.size for path in maps if not is_linked(path) for block in read_blocks(path))

    def _pins(self) -> Iterator[tuple[ObjectVersion, Path]]:
        for path in list(self._root.glob("??/*.pin")):
            try:
                yield ObjectVersion(**json.loads(path.read_bytes())), path
            except (OSError, ValueError, TypeError):
                path.unlink(missing_ok=True)

    def _map_path(self, version: ObjectVersion) -> Path:
        name = hashlib.sha256(_identity_bytes(version)).hexdigest()[:40]
        return self._root / name[:2] / f"{name}.map"

    def _maps(self) -> Iterator[Path]:
        return self._root.glob("??/*.map")

    def close(self) -> None:
        """Close the directory's lock file."""
        os.close(self._lock_fd)


def cached_sizes(directory: Path, endpoint: str, bucket: str) -> dict[tuple[str, str], int]:
    """Bytes that a cache directory has of each (key, ETag) of a bucket. Opens nothing that could be written."""
    found: dict[tuple[str, str], int] = {}
    for path in (directory / FORMAT).glob("??/*.map"):
        entry = read_entry(path)
        if entry and (entry.version.endpoint, entry.version.bucket) == (endpoint, bucket):
            found[entry.version.key, entry.version.etag] = entry.cached_bytes
    return found


def _identity(version: ObjectVersion) -> dict[str, object]:
    """What tells a version from all others; its bytes are the same under whatever version id."""
    return {name: value for name, value in asdict(version).items() if name != "version_id"}


def _identity_bytes(version: ObjectVersion) -> bytes:
    return json.dumps(_identity(version), sort_keys=True).encode()


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
