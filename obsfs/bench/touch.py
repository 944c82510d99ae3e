"""A process that reads a mapped file, since a page that does not come ends whoever has it mapped (SIGBUS).

Run as ``python -m obsfs.bench.touch PATH BYTES``: writes the rate in MB/s.
"""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path


def touch(path: Path, size: int) -> float:
    """Map the first `size` bytes of a file, touch every page, and return the rate in MB/s."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as memory:
        started = time.perf_counter()
        touched = len(memory[:: mmap.PAGESIZE]) * mmap.PAGESIZE
        return touched / (time.perf_counter() - started) / 1e6


if __name__ == "__main__":
    print(touch(Path(sys.argv[1]), int(sys.argv[2])))
