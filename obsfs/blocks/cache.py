"""The block cache on disk, shared by every process of one user.

One object version is two files under ``CACHE_DIR/v1/``: ``ID.data``, sparse and exactly as long as the object, so
that the kernel can serve from it, and ``ID.map``, which says for each block whether it is there, when it was last
used, and the checksum of its bytes. ID is a hash of endpoint, bucket, key, ETag and size.

Four rules keep it right without a journal:

* A block's bytes are written before its map entry says *present*. After a restart an entry is believed only when
  the checksum agrees, or when the file carries a seal: it was complete, synced, and its inode has not been touched
  since (ctime). So it does not matter which writes a power cut keeps.
* A map entry's state is one aligned 64-bit word with a generation in it, which grows whenever the block goes. Who
  takes bytes from the data file checks that word before *and after*: equal words mean that the bytes were whole.
* Who fetches or evicts a block holds an open-file-description lock on its entry's bytes in the map file, so no
  block is fetched twice or punched out while it arrives, whichever processes are at it; a lock ends with its owner.
* A file that the kernel reads by itself (passthrough) is locked against eviction in parts; it can only be unlinked
  whole, which leaves its readers undisturbed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import mmap
import os
import struct
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from obsfs.errors import CacheError
from obsfs.remote.client import ObjectVersion

BLOCK = 1 << 20
"""Bytes in a block: the unit of presence, verification and eviction."""

FORMAT = "v1"
HEADER = 4096
ENTRY = 24
_MAGIC = b"OBSFSMAP"
# magic, block size, object size, then the seal: inode, size, mtime and ctime in ns; then the length of the identity.
_HEAD = struct.Struct("<8sQQ4QQ")
_SEAL = struct.Struct("<4Q")
_SEAL_AT = 24
_LOCK_OPEN = 0
_LOCK_WHOLE = 1
_PRESENT = 1
_OVERFLOW_BYTES = 64 << 20

_FLOCK = struct.Struct("hhqqi4x")
_FALLOC_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, <linux/falloc.h>

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def block_count(size: int) -> int:
    """How many blocks an object of `size` bytes has."""
    return -(-size // BLOCK)


def checksum(data: bytes | memoryview) -> int:
    """The 64-bit checksum (XXH3) of a block."""
    return xxhash.xxh3_64_intdigest(data)


def _lock(fd: int, start: int, length: int, kind: int) -> bool:
    """Take (or with F_UNLCK drop) an open-file-description lock without waiting; False if another holds it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _entry_at(block: int) -> int:
    return HEADER + ENTRY * block


