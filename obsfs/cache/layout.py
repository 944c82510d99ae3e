"""The format of the block cache on disk, which every process of one user shares.

One object version is two files under ``CACHE_DIR/v1/``. ``ID.data`` is sparse and exactly as long as the object, so
that the kernel can serve from it. ``ID.map`` holds for each block its checksum, its last use, and whether it is there.
ID is a hash of endpoint, bucket, key, ETag and size. A third file, ``ID.pin``, keeps eviction away.

Five rules keep it right without a journal:

* A block's bytes are written before its map entry says *present*. After a restart, an entry counts only if the checksum
  agrees, or if the file has a seal: all blocks were verified and synced, its inode was not touched since (ctime), and
  its file system stayed mounted. So it does not matter which writes a power cut keeps, nor what happened to the disk
  while nobody looked.
* The state of a map entry is one aligned 64-bit word with a generation in it, which grows whenever the block goes.
  Readers of the data file check that word before *and after* they take bytes: equal words mean right bytes.
  :mod:`obsfs.cache.lending` is the one place that does so.
* A process that fetches or evicts a block holds an open-file-description lock on the entry's bytes in the map file. So
  no block is fetched twice, or punched out while it arrives. The lock ends with its owner.
* A complete data file may have a second name outside of the cache (a hard link). Readers by that name are not
  disturbed: no block of it is evicted, and it is never truncated.
* A file that the kernel reads by itself (passthrough) is only evicted whole, even later: a program that mapped it may
  have closed it, and nobody can tell. The map file notes that. While the file is handed over, it is locked through the
  open file that the kernel has. That lock ends when the kernel is done with it, even if its server was killed.

Nothing maps these files into memory: a full disk, or somebody who truncates a file, would kill the process (SIGBUS).
Map files are sparse, so they take room for what is cached rather than for the whole object.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from obsfs import private
from obsfs.blocks import BLOCK, block_count
from obsfs.cache.syscalls import mount_session, written_ranges
from obsfs.store.types import ObjectVersion

FORMAT = "v1"
HEADER = 4096
"""Bytes of a map file before its entries."""
ENTRY = 24
"""Bytes of a map entry: checksum, last use (ns since the epoch) and state word, 64 bits each."""
_MAGIC = b"OBSFSMAP"
# magic, block size, object size; then the seal: inode, size, mtime and ctime in ns; then the length of the identity.
_HEAD = struct.Struct("<8sQQ4QQ")
SEAL = struct.Struct("<4Q")
SEAL_AT = 24
"""Offset of the seal in the header."""
HANDED_TO_KERNEL_AT = HEADER - 1
"""Offset in the header of a byte that is not 0 once the kernel was given the data file."""
LAST_USED_AT = 8
"""Offset of the last use in an entry."""
STATE_AT = 16
"""Offset of the state word in an entry."""
WORD = struct.Struct("<Q")

TAKEOVER_LOCK = 0
"""Byte of a map file. The process that outlives a server holds its lock while the kernel reads the file; earlier
versions locked it for every open object."""
PASSTHROUGH_LOCK = 0
"""Byte of a data file that is locked while the kernel reads the file by itself."""
IN_USE_LOCK = 1
"""Byte of a data file that every process locks that has the object open. Map files are not always open."""
PRESENT = 1
"""Bit of a state word: the block is in the data file."""


def identity(version: ObjectVersion) -> dict[str, object]:
    """Return the fields that tell a version from all others: not its version id and date, which change no byte."""
    return {name: value for name, value in asdict(version).items() if name not in ("version_id", "modified")}


def identity_bytes(version: ObjectVersion) -> bytes:
    """Return the identity as the map file has it (JSON)."""
    return json.dumps(identity(version), sort_keys=True).encode()


def map_path(root: Path, version: ObjectVersion) -> Path:
    """Return the path of the map file of a version, under ``CACHE_DIR/v1/``."""
    name = hashlib.sha256(identity_bytes(version)).hexdigest()[:40]
    return root / name[:2] / f"{name}.map"


def checksum(data: bytes | memoryview) -> int:
    """Return the 64-bit checksum (XXH3) of a block."""
    return xxhash.xxh3_64_intdigest(data)


def entry_at(block: int) -> int:
    """Return the offset of a block's entry in the map file."""
    return HEADER + ENTRY * block


def map_size(size: int) -> int:
    """Return the length (bytes) of the map file of an object of `size` bytes. It is sparse."""
    return HEADER + ENTRY * block_count(size)


