"""The one table of open files: which node a handle belongs to, in which mode it is read, and what serves it.

The kernel keeps an inode in one mode while it is open (fs/fuse/iomode.c), so what counts is how many handles of each
mode a node has. All other code asks this table, and counts nothing itself.

A handle number means nothing outside of this module. It follows from the node and the mode, because the takeover log
records those and no handle: a successor must know the numbers that its predecessor gave.
"""

from __future__ import annotations

import enum
import errno
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from obsfs.errors import ObsfsError
from obsfs.fetch.reader import Reader

_MAX_COUNTED = 4096
"""Requests that are remembered: more than the kernel has in flight (max_background, and one for each thread)."""


class Mode(enum.IntEnum):
    """How a handle is read. The value is the lowest bit of the handle's number."""

    BUFFERED = 0
    """Reads come to this process, by way of the kernel's page cache."""
    PASSTHROUGH = 1
    """The kernel reads the cache file by itself."""


class BadHandleError(ObsfsError):
    """No open file has this handle."""

    errno = errno.EBADF


@dataclass(slots=True, eq=False)
class OpenFile:
    """A node that is open, and what serves it."""

    node: int
    buffered: int = 0
    """Handles in this mode."""
    passthrough: int = 0
    """Handles in this mode."""
    backing: int = 0
    """The kernel's id of the cache file while there are passthrough handles; 0 before the kernel has given one."""
    reader: Reader | None = None
    """Reads the version of the node; None only in a successor that could not open it yet."""
    inherited: int = 0
    """Passthrough handles of a predecessor: the supervisor, and not `reader`, keeps their cache file."""

    @property
    def handle_count(self) -> int:
        """Handles of all modes."""
        return self.buffered + self.passthrough


