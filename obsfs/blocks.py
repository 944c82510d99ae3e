"""Blocks: the pieces of a file that are fetched, cached and verified, and block numbers as ranges. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

BLOCK = 1 << 20
"""Bytes in a block: the unit of presence, verification and eviction."""

PIECE = 8
"""Blocks in a piece: the longest range request, 8 MiB, where requests cost little compared to their bytes. Ranges keep
to the borders of pieces: servers store objects in parts or chunks of 4 or 8 MiB, and a range across two of them costs
more on their side (SeaweedFS: a fifth more CPU)."""


def block_count(size: int) -> int:
    """Return how many blocks an object of `size` bytes has."""
    return -(-size // BLOCK)


def runs(blocks: Iterable[int]) -> Iterator[range]:
    """Group numbers that follow each other.

    Args:
        blocks: Block numbers, in any order.

    Returns:
        Ranges without gaps, in the order given.
    """
    start = stop = -1
    for block in blocks:
        if block != stop:
            if stop > start:
                yield range(start, stop)
            start = block
        stop = block + 1
    if stop > start:
        yield range(start, stop)
