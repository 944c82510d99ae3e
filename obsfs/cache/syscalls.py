"""What the cache asks of the kernel about one open file: byte locks, holes, write errors, and where it is mounted."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import xxhash

_FLOCK = struct.Struct("hhqqi4x")
_AT_EMPTY_PATH = 0x1000  # <fcntl.h>
_STATX_MNT_ID_UNIQUE = 0x4000  # <linux/stat.h>, Linux 6.8
_STATX_BYTES = 256
_STATX_MNT_ID_AT = 144
_STATX_MNT_ID_BYTES = 8
_WAIT_BEFORE = 1  # SYNC_FILE_RANGE_WAIT_BEFORE, <linux/fs.h>
_BEYOND_ANY_PAGE = 1 << 62
_FALLOC_PUNCH = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, <linux/falloc.h>
_PAGE = 4096
_WRITE_LOST = (errno.EIO, errno.ENOSPC)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)


def lock_range(fd: int, start: int, length: int, kind: int) -> bool:
    """Take or drop an open-file-description lock on bytes of a file, without waiting.

    Args:
        start: Offset of the first byte.
        length: Bytes.
        kind: fcntl.F_RDLCK, F_WRLCK or F_UNLCK.

    Returns:
        False if another open file holds a lock that conflicts.

    Raises:
        OSError: The file system refuses locks.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def is_file_at(fd: int, path: Path) -> bool:
    """Return whether an open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except OSError:
        return False


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Give the disk the room of a range back. It reads as zeros from then on.

    Args:
        offset: Of the first byte.
        size: Bytes.

    Raises:
        OSError: The file system refuses.
    """
    if _libc.fallocate(fd, _FALLOC_PUNCH, offset, size) != 0:
        raise OSError(ctypes.get_errno(), "cannot punch a hole into the cache file")


def supports_holes(fd: int) -> bool:
    """Return whether the file system of an open file can give room back inside of files, as eviction does."""
    return bool(_libc.fallocate(fd, _FALLOC_PUNCH, 0, _PAGE) == 0 or ctypes.get_errno() != errno.EOPNOTSUPP)


def has_lost_writes(fd: int) -> bool:
    """Return whether a disk failed to write what an open file took, since this descriptor was asked last.

    Waits for nothing. The kernel marks such pages clean: they read right until it needs their memory, and then read as
    what the disk has. It reports that once for each open file, to fsync(2) and to this (errseq_t, <linux/errseq.h>).
    """
    return bool(_libc.sync_file_range(fd, _BEYOND_ANY_PAGE, 1, _WAIT_BEFORE) and ctypes.get_errno() in _WRITE_LOST)


def mount_session(fd: int) -> int | None:
    """Return a number that changes with every reboot and every mount of the file system of an open file.

    None if the kernel cannot tell (before Linux 6.8).
    """
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_MNT_ID_UNIQUE, buffer):
        return None
    mask = int.from_bytes(buffer.raw[:4], sys.byteorder)
    if not mask & _STATX_MNT_ID_UNIQUE or not (boot := _boot_id()):
        return None
    mount = buffer.raw[_STATX_MNT_ID_AT : _STATX_MNT_ID_AT + _STATX_MNT_ID_BYTES]
    return xxhash.xxh3_64_intdigest(boot + mount)


@cache
def _boot_id() -> bytes:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        return b""


def written_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """Yield start and end (bytes) of each part of a sparse file that is not a hole. Raises OSError."""
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