def header(old: bytes, size: int, identity: bytes) -> bytes:
    """Return the first page of a map file.

    Args:
        old: The page as it is now, or nothing: the seal and the handed-over byte are kept.
        size: Bytes of the object.
        identity: Of its version.

    Raises:
        OSError: The identity is too long.
    """
    old = old.ljust(HEADER, b"\0")
    seal = old[SEAL_AT : SEAL_AT + SEAL.size]
    head = struct.pack("<8sQQ", _MAGIC, BLOCK, size) + seal + struct.pack("<Q", len(identity)) + identity
    if len(head) > HANDED_TO_KERNEL_AT:
        raise OSError(errno.ENAMETOOLONG, "object identity too long")
    return head.ljust(HANDED_TO_KERNEL_AT, b"\0") + old[HANDED_TO_KERNEL_AT:]


@dataclass(frozen=True)
class CacheEntry:
    """What the cache holds of one object version. Sizes in bytes, `last_used` in seconds since the epoch."""

    version: ObjectVersion
    cached_bytes: int
    last_used: float
    path: Path


class StoredBlock(NamedTuple):
    """A block that a map file says is present. Sorts by last use (`used`, ns since the epoch); `size` in bytes."""

    used: int
    path: Path
    number: int
    word: int
    size: int


class MapSummary(NamedTuple):
    """What eviction needs to know of a map file. `room`: bytes of the disk that the map file itself takes."""

    blocks: list[StoredBlock]
    room: int
    is_readable: bool


def read_entry(path: Path) -> CacheEntry | None:
    """Return what a map file says, or None if it is damaged."""
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


def read_map(path: Path) -> MapSummary:
    """Read a map file for eviction. In a file that is evicted whole, all blocks count as used when the last one was."""
    try:
        fd = private.open_file(path, os.O_RDONLY)
    except OSError:
        return MapSummary([], 0, False)
    try:
        head = os.pread(fd, HEADER, 0)
        blocks = list(stored_blocks(fd, path))
        if blocks and any(head[HANDED_TO_KERNEL_AT:]):
            used = max(block.used for block in blocks)
            blocks = [block._replace(used=used) for block in blocks]
        return MapSummary(blocks, os.fstat(fd).st_blocks * 512, head[: len(_MAGIC)] == _MAGIC)
    except OSError:
        return MapSummary([], 0, False)
    finally:
        os.close(fd)


def read_blocks(path: Path) -> list[StoredBlock]:
    """Return every present block of a map file, in order; none if it is not one."""
    return read_map(path).blocks


def stored_blocks(fd: int, path: Path) -> Iterator[StoredBlock]:
    """Yield every present block of an open map file, in order; none if it is not one. Raises OSError."""
    head = os.pread(fd, HEADER, 0)
    if len(head) < HEADER or not head.startswith(_MAGIC):
        return
    _, _, size, *_ = _HEAD.unpack_from(head)
    done = 0
    for start, stop in written_ranges(fd):
        # Entries cross the borders of pages.
        first, last = max(done, (max(start, HEADER) - HEADER) // ENTRY), -(-(stop - HEADER) // ENTRY)
        table = os.pread(fd, ENTRY * max(0, last - first), entry_at(first))
        table = table[: len(table) - len(table) % ENTRY]
        for block, (_, used, word) in enumerate(struct.iter_unpack("<3Q", table), first):
            if word & PRESENT and size > block * BLOCK:
                yield StoredBlock(used, path, block, word, min(BLOCK, size - block * BLOCK))
        done = max(done, last)


def map_paths(root: Path) -> Iterator[Path]:
    """Yield all map files under ``CACHE_DIR/v1/``. Follows no symlinks."""
    with suppress(OSError), os.scandir(root) as levels:
        for level in levels:
            if len(level.name) == 2 and level.is_dir(follow_symlinks=False):
                with suppress(OSError), os.scandir(level.path) as files:
                    yield from [Path(file.path) for file in files if file.name.endswith(".map")]


def pin_path(path: Path) -> Path:
    """Return the file that pins an object by its existence."""
    return path.with_suffix(".pin")


def is_pinned(path: Path) -> bool:
    """Return whether eviction must leave the blocks of a map file alone."""
    return pin_path(path).exists()


def is_linked(path: Path) -> bool:
    """Return whether the data file of a map file has another name, outside of the cache."""
    try:
        return path.with_suffix(".data").stat().st_nlink > 1
    except OSError:
        return False


def current_seal(fd: int) -> tuple[int, int, int, int] | None:
    """Return what a seal notes of an open data file: inode, size, mtime and ctime.

    None if nobody can tell whether its file system was mounted anew: its disk may have been elsewhere, or the machine
    was off. Then every file is verified as it is read.
    """
    session = mount_session(fd)
    if session is None:
        return None
    stat = os.fstat(fd)
    # The session has no field of its own in this format.
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns ^ session
