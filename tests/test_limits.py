"""How many files a process may have open: more of them, fewer for each, and a word when it is not enough."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from obsfs import mountinfo
from obsfs.cache import map_file
from obsfs.cache.directory import Cache
from obsfs.errors import TooManyFilesError
from obsfs.fuse.kernel import channel
from obsfs.limits import available_memory
from obsfs.store.types import ObjectVersion
from tests.conftest import Store, status, wait_for

_RAISED = """
import resource
from obsfs.limits import allow_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(allow_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [(100, 400, "True 400 400"), (400, 400, "False 400 400"), (64, 4096, "True 4096 4096")],
)
def test_the_soft_limit_becomes_the_hard_one(soft: int, hard: int, expected: str) -> None:
    code = _RAISED.format(soft=soft, hard=hard)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected


def test_an_open_object_has_one_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a few of them, a second one of the map file."""
    monkeypatch.setattr(map_file, "_MAX_OPEN", 3)
    cache = Cache(tmp_path / "c", 1 << 30)

    def to_cache() -> int:
        return sum(str(tmp_path) in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))

    before = to_cache()
    opened = [cache.open(ObjectVersion("http://here", "bucket", f"k{n}", '"e"', 3 << 20)) for n in range(10)]
    assert to_cache() == before + 10 + 3
    assert all(cached.claim(range(2)) for cached in opened)
    assert to_cache() == before + 20
    for cached in opened:
        cached.store_block(1, memoryview(bytes(1 << 20)))
        cached.release_claim(range(2))
    assert all(cached.ensure_verified(1) and not cached.ensure_verified(0) for cached in reversed(opened))
    cache.open(ObjectVersion("http://here", "bucket", "k", '"e"', 3 << 20)).close()
    assert to_cache() <= before + 10 + 3
    for cached in opened:
        cached.close()
    assert to_cache() == before


def test_no_more_descriptors_is_an_error_of_its_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 1 << 30)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
    with ExitStack() as held:
        while (fd := os.open(os.devnull, os.O_RDONLY)) < highest:
            held.callback(os.close, fd)
        held.callback(os.close, fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1, limits[1]))
        try:
            with pytest.raises(TooManyFilesError) as raised:
                cache.open(ObjectVersion("http://here", "bucket", "k", '"e"', 3 << 20))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert raised.value.errno == errno.ENFILE
    assert "LimitNOFILE" in str(raised.value)


_FILES = 240


@pytest.fixture
def limited(bucket: Store, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A mount of many files whose server was started with these limits (soft, hard)."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: bucket.put(f"f{n:03}.bin", b"%d" % n), range(_FILES)))
    path = tmp_path / "mnt"
    path.mkdir()
    options = ["--endpoint-url", bucket.server.endpoint, "--cache-dir", str(tmp_path / "cache")]
    soft, hard = request.param
    subprocess.run(
        ["prlimit", f"--nofile={soft}:{hard}", sys.executable, "-m", "obsfs", "mount", str(bucket), path, *options],
        check=True, timeout=60,
    )  # fmt: skip
    yield path
    channel.unmount(path, lazy=True)


@pytest.mark.parametrize("limited", [(100, 360), (64, 4096)], indirect=True)
def test_many_files_are_open_at_once(limited: Path) -> None:
    with ExitStack() as held:
        files = [held.enter_context((limited / f"f{n:03}.bin").open("rb", buffering=0)) for n in range(_FILES)]
        assert [file.read() for file in files[::40]] == [b"%d" % n for n in range(0, _FILES, 40)]
        assert status(limited)["open_files"] == _FILES


@pytest.mark.parametrize("limited", [(100, 160)], indirect=True)
def test_one_too_many_is_told_and_the_rest_lives_on(limited: Path, tmp_path: Path) -> None:
    with ExitStack() as held:
        files = []
        with pytest.raises(OSError) as raised:
            for n in range(_FILES):
                files.append(held.enter_context((limited / f"f{n:03}.bin").open("rb", buffering=0)))
        assert raised.value.errno == errno.ENFILE
        assert len(files) > 70
        assert sorted(os.listdir(limited))[-1] == "f239.bin"
    wait_for(lambda: status(limited)["open_files"] == 0)
    # Readers that nobody uses any more are closed for those that somebody wants.
    with ExitStack() as held:
        for n in range(_FILES - 1, _FILES - 70, -1):
            held.enter_context((limited / f"f{n:03}.bin").open("rb", buffering=0))
    (log,) = (tmp_path / "state" / "obsfs").glob("*.log")
    assert "Too many open files" in log.read_text()


def _write(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return str(root)


_MEMINFO = {"proc/meminfo": "MemTotal:  9 kB\nMemAvailable:   1000 kB\nMemFree: 1 kB\n"}
_STAT = "anon 5\ninactive_file 700\nactive_file 30\n"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 1_024_000),
        ({"proc/self/cgroup": "0::/\n"}, 1_024_000),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max\n",
          "sys/fs/cgroup/a/memory.max": "9000\n", "sys/fs/cgroup/a/memory.current": "8000\n",
          "sys/fs/cgroup/a/memory.stat": _STAT}, 1730),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "500\n", "sys/fs/cgroup/memory.current": "900\n",
          "sys/fs/cgroup/memory.stat": "anon 900\n"}, 0),
        ({"proc/self/cgroup": "9:cpu:/x\n4:memory:/c\n", "sys/fs/cgroup/memory/c/memory.limit_in_bytes": "7000\n",
          "sys/fs/cgroup/memory/c/memory.usage_in_bytes": "6000\n", "sys/fs/cgroup/memory/c/memory.stat": _STAT}, 1730),
        ({"proc/self/cgroup": "4:memory:/of/the/host\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "7000\n",
          "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n", "sys/fs/cgroup/memory/memory.stat": "rss 5\n"},
         6000),
    ],
    ids=["no cgroups", "root", "parent", "over", "version 1", "container"],
)  # fmt: skip
def test_memory_is_what_machine_and_control_groups_leave(files: dict[str, str], available: int, tmp_path: Path) -> None:
    assert available_memory(_write(tmp_path, {**_MEMINFO, **files})) == available


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory() < psutil.virtual_memory().total


def test_a_limit_with_which_nothing_could_be_read_is_refused(bucket: Store, tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    command = ["prlimit", "--nofile=40:40", sys.executable, "-m", "obsfs", "mount", str(bucket), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "limit of open files is 40" in done.stderr
    assert mountinfo.mounted_at(path) is None
