"""What the block cache looks like on disk, shared by every process of one user.

One object version is two files under ``CACHE_DIR/v1/``: ``ID.data``, sparse and exactly as long as the object, so
that the kernel can serve from it, and ``ID.map``, which says for each block whether it is there, when it was last
used, and the checksum of its bytes. ID is a hash of endpoint, bucket, key, ETag and size. A third, ``ID.pin``, keeps
eviction away.

Five rules keep it right without a journal:

* A block's bytes are written before its map entry says *present*. After a restart an entry is believed only when
  the checksum agrees, or when the file carries a seal: it was complete, verified and synced, its inode has not been
  touched since (ctime), and its file system has been mounted since, without a break. So it does not matter which
  writes a power cut keeps, nor what became of the disk while nobody looked.
* A map entry's state is one aligned 64-bit word with a generation in it, which grows whenever the block goes. Who
  takes bytes from the data file checks that word before *and after*: equal words mean that the bytes were whole.
* Who fetches or evicts a block holds an open-file-description lock on its entry's bytes in the map file, so no
  block is fetched twice or punched out while it arrives, whichever processes are at it; a lock ends with its owner.
* A complete data file may have a second name outside (a hard link, :meth:`~obsfs.cache.object.CachedObject.link`).
  Whoever reads it by that name is not disturbed: no block of it is evicted, and it is never truncated.
* A file that the kernel was given, to read it by itself (passthrough), is only evicted whole, which leaves its readers
  undisturbed, for as long as it is there: who has mapped it may have closed it, and nobody can tell. Its map file says
  so. While it is handed over it is locked, on the open data file that the kernel is given: that lock ends when the
  kernel has done with it, however its server ended.

Nothing here maps a file into memory: a full disk, or somebody who cuts a file off, would end the process (SIGBUS). Map
files are sparse, so they take the room of what is cached rather than of the object.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import xxhash

from obsfs import private
from obsfs.errors import ObsfsError
from obsfs.store.types import ObjectVersion

BLOCK = 1 << 20
"""Bytes in a block: the unit of presence, verification and eviction."""

PIECE = 8
"""Blocks in a piece: the longest range request, 8 MiB, where requests cost little beside their bytes. Ranges keep to
the borders of pieces: servers keep objects in parts or chunks of 4 or 8 MiB, and a range that lies across two of them
costs more on their side (SeaweedFS: a fifth more of its CPU)."""

FORMAT = "v1"
HEADER = 4096
ENTRY = 24
_MAGIC = b"OBSFSMAP"
# magic, block size, object size, then the seal: inode, size, mtime and ctime in ns; then the length of the identity.
_HEAD = struct.Struct("<8sQQ4QQ")
SEAL = struct.Struct("<4Q")
SEAL_AT = 24
HANDED_TO_KERNEL_AT = HEADER - 1
"""Where in the header the byte is that is not 0 once the kernel was given the data file."""
LAST_USED_AT = 8
"""Where in an entry its last use is."""
STATE_AT = 16
"""Where in an entry its state word is."""
WORD = struct.Struct("<Q")

TAKEOVER_LOCK = 0
"""The byte of a map file that is locked for a file which the kernel reads, by who outlives its server; earlier versions
locked it for every open object."""
PASSTHROUGH_LOCK = 0
"""The byte of a data file that is locked while the kernel reads it by itself."""
IN_USE_LOCK = 1
"""The byte of a data file that whoever has the object open has locked. A map file has no descriptor all the time."""
PRESENT = 1

_FLOCK = struct.Struct("hhqqi4x")
_AT_EMPTY_PATH = 0x1000  # <fcntl.h>
_STATX_MNT_ID_UNIQUE = 0x4000  # <linux/stat.h>, Linux 6.8
_STATX_BYTES = 256
_STATX_MNT_ID_AT = 144
_WAIT_BEFORE = 1  # SYNC_FILE_RANGE_WAIT_BEFORE, <linux/fs.h>
_FAR_AWAY = 1 << 62
"""Where no file has a page."""
_FALLOC_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, <linux/falloc.h>

_LOST = (errno.EIO, errno.ENOSPC)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)


def identity(version: ObjectVersion) -> dict[str, object]:
    """What tells a version from all others; its bytes are the same under whatever version id and date."""
    return {name: value for name, value in asdict(version).items() if name not in ("version_id", "modified")}


def identity_bytes(version: ObjectVersion) -> bytes:
    """As it is written into the map file."""
    return json.dumps(identity(version), sort_keys=True).encode()


def map_path(root: Path, version: ObjectVersion) -> Path:
    """The map file of a version, under ``CACHE_DIR/v1/``."""
    name = hashlib.sha256(identity_bytes(version)).hexdigest()[:40]
    return root / name[:2] / f"{name}.map"


def block_count(size: int) -> int:
    """How many blocks an object of `size` bytes has."""
    return -(-size // BLOCK)


def checksum(data: bytes | memoryview) -> int:
    """The 64-bit checksum (XXH3) of a block."""
    return xxhash.xxh3_64_intdigest(data)


def lock_range(fd: int, start: int, length: int, kind: int) -> bool:
    """Take (or with F_UNLCK drop) an open-file-description lock without waiting; False if another holds it."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def entry_at(block: int) -> int:
    """Where in the map file a block's entry is: checksum, last use in ns since the epoch, state word."""
    return HEADER + ENTRY * block