def _seal_of(fd: int) -> tuple[int, int, int, int]:
    stat = os.fstat(fd)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class CachedObject:
    """The blocks of one object version. Safe to use from many threads; made by :meth:`Cache.open`."""

    def __init__(self, cache: Cache, version: ObjectVersion, data_fd: int, map_fd: int) -> None:
        self.version = version
        self.size = version.size
        self.blocks = block_count(version.size)
        self.data_fd = data_fd
        self._cache = cache
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
        return word if word & _PRESENT else 0

    def _is_sealed(self) -> bool:
        seal = _SEAL.unpack_from(self._map, _SEAL_AT)
        return any(seal) and seal == _seal_of(self.data_fd)

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
        word = self._present_word(block)
        if not word:
            return False
        length = self.length_of(block)
        data = os.pread(self.data_fd, length, block * BLOCK)
        if len(data) == length and checksum(data) == self._words[3 * block]:
            self._trusted[block] = word
            return True
        if self._words[3 * block + 2] == word:
            self._cache.count_corrupt()
            self._words[3 * block + 2] = word + 1  # absent, next generation
        return False

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
        return _lock(self._map_fd, _entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_WRLCK)

    def unlock(self, blocks: range) -> None:
        """Give up a claim."""
        _lock(self._map_fd, _entry_at(blocks.start), ENTRY * len(blocks), fcntl.F_UNLCK)

    def put(self, block: int, data: memoryview) -> None:
        """Store a block that was fetched under a claim. A disk that takes no more makes it stay in memory."""
        digest = checksum(data)
        if not self._cache.reserve(len(data)):
            self._cache.hold(self, block, bytes(data))
            return
        try:
            written = os.pwrite(self.data_fd, data, block * BLOCK)
        except OSError:
            written = 0
        if written != len(data):
            self._cache.settle(len(data), stored=False)
            self._cache.hold(self, block, bytes(data))
            return
        base = 3 * block
        self._words[base] = digest
        self._words[base + 1] = time.time_ns()
        word = (self._words[base + 2] | _PRESENT) + 2
        self._words[base + 2] = word
        self._trusted[block] = word
        self._cache.settle(len(data), stored=True)

    def seal(self) -> None:
        """If every block is verified, sync the data and note it, so that a later process need not verify again."""
        if not self.is_complete() or self._is_sealed():
            return
        os.fsync(self.data_fd)
        seal = _seal_of(self.data_fd)
        if self.is_complete():
            _SEAL.pack_into(self._map, _SEAL_AT, *seal)

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
            if not self._whole_users and not _lock(self._map_fd, _LOCK_WHOLE, 1, fcntl.F_RDLCK):
                return False
            self._whole_users += 1
        if self.is_complete():
            self.touch(range(self.blocks))
            return True
        self.release_whole()
        return False

    def release_whole(self) -> None:
        """The end of one :meth:`hold_whole`."""
        with self._guard:
            self._whole_users -= 1
            if not self._whole_users:
                self.touch(range(self.blocks))
                _lock(self._map_fd, _LOCK_WHOLE, 1, fcntl.F_UNLCK)

    def close(self) -> None:
        """Close the files; the object must not be used afterwards."""
        self._cache.forget_held(self)
        self._words.release()
        self._map.close()
        os.close(self._map_fd)
        os.close(self.data_fd)


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds of one object version. Sizes in bytes, `last_used` in seconds since the epoch."""

    version: ObjectVersion
    cached_bytes: int
    last_used: float
    path: Path


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
        identity = json.dumps(asdict(version), sort_keys=True).encode()
        name = hashlib.sha256(identity).hexdigest()[:40]
        base = self._root / name[:2] / name
        size = HEADER + ENTRY * block_count(version.size)
        try:
            base.parent.mkdir(mode=0o700, exist_ok=True)
            while True:
                data_fd, map_fd = self._open_files(base, version.size, size, identity)
                # Whoever evicts takes this lock alone before it unlinks; then the files are no longer at their names.
                if _lock(map_fd, _LOCK_OPEN, 1, fcntl.F_RDLCK) and _is_at(map_fd, base.with_suffix(".map")):
                    break
                os.close(data_fd)
                os.close(map_fd)
                time.sleep(0.001)
            return CachedObject(self, version, data_fd, map_fd)
        except OSError as error:
            raise CacheError(
                f"cache directory {self.directory} cannot be used ({error.strerror})", "make room, or --cache-dir"
            ) from None

    def _open_files(self, base: Path, size: int, map_size: int, identity: bytes) -> tuple[int, int]:
        with _exclusive(self._lock_fd):
            map_path, data_path = base.with_suffix(".map"), base.with_suffix(".data")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            data_fd = os.open(data_path, flags, 0o600)
            try:
                map_fd = os.open(map_path, flags, 0o600)
            except OSError:
                os.close(data_fd)
                raise
            try:
                if not os.fstat(map_fd).st_size:
                    # Every page is allocated now: a full disk must not surface as SIGBUS when the map is written.
                    os.ftruncate(data_fd, 0)
                    os.ftruncate(data_fd, size)
                    os.posix_fallocate(map_fd, 0, map_size)
                    os.pwrite(map_fd, _header(b"", size, identity), 0)
                head = os.pread(map_fd, HEADER, 0)
                fits = head == _header(head, size, identity) and os.fstat(map_fd).st_size == map_size
                if not fits or os.fstat(data_fd).st_size != size:
                    # Damaged. The files go, rather than shrink under a process that has them mapped.
                    _unlink(map_path)
            except OSError:
                _unlink(map_path)
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

    def forget_held(self, owner: CachedObject) -> None:
        """Drop what is held in memory for an object that is closed."""
        with self._guard:
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
        with _exclusive(self._lock_fd):
            stored = self._stored
            blocks = [
                (used, path, block, word, size)
                for path in self._maps()
                for block, (used, word, size) in _read_blocks(path)
            ]
            total = sum(size for *_, size in blocks)
            excess = total - target
            if excess > 0:
                excess += target // 20
                blocks.sort()
                victims: dict[Path, list[tuple[int, int, int]]] = {}
                chosen = 0
                freed = 0
                while freed < excess and chosen < len(blocks):
                    # In rounds: what is in use by passthrough frees nothing, so that more must be chosen.
                    round_bytes = 0
                    victims.clear()
                    while chosen < len(blocks) and freed + round_bytes < excess:
                        _, path, block, word, size = blocks[chosen]
                        victims.setdefault(path, []).append((block, word, size))
                        round_bytes += size
                        chosen += 1
                    for path, chosen_blocks in victims.items():
                        freed += _evict_blocks(path, chosen_blocks)
                total -= freed
                self.evicted_bytes += freed
            with self._guard:
                # What was stored during the scan may have been seen by it or not.
                self._used = total + self._stored - stored
                self._stored_at_scan = stored

    def clean(self, *, older_than: float = 0.0, prefix: tuple[str, str] | None = None) -> int:
        """Drop what was not used for `older_than` seconds, of the objects whose (bucket, key) start so.

        Returns the bytes freed. What another process has open loses its blocks and keeps its files.
        """
        horizon = (time.time() - older_than) * 1e9
        freed = 0
        with _exclusive(self._lock_fd):
            for path in list(self._maps()):
                entry = _read_entry(path)
                if entry is None:
                    _unlink(path)
                    continue
                if prefix is not None and not _is_under(entry.version, prefix):
                    continue
                if entry.last_used * 1e9 > horizon:
                    continue
                freed += _evict_blocks(path, [(block, word, size) for block, (_, word, size) in _read_blocks(path)])
            with self._guard:
                self._used = max(0, self._used - freed)
        return freed

    def entries(self) -> Iterator[CacheEntry]:
        """Everything in the cache."""
        for path in self._maps():
            if (entry := _read_entry(path)) is not None:
                yield entry

    def _maps(self) -> Iterator[Path]:
        return self._root.glob("??/*.map")

    def close(self) -> None:
        """Close the directory's lock file."""
        os.close(self._lock_fd)


