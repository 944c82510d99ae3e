"""O_DIRECT takes any offset, size and buffer, whatever of the file is in the cache, and whoever else reads it."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import MIB, Mounter, Store, random_bytes, status, wait_for
from tests.fuse.test_passthrough import is_direct
from tests.service.test_takeover import kill, successor

_SIZE = 9 * MIB + 777
_DATA = random_bytes(_SIZE)
_READS = [
    (0, 4096, 0),
    (1, 4096, 0),
    (4096, 1000, 0),
    (4096, 4096, 3),
    (511, 513, 511),
    (MIB - 1, 2, 0),
    (3 * MIB + 5, 3 * MIB + 1, 17),
    (_SIZE - 100, 100, 0),
    (_SIZE - 100, 5000, 1),
    (_SIZE, 10, 0),
    (_SIZE + 9999, 4096, 0),
]


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        yield fd
    finally:
        os.close(fd)


def check_reads(fd: int) -> None:
    dice = random.Random(fd)
    reads = [*_READS, *((dice.randrange(_SIZE), dice.randrange(2 * MIB), dice.randrange(4096)) for _ in range(10))]
    for offset, size, shift in reads:
        with mmap.mmap(-1, size + shift + 1) as memory, memoryview(memory) as view:
            target = view[shift : shift + size]
            count = os.preadv(fd, [target], offset)
            assert bytes(target[:count]) == _DATA[offset : offset + size], (offset, size, shift)
            target.release()


@pytest.fixture
def path(bucket: Store, mount: Mounter, fuse_backend: str) -> Path:
    bucket.put("file.bin", _DATA)
    return mount(bucket, fuse_backend=fuse_backend) / "file.bin"


def test_before_and_after_it_is_cached(path: Path) -> None:
    with opened(path) as early:
        check_reads(early)
        assert path.read_bytes() == _DATA
        if status(path.parent)["passthrough"]:
            wait_for(lambda: is_direct(path))
        check_reads(early)
        with opened(path) as late:
            check_reads(late)
            check_reads(early)
    with opened(path) as fd:
        check_reads(fd)


@pytest.fixture
def complete(bucket: Store, mount: Mounter) -> Path:
    bucket.put("file.bin", _DATA)
    path = mount(bucket) / "file.bin"
    path.read_bytes()
    wait_for(lambda: is_direct(path))
    return path


def test_beside_readers_whom_the_kernel_serves(complete: Path) -> None:
    with complete.open("rb", buffering=0) as before, mmap.mmap(before.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert is_direct(complete)
        with opened(complete) as fd, complete.open("rb", buffering=0) as after:
            check_reads(fd)
            asked = status(complete.parent)["bytes_read"]
            assert before.read() == after.read() == mapped[:] == _DATA
            assert status(complete.parent)["bytes_read"] == asked, "they are served as before"
        assert mapped[:] == _DATA


def test_alone_and_then_beside_others(complete: Path) -> None:
    with opened(complete) as fd:
        with complete.open("rb", buffering=0) as other:
            assert other.read() == _DATA
        check_reads(fd)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:] == _DATA
        for source in (complete, f"/proc/self/fd/{fd}"):
            done = subprocess.run(
                ["dd", f"if={source}", "iflag=direct,fullblock", "bs=99999", "status=none"],
                pass_fds=[fd], capture_output=True, check=True, timeout=30,
            )  # fmt: skip
            assert done.stdout == _DATA
        read_end, write_end = os.pipe()
        assert os.sendfile(write_end, fd, 12345, 1001) == 1001
        assert os.read(read_end, 2000) == _DATA[12345 : 12345 + 1001]
        os.close(read_end)
        os.close(write_end)


def test_with_another_server(complete: Path) -> None:
    with opened(complete) as fd, complete.open("rb", buffering=0) as other:
        check_reads(fd)
        successor(complete.parent, kill(complete.parent))
        check_reads(fd)
        with opened(complete) as late:
            check_reads(late)
        assert other.read() == _DATA
    assert complete.read_bytes() == _DATA
    with opened(complete) as fd:
        check_reads(fd)
    wait_for(lambda: not status(complete.parent)["open_files"])
