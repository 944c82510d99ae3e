"""What is measured inside one process: ``python -m benchmarks.worker WHAT ARGUMENTS ...``.

Says ``ready`` when it has imported all that it needs, waits for a line, does it, and prints one JSON line with
``seconds``, ``cpu_seconds`` and ``bytes`` (or however many things it counts).
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from obsfs.bench.measure import read_part
from obsfs.errors import ObsfsError

RANGE = 8 << 20
PIECE = 1 << 20
THREADS = 8
_LIMIT_SECONDS = 300.0
_kept: list[Any] = []

Work = Callable[[], int]


# through a path


def from_pretrained(path: str) -> Work:
    """Load a model, and read one byte of every page of every weight: transformers returns before it has read.

    What was loaded is kept: to give a gigabyte back takes the kernel 0.1 s, and is not loading.
    """
    import transformers
    import transformers.models.qwen2.modeling_qwen2

    from obsfs.demo.model import load_model

    transformers.utils.logging.disable_progress_bar()

    def work() -> int:
        _kept.append(load_model(Path(path)))
        return int(_kept[-1].size)

    return work


def load_file(path: str) -> Work:
    """``safetensors.torch.load_file``, and one byte of every page."""
    from safetensors.torch import load_file

    from obsfs.demo.model import touch_tensors

    def work() -> int:
        _kept.append(load_file(path))
        return touch_tensors(_kept[-1].values())

    return work


def tensor(path: str, name: str) -> Work:
    """One tensor by ``safe_open``."""
    import torch  # noqa: F401  (safe_open imports it where it is first needed, which is not what is measured)
    from safetensors import safe_open

    from obsfs.demo.model import touch_tensors

    def work() -> int:
        with safe_open(path, "pt") as file:
            return touch_tensors([file.get_tensor(name)])

    return work


def touch(path: str) -> Work:
    """One byte of every page through a memory map."""

    def work() -> int:
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            return len(memory[:: mmap.PAGESIZE]) * mmap.PAGESIZE

    return work


def threads(path: str) -> Work:
    """Threads on one descriptor, a consecutive part of the file for each."""

    def work() -> int:
        with Path(path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            part = -(-size // THREADS)

            def read(start: int) -> int:
                return read_part(file.fileno(), start, min(start + part, size))

            return _in_threads(read, range(0, size, part), THREADS)

    return work


def scattered(path: str, size: str, count: str, readers: str) -> Work:
    """`count` random reads of `size` bytes, in that many threads."""

    def work() -> int:
        with Path(path).open("rb", buffering=0) as file:
            offsets = random_offsets(os.fstat(file.fileno()).st_size, int(size), int(count))
            return _in_threads(lambda offset: len(os.pread(file.fileno(), int(size), offset)), offsets, int(readers))

    return work


def stat(path: str) -> Work:
    """stat(2) of every file in a directory."""
    names = list(Path(path).iterdir())
    return lambda: len([Path.stat(name) for name in names])


# past any file system


def boto3(connections: str, *keys: str) -> Work:
    """Objects in ranges of 8 MiB over so many connections, thrown away: what the link gives."""
    client = _boto3(connections)
    ranges = [(key, start, stop) for key in keys for start, stop in _ranges(_size(client, key))]
    return lambda: _in_threads(_thrown_away(client), ranges, int(connections))


def boto3_scattered(connections: str, key: str, size: str, count: str) -> Work:
    """As `scattered`, by range requests."""
    client = _boto3(connections)
    offsets = random_offsets(_size(client, key), int(size), int(count))
    ranges = [(key, offset, offset + int(size)) for offset in offsets]
    return lambda: _in_threads(_thrown_away(client), ranges, int(connections))


def boto3_list(prefix: str) -> Work:
    """The bare pages of a listing."""
    pages = _boto3("1").get_paginator("list_objects_v2").paginate(Bucket=_bucket(), Prefix=prefix, Delimiter="/")
    return lambda: sum(len(page["Contents"]) for page in pages)


def obstore(directory: str, *keys: str) -> Work:
    """Download objects into a directory, in ranges of 8 MiB over 16 connections."""
    from obstore.store import S3Store

    store = S3Store(
        _bucket(),
        endpoint=os.environ["AWS_ENDPOINT_URL"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    ranges = [(key, start, stop) for key in keys for start, stop in _ranges(store.head(key)["size"])]
    files = {key: os.open(Path(directory, Path(key).name), os.O_CREAT | os.O_WRONLY) for key in keys}

    def download(part: tuple[str, int, int]) -> int:
        key, start, stop = part
        return os.pwrite(files[key], store.get_range(key, start=start, end=stop), start)

    return lambda: _in_threads(download, ranges, 16)


def random_offsets(file_size: int, size: int, count: int) -> list[int]:
    """Offsets of different pieces of `size` bytes, the same ones each time."""
    return [piece * size for piece in random.Random(1).sample(range(file_size // size), count)]


def _bucket() -> str:
    return os.environ["BENCH_BUCKET"]


def _boto3(connections: str) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(max_pool_connections=int(connections), s3={"addressing_style": "path"}))


def _size(client: Any, key: str) -> int:
    return int(client.head_object(Bucket=_bucket(), Key=key)["ContentLength"])


def _ranges(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + RANGE, size)) for start in range(0, size, RANGE)]


def _thrown_away(client: Any) -> Callable[[tuple[str, int, int]], int]:
    local = threading.local()

    def fetch(part: tuple[str, int, int]) -> int:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(PIECE))
        key, start, stop = part
        body = client.get_object(Bucket=_bucket(), Key=key, Range=f"bytes={start}-{stop - 1}")["Body"]
        while body.readinto(local.buffer):
            pass
        return stop - start

    return fetch


def _in_threads(work: Callable[[Any], int], parts: Iterable[Any], count: int) -> int:
    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(work, parts))


WORK: dict[str, Callable[..., Work]] = {
    function.__name__: function
    for function in (
        from_pretrained, load_file, tensor, touch, threads, scattered, stat,
        boto3, boto3_scattered, boto3_list, obstore,
    )
}  # fmt: skip


def measure(command: Sequence[object], before: Callable[[], object] = lambda: None) -> dict[str, float]:
    """The figures of a worker, given WHAT and its arguments; `before` is called between ready and go."""
    return measure_all([command], before)[0]


def measure_all(
    commands: Sequence[Sequence[object]], before: Callable[[], object] = lambda: None
) -> list[dict[str, float]]:
    """Those of several that go at the same moment. Raises ObsfsError when one fails, or takes over five minutes."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    pipes: list[tuple[IO[str], IO[str]]] = []
    # Killed, not terminated: who waits for a page of a memory map hears nothing else.
    alarm = threading.Timer(_LIMIT_SECONDS, lambda: list(map(subprocess.Popen.kill, processes)))
    alarm.start()
    try:
        for process in processes:
            assert process.stdin and process.stdout
            pipes.append((process.stdin, process.stdout))
            if process.stdout.readline() != "ready\n":
                raise ObsfsError("a worker did not start, see above")
        before()
        for stdin, _ in pipes:
            stdin.write("\n")
            stdin.flush()
        lines = [stdout.readline() for _, stdout in pipes]
        if not all(lines):
            raise ObsfsError("a worker failed, see above, or took too long")
        return [json.loads(line) for line in lines]
    finally:
        alarm.cancel()
        for process in processes:
            process.kill()
            process.communicate()


def timed(*command: object, limit: float = 600.0) -> float:
    """Seconds of a command whose output is thrown away. Raises SubprocessError."""
    started = time.perf_counter()
    subprocess.run(list(map(str, command)), stdout=subprocess.DEVNULL, check=True, timeout=limit)
    return time.perf_counter() - started


def main() -> None:
    work = WORK[sys.argv[1]](*sys.argv[2:])
    print("ready", flush=True)
    sys.stdin.readline()
    started, cpu = time.perf_counter(), _cpu()
    size = work()
    print(
        json.dumps({"seconds": time.perf_counter() - started, "cpu_seconds": _cpu() - cpu, "bytes": size}), flush=True
    )


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