def map_size(size: int) -> int:
    """Length in bytes of the map file of an object of `size` bytes. It is sparse."""
    return HEADER + ENTRY * block_count(size)


def current_seal(fd: int) -> tuple[int, int, int, int] | None:
    """What a seal notes of a data file; None where it cannot be known whether its file system was mounted anew.

    It was when its disk may have been elsewhere, or the machine was off: then every file is verified as it is read.
    """
    session = _session(fd)
    if session is None:
        return None
    stat = os.fstat(fd)
    # The session has no field of its own in this format.
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns ^ session


def _session(fd: int) -> int | None:
    """A number that is another one after a reboot or a new mount of the file system of an open file."""
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_MNT_ID_UNIQUE, buffer):
        return None
    mask = int.from_bytes(buffer.raw[:4], sys.byteorder)
    if not mask & _STATX_MNT_ID_UNIQUE or not (boot := _boot_id()):
        return None
    mount = buffer.raw[_STATX_MNT_ID_AT : _STATX_MNT_ID_AT + WORD.size]
    return xxhash.xxh3_64_intdigest(boot + mount)


@cache
def _boot_id() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return b""


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds of one object version. Sizes in bytes, `last_used` in seconds since the epoch."""

    version: ObjectVersion
    cached_bytes: int
    last_used: float
    path: Path


class StoredBlock(NamedTuple):
    """A block that a map file says is present. They sort by their last use (ns since the epoch); `size` in bytes."""

    used: int
    path: Path
    number: int
    word: int
    size: int


def header(old: bytes, size: int, identity: bytes) -> bytes:
    """The first page of a map file, with what `old` says of the data file. Raises OSError: the identity is too long."""
    old = old.ljust(HEADER, b"\0")
    seal = old[SEAL_AT : SEAL_AT + SEAL.size]
    head = struct.pack("<8sQQ", _MAGIC, BLOCK, size) + seal + struct.pack("<Q", len(identity)) + identity
    if len(head) > HANDED_TO_KERNEL_AT:
        raise OSError(errno.ENAMETOOLONG, "object identity too long")
    return head.ljust(HANDED_TO_KERNEL_AT, b"\0") + old[HANDED_TO_KERNEL_AT:]


class DirectoryLock:
    """A lock of the whole directory, among threads and processes.

    `prepare` makes the directory of its file; it is called when that is not there, as somebody may have removed the
    whole cache. Where that is not possible it is a lock among the threads of this process only.
    """

    def __init__(self, path: Path, prepare: Callable[[], None]) -> None:
        self.path = path
        self._prepare = prepare
        self._threads = threading.RLock()
        self._fd = -1
        self._depth = 0

    def open(self) -> None:
        """See that the file is open and at its name. Raises OSError or what `prepare` raises."""
        with self._threads:
            if self._fd >= 0 and is_file_at(self._fd, self.path):
                return
            if self.path.parent.is_symlink():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.path.parent))
            try:
                fd = private.open_file(self.path)
            except FileNotFoundError:
                self._prepare()
                fd = private.open_file(self.path)
            self.close()
            self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor of a file on the cache's file system; -1 when there is none."""
        return self._fd

    def __enter__(self) -> None:
        self._threads.acquire()
        self._depth += 1
        try:
            if self._depth == 1:
                with suppress(OSError, ObsfsError):
                    self.open()
                if self._fd >= 0:
                    # A broken disk may refuse it: then only the threads of this process are kept apart.
                    with suppress(OSError):
                        fcntl.flock(self._fd, fcntl.LOCK_EX)
        except BaseException:
            # Ctrl-C while another process holds the lock: no __exit__ follows, and other threads would never get it.
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        try:
            if not self._depth and self._fd >= 0:
                with suppress(OSError):
                    fcntl.flock(self._fd, fcntl.LOCK_UN)
        finally:
            self._threads.release()

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def abandon(self) -> None:
        """As :meth:`~obsfs.cache.object.CachedObject.abandon`."""
        with suppress(OSError):
            self.close()


