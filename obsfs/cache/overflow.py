"""Blocks that stay in memory for as long as the disk does not take them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Protocol

_MAX_BYTES = 64 << 20


class Drained(Enum):
    """What became of a block that was to be written from memory to the disk."""

    WRITTEN = "written"
    ALREADY_THERE = "already there"
    """Another process has written it."""
    REFUSED = "refused"
    """The disk does not take it, or another process fetches it now."""


class BlockOwner(Protocol):
    """The object whose blocks overflow."""

    def write_overflowed(self, block: int, data: bytes) -> Drained:
        """Write a block to the file. There is room for it."""


class OverflowBuffer:
    """At most 64 MiB of blocks; the oldest go first. Safe to use from many threads.

    Args:
        with_room: As :meth:`obsfs.cache.room.Room.reserve_and_write`: makes room for so many bytes, calls the function,
            which says whether it wrote them, and returns that.
    """

    def __init__(self, with_room: Callable[[int, Callable[[], bool]], bool]) -> None:
        self._with_room = with_room
        self.count = 0
        """How many blocks the disk did not take so far."""
        self._guard = threading.Lock()
        self._draining = threading.Lock()
        self._blocks: OrderedDict[tuple[BlockOwner, int], bytes] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, owner: BlockOwner, block: int) -> bytes | None:
        """Return a block, if it is here."""
        return self._blocks.get((owner, block)) if self._blocks else None

    def add(self, owner: BlockOwner, block: int, data: bytes) -> None:
        """Keep a block that the disk did not take."""
        with self._guard:
            self.count += 1
            self._drop(owner, block)
            self._blocks[owner, block] = data
            self._bytes += len(data)
            while self._bytes > _MAX_BYTES:
                self._drop(*next(iter(self._blocks)))

    def drain_one(self) -> None:
        """Write one block to the disk. Called for each block that the disk takes, it ends with none left here."""
        while self._blocks and not self._drain_oldest():
            pass

    def _drain_oldest(self) -> bool:
        """Try to write the oldest block. Returns False if it has gone meanwhile and was not written here."""
        with self._guard:
            (owner, block), data = next(iter(self._blocks.items()), ((None, 0), b""))
        if owner is None:
            return True
        # No lock is held here: making room may close files, this owner's among them.
        is_written = self._with_room(len(data), partial(self._write, owner, block, data))
        return is_written or self.get(owner, block) is data

    def _write(self, owner: BlockOwner, block: int, data: bytes) -> bool:
        """Write a block that is still here. Returns False also if another process has written it."""
        with self._draining:
            if self.get(owner, block) is not data:
                return False
            drained = owner.write_overflowed(block, data)
            if drained is not Drained.REFUSED:
                with self._guard:
                    self._drop(owner, block)
            return drained is Drained.WRITTEN

    def forget(self, owner: BlockOwner) -> None:
        """Drop the blocks of an object that is closed. Nobody writes to its file any more when this returns."""
        with self._draining, self._guard:
            for other, block in list(self._blocks):
                if other is owner:
                    self._drop(other, block)

    def _drop(self, owner: BlockOwner, block: int) -> None:
        self._bytes -= len(self._blocks.pop((owner, block), b""))
