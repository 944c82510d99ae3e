"""The FUSE wire format: the structures of ``<linux/fuse.h>``, protocol 7.45, and nothing else.

Names are the header's without ``fuse_`` and ``FUSE_``. Everything is in the machine's byte order.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

MAJOR = 7
MINOR = 45

IN_HEADER = struct.Struct("=IIQQIIIHH")
OUT_HEADER = struct.Struct("=IiQ")
ATTR = struct.Struct("=QQQqqqIIIIIIIIII")
ENTRY_OUT = struct.Struct("=QQQQII")  # followed by ATTR
ATTR_OUT = struct.Struct("=QII")  # followed by ATTR
INIT_IN = struct.Struct("=IIIII44x")
INIT_OUT = struct.Struct("=IIIIHHIIHHIIH22x")
OPEN_IN = struct.Struct("=II")
OPEN_OUT = struct.Struct("=QIi")
READ_IN = struct.Struct("=QQIIQII")
RELEASE_IN = struct.Struct("=QIIQ")
FORGET_IN = struct.Struct("=Q")
BATCH_FORGET_IN = struct.Struct("=II")
FORGET_ONE = struct.Struct("=QQ")
GETXATTR_IN = struct.Struct("=II")
GETXATTR_OUT = struct.Struct("=II")
STATFS_OUT = struct.Struct("=QQQQQIIII24x")
INTERRUPT_IN = struct.Struct("=Q")
DIRENT = struct.Struct("=QQII")  # followed by the name, padded to 8 bytes
NOTIFY_INVAL_ENTRY_OUT = struct.Struct("=QII")  # followed by the name and a NUL
NOTIFY_STORE_OUT = struct.Struct("=QQII")  # followed by the bytes
BACKING_MAP = struct.Struct("=iIQ")

BUFFER_BYTES = 128 << 10
"""st_blksize, which Python and stdio take for the size of their buffers, so that a seek of a buffered reader costs as
much. With 1 MiB, which is longer than the kernel's own read-ahead, the kernel read 3 MiB for each seek
(``page_cache_sync_ra``, mm/readahead.c)."""
_ATTR_SECONDS = 86400  # a node's attributes never change: the kernel may keep them as long as it likes

# _IOR(229, 0, uint32), _IOW(229, 1, struct fuse_backing_map), _IOW(229, 2, uint32)
DEV_IOC_CLONE = 0x8004E500
DEV_IOC_BACKING_OPEN = 0x4010E501
DEV_IOC_BACKING_CLOSE = 0x4004E502

NOTIFY_INVAL_ENTRY = 3
NOTIFY_STORE = 4
NOTIFY_RESEND = 7
UNIQUE_RESEND = 1 << 63  # set in the number of a request that is sent again
EXPIRE_ONLY = 1

DT_DIR = 4
DT_REG = 8


class Opcode(enum.IntEnum):
    """``enum fuse_opcode``: those that are answered with more than ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


class Init(enum.IntFlag):
    """INIT flags; from bit 32 on they travel in ``flags2``."""

    ASYNC_READ = 1 << 0
    SPLICE_WRITE = 1 << 7
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30
    HAS_EXPIRE_ONLY = 1 << 35
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


class FileOpen(enum.IntFlag):
    """``FOPEN_*``."""

    DIRECT_IO = 1 << 0
    KEEP_CACHE = 1 << 1
    CACHE_DIR = 1 << 3
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


class Request(NamedTuple):
    """The header of a request. `body` is where its argument starts, `end` where it ends."""

    opcode: int
    unique: int
    node: int
    end: int
    body: int = IN_HEADER.size


def parse_request(buffer: bytes | bytearray | memoryview, length: int) -> Request:
    """Return the header of the request in the first `length` bytes. Raises ValueError for an incomplete request."""
    if length < IN_HEADER.size:
        raise ValueError(f"a request of {length} bytes is too short")
    size, opcode, unique, node, _, _, _, _, _ = IN_HEADER.unpack_from(buffer)
    if size != length:
        raise ValueError(f"a request says {size} bytes and has {length}")
    return Request(opcode, unique, node, size)


def text(buffer: bytes | bytearray | memoryview, start: int, end: int) -> str:
    """Return the NUL-terminated name in ``[start, end)``. Raises ValueError without a NUL, or if it is not UTF-8."""
    raw = bytes(buffer[start:end])
    return raw[: raw.index(b"\0")].decode()


def init_out(*, minor: int, flags: Init, max_pages: int, max_background: int) -> bytes:
    """Return the answer to INIT. `max_pages` is the longest read in pages; writes are refused, so theirs is minimal."""
    low, high = flags & 0xFFFFFFFF, flags >> 32
    depth = 1 if flags & Init.PASSTHROUGH else 0
    congestion = max_background * 3 // 4
    return INIT_OUT.pack(MAJOR, minor, 1 << 30, low, max_background, congestion, 4096, 1, max_pages, 0, high, depth, 0)


def attr(*, ino: int, mode: int, size: int, mtime: float, uid: int, gid: int) -> bytes:
    """``struct fuse_attr``. `mtime` in seconds stands for all three times."""
    seconds, nanos = divmod(int(mtime * 1_000_000_000), 1_000_000_000)
    blocks = -(-size // 512)
    return ATTR.pack(
        ino, size, blocks, seconds, seconds, seconds, nanos, nanos, nanos, mode, 1, uid, gid, 0, BUFFER_BYTES, 0
    )


def entry_out(node: int, ttl: float, attributes: bytes) -> bytes:
    """``struct fuse_entry_out``; node 0 says for `ttl` seconds that the name does not exist."""
    seconds, nanos = _split(ttl)
    return ENTRY_OUT.pack(node, 0, seconds, _ATTR_SECONDS, nanos, 0) + attributes


def attr_out(attributes: bytes) -> bytes:
    """``struct fuse_attr_out``."""
    return ATTR_OUT.pack(_ATTR_SECONDS, 0, 0) + attributes


def dirent(ino: int, offset: int, kind: int, name: bytes) -> bytes:
    """``struct fuse_dirent`` with its name, padded."""
    return DIRENT.pack(ino, offset, len(name), kind) + name + bytes(-len(name) % 8)


def inval_entry(parent: int, name: bytes, *, drop: bool = False) -> bytes:
    """Return a notification that ends a name's lifetime. With `drop`, the kernel should forget its node too."""
    body = NOTIFY_INVAL_ENTRY_OUT.pack(parent, len(name), 0 if drop else EXPIRE_ONLY) + name + b"\0"
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), NOTIFY_INVAL_ENTRY, 0) + body


def resend() -> bytes:
    """Return a notification that asks for every request again that was read and not answered."""
    return OUT_HEADER.pack(OUT_HEADER.size, NOTIFY_RESEND, 0)


def store(node: int, offset: int, size: int) -> bytes:
    """Return the start of a notification that brings `size` bytes of a node into the page cache; they follow it."""
    total = OUT_HEADER.size + NOTIFY_STORE_OUT.size + size
    return OUT_HEADER.pack(total, NOTIFY_STORE, 0) + NOTIFY_STORE_OUT.pack(node, offset, size, 0)


def _split(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * 1e9)
