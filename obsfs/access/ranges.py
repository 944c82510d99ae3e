"""Block numbers as ranges. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


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
