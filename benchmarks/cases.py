"""The cases: each measures every system that it concerns, taking turns, in the link's profile that holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from benchmarks import data
from benchmarks.bench import BUCKET, Bench, dd, drop_page_cache
from benchmarks.peers import OBSFS
from benchmarks.worker import measure, measure_all, timed
from obsfs.demo.server import program_path

_T = TypeVar("_T")
_STREAM_BYTES = 20 * 10**9
_PROCESSES = 8
_SCATTERED = 256
_LISTING_SECONDS = 60.0
_MODELS = 500
_TRAINING = {
    "method": "qlora",
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "max_length": 32,
    "report_to": "none",
    "save_strategy": "no",
}
_KIB, _MIB = 1 << 10, 1 << 20


def _turns(things: Sequence[_T], run: int) -> Sequence[_T]:
    """The same things, another one first in each run."""
    first = run % len(things) if things else 0
    return [*things[first:], *things[:first]]


def cold_dd(bench: Bench) -> None:
    """2 GiB in sequence, from the bucket."""
    for run in range(bench.runs):
        bench.boto3(16, data.WEIGHTS)
        bench.each_cold(_turns(bench.peers(), run), bench.size(data.WEIGHTS), lambda path: dd(path / data.WEIGHTS))


def cold_load(bench: Bench) -> None:
    """`from_pretrained` from the bucket; for downloaders, download and load."""
    connections = 32 if bench.profile == "far" else 16
    for run in range(bench.runs):
        bench.boto3(connections, *bench.model_keys)
        bench.each_cold(
            _turns(bench.peers(), run),
            bench.size(data.MODEL),
            lambda path: measure(["from_pretrained", path / data.MODEL])["seconds"],
        )
        for downloader in _turns(bench.downloaders(), run):
            place = bench.place()
            place.path.mkdir()
            with bench.surviving(downloader):
                seconds = downloader.download(place, bench.model_keys)
                seconds += measure(["from_pretrained", place.path])["seconds"]
                bench.record(downloader.name, "seconds", seconds)
            shutil.rmtree(place.path)


def load_file(bench: Bench) -> None:
    """Memory-mapped `load_file` of 2 GiB."""
    for _ in range(bench.runs):
        size = bench.size(data.WEIGHTS)
        bench.each_cold([OBSFS], size, lambda path: measure(["load_file", path / data.WEIGHTS])["seconds"])


def threads(bench: Bench) -> None:
    """8 threads on one descriptor, each with its part of 2 GiB."""
    for _ in range(bench.runs):
        size = bench.size(data.WEIGHTS)
        bench.each_cold([OBSFS], size, lambda path: measure(["threads", path / data.WEIGHTS])["seconds"])


def processes(bench: Bench) -> None:
    """8 processes load one model at the same time; from ext4 with a hot page cache, for what it takes at least."""

    def load(path: Path) -> float:
        return max(one["seconds"] for one in measure_all([["from_pretrained", path / data.MODEL]] * _PROCESSES))

    for _ in range(bench.runs):
        bench.each_cold([OBSFS], bench.size(data.MODEL), load)
        bench.record("ext4", "seconds", load(bench.local))


def tensor(bench: Bench) -> None:
    """One tensor of 8 MiB out of 4 GB: bytes over the link, and how many times its latency was waited for."""
    for run in range(bench.runs):
        number = (2 * run + 1) * data.TENSORS[data.LARGE] // (2 * bench.runs)
        for peer in _turns(bench.peers(), run):
            with bench.surviving(peer), bench.mounted(peer) as mounted:
                work = ["tensor", mounted.path / data.LARGE, data.tensor_name(number)]
                received = bench.received
                cold = measure(work)["seconds"]
                time.sleep(1.0)  # what is on its way counts
                bench.record(peer.name, "received_mib", (bench.received - received) / _MIB)
                bench.record(peer.name, "waits", (cold - measure(work)["seconds"]) / bench.latency)


def random_reads(bench: Bench) -> None:
    """256 random reads of 1 MiB by 16 readers, and of 4 KiB by one."""
    for run in range(bench.runs):
        seconds = measure(["boto3_scattered", 16, data.LARGE, _MIB, _SCATTERED])["seconds"]
        bench.record("boto3", "seconds", seconds)
        bench.each_cold(
            _turns(bench.peers(), run),
            _SCATTERED * _MIB,
            lambda path: measure(["scattered", path / data.LARGE, _MIB, _SCATTERED, 16])["seconds"],
        )
        for peer in _turns(bench.peers(), run):
            with bench.surviving(peer), bench.mounted(peer) as mounted:
                seconds = measure(["scattered", mounted.path / data.LARGE, 4 * _KIB, 32, 1])["seconds"]
                bench.record(peer.name, "milliseconds_per_4k", seconds / 32 * 1000)


def first_byte(bench: Bench) -> None:
    """From the command to the first byte of a file."""
    for run in range(bench.runs):
        for peer in _turns(bench.peers(), run):
            started = time.perf_counter()
            with bench.surviving(peer), bench.mounted(peer) as mounted:
                (mounted.path / data.LARGE).open("rb", buffering=0).read(1)
                bench.record(peer.name, "seconds", time.perf_counter() - started)


def warm_load(bench: Bench) -> None:
    """`from_pretrained` from the local disk, the page cache dropped (warm) or not (hot)."""
    with ExitStack() as stack:
        places = {"ext4": bench.local / data.MODEL}
        for peer in bench.peers("obsfs", "rclone tuned", "s3fs-fuse"):
            cache = bench.home / f"kept-{peer.name.replace(' ', '-')}"
            stack.callback(shutil.rmtree, cache, ignore_errors=True)
            with bench.mounted(peer, cache) as mounted:
                measure(["from_pretrained", mounted.path / data.MODEL])
                time.sleep(1.0)  # the end of what is written behind the reader
            places[peer.name] = stack.enter_context(bench.mounted(peer, cache)).path / data.MODEL
        for run in range(4 * bench.runs):
            # Whoever comes second finds a disk that has just read something else: they take turns.
            for system in _turns(list(places), run):
                seconds = measure(["from_pretrained", places[system]], drop_page_cache)["seconds"]
                bench.record(system, "seconds", seconds)
        for run in range(bench.runs):
            for system in _turns(list(places), run):
                seconds = measure(["from_pretrained", places[system]])["seconds"]
                bench.record(system, "seconds", seconds, case="hot_load")


def warm_read(bench: Bench) -> None:
    """dd, and one byte of every page through a memory map: 2 GiB that are in the page cache."""
    cache = bench.home / "kept"
    with bench.mounted(OBSFS, cache) as mounted:
        dd(mounted.path / data.WEIGHTS)
        while os.getxattr(mounted.path / data.WEIGHTS, "user.obsfs.served_by") != b"passthrough":
            time.sleep(0.1)
    with bench.mounted(OBSFS, cache) as mounted:
        places = {"ext4": bench.local / data.WEIGHTS, "obsfs": mounted.path / data.WEIGHTS}
        # Both from the disk by the kernel's read-ahead: pages that were written in pieces map more slowly.
        drop_page_cache()
        for path in places.values():
            dd(path)
        for run in range(3 * bench.runs):
            for system in _turns(list(places), run):
                bench.record(system, "seconds", dd(places[system]), case="warm_dd")
                bench.record(system, "seconds", measure(["touch", places[system]])["seconds"], case="warm_mmap")
    shutil.rmtree(cache)


def listing(bench: Bench) -> None:
    """`find`, `ls -l` and stat(2) of 20,000 files in a directory, cold and hot; the bare pages of its listing."""
    commands = {"find": ("find", "-H"), "ls": ("ls", "-l")}
    local = bench.local / data.SMALL
    for run in range(bench.runs):
        pages = measure(["boto3_list", f"{data.SMALL}/"])["seconds"]
        bench.record("boto3", "seconds", pages, case="find_cold")
        for name, command in commands.items():
            timed(*command, local)
            bench.record("ext4", "seconds", timed(*command, local), case=f"{name}_hot")
        bench.record("ext4", "seconds", measure(["stat", local])["seconds"], case="stat_hot")
        for peer in _turns(bench.peers(), run):
            for name, command in commands.items():
                with bench.surviving(peer), bench.mounted(peer) as mounted:
                    path = mounted.path / data.SMALL
                    for state in ("cold", "hot"):
                        seconds = timed(*command, path, limit=_LISTING_SECONDS)
                        bench.record(peer.name, "seconds", seconds, case=f"{name}_{state}")
                    if name == "ls":
                        bench.record(peer.name, "seconds", measure(["stat", path])["seconds"], case="stat_hot")


def library(bench: Bench) -> None:
    """4 GB pushed and pulled, hashed on the way; s5cmd with as many connections and parts of the same size, which
    hashes nothing, and with ``sha256sum`` after it, which brings what a pull brings.

    And the table of 500 models, asked for and remembered.
    """
    source = bench.home / "publish"
    source.mkdir()
    (source / data.LARGE).hardlink_to(bench.local / data.LARGE)
    obsfs = [sys.executable, "-m", "obsfs"]
    s5cmd = next((system for system in bench.downloaders() if system.name == "s5cmd"), None)
    options = ["--endpoint-url", bench.endpoint, "cp", "--concurrency", "16", "--part-size", "8"]
    for run in range(bench.runs):
        # Under a name of its own each time: of another version, what is the same is copied inside the server.
        place, key = bench.place(), f"library/large-{run}@v1"
        name = f"obs://{BUCKET}/{key}"
        pull = [*obsfs, "pull", name, "--cache-dir", place.cache]
        bench.record("obsfs", "seconds", timed(*obsfs, "push", source, name), case="push")
        bench.send_by_link(f"{key}/{data.LARGE}", bench.local / data.LARGE)
        bench.record("obsfs", "seconds", timed(*pull), case="pull")
        bench.record("obsfs", "seconds", timed(*pull), case="pull_again")
        shutil.rmtree(place.cache)
        bench.record("obsfs", "seconds", timed(*pull, place.path), case="pull_copy")
        shutil.rmtree(place.path)
        shutil.rmtree(place.cache)
        if s5cmd is not None:
            key = f"library/s5cmd-{run}/"
            there = f"s3://{BUCKET}/{key}"
            with bench.surviving(s5cmd):
                command = [program_path("s5cmd"), *options]
                bench.record("s5cmd", "seconds", timed(*command, f"{source}/", there), case="push")
                bench.send_by_link(f"{key}{data.LARGE}", bench.local / data.LARGE)
                seconds = timed(*command, f"{there}*", f"{place.path}/")
                bench.record("s5cmd", "seconds", seconds, case="pull")
                seconds += timed("sha256sum", place.path / data.LARGE)
                bench.record("s5cmd, hashed", "seconds", seconds, case="pull")
            shutil.rmtree(place.path, ignore_errors=True)
    bench.put_models(_MODELS)
    for _ in range(bench.runs):
        place = bench.place()
        models = [*obsfs, "models", f"obs://{BUCKET}/many", "--cache-dir", place.cache]
        bench.record("obsfs", "seconds", timed(*models), case="models_cold")
        bench.record("obsfs", "seconds", timed(*models), case="models_cached")
    shutil.rmtree(source)


def train(bench: Bench) -> None:
    """QLoRA, from the command to its first step: from the bucket; downloaded by s5cmd first; warm, and from ext4."""
    rows = bench.home / "train.jsonl"
    rows.write_text("".join(json.dumps({"text": f"one line of text, number {n}"}) + "\n" for n in range(64)))
    s5cmd = next((system for system in bench.downloaders() if system.name == "s5cmd"), None)

    def first_step(model: object, cache: Path) -> float:
        out = bench.home / "trained"
        options = {**_TRAINING, "model": model, "data": rows, "output": out, "cache_dir": cache}
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        command = [sys.executable, "-m", "obsfs", "train", *words, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        shutil.rmtree(out)
        seconds: float = json.loads(done.stdout.splitlines()[-1])["seconds"]["to first step"]
        return seconds

    for _ in range(bench.runs):
        place = bench.place()
        bench.record("obsfs", "seconds", first_step(f"obs://{BUCKET}/{data.MODEL}", place.cache), case="train_cold")
        bench.record("obsfs", "seconds", first_step(f"obs://{BUCKET}/{data.MODEL}", place.cache), case="train_warm")
        shutil.rmtree(place.cache)
        bench.record("ext4", "seconds", first_step(bench.local / data.MODEL, place.cache), case="train_warm")
        if s5cmd is not None:
            place.path.mkdir()
            with bench.surviving(s5cmd):
                seconds = s5cmd.download(place, bench.model_keys)
                bench.record("s5cmd", "seconds", seconds, case="train_download")
                bench.record("s5cmd", "seconds", seconds + first_step(place.path, place.cache), case="train_cold")
            shutil.rmtree(place.path)


def stream(bench: Bench) -> None:
    """20 GB through a cache of 1 GiB: the most memory that the server has for itself."""
    os.environ["OBSFS_CACHE_SIZE"] = "1GiB"
    received = 0
    try:
        with bench.mounted(OBSFS) as mounted:
            for path in _forever(mounted.path / data.LARGE, mounted.path / data.WEIGHTS):
                with path.open("rb", buffering=0) as file:
                    while read := len(file.read(16 * _MIB)):
                        received += read
                    # The kernel keeps no pages, so that the next round comes through the server again.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if received >= _STREAM_BYTES:
                    break
            bench.record("obsfs", "daemon_memory_mib", mounted.peak_bytes / _MIB)
    finally:
        del os.environ["OBSFS_CACHE_SIZE"]


def _forever(*files: Path) -> Iterator[Path]:
    while True:
        yield from files


Case = Callable[[Bench], None]
CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "warm_load": (warm_load, ("lan",)),
    "warm_read": (warm_read, ("lan",)),
    "cold_dd": (cold_dd, ("lan", "obs")),
    "stream": (stream, ("lan",)),
    "cold_load": (cold_load, ("obs", "far")),
    "load_file": (load_file, ("obs",)),
    "threads": (threads, ("obs",)),
    "processes": (processes, ("obs",)),
    "first_byte": (first_byte, ("obs",)),
    "tensor": (tensor, ("waits",)),
    "library": (library, ("obs",)),
    "train": (train, ("obs",)),
    "random_reads": (random_reads, ("obs",)),
    "listing": (listing, ("obs",)),
}
"""Each case with the profiles that it is measured in."""
