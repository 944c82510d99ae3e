"""What is measured, and how: reads, stats and listings of one place, cold and warm.

A bucket is measured through mounts of its own with an empty cache, so that cold is cold and nobody's cache is
touched: each case once as it comes from the bucket, and once after a new mount, from the SSD. Any other directory is
measured as it is: after the kernel was told to forget the file, and again from the page cache.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from obsfs import private, processes
from obsfs.errors import CacheError, UnavailableError, UsageError
from obsfs.service import mounts
from obsfs.settings import Settings

_MIB = 1 << 20
_PARALLEL = 4
_RANDOM_READERS = 16
_RANDOM_READS = 128
_LEAST_FILE = 4 * _MIB
_NAMES = 10_000
_WALK_SECONDS = 60.0


class Figure(NamedTuple):
    """One line of the result. `cold` and `warm` are in `unit`; a time is better when it is less, a rate when more."""

    case: str
    title: str
    unit: str
    cold: float
    warm: float


class Sample(NamedTuple):
    """A file to read, with its size in bytes, and the names of the place (a part of them, if there are very many)."""

    path: Path
    size: int
    names: list[Path]


Measure = Callable[[Path, Sample, int], float]
"""The figure, of the place, what is in it, and the most bytes to read."""


# the cases; paths of the sample are relative to the place


def _sequential(place: Path, sample: Sample, most: int) -> float:
    with (place / sample.path).open("rb", buffering=0) as file:
        return _rate(lambda: read_part(file.fileno(), 0, min(sample.size, most)))


def _parallel(place: Path, sample: Sample, most: int) -> float:
    size = min(sample.size, most)
    part = -(-size // _PARALLEL)
    with (place / sample.path).open("rb", buffering=0) as file, ThreadPoolExecutor(_PARALLEL) as pool:
        starts = range(0, size, part)
        return _rate(
            lambda: sum(pool.map(lambda start: read_part(file.fileno(), start, min(start + part, size)), starts))
        )


def _random(place: Path, sample: Sample, most: int) -> float:
    pieces = sample.size // _MIB
    chosen = random.Random(1).sample(range(pieces), min(_RANDOM_READS, pieces, most // _MIB))
    with (place / sample.path).open("rb", buffering=0) as file, ThreadPoolExecutor(_RANDOM_READERS) as pool:
        return _rate(lambda: sum(pool.map(lambda piece: len(os.pread(file.fileno(), _MIB, piece * _MIB)), chosen)))


def _mmap(place: Path, sample: Sample, most: int) -> float:
    size = min(sample.size, most)
    done = subprocess.run(
        processes.python_command("-m", "obsfs.bench.touch", str(place / sample.path), str(size)),
        cwd="/",
        env=processes.child_environment(),
        capture_output=True,
        check=False,
    )
    try:
        return float(done.stdout)
    except ValueError:
        raise UnavailableError(f"{sample.path} could not be read", "see `obsfs status` and the log") from None


def _first_byte(place: Path, sample: Sample, most: int) -> float:
    started = time.perf_counter()
    with (place / sample.path).open("rb", buffering=0) as file:
        file.read(1)
    return (time.perf_counter() - started) * 1000


def _list(place: Path, sample: Sample, most: int) -> float:
    started = time.perf_counter()
    count = sum(1 for _ in itertools.islice(_walk(place), _NAMES))
    return count / (time.perf_counter() - started)


def _stat(place: Path, sample: Sample, most: int) -> float:
    started = time.perf_counter()
    for name in sample.names:
        (place / name).stat()
    return len(sample.names) / (time.perf_counter() - started)


CASES: dict[str, tuple[str, str, Measure]] = {
    "first_byte": ("open a file, and its first byte", "ms", _first_byte),
    "sequential": ("one reader, in sequence", "MB/s", _sequential),
    "parallel": (f"{_PARALLEL} readers, each in its part", "MB/s", _parallel),
    "random": (f"{_RANDOM_READERS} readers, 1 MiB here and there", "MB/s", _random),
    "mmap": ("memory map, page after page", "MB/s", _mmap),
    "list": ("names listed", "/s", _list),
    "stat": ("files looked at with stat", "/s", _stat),
}


def read_part(fd: int, start: int, stop: int) -> int:
    """Read bytes ``[start, stop)`` in pieces of 1 MiB and throw them away; how many there were."""
    buffer = memoryview(bytearray(_MIB))
    offset = start
    while offset < stop:
        count = os.preadv(fd, [buffer[: stop - offset]], offset)
        if not count:
            break
        offset += count
    return offset - start


def _rate(read: Callable[[], int]) -> float:
    started = time.perf_counter()
    size = read()
    return size / (time.perf_counter() - started) / 1e6


def _walk(place: Path) -> Iterator[os.DirEntry[str]]:
    """All entries under a directory; directories that cannot be read are left out."""
    todo = [str(place)]
    while todo:
        try:
            with os.scandir(todo.pop()) as entries:
                for entry in entries:
                    yield entry
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(entry.path)
        except PermissionError:
            continue


def choose_sample(place: Path, file: str | None) -> Sample:
    """Find what to read: `file` (relative to the place), or the largest file among the first 10,000 names.

    Raises UsageError when there is no file of 4 MiB or more.
    """
    deadline = time.monotonic() + _WALK_SECONDS
    names: list[Path] = []
    best, size = None, -1
    for entry in itertools.islice(_walk(place), _NAMES):
        names.append(Path(entry.path).relative_to(place))
        found = entry.stat(follow_symlinks=False)
        if stat.S_ISREG(found.st_mode) and found.st_size > size:
            best, size = names[-1], found.st_size
        if time.monotonic() > deadline:
            break
    if file is not None:
        path = place / file
        if not path.is_file():
            raise UsageError(f"there is no file {file}", "give its path below what is measured")
        best, size = Path(file), path.stat().st_size
    if best is None or size < _LEAST_FILE:
        raise UsageError("there is no file of 4 MiB or more to read", "name one with --file, or measure another place")
    return Sample(best, size, names)


class Directory:
    """A directory as it is, obsfs or not."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    @contextmanager
    def cold(self, sample: Sample | None = None) -> Iterator[Path]:
        """The directory, its sample forgotten by the kernel."""
        if sample is not None:
            _forget(self._path / sample.path)
        yield self._path

    @contextmanager
    def warm(self, sample: Sample) -> Iterator[Path]:
        """The directory, its sample in the page cache as far as it was read."""
        yield self._path

    def close(self) -> None:
        """Nothing to do."""


