"""Bytes that are lent are right, whatever another process evicts between any two steps of taking them."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from obsfs.blocks import BLOCK
from obsfs.cache.directory import Cache
from obsfs.cache.layout import WORD, read_blocks
from obsfs.cache.lending import Lender, Lent
from obsfs.cache.object import CachedObject
from obsfs.cache.removal import evict_blocks
from tests.cache.test_cache import put, version
from tests.conftest import random_bytes

SIZE = 3 * BLOCK + 9
CONTENT = [random_bytes(min(BLOCK, SIZE - block * BLOCK), block) for block in range(4)]
WHOLE = b"".join(CONTENT)
_STEPS = ("pread", "preadv", "pwrite", "splice", "link", "open", "fstat")
_numbers = count()

Way = Callable[[CachedObject, int, int], bytes | None]
Disturbance = tuple[int, str, int]
"""Before which step (a system call), what happens, and to which block."""

disturbances = st.lists(
    st.tuples(st.integers(0, 6), st.sampled_from(["evict", "evict all", "refetch", "truncate"]), st.integers(0, 3)),
    max_size=3,
)
ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE))


class OtherProcess:
    """Evicts and fetches as another process does: with descriptors of its own, and under the directory's lock."""

    def __init__(self, home: Path, path: Path) -> None:
        self._home, self._path = home, path

    def act(self, what: str, block: int) -> None:
        with (self._home / "v1" / "lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # it would wait until the step is over
            present = read_blocks(self._path)
            if what == "truncate":
                data = self._path.with_suffix(".data")
                if data.exists() and data.stat().st_nlink == 1:
                    os.truncate(data, block * BLOCK + 4)
            elif what == "evict all":
                evict_blocks(self._path, present)
            else:
                evict_blocks(self._path, [one for one in present if one.number == block])
        if what == "refetch":
            with closing(Cache(self._home, 1 << 30)) as cache, closing(cache.open(version(SIZE))) as cached:
                blocks = range(block, block + 1)
                if not cached.is_present(block) and cached.claim(blocks):
                    cached.store_block(block, memoryview(CONTENT[block]))
                    cached.release_claim(blocks)


@contextmanager
def disturbed(other: OtherProcess, plan: list[Disturbance]) -> Iterator[None]:
    """Have another process act before the planned steps: before each system call that this process makes on files."""
    steps, is_acting = count(), False

    def watched(call: Callable[..., object]) -> Callable[..., object]:
        def step(*arguments: object, **options: object) -> object:
            nonlocal is_acting
            if not is_acting:
                number, is_acting = next(steps), True
                try:
                    for at, what, block in plan:
                        if at == number:
                            other.act(what, block)
                finally:
                    is_acting = False
            return call(*arguments, **options)

        return step

    patches = [mock.patch.object(os, name, watched(getattr(os, name))) for name in _STEPS]
    patches.append(mock.patch.object(fcntl, "fcntl", watched(fcntl.fcntl)))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def by_read(cached: CachedObject, offset: int, size: int) -> bytes | None:
    return cached.read(offset, size)


def by_readinto(cached: CachedObject, offset: int, size: int) -> bytes | None:
    buffer = bytearray(size)
    return bytes(buffer) if cached.readinto(offset, memoryview(buffer)) else None


def by_splice(cached: CachedObject, offset: int, size: int) -> bytes | None:
    """As the server answers the kernel: the bytes lie in a pipe, as pages of the file, until they are sent."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 1 << 20)
    size = min(size, BLOCK // 2)

    def take(fd: int, offset: int, size: int) -> bool:
        moved = 0
        while moved < size and (piece := os.splice(fd, writing, size - moved, offset_src=offset + moved)):
            moved += piece
        return moved == size

    try:
        if cached.lend(offset, size, take) is not Lent.TAKEN:
            return None
        os.close(writing)
        writing = -1
        with open(reading, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)


def by_another_process(cached: CachedObject, offset: int, size: int) -> bytes | None:
    """As the helper that stores pages in the kernel: it takes a block, and then looks at the state word on its own."""
    block = offset // BLOCK
    ref = cached.state_word_ref(block)
    if ref is None:
        return None
    try:
        size = min(size, (block + 1) * BLOCK - offset)
        data = os.pread(cached.data_fd, size, offset)
        # It stores nothing if the file ends early.
        return data if os.pread(ref.fd, WORD.size, ref.offset) == WORD.pack(ref.word) and len(data) == size else None
    finally:
        os.close(ref.fd)


WAYS = [by_read, by_readinto, by_splice, by_another_process]


@contextmanager
def cached_whole(tmp_path: Path) -> Iterator[tuple[Path, CachedObject]]:
    home = tmp_path / str(next(_numbers))
    with closing(Cache(home, 1 << 30)) as cache:
        cached = cache.open(version(SIZE))
        for block in range(4):
            put(cached, block)
        yield home, cached
        cached.close()
    shutil.rmtree(home)


_fast = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("way", WAYS)
@given(plan=disturbances, where=ranges)
@example(plan=[(1, "evict", 0)], where=(5, 9))
@example(plan=[(1, "refetch", 1)], where=(5, 2 * BLOCK))
@example(plan=[(1, "truncate", 1)], where=(BLOCK, 2 * BLOCK))
@_fast
def test_lent_bytes_are_right_or_refused(
    tmp_path: Path, way: Way, plan: list[Disturbance], where: tuple[int, int]
) -> None:
    offset, size = where[0], min(where[1], SIZE - where[0])
    with cached_whole(tmp_path) as (home, cached):
        with disturbed(OtherProcess(home, cached.path), plan):
            data = way(cached, offset, size)
        if data is None:
            assert plan, "nobody has disturbed it"
        else:
            assert data == WHOLE[offset : offset + len(data)]
        # What was found absent can be fetched and read again. A truncated file is replaced first, and fetched anew.
        for _ in range(2):
            cached.read(0, SIZE)
            for block in range(4):
                if not cached.ensure_verified(block):
                    put(cached, block)
        assert cached.read(0, SIZE) == WHOLE


@given(plan=disturbances, is_reopen=st.booleans())
@_fast
def test_a_file_that_is_lent_to_the_kernel_is_whole_and_stays_so(
    tmp_path: Path, plan: list[Disturbance], is_reopen: bool
) -> None:
    plan = [one for one in plan if one[1] != "truncate"]
    with cached_whole(tmp_path) as (home, cached):
        other = OtherProcess(home, cached.path)
        with disturbed(other, plan):
            is_lent = cached.acquire_passthrough(is_reopen=is_reopen)
        assert is_lent or plan
        if is_lent:
            for what in ("evict", "refetch", "evict all"):
                other.act(what, 1)
                assert os.pread(cached.data_fd, SIZE, 0) == WHOLE
            cached.release_passthrough()
            # A program that mapped the file may have closed it: later, too, it goes whole or not at all.
            other.act("evict", 1)
            assert os.pread(cached.data_fd, SIZE, 0) == WHOLE


@given(plan=disturbances)
@_fast
def test_a_file_with_a_second_name_is_whole_and_stays_so(tmp_path: Path, plan: list[Disturbance]) -> None:
    with cached_whole(tmp_path) as (home, cached):
        other, name = OtherProcess(home, cached.path), home / "second name"
        with disturbed(other, plan):
            has_name = cached.link(name)
        assert has_name or plan
        assert name.exists() == has_name
        if has_name and name.stat().st_size == SIZE:  # else it was truncated before
            for what in ("evict", "evict all"):
                other.act(what, 1)
                assert name.read_bytes() == WHOLE


def test_a_missing_second_look_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: without the look at the state words afterwards, zeros of a hole are served."""
    are_verified, looks = Lender.are_verified, count()
    with cached_whole(tmp_path) as (home, cached):
        monkeypatch.setattr(
            Lender, "are_verified", lambda self, blocks: next(looks) % 2 == 1 or are_verified(self, blocks)
        )
        with disturbed(OtherProcess(home, cached.path), [(1, "evict", 0)]):
            assert by_read(cached, 0, BLOCK) == bytes(BLOCK)
