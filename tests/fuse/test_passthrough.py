"""The native FUSE backend: files that the kernel reads by itself, and how they live with eviction and open files."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cache.test_cache import evict
from tests.conftest import MIB, Mounter, Store, random_bytes, status, wait_for


def is_direct(path: Path) -> bool:
    return os.getxattr(path, "user.obsfs.served_by") == b"passthrough"


@pytest.fixture
def complete(bucket: Store, mount: Mounter) -> Path:
    """A file that is wholly cached, on a mount that can pass through."""
    bucket.put("file.bin", random_bytes(9 * MIB + 1))
    path = mount(bucket, cache_size="64MiB", metadata_ttl="0.5s") / "file.bin"
    assert status(path.parent)["passthrough"], "this kernel or user cannot pass through: needs Linux 6.9 and root"
    path.read_bytes()
    wait_for(lambda: is_direct(path))
    return path


def test_the_server_is_not_asked_for_bytes(complete: Path) -> None:
    before = status(complete.parent)["bytes_read"]
    assert complete.read_bytes() == random_bytes(9 * MIB + 1)
    assert status(complete.parent)["bytes_read"] == before


def test_a_file_that_is_open_while_it_becomes_complete(bucket: Store, mount: Mounter) -> None:
    data = random_bytes(12 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket) / "file.bin"
    with path.open("rb", buffering=0) as early:
        assert early.read(100) == data[:100]
        assert path.read_bytes() == data
        wait_for(lambda: is_direct(path))
        # The early one goes on as it began, the later ones are direct, on the same path.
        before = status(path.parent)["bytes_read"]
        with path.open("rb") as late:
            assert late.read() == data
        assert status(path.parent)["bytes_read"] == before
        assert os.pread(early.fileno(), MIB, 5 * MIB) == data[5 * MIB : 6 * MIB]
        assert os.fstat(early.fileno()).st_ino == path.stat().st_ino
    assert path.read_bytes() == data


@pytest.mark.parametrize("length", [0, 5_000_000])
def test_a_file_that_is_cut_off_under_a_direct_reader_is_right_for_all_who_open_it_then(
    complete: Path, tmp_path: Path, length: int
) -> None:
    data = random_bytes(9 * MIB + 1)
    (stored,) = (tmp_path / "blocks").glob("v1/??/*.data")
    with complete.open("rb", buffering=0) as early:
        assert os.pread(early.fileno(), 100, 0) == data[:100]
        os.truncate(stored, length)
        # The log says so before anybody opens it again.
        wait_for(lambda: "spoiled, and the kernel reads it" in Path(status(complete.parent)["log"]).read_text())
        before = status(complete.parent)["bytes_fetched"]
        for _ in range(3):
            assert complete.read_bytes() == data
        assert status(complete.parent)["bytes_fetched"] - before == len(data)
        # The kernel reads the old file for it: an early end, as promise C7 of docs/cache.md says, and no other bytes.
        assert os.pread(early.fileno(), 100, 8 * MIB) == b""
    assert complete.read_bytes() == data
    wait_for(lambda: is_direct(complete))
    assert complete.read_bytes() == data


def test_a_direct_reader_keeps_its_bytes_under_eviction(bucket: Store, complete: Path) -> None:
    others = [f"other-{n}.bin" for n in range(6)]
    for n, name in enumerate(others):
        bucket.put(name, random_bytes(16 * MIB, n))
    with complete.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for n, name in enumerate(others):
            wait_for((complete.parent / name).exists, 10)
            assert (complete.parent / name).read_bytes() == random_bytes(16 * MIB, n)
        assert mapped[:] == random_bytes(9 * MIB + 1)
    assert status(complete.parent)["cache_bytes"] <= 64 * MIB
    assert complete.read_bytes() == random_bytes(9 * MIB + 1)


def test_a_direct_reader_of_a_mount_that_died_reads_no_holes(complete: Path, mount: Mounter) -> None:
    """The kernel serves it after server and supervisor are gone, and with them whatever locks they held."""
    place = Path(status(complete.parent)["cache_dir"])
    with complete.open("rb", buffering=0) as file:
        mount.kill(complete.parent)
        evict(place, 4 * MIB)
        assert os.pread(file.fileno(), 10 * MIB, 0) == random_bytes(9 * MIB + 1)
    # What is left of the mount is the last to hold it.
    subprocess.run(["umount", "-l", complete.parent], check=True, timeout=10)
    wait_for(lambda: evict(place, 4 * MIB) <= 4 * MIB)


_MAPS = """
import ctypes, hashlib, os, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
size, fd = os.path.getsize(sys.argv[1]), os.open(sys.argv[1], os.O_RDONLY)
start = libc.mmap(None, ctypes.c_size_t(size), 1, 1, fd, ctypes.c_long(0))
os.close(fd)
print("closed", flush=True)
sys.stdin.readline()
print(hashlib.sha256((ctypes.c_char * size).from_address(start)).hexdigest())
"""


def test_a_map_whose_file_was_closed_reads_no_holes(complete: Path) -> None:
    """The map is of the cache's file itself then, and nobody can tell that it is there."""
    place = Path(status(complete.parent)["cache_dir"])
    with subprocess.Popen(
        [sys.executable, "-c", _MAPS, complete], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "closed\n"
        wait_for(lambda: not status(complete.parent)["open_files"])
        assert evict(place, 4 * MIB) <= 4 * MIB
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == hashlib.sha256(random_bytes(9 * MIB + 1)).hexdigest()
    assert complete.read_bytes() == random_bytes(9 * MIB + 1)


def test_it_can_be_switched_off(bucket: Store, mount: Mounter) -> None:
    bucket.put("file.bin", random_bytes(3 * MIB))
    path = mount(bucket, passthrough=False) / "file.bin"
    for _ in range(2):
        assert path.read_bytes() == random_bytes(3 * MIB)
    assert not status(path.parent)["passthrough"]
    assert not is_direct(path)


def test_weights_that_are_being_loaded_are_in_memory_before_they_are_asked_for(
    bucket: Store, mount: Mounter, tmp_path: Path
) -> None:
    data = random_bytes(9 * MIB + 1)
    for name in ("config.json", "model.safetensors"):
        bucket.put(f"m/{name}", data)
    # Who has read the config through a mount has begun a load there, for half a minute; the other knows nothing of it.
    filled, path = (mount(bucket, cache_dir=tmp_path / "own") / "m" for _ in range(2))
    for name in ("config.json", "model.safetensors"):
        assert (filled / name).read_bytes() == data
        wait_for(lambda: is_direct(path / name))  # noqa: B023 - called now
    copies = list((tmp_path / "own").rglob("*.data"))
    for copy in copies:
        with copy.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert [pages_in_memory(copy) for copy in copies] == [0, 0]
    with (path / "model.safetensors").open("rb", buffering=0):
        time.sleep(0.2)
    assert [pages_in_memory(copy) for copy in copies] == [0, 0], "somebody may want one tensor of it"
    with (path / "config.json").open("rb", buffering=0), (path / "model.safetensors").open("rb", buffering=0):
        wait_for(lambda: sorted(pages_in_memory(copy) for copy in copies) == [0, 9 * 256 + 1])


def pages_in_memory(path: Path) -> int:
    """How many pages of a file the kernel holds; see mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        states = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), states)
        del first
        assert not failed, os.strerror(ctypes.get_errno())
        return sum(state & 1 for state in states)