class Mounts:
    """A bucket through mounts with a cache of their own, under the settings' cache directory; close it at the end.

    Raises CacheError when that directory cannot be used.
    """

    def __init__(self, source: str, settings: Settings) -> None:
        self.name = source
        try:
            private.make_directory(settings.cache_dir, "cache directory", "choose another --cache-dir", CacheError)
            self._home = Path(tempfile.mkdtemp(prefix="bench-", dir=settings.cache_dir))
        except OSError as error:
            raise CacheError(
                f"cache directory {settings.cache_dir} cannot be used ({error.strerror})", "choose another --cache-dir"
            ) from None
        self._settings = settings
        self._cache = self._home / "cache"

    @contextmanager
    def cold(self, sample: Sample | None = None) -> Iterator[Path]:
        """A new mount with an empty cache."""
        shutil.rmtree(self._cache, ignore_errors=True)
        with self._mounted() as path:
            yield path

    @contextmanager
    def warm(self, sample: Sample) -> Iterator[Path]:
        """A new mount with the cache of the last cold one, which the kernel has forgotten."""
        for file in self._cache.rglob("*.data"):
            _forget(file)
        with self._mounted() as path:
            yield path

    @contextmanager
    def _mounted(self) -> Iterator[Path]:
        path = self._home / "mnt"
        path.mkdir(exist_ok=True)
        settings = replace(self._settings, cache_dir=self._cache)
        process = mounts.start(self.name, path, settings, lifeline=True)
        with mounts.Mount(self.name, path, process):
            yield path

    def close(self) -> None:
        """Remove the cache."""
        shutil.rmtree(self._home, ignore_errors=True)


def _forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def place_of(target: str, settings: Settings) -> Directory | Mounts:
    """What ``obsfs bench TARGET`` measures: an address, what an obsfs mountpoint shows, or any other directory.

    Raises UsageError when it is none of them.
    """
    if "://" in target:
        return Mounts(target, settings)
    path = mounts.resolve_mountpoint(target)
    for found in mounts.find_mounts(path):
        if found.state in ("dead", "not answering"):
            raise UsageError(f"the mount {path} is {found.state}", "mount it again, or `obsfs umount` it")
        if found.state == "mounted":
            endpoint = settings.endpoint_url or found.status["endpoint"]
            return Mounts(found.entry.source, replace(settings, endpoint_url=endpoint))
    if not path.is_dir():
        raise UsageError(f"{target} is no directory", "give a mountpoint, a directory, or obs://BUCKET[/PREFIX]")
    return Directory(path)


def run(
    place: Directory | Mounts, *, file: str | None, most: int, on_step: Callable[[str], None]
) -> tuple[Sample, list[Figure]]:
    """Measure every case, cold and warm; `on_step` is told what comes next. Raises ObsfsError, and nothing else."""
    try:
        return _run(place, file, most, on_step)
    except OSError as error:
        raise UnavailableError(f"{error.filename or place.name} could not be read", error.strerror or "") from None


def _run(
    place: Directory | Mounts, file: str | None, most: int, on_step: Callable[[str], None]
) -> tuple[Sample, list[Figure]]:
    on_step("looking for a file")
    with place.cold() as path:
        sample = choose_sample(path, file)
    figures = []
    for case, (title, unit, measure) in CASES.items():
        on_step(title)
        with place.cold(sample) as path:
            cold = measure(path, sample, most)
        with place.warm(sample) as path:
            warm = measure(path, sample, most)
        figures.append(Figure(case, title, unit, cold, warm))
    return sample, figures
