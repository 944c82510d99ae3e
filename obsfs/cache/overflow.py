"""Blocks that stay in memory for as long as the disk does not take them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obsfs.cache.object import CachedObject

_MAX_BYTES = 64 << 20


class OverflowBuffer:
    """64 MiB of them at most; the oldest go first. Safe to use from many threads.

    `store` is :meth:`~obsfs.cache.directory.Cache.store`.
    """

    def __init__(self, store: Callable[[int, Callable[[], bool]], bool]) -> None:
        self._store = store
        self.count = 0
        """How many blocks the disk did not take so far."""
        self._guard = threading.Lock()
        self._draining = threading.Lock()
        self._blocks: OrderedDict[tuple[CachedObject, int], bytes] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, owner: CachedObject, block: int) -> bytes | None:
        """A block, if it is held."""
        return self._blocks.get((owner, block)) if self._blocks else None

    def add(self, owner: CachedObject, block: int, data: bytes) -> None:
        """Keep a block that the disk did not take."""
        with self._guard:
            self.count += 1
            self._drop(owner, block)
            self._blocks[owner, block] = data
            self._bytes += len(data)
            while self._bytes > _MAX_BYTES:
                self._drop(*next(iter(self._blocks)))

    def drain_one(self) -> None:
        """The disk takes blocks again: write one to it. Called for each that it takes, it ends with none held."""
        while self._blocks and not self._drain_oldest():
            pass

    def _drain_oldest(self) -> bool:
        """Try to write the oldest block. Returns False when it is no longer held and was not written here."""
        with self._guard:
            (owner, block), data = next(iter(self._blocks.items()), ((None, 0), b""))
        if owner is None:
            return True
        # No lock is held here: making room may close files, this owner's among them.
        return (
            self._store(len(data), partial(self._write_claimed, owner, block, data)) or self.get(owner, block) is data
        )

    def _write_claimed(self, owner: CachedObject, block: int, data: bytes) -> bool:
        """Write a block that is still held. Returns False also when another process has written it."""
        claim = range(block, block + 1)
        with self._draining:
            if self.get(owner, block) is not data or not owner.claim(claim):
                return False
            try:
                # A block that is written twice would be counted twice.
                is_there = owner.verify(block)
                is_stored = not is_there and owner.write_block(block, memoryview(data))
            finally:
                owner.release_claim(claim)
            if is_there or is_stored:
                with self._guard:
                    self._drop(owner, block)
            return is_stored

    def forget(self, owner: CachedObject) -> None:
        """Drop what is held for an object that is closed. Nobody writes to its file any more when this returns."""
        with self._draining, self._guard:
            for one, block in list(self._blocks):
                if one is owner:
                    self._drop(one, block)

    def _drop(self, owner: CachedObject, block: int) -> None:
        self._bytes -= len(self._blocks.pop((owner, block), b""))
