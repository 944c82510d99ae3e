"""A loader in a process of its own: says ``ready`` when it has imported, waits for a line, and prints one JSON line.

``python -m benchmarks.load from_pretrained|load_file PATH``. Each figure includes one read of every page of every
weight: both calls return before they have read.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import transformers
import transformers.models.qwen2.modeling_qwen2
from safetensors.torch import load_file

from obsfs.demo.model import load_model, touch_tensors


def main() -> None:
    how, path = sys.argv[1], Path(sys.argv[2])
    transformers.utils.logging.disable_progress_bar()
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    size = load_model(path).size if how == "from_pretrained" else touch_tensors(load_file(path).values())
    print(json.dumps({"seconds": time.perf_counter() - started, "bytes": size}), flush=True)


main()
