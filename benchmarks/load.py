"""A loader in a process of its own: says ``ready`` when it has imported, waits for a line, and prints one JSON line.

``python -m benchmarks.load from_pretrained|load_file|threads PATH``. The first two include one read of every page of
every weight, for they return before they have read; `threads` are 8 on one descriptor, each with a part of its own.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import transformers
import transformers.models.qwen2.modeling_qwen2
from safetensors.torch import load_file

from obsfs.demo.model import load_model, touch_tensors

THREADS = 8
PIECE = 1 << 20


def read_in_threads(path: Path) -> int:
    """Read a file through one descriptor, a consecutive part of it by each thread; returns its bytes."""
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        size = os.fstat(file.fileno()).st_size
        part = -(-size // THREADS)

        def read(start: int) -> int:
            stop = min(start + part, size)
            offsets = range(start, stop, PIECE)
            buffer = bytearray(PIECE)
            return sum(os.preadv(file.fileno(), [memoryview(buffer)[: stop - offset]], offset) for offset in offsets)

        return sum(pool.map(read, range(0, size, part)))


HOW: dict[str, Callable[[Path], int]] = {
    "from_pretrained": lambda path: load_model(path).size,
    "load_file": lambda path: touch_tensors(load_file(path).values()),
    "threads": read_in_threads,
}


def main() -> None:
    load, path = HOW[sys.argv[1]], Path(sys.argv[2])
    transformers.utils.logging.disable_progress_bar()
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    size = load(path)
    print(json.dumps({"seconds": time.perf_counter() - started, "bytes": size}), flush=True)


main()