class HandleTable:
    """Open files by their nodes, and the opens and releases that were counted. Safe to use from many threads.

    Args:
        guard: the lock of the tree, which makes a count and its record one step for other threads.
        record: appends to the takeover log.
        on_closed: called with the id of a node that has no handle any more, while the guard is held.
    """

    def __init__(self, guard: threading.RLock, record: Callable[..., None], on_closed: Callable[[int], None]) -> None:
        self._guard = guard
        self._record = record
        self._on_closed = on_closed
        self._files: dict[int, OpenFile] = {}
        # Opens and releases by the numbers of their requests, the newest last, and the mode that each counted.
        self._counted: OrderedDict[int, Mode] = OrderedDict()

    # questions

    def reader(self, handle: int) -> Reader | None:
        """Return what reads an open file; None if the handle is not open, or its file could not be opened again."""
        file = self._files.get(handle >> 1)  # node_of, without a call: each read asks
        return file.reader if file is not None else None

    def file(self, node: int) -> OpenFile | None:
        """Return a node's open file; None if it is not open."""
        return self._files.get(node)

    def find(self, handle: int) -> tuple[OpenFile, Mode]:
        """Return the open file of a handle, and the mode of the handle. Raises BadHandleError."""
        file, mode = self._files.get(self.node_of(handle)), Mode(handle & 1)
        if file is None or not (file.passthrough if mode is Mode.PASSTHROUGH else file.buffered):
            raise BadHandleError(f"handle {handle} is not open")
        return file, mode

    @staticmethod
    def node_of(handle: int) -> int:
        """Return the node id in a handle, whether it is open or not."""
        return handle >> 1

    @staticmethod
    def handle_of(node: int, mode: Mode) -> int:
        """Return the number of a node's handles of this mode, whether there is one or not."""
        return node << 1 | mode

    def is_open(self, node: int) -> bool:
        """Return whether a node has a handle."""
        return node in self._files

    def files(self) -> list[OpenFile]:
        """Return all open files."""
        return list(self._files.values())

    def buffered_nodes(self, reader: Reader) -> list[int]:
        """Return the nodes that this reader serves, and that have a buffered handle."""
        return [file.node for file in self.files() if file.reader is reader and file.buffered]

    def counted(self, unique: int) -> Mode | None:
        """Return the mode that the open or release with this number counted; None if it was not counted yet.

        A request comes again, with the same number, after a takeover (FUSE_NOTIFY_RESEND).
        """
        with self._guard:
            return self._counted.get(unique)

    # changes: each is recorded before the kernel hears of it

    def open(self, node: int, mode: Mode, reader: Reader | None = None, unique: int = 0) -> int:
        """Count one more handle of a node, and return its number.

        Args:
            node: the node id.
            mode: how it is read.
            reader: what reads it; the first one of an open file stays.
            unique: the number of the request, or 0.
        """
        with self._guard:
            file = self._files.setdefault(node, OpenFile(node))
            if file.reader is None:
                file.reader = reader
            self._count(file, mode, 1)
            self._note(file, unique, mode)
            return self.handle_of(node, mode)

    def release(self, handle: int, unique: int = 0) -> tuple[OpenFile, Mode]:
        """Count one handle less, and drop the file with the last one. Returns the file. Raises BadHandleError."""
        with self._guard:
            file, mode = self.find(handle)
            self._count(file, mode, -1)
            if not file.handle_count:
                del self._files[file.node]
            self._note(file, unique, mode)
            if not file.handle_count:
                self._on_closed(file.node)
            return file, mode

    def make_buffered(self, handle: int, unique: int = 0) -> int:
        """Turn a passthrough handle, of which the kernel does not know yet, into a buffered one. Returns its number."""
        with self._guard:
            file, mode = self.find(handle)
            self._count(file, mode, -1)
            self._count(file, Mode.BUFFERED, 1)
            self._note(file, unique, Mode.BUFFERED)
            return self.handle_of(file.node, Mode.BUFFERED)

    def set_backing(self, file: OpenFile, backing: int) -> None:
        """Note the kernel's id of the cache file of an open file; 0 for none."""
        with self._guard:
            file.backing = backing
            self._record(["backing", file.node, backing])

    @staticmethod
    def _count(file: OpenFile, mode: Mode, change: int) -> None:
        if mode is Mode.PASSTHROUGH:
            file.passthrough += change
        else:
            file.buffered += change

    def _note(self, file: OpenFile, unique: int, mode: Mode) -> None:
        self._remember(unique, mode)
        self._record(["open", file.node, file.buffered, file.passthrough, unique, mode is Mode.PASSTHROUGH])

    def _remember(self, unique: int, mode: Mode) -> None:
        if unique:
            self._counted[unique] = mode
            if len(self._counted) > _MAX_COUNTED:
                self._counted.popitem(last=False)

    # takeover

    def records_of(self, node: int) -> Iterator[list[object]]:
        """Yield the records that restore the open file of a node. The caller holds the guard."""
        if (file := self._files.get(node)) is not None:
            yield ["open", node, file.buffered, file.passthrough, 0, False]
            yield ["backing", node, file.backing]

    def records(self) -> Iterator[list[object]]:
        """Yield the records that restore the counted requests. The caller holds the guard."""
        for unique, mode in self._counted.items():
            yield ["counted", unique, mode is Mode.PASSTHROUGH]

    def restore(self, kind: str, number: int, values: list[Any]) -> None:
        """Take over a record: ``counted`` of a request, ``open`` or ``backing`` of a node.

        Raises ValueError or TypeError for one that cannot be understood.
        """
        if kind == "counted":
            self._remember(number, Mode(bool(values[0])))
        elif kind == "open":
            buffered, passthrough, unique, is_passthrough = values
            file = self._files.get(number) or OpenFile(number)
            file.buffered, file.passthrough = whole_number(buffered), whole_number(passthrough)
            if not file.passthrough:
                file.backing = 0
            if file.handle_count:
                self._files[number] = file
            else:
                self._files.pop(number, None)
            self._remember(whole_number(unique), Mode(bool(is_passthrough)))
        elif kind == "backing":
            backing = whole_number(values[0])
            if (known := self._files.get(number)) is not None and known.passthrough:
                known.backing = backing


def whole_number(value: object) -> int:
    """Return a number from the takeover log. Raises ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(value)
    return value