def read_entry(path: Path) -> CacheEntry | None:
    """What a map file says, or None when it does not say it right."""
    try:
        fd = private.open_file(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        head = os.pread(fd, HEADER, 0)
        magic, block, size, *_, length = _HEAD.unpack_from(head)
        if magic != _MAGIC or block != BLOCK:
            return None
        version = ObjectVersion(**json.loads(head[_HEAD.size : _HEAD.size + length]))
        if version.size != size:
            return None
        blocks = list(stored_blocks(fd, path))
        used = max((block.used for block in blocks), default=0) or os.fstat(fd).st_mtime_ns
        return CacheEntry(version, sum(block.size for block in blocks), used / 1e9, path.with_suffix(".data"))
    except (OSError, ValueError, TypeError, RecursionError, struct.error):
        return None
    finally:
        os.close(fd)


class MapFile(NamedTuple):
    """What eviction has to know of a map file. `room` is what it takes of the disk itself, in bytes."""

    blocks: list[StoredBlock]
    room: int
    is_readable: bool


def read_map(path: Path) -> MapFile:
    """Read a map file for eviction. The blocks of a file that is evicted whole were all used when its last one was."""
    try:
        fd = private.open_file(path, os.O_RDONLY)
    except OSError:
        return MapFile([], 0, False)
    try:
        head = os.pread(fd, HEADER, 0)
        blocks = list(stored_blocks(fd, path))
        if blocks and any(head[HANDED_TO_KERNEL_AT:]):
            used = max(block.used for block in blocks)
            blocks = [block._replace(used=used) for block in blocks]
        return MapFile(blocks, os.fstat(fd).st_blocks * 512, head[: len(_MAGIC)] == _MAGIC)
    except OSError:
        return MapFile([], 0, False)
    finally:
        os.close(fd)


def read_blocks(path: Path) -> list[StoredBlock]:
    """Every present block of a map file; none of a file that is not one."""
    return read_map(path).blocks


def stored_blocks(fd: int, path: Path) -> Iterator[StoredBlock]:
    """Every present block of an open map file, in order; none of a file that is not one. Raises OSError."""
    head = os.pread(fd, HEADER, 0)
    if len(head) < HEADER or not head.startswith(_MAGIC):
        return
    _, _, size, *_ = _HEAD.unpack_from(head)
    done = 0
    for start, stop in _extents(fd):
        # Entries lie across the borders of pages.
        first, last = max(done, (max(start, HEADER) - HEADER) // ENTRY), -(-(stop - HEADER) // ENTRY)
        table = os.pread(fd, ENTRY * max(0, last - first), entry_at(first))
        table = table[: len(table) - len(table) % ENTRY]
        for block, (_, used, word) in enumerate(struct.iter_unpack("<3Q", table), first):
            if word & PRESENT and size > block * BLOCK:
                yield StoredBlock(used, path, block, word, min(BLOCK, size - block * BLOCK))
        done = max(done, last)


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Where a sparse file has been written to."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def evict_blocks(path: Path, victims: list[StoredBlock]) -> int:
    """Evict blocks of one map file; the file itself when the kernel has had it, or nothing is left and nobody has it.

    Returns the bytes freed.
    """
    try:
        map_fd = private.open_file(path, os.O_RDWR)
    except OSError:
        return 0
    try:
        if is_linked(path):
            return 0
        # Made anew if somebody has removed it: the map must not stay for that.
        data_fd = private.open_file(path.with_suffix(".data"))
        try:
            # From here on nobody hands the file to the kernel, who has not done so before.
            is_free = lock_range(data_fd, PASSTHROUGH_LOCK, 1, fcntl.F_WRLCK)
            only_whole = any(os.pread(map_fd, 1, HANDED_TO_KERNEL_AT))
            present = list(read_blocks(path))
            is_alone = len(present) == len(victims) and _is_unused(map_fd, data_fd)
            # Who has it open reads on in it, and what he writes to it goes with it.
            if is_alone or (only_whole and is_free):
                unlink(path)
                return sum(block.size for block in present)
            return sum(_punch(map_fd, data_fd, block) for block in victims) if is_free and not only_whole else 0
        finally:
            os.close(data_fd)
    except OSError:
        return 0
    finally:
        os.close(map_fd)


def _punch(map_fd: int, data_fd: int, block: StoredBlock) -> int:
    entry = entry_at(block.number)
    state_at = entry + STATE_AT
    if not lock_range(map_fd, entry, ENTRY, fcntl.F_WRLCK):
        return 0
    if os.pread(map_fd, 8, state_at) != struct.pack("<Q", block.word):
        return 0
    os.pwrite(map_fd, struct.pack("<Q", block.word + 1), state_at)
    punch_block(data_fd, block.number)
    return block.size


def punch_block(data_fd: int, block: int) -> None:
    """Give the disk the room of a block back, which must be absent. Raises OSError."""
    # Whole pages, also at the end of the file: a partial page would be zeroed in place, under a reply in a pipe.
    if _libc.fallocate(data_fd, _FALLOC_PUNCH, block * BLOCK, BLOCK) != 0:
        raise OSError(ctypes.get_errno(), "cannot punch a hole into the cache file")


def has_lost_writes(fd: int) -> bool:
    """Whether a disk has failed to write what an open file took, since this descriptor was asked last.

    Waits for nothing. The kernel takes such pages for written: they read right until it needs their memory, and are
    then what the disk has. It says so once for each open file, to fsync(2) and to this (errseq_t, <linux/errseq.h>).
    """
    return bool(_libc.sync_file_range(fd, _FAR_AWAY, 1, _WAIT_BEFORE) and ctypes.get_errno() in _LOST)


def supports_holes(fd: int) -> bool:
    """Whether the file system of an open file can give room back inside of files, as eviction does."""
    return bool(_libc.fallocate(fd, _FALLOC_PUNCH, 0, HEADER) == 0 or ctypes.get_errno() != errno.EOPNOTSUPP)


def pin_path(path: Path) -> Path:
    """The file whose being there pins what belongs to a map file."""
    return path.with_suffix(".pin")


def is_pinned(path: Path) -> bool:
    """Whether the blocks of a map file are to be left alone by eviction."""
    return pin_path(path).exists()


def is_linked(path: Path) -> bool:
    """Whether the data file of a map file has another name, outside of the cache."""
    try:
        return path.with_suffix(".data").stat().st_nlink > 1
    except OSError:
        return False


def unlink(path: Path) -> None:
    """Remove a map file and the data file beside it."""
    path.unlink(missing_ok=True)
    path.with_suffix(".data").unlink(missing_ok=True)


def remove_empty(path: Path) -> None:
    """Remove a map file in which no block is present, and its data, if nobody has it open. Raises OSError."""
    map_fd = private.open_file(path, os.O_RDWR)
    try:
        data_fd = private.open_file(path.with_suffix(".data"))
        try:
            if _is_unused(map_fd, data_fd) and next(stored_blocks(map_fd, path), None) is None:
                unlink(path)
        finally:
            os.close(data_fd)
    finally:
        os.close(map_fd)


def _is_unused(map_fd: int, data_fd: int) -> bool:
    """Whether nobody has the object open; nobody opens it then before these descriptors are closed."""
    return lock_range(map_fd, TAKEOVER_LOCK, 1, fcntl.F_WRLCK) and lock_range(data_fd, IN_USE_LOCK, 1, fcntl.F_WRLCK)


def map_paths(root: Path) -> Iterator[Path]:
    """All map files under ``CACHE_DIR/v1/``. Follows no symlinks."""
    with suppress(OSError), os.scandir(root) as levels:
        for level in levels:
            if len(level.name) == 2 and level.is_dir(follow_symlinks=False):
                with suppress(OSError), os.scandir(level.path) as files:
                    yield from [Path(file.path) for file in files if file.name.endswith(".map")]


def is_file_at(fd: int, path: Path) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except OSError:
        return False
