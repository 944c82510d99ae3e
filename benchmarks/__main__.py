"""``python -m benchmarks``: the figures that the README promises, each as a ratio of two measured in one run.

Starts SeaweedFS and the emulated OBS link, makes a Qwen2 of 0.5 billion parameters in four shards and two files of
2 GiB, and measures obsfs beside what it is compared with, interleaved. Writes one JSON file and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from botocore.config import Config

from benchmarks.link import PROFILES, Link
from benchmarks.memory import settled
from obsfs.demo.server import EmbeddedServer
from obsfs.errors import ObsfsError
from obsfs.fuse import mounts
from obsfs.settings import Settings

BUCKET = "bench"
GIB = 1 << 30
RANGE = 8 << 20
THREADS = 16
STREAM_BYTES = 20 * 10**9


class Target(NamedTuple):
    """`figure` over `base` (both in seconds) must not pass `most`; or, with no base, `figure` itself."""

    title: str
    figure: str
    base: str | None
    most: float


TARGETS = (
    Target("warm from_pretrained / ext4", "warm_load", "ext4_load", 1.10),
    Target("warm dd / ext4, page cache hot", "warm_dd", "ext4_dd", 1 / 0.5),
    Target("cold dd / boto3, 16 threads", "cold_dd", "boto3_file", 1 / 0.85),
    Target("cold from_pretrained / boto3, 16 threads", "cold_load", "boto3_model", 1.4),
    Target("cold load_file / cold dd", "cold_load_file", "cold_dd", 1 / 0.8),
    Target("cold, 8 threads on one descriptor / cold dd", "cold_threads", "cold_dd", 1 / 0.8),
    Target("MiB of daemon memory, 20 GB streamed", "stream_memory_mib", None, 300),
    Target("one 8 MiB tensor: MiB fetched", "tensor_mib", None, 17),
)


class Bench:
    """The server, the link, the data, and mounts that come and go."""

    def __init__(self, stack: ExitStack, home: Path) -> None:
        self.home = home
        self.figures: dict[str, list[float]] = {}
        self._count = 0
        self._mounted: tuple[Path, Path] | None = None
        self.server = stack.enter_context(EmbeddedServer(home))
        os.environ.update(self.server.environment, XDG_STATE_HOME=str(home / "state"))
        _say("making the data")
        self.model = home / "qwen2"
        _child("benchmarks.data", self.model, home / "weights.safetensors")
        self.server.upload(self.model, BUCKET, "qwen2/")
        weights = home / "weights.safetensors"
        for name in (weights.name, "file.bin"):
            with weights.open("rb") as file:
                self.server.client().put_object(Bucket=BUCKET, Key=name, Body=file)
        weights.rename(home / "file.bin")
        self.link = stack.enter_context(Link(self.server, PROFILES["obs"]))
        os.environ["AWS_ENDPOINT_URL"] = self.link.endpoint
        stack.callback(self.unmount)

    def record(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)
        _say(f"{name} = {value:.3f}")

    def mount(self, cache: Path | None = None, **settings: Any) -> Path:
        """A new mount in place of the one before, with an empty cache of its own unless one is given."""
        self.unmount()
        self._count += 1
        path = self.home / f"mnt{self._count}"
        path.mkdir()
        cache = cache or self.home / f"cache{self._count}"
        mounts.start(f"obs://{BUCKET}", path, Settings.load(cache_dir=cache, **settings), lifeline=False)
        self._mounted = path, cache
        return path

    def unmount(self) -> None:
        """Take down the mount, and its cache if it had one of its own."""
        if self._mounted is not None:
            path, cache = self._mounted
            self._mounted = None
            mounts.unmount(path)
            path.rmdir()
            if cache.name.startswith("cache"):
                shutil.rmtree(cache, ignore_errors=True)

    def fetch_with_boto3(self, keys: list[str]) -> float:
        """Seconds that boto3's threads need to read objects in ranges of 8 MiB and throw them away."""
        client = boto3.client("s3", config=Config(max_pool_connections=THREADS, s3={"addressing_style": "path"}))
        ranges = []
        for key in keys:
            size = client.head_object(Bucket=BUCKET, Key=key)["ContentLength"]
            ranges += [(key, start, min(start + RANGE, size)) for start in range(0, size, RANGE)]
        local = threading.local()

        def fetch(part: tuple[str, int, int]) -> None:
            if not hasattr(local, "buffer"):
                local.buffer = memoryview(bytearray(1 << 20))
            key, start, stop = part
            body = client.get_object(Bucket=BUCKET, Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
            while body.readinto(local.buffer):
                pass

        started = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fetch, ranges))
        return time.perf_counter() - started

    def load(self, how: str, path: Path, before: Callable[[], object] = lambda: None) -> float:
        """Seconds for a loader in a child, which has imported all before `before` is called and the clock runs."""
        command = [sys.executable, "-m", "benchmarks.load", how, str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdin and child.stdout
            assert child.stdout.readline() == "ready\n"
            before()
            child.stdin.write("\n")
            child.stdin.flush()
            return float(json.loads(child.stdout.readline())["seconds"])


def _child(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


def _say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def _dd(path: Path) -> float:
    started = time.perf_counter()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M"], capture_output=True, check=True)
    return time.perf_counter() - started


def cold(bench: Bench, runs: int) -> None:
    """Everything from the bucket. The first round warms up and does not count."""
    shards = [f"qwen2/{path.name}" for path in sorted(bench.model.iterdir())]
    for run in range(runs + 1):
        figures = {
            "boto3_file": bench.fetch_with_boto3(["file.bin"]),
            "cold_dd": _dd(bench.mount() / "file.bin"),
            "boto3_model": bench.fetch_with_boto3(shards),
            "cold_load": bench.load("from_pretrained", bench.mount() / "qwen2"),
            "cold_load_file": bench.load("load_file", bench.mount() / "weights.safetensors"),
            "cold_threads": bench.load("threads", bench.mount() / "file.bin"),
        }
        for name, value in figures.items():
            if run:
                bench.record(name, value)


def tensor(bench: Bench, runs: int) -> None:
    """One tensor of 8 MiB out of a file of 2 GiB (the tensors of `benchmarks.data` have 8 MiB)."""
    for number in range(0, 250, max(1, 250 // runs)):
        path = bench.mount()
        program = (
            "import sys; from safetensors import safe_open\n"
            "with safe_open(sys.argv[1], 'pt') as file: file.get_tensor(sys.argv[2]).float().sum()"
        )
        name = f"model.layers.{number}.weight"
        subprocess.run([sys.executable, "-c", program, path / "weights.safetensors", name], check=True)
        bench.record("tensor_mib", mounts.status(path)["bytes_fetched"] / 2**20)


def warm(bench: Bench, runs: int) -> None:
    """Everything from the cache, after a new mount, beside the same bytes on the same disk."""
    cache = bench.home / "kept"
    path = bench.mount(cache)
    subprocess.run(["sh", "-c", f"cat {path}/file.bin {path}/qwen2/* > /dev/null"], check=True)
    files = [path / "file.bin", *(path / "qwen2").iterdir()]
    while not all(os.getxattr(file, "user.obsfs.served_by") == b"passthrough" for file in files):
        time.sleep(0.1)
    path = bench.mount(cache)

    def drop() -> None:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")

    places = {"ext4_load": bench.model, "warm_load": path / "qwen2"}
    for run in range(4 * runs):
        # Whoever comes second finds a disk that has just read something else: they take turns.
        for name in sorted(places, reverse=bool(run % 2)):
            bench.record(name, bench.load("from_pretrained", places[name], drop))
    for file in (bench.home / "file.bin", path / "file.bin"):
        _dd(file)
    for _ in range(runs):
        bench.record("ext4_dd", _dd(bench.home / "file.bin"))
        bench.record("warm_dd", _dd(path / "file.bin"))
    bench.unmount()
    shutil.rmtree(cache)


def stream(bench: Bench, runs: int) -> None:
    """20 GB through a cache of 1 GiB, without the link: the most memory that the server has for itself."""
    os.environ["AWS_ENDPOINT_URL"] = bench.server.endpoint
    path = bench.mount(cache_size=GIB)
    most = fetched = 0
    for file in _forever(path / "file.bin", path / "weights.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.read(64 << 20):
                most = max(most, mounts.status(path)["memory_bytes"])
            # The kernel keeps no pages, so that the next round comes through the server again.
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            fetched = mounts.status(path)["bytes_fetched"]
        if fetched >= STREAM_BYTES:
            break
    bench.record("stream_fetched_gb", fetched / 1e9)
    bench.record("stream_memory_mib", most / 2**20)
    os.environ["AWS_ENDPOINT_URL"] = bench.link.endpoint


def _forever(*files: Path) -> Iterator[Path]:
    while True:
        yield from files


CASES = {"cold": cold, "tensor": tensor, "warm": warm, "stream": stream}


def report(figures: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row per target that was measured: medians, ratio, whether it is met."""
    rows = []
    for target in TARGETS:
        if target.figure not in figures or (target.base and target.base not in figures):
            continue
        figure = statistics.median(figures[target.figure])
        base = statistics.median(figures[target.base]) if target.base else 1.0
        value = max(figures[target.figure]) if target.base is None else figure / base
        rows.append({"title": target.title, "value": value, "most": target.most, "met": value <= target.most})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one (may be repeated)")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each figure (default 3)")
    parser.add_argument(
        "--directory", type=Path, help="where to keep the data (15 GB; default: the temporary directory)"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latest.json"))
    arguments = parser.parse_args()
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="obsfs-bench-", dir=arguments.directory))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        _say("settling the memory")
        stack.enter_context(settled())
        bench = Bench(stack, home)
        for name in arguments.case or CASES:
            print(name, file=sys.stderr)
            CASES[name](bench, arguments.runs)
        rows = report(bench.figures)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"figures": bench.figures, "targets": rows}, indent=2) + "\n")
    for row in rows:
        print(
            f"{row['title']:45} {row['value']:8.2f}   at most {row['most']:7.2f}   {'met' if row['met'] else 'NOT MET'}"
        )
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ObsfsError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)
