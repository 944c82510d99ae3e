"""The calls of the kernel, translated: arguments from the wire into operations, and what they return into answers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from itertools import takewhile

from obsfs.errors import NotFoundError, ObsfsError
from obsfs.fuse.kernel import wire
from obsfs.fuse.kernel.front import KernelFront
from obsfs.fuse.kernel.wire import FileOpen, Opcode, Request
from obsfs.vfs.listings import WouldBlockError
from obsfs.vfs.operations import REFRESH, UNKNOWN_INO, Attributes, Operations

Call = Callable[[Request, memoryview, bool], bytes]
"""Takes a request, the buffer that it is in, and whether it may wait for the bucket or the disk. Returns the answer.
Raises WouldBlockError when it may not wait and would have to, ObsfsError, and ValueError for what cannot be parsed."""


class _RangeError(ObsfsError):
    errno = errno.ERANGE


class Calls:
    """The calls that have an answer, other than reads."""

    def __init__(self, operations: Operations, front: KernelFront) -> None:
        self._operations = operations
        self._front = front
        self.by_opcode: dict[int, Call] = {
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.OPEN: self._open,
            Opcode.RELEASE: self._release,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdir,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.STATFS: self._statfs,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
        }

    def take_back(self, request: Request, answer: bytes) -> None:
        """Undo what a call counted whose request was interrupted since: the kernel never gives it back."""
        if request.opcode == Opcode.OPENDIR:
            self._operations.take_back_opendir(request.node, wire.OPEN_OUT.unpack(answer)[0])
        elif request.opcode == Opcode.OPEN:
            self._operations.release(wire.OPEN_OUT.unpack(answer)[0])
        self._operations.take_back(_number(request))

    # names and attributes

    def _lookup(self, request: Request, view: memoryview, wait: bool) -> bytes:
        name = wire.text(view, request.body, request.end)
        try:
            found = self._operations.lookup(request.node, name, wait=wait, unique=self._counted_once(request))
        except NotFoundError:
            return wire.entry_out(0, self._operations.negative_ttl(request.node, name), bytes(wire.ATTR.size))
        self._check_limit()
        return _entry(found)

    def _counted_once(self, request: Request) -> int:
        """Return the number of a request that counts lookups.

        Those that a predecessor counted and did not answer are taken back first.
        """
        unique = _number(request)
        if unique != request.unique:
            self._operations.take_back(unique)
        return unique

    def _check_limit(self) -> None:
        if self._operations.over_limit:
            self._front.note_over_limit()

    def _getattr(self, request: Request, view: memoryview, wait: bool) -> bytes:
        return wire.attr_out(_attr(self._operations.getattr(request.node)))

    def forget(self, request: Request, view: memoryview) -> None:
        """FORGET and BATCH_FORGET, which have no answer."""
        if request.opcode == Opcode.FORGET:
            self._operations.forget([(request.node, *wire.FORGET_IN.unpack_from(view, request.body))])
            return
        count, _ = wire.BATCH_FORGET_IN.unpack_from(view, request.body)
        start = request.body + wire.BATCH_FORGET_IN.size
        count = min(count, max(0, request.end - start) // wire.FORGET_ONE.size)
        self._operations.forget(wire.FORGET_ONE.iter_unpack(view[start : start + count * wire.FORGET_ONE.size]))

    def _statfs(self, request: Request, view: memoryview, wait: bool) -> bytes:
        figures = self._operations.statfs()
        return wire.STATFS_OUT.pack(
            figures.blocks,
            figures.free,
            figures.free,
            0,
            0,
            figures.block_size,
            figures.name_max,
            figures.block_size,
            0,
        )

    def _getxattr(self, request: Request, view: memoryview, wait: bool) -> bytes:
        size, _ = wire.GETXATTR_IN.unpack_from(view, request.body)
        name = wire.text(view, request.body + wire.GETXATTR_IN.size, request.end)
        if name == REFRESH:
            if not wait:
                raise WouldBlockError
            self._front.forget_names_now(self._operations.refresh(request.node))
            return _sized(b"", size)
        return _sized(self._operations.getxattr(request.node, name), size)

    def _listxattr(self, request: Request, view: memoryview, wait: bool) -> bytes:
        size, _ = wire.GETXATTR_IN.unpack_from(view, request.body)
        return _sized(b"".join(b"%s\0" % name.encode() for name in self._operations.listxattr(request.node)), size)

    # files

    def _open(self, request: Request, view: memoryview, wait: bool) -> bytes:
        flags, _ = wire.OPEN_IN.unpack_from(view, request.body)
        opened = self._operations.open(request.node, flags, _number(request), wait=wait)
        flags_out = FileOpen.KEEP_CACHE | FileOpen.NOFLUSH
        if opened.backing:
            flags_out = FileOpen.PASSTHROUGH | FileOpen.NOFLUSH
            if flags & os.O_DIRECT:
                # The cache's file system wants offsets, sizes and buffers aligned; we do not, and a reader must not
                # notice that the file has become complete. With this flag reads come here, on an inode that others
                # read by passthrough (fs/fuse/file.c: "FOPEN_DIRECT_IO overrides FOPEN_PASSTHROUGH").
                flags_out |= FileOpen.DIRECT_IO
        return wire.OPEN_OUT.pack(opened.handle, flags_out, opened.backing)

    def _release(self, request: Request, view: memoryview, wait: bool) -> bytes:
        handle, *_ = wire.RELEASE_IN.unpack_from(view, request.body)
        self._operations.release(handle, _number(request))
        return b""

    # directories

    def _opendir(self, request: Request, view: memoryview, wait: bool) -> bytes:
        handle = self._operations.opendir(request.node, wait=wait)
        flags = FileOpen.CACHE_DIR
        if self._operations.note_shown(request.node, handle):
            flags |= FileOpen.KEEP_CACHE
        return wire.OPEN_OUT.pack(handle, flags, 0)

    def _readdir(self, request: Request, view: memoryview, wait: bool) -> bytes:
        handle, offset, size, *_ = wire.READ_IN.unpack_from(view, request.body)
        operations, plus = self._operations, request.opcode == Opcode.READDIRPLUS
        parts: list[bytes] = []
        left = size
        fixed = wire.DIRENT.size + (wire.ENTRY_OUT.size + wire.ATTR.size if plus else 0)

        def fits(entry: tuple[str, bool, int]) -> bool:
            nonlocal left
            length = len(entry[0].encode())
            left -= fixed + length + -length % 8
            return bool(left >= 0)

        entries = list(takewhile(fits, operations.readdir(request.node, handle, offset, wait=wait)))
        entered: list[Attributes] = []
        if plus:
            names = [name for name, *_ in entries]
            entered = operations.enter(request.node, handle, names, self._counted_once(request))
        for index, (name, is_dir, following) in enumerate(entries):
            kind = wire.DT_DIR if is_dir else wire.DT_REG
            ino = UNKNOWN_INO
            if plus:
                # Without a node the kernel is told the name, and looks it up by itself (fs/fuse/readdir.c).
                parts.append(_entry(entered[index]) if entered else wire.entry_out(0, 0, bytes(wire.ATTR.size)))
                ino = entered[index].ino if entered else UNKNOWN_INO
            parts.append(wire.dirent(ino, following, kind, name.encode()))
        self._check_limit()
        return b"".join(parts)

    def _releasedir(self, request: Request, view: memoryview, wait: bool) -> bytes:
        handle, *_ = wire.RELEASE_IN.unpack_from(view, request.body)
        self._operations.releasedir(handle)
        return b""


def _number(request: Request) -> int:
    """Return the number of a request, also of one that is sent again."""
    return request.unique & ~wire.UNIQUE_RESEND


def _entry(found: Attributes) -> bytes:
    return wire.entry_out(found.node, found.ttl, _attr(found))


def _attr(found: Attributes) -> bytes:
    return wire.attr(ino=found.ino, mode=found.mode, size=found.size, mtime=found.mtime, uid=found.uid, gid=found.gid)


def _sized(value: bytes, size: int) -> bytes:
    """Answer an xattr call, which takes two steps: size 0 asks how long the value is."""
    if not size:
        return wire.GETXATTR_OUT.pack(len(value), 0)
    if len(value) > size:
        raise _RangeError("the buffer is too small for the attribute")
    return value
