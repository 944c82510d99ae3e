"""Memory as on a machine that has been up for a week, whatever machine this is.

A virtual machine with free page reporting gives free memory back to its host in blocks of 2 MiB, two seconds after it
was freed, and pays for every page of it anew: 2.4 s per GiB was measured where a page that was in use before costs
0.1 s. A cold read fills memory twice over (the cache file's pages and the mount's) and what it is compared with fills
none, so such a host's memory would be measured, not the file system.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BLOCK = 2 << 20
_SPARE = 1 << 30


@contextmanager
def settled() -> Iterator[None]:
    """Touch all free memory but 1 GiB, then free it but for one page of 4 KiB in each 2 MiB.

    What is free then is known to the host, and in pieces too small to be given back until this is left. Costs 1/512
    of the memory. Drops the page cache first (needs root), so that everything measured lives in settled memory.
    """
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")
    size = (os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE - _SPARE) // _BLOCK * _BLOCK
    if size <= 0:
        yield
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.madvise(mmap.MADV_DONTFORK)
        for offset in range(0, size, mmap.PAGESIZE):
            memory[offset] = 1
        for offset in range(0, size, _BLOCK):
            memory.madvise(mmap.MADV_DONTNEED, offset + mmap.PAGESIZE, _BLOCK - mmap.PAGESIZE)
        yield