class _exclusive:
    """The lock of the whole directory, among threads and processes; held for short times only."""

    _threads = threading.RLock()

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        self._threads.acquire()
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._threads.release()


def _header(old: bytes, size: int, identity: bytes) -> bytes:
    seal = old[_SEAL_AT : _SEAL_AT + _SEAL.size] if len(old) == HEADER else bytes(_SEAL.size)
    head = struct.pack("<8sQQ", _MAGIC, BLOCK, size) + seal + struct.pack("<Q", len(identity)) + identity
    if len(head) > HEADER:
        raise OSError(errno.ENAMETOOLONG, "object identity too long")
    return head.ljust(HEADER, b"\0")


def _read_entry(path: Path) -> CacheEntry | None:
    try:
        with path.open("rb") as file:
            head = file.read(HEADER)
        magic, block, size, *_, length = _HEAD.unpack_from(head)
        if magic != _MAGIC or block != BLOCK:
            return None
        version = ObjectVersion(**json.loads(head[_HEAD.size : _HEAD.size + length]))
        if version.size != size:
            return None
        rows = [row for _, row in _read_blocks(path)]
        used = max((used for used, _, _ in rows), default=0) or path.stat().st_mtime_ns
        return CacheEntry(version, sum(size for *_, size in rows), used / 1e9, path.with_suffix(".data"))
    except (OSError, ValueError, TypeError, struct.error):
        return None


def _read_blocks(path: Path) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """``(block, (last used in ns, state word, bytes))`` of every present block of a map file."""
    try:
        data = path.read_bytes()
    except OSError:
        return
    if len(data) < HEADER or data[:8] != _MAGIC:
        return
    _, _, size, *_ = _HEAD.unpack_from(data)
    table = data[HEADER:]
    table = table[: len(table) - len(table) % ENTRY]
    for block, (_, used, word) in enumerate(struct.iter_unpack("<3Q", table)):
        if word & _PRESENT and size > block * BLOCK:
            yield block, (used, word, min(BLOCK, size - block * BLOCK))


def _evict_blocks(path: Path, victims: list[tuple[int, int, int]]) -> int:
    """Evict blocks of one file, the file itself when nobody has it open and nothing is left. Bytes freed."""
    try:
        map_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        everything = sum(1 for _ in _read_blocks(path)) == len(victims)
        if everything and _lock(map_fd, _LOCK_OPEN, 1, fcntl.F_WRLCK):
            _unlink(path)
            return sum(size for *_, size in victims)
        if not _lock(map_fd, _LOCK_WHOLE, 1, fcntl.F_WRLCK):
            return 0
        data_fd = os.open(path.with_suffix(".data"), os.O_RDWR | os.O_CLOEXEC)
        try:
            return sum(_punch(map_fd, data_fd, block, word, size) for block, word, size in victims)
        finally:
            os.close(data_fd)
    except OSError:
        return 0
    finally:
        os.close(map_fd)


def _punch(map_fd: int, data_fd: int, block: int, word: int, size: int) -> int:
    state_at = _entry_at(block) + 16
    if not _lock(map_fd, _entry_at(block), ENTRY, fcntl.F_WRLCK):
        return 0
    if os.pread(map_fd, 8, state_at) != struct.pack("<Q", word):
        return 0
    os.pwrite(map_fd, struct.pack("<Q", word + 1), state_at)
    # Whole pages, also at the end of the file: a partial page would be zeroed in place, under a reply in a pipe.
    if _libc.fallocate(data_fd, _FALLOC_PUNCH, block * BLOCK, BLOCK) != 0:
        raise OSError(ctypes.get_errno(), "cannot punch a hole into the cache file")
    return size


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(".data").unlink(missing_ok=True)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _is_under(version: ObjectVersion, prefix: tuple[str, str]) -> bool:
    bucket, key = prefix
    return version.bucket == bucket and (
        version.key == key or version.key.startswith(key.rstrip("/") + "/" if key else "")
    )
