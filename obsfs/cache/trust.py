"""Which blocks of an object this process knows to be right."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

CHUNK = 4096
"""Blocks whose trust is noted together: 32 KiB of memory for each 4 GiB of an object that are touched."""


class TrustTable:
    """The state word at which this process verified or wrote each block; 0 if it did not.

    A block is right as long as the map file still has the same word.
    """

    def __init__(self, blocks: int) -> None:
        self._length = min(CHUNK, blocks)
        self._chunks: dict[int, array[int]] = {}

    def __getitem__(self, block: int) -> int:
        chunk = self._chunks.get(block // CHUNK)
        return chunk[block % CHUNK] if chunk else 0

    def __setitem__(self, block: int, word: int) -> None:
        chunk = self._chunks.get(block // CHUNK)
        if chunk is None:
            chunk = self._chunks.setdefault(block // CHUNK, array("Q", bytes(8 * self._length)))
        chunk[block % CHUNK] = word

    def words(self, blocks: range) -> array[int] | None:
        """Return the words of blocks of one chunk (see `chunks`); None if none of that chunk was verified."""
        chunk = self._chunks.get(blocks.start // CHUNK)
        first = blocks.start % CHUNK
        return chunk[first : first + len(blocks)] if chunk else None


def chunks(blocks: range) -> Iterator[range]:
    """Split a range of blocks at the borders of chunks."""
    start = blocks.start
    while start < blocks.stop:
        stop = min(blocks.stop, start - start % CHUNK + CHUNK)
        yield range(start, stop)
        start = stop
