"""The server, the link, the data and the figures: what every case of :mod:`benchmarks.cases` works with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks import data, worker
from benchmarks.link import PROFILES, Link, SentFile
from benchmarks.peers import DOWNLOADERS, OBSFS, PEERS, Downloader, Mounted, Peer, Place, System
from obsfs.demo.server import EmbeddedServer
from obsfs.errors import ObsfsError
from obsfs.library.manifest import File, Manifest, ModelInfo, now
from obsfs.library.names import MANIFEST

BUCKET = "bench"
_SENT_FROM = 16 << 20
"""Bytes."""


class Key(NamedTuple):
    """What a figure is of. `system` is a peer, a downloader, ``boto3``, or ``ext4``; `metric` ends in its unit."""

    case: str
    profile: str
    system: str
    metric: str = "seconds"


class Bench:
    """`only` names the systems to measure besides the baselines; none means all that are there."""

    def __init__(self, stack: ExitStack, home: Path, runs: int, only: Sequence[str] = ()) -> None:
        self.home = home
        self.runs = runs
        self.figures: dict[Key, list[float]] = {}
        self.missing: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.case = self.profile = ""
        self._count = 0
        self._peers = [peer for peer in PEERS if self._is_wanted(peer, only)]
        self._downloaders = [downloader for downloader in DOWNLOADERS if self._is_wanted(downloader, only)]
        self._server = stack.enter_context(EmbeddedServer(home))
        os.environ.update(self._server.environment, BENCH_BUCKET=BUCKET, XDG_STATE_HOME=str(home / "state"))
        self._link: Link | None = None
        self._sent: list[SentFile] = []
        self.local = home / "local"
        self.local.mkdir()
        self._make_data()

    def _is_wanted(self, system: System, only: Sequence[str]) -> bool:
        if only and system.name not in only:
            return False
        if system.is_missing:
            self.missing[system.name] = system.remedy
            say(f"{system.name} is missing: {system.remedy}")
            return False
        return True

    def _make_data(self) -> None:
        say("making the data")
        subprocess.run([sys.executable, "-m", "benchmarks.data", self.local], check=True)
        say("uploading it")
        client = self._server.client(max_pool_connections=16)
        client.create_bucket(Bucket=BUCKET)

        def upload(path: Path) -> None:
            key = path.relative_to(self.local).as_posix()
            with path.open("rb") as file:
                etag = client.put_object(Bucket=BUCKET, Key=key, Body=file)["ETag"]
            if path.stat().st_size >= _SENT_FROM:
                self._sent.append(SentFile(f"/{BUCKET}/{key}", etag, path))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(upload, sorted(path for path in self.local.rglob("*") if path.is_file())))

    def put_models(self, count: int) -> None:
        """A library ``many/`` of so many models, as far as manifests tell: all have the same files."""
        files = tuple(
            File(path=f"model-{n:05}-of-00004.safetensors", size=1 << 30, etag=f'"{n}"', sha256=f"{n:064}")
            for n in range(4)
        )
        client = self._server.client(max_pool_connections=16)

        def put(number: int) -> None:
            name = f"model-{number:03}"
            about = ModelInfo(architecture="Qwen2ForCausalLM", parameters=494_032_768, dtype="bfloat16")
            manifest = Manifest(name=name, version="v1", created=now(), model=about, files=files)
            client.put_object(Bucket=BUCKET, Key=f"many/{name}@v1/{MANIFEST}", Body=manifest.to_json())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, range(count)))

    def size(self, name: str) -> int:
        """Bytes of a file, or of all files of a directory, of the data."""
        path = self.local / name
        return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size

    @property
    def model_keys(self) -> list[str]:
        """The keys of the model's files."""
        return [f"{data.MODEL}/{path.name}" for path in sorted((self.local / data.MODEL).iterdir())]

    def send_by_link(self, key: str, path: Path) -> None:
        """An object that was pushed is sent by the link itself from now on, as those are that were there before, and
        what the push left to be written is not in the way of what comes next."""
        if self._link is not None:
            etag = self._server.client().head_object(Bucket=BUCKET, Key=key)["ETag"]
            self._link.send(SentFile(f"/{BUCKET}/{key}", etag, path))
            self._bring_to_memory()

    @contextmanager
    def linked(self, profile: str) -> Iterator[None]:
        """Everything inside goes over this link."""
        self.profile = profile
        with ExitStack() as stack:
            if profile != "lan":
                self._link = stack.enter_context(Link(self._server, PROFILES[profile], self._sent))
                self._bring_to_memory()
            os.environ["AWS_ENDPOINT_URL"] = self.endpoint
            try:
                yield
            finally:
                self._link = None

    def _bring_to_memory(self) -> None:
        """What nginx sends, and nothing else: the disk of a distant server is not measured, and none of ours has to be
        found room for, or written, while it is."""
        drop_page_cache()
        for sent in self._sent:
            dd(sent.path)

    @property
    def endpoint(self) -> str:
        """Where the bucket is, as seen over the link."""
        return self._link.endpoint if self._link else self._server.endpoint

    @property
    def received(self) -> int:
        """Bytes that came over the link so far, with all headers; 0 without one."""
        return self._link.received if self._link else 0

    @property
    def latency(self) -> float:
        """Seconds that each request waits on this link."""
        return PROFILES[self.profile].latency

    def peers(self, *names: str) -> list[Peer]:
        """Those that are there and work over this link; of these names, if any are given."""
        found = [peer for peer in self._peers if self.profile in peer.profiles and (not names or peer.name in names)]
        return [peer for peer in found if peer.name not in self.failed]

    def downloaders(self) -> list[Downloader]:
        """Those that are there."""
        return [downloader for downloader in self._downloaders if downloader.name not in self.failed]

    def record(self, system: str, metric: str, value: float, *, case: str = "") -> None:
        """Note a figure of the current case."""
        key = Key(case or self.case, self.profile, system, metric)
        self.figures.setdefault(key, []).append(value)
        say(f"{key.case:14} {key.profile:5} {system:13} {value:10.3f} {metric}")

    def boto3(self, *arguments: object) -> None:
        """Measure what the link gives; see the worker."""
        figures = worker.measure(["boto3", *arguments])
        self.record("boto3", "seconds", figures["seconds"])
        self.record("boto3", "cpu_seconds_per_gb", figures["cpu_seconds"] / figures["bytes"] * 1e9)

    def place(self, cache: Path | None = None) -> Place:
        """A new mountpoint, with an empty cache unless one is given."""
        self._count += 1
        filer = f"127.0.0.1:{self._server.filer_port}"
        cache = cache or self.home / f"cache{self._count}"
        return Place(BUCKET, self.endpoint, filer, self.home / f"mnt{self._count}", cache)

    @contextmanager
    def mounted(self, peer: Peer, cache: Path | None = None) -> Iterator[Mounted]:
        """A peer at work. Its cache goes with it unless it was given."""
        place = self.place(cache)
        try:
            with Mounted(peer, place, self.home / f"{peer.name.replace(' ', '-')}.log") as mounted:
                yield mounted
        finally:
            if cache is None:
                shutil.rmtree(place.cache, ignore_errors=True)

    def each_cold(self, peers: Sequence[Peer], size: int, work: Callable[[Path], float]) -> None:
        """Measure `work` (seconds, of a mountpoint; it uses `size` bytes) on each peer with an empty cache."""
        for peer in peers:
            with self.surviving(peer), self.mounted(peer) as mounted:
                received, cpu = self.received, mounted.cpu_seconds
                self.record(peer.name, "seconds", work(mounted.path))
                self.record(peer.name, "daemon_cpu_seconds_per_gb", (mounted.cpu_seconds - cpu) / size * 1e9)
                self.record(peer.name, "daemon_memory_mib", mounted.peak_bytes / 2**20)
                if self._link:
                    self.record(peer.name, "received_over_used", (self.received - received) / size)

    @contextmanager
    def surviving(self, system: System) -> Iterator[None]:
        """A system that fails is named and left out from then on; obsfs may not."""
        try:
            yield
        except (ObsfsError, OSError, subprocess.SubprocessError) as error:
            if system is OBSFS:
                raise
            self.failed[system.name] = f"{self.case} ({self.profile}): {error}"
            say(f"{system.name} failed: {error}")


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def dd(path: Path) -> float:
    """Seconds to read a file in pieces of 1 MiB."""
    started = time.perf_counter()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=1M"], capture_output=True, check=True, timeout=600)
    return time.perf_counter() - started


def drop_page_cache() -> None:
    """Have the kernel forget what it has read."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")
