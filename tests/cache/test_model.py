"""The cache against a model of it: whatever happens to it in whichever order, reads are right and bytes bounded."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from obsfs.blocks import BLOCK
from obsfs.cache.directory import Cache
from obsfs.cache.lending import Lent
from obsfs.cache.object import CachedObject
from tests.cache.test_cache import put, version
from tests.conftest import random_bytes, small_disk

SIZES = {"long": 3 * BLOCK + 5, "one": BLOCK, "two": 2 * BLOCK}
CONTENT = {
    key: b"".join(random_bytes(min(BLOCK, size - start), start // BLOCK) for start in range(0, size, BLOCK))
    for key, size in SIZES.items()
}
LIMIT = 4 * BLOCK
_SLACK = 256 << 10
"""Bytes of new map files, which are counted at the next scan of the cache."""
_CLOCK_TICK = 0.005
"""Seconds between two times of an inode that differ, by CONFIG_HZ of 250."""
_numbers = count()

numbers = st.integers(0, 4)
"""Which of the open objects."""
positions = st.tuples(st.floats(0, 0.999), st.floats(0, 1))
"""Where a read begins and how long it is, as parts of the object."""


class CacheModel(RuleBasedStateMachine):
    """What is stored of an object is always the same; the model knows who reads it by passthrough, and what is damaged.

    Another process shares the directory: it reads and evicts, and stores nothing, so that bytes can be counted.
    """

    disk: Path

    def __init__(self) -> None:
        super().__init__()
        self.home = self.disk / f"c{next(_numbers)}"
        self.cache = Cache(self.home, LIMIT, min_free=0)
        self.open_objects: list[CachedObject] = []
        self.direct: list[CachedObject] = []
        self.truncated: set[str] = set()
        """Keys whose files somebody truncated while they were open."""
        self.count = 0
        self.names: list[tuple[Path, str]] = []

    def teardown(self) -> None:
        for cached in self.open_objects:
            cached.close()
        self.cache.close()
        shutil.rmtree(self.home)
        self.empty_disk()

    # what obsfs does

    @rule(key=st.sampled_from(list(SIZES)))
    def open(self, key: str) -> None:
        if len(self.open_objects) < 5:
            self.open_objects.append(self.cache.open(version(SIZES[key], key)))

    @rule(key=st.sampled_from(list(SIZES)))
    def open_and_store(self, key: str) -> None:
        self.open(key)
        self.store_all(len(self.open_objects) - 1)

    @initialize(key=st.sampled_from(list(SIZES)))
    def begin(self, key: str) -> None:
        """Begin with a whole object: few runs would come to one by themselves."""
        self.open(key)
        self.store_all(0)

    @rule(number=numbers)
    def close(self, number: int) -> None:
        if cached := self._object(number):
            self._close(cached)

    def _close(self, cached: CachedObject) -> None:
        while cached in self.direct:
            self.direct.remove(cached)
            cached.release_passthrough()
        self.open_objects.remove(cached)
        cached.close()

    def _object(self, number: int) -> CachedObject | None:
        return self.open_objects[number % len(self.open_objects)] if self.open_objects else None

    @rule(number=numbers, block=st.integers(0, 3))
    def store(self, number: int, block: int) -> None:
        if (cached := self._object(number)) and block < cached.blocks and not cached.ensure_verified(block):
            data = put(cached, block)
            assert data == CONTENT[cached.version.key][block * BLOCK :][:BLOCK]
            # A reader never fails because of the cache: what was just fetched can be read.
            assert cached.read(block * BLOCK, len(data)) == data

    @rule(number=numbers)
    def store_all(self, number: int) -> None:
        for block in range(4):
            self.store(number, block)

    @rule(number=numbers, where=positions)
    def read(self, number: int, where: tuple[float, float]) -> None:
        if cached := self._object(number):
            offset, size = self._range(cached, where)
            data = cached.read(offset, size)
            assert data in (None, CONTENT[cached.version.key][offset : offset + size])

    @rule(number=numbers, where=positions)
    def read_by_descriptor(self, number: int, where: tuple[float, float]) -> None:
        if cached := self._object(number):
            offset, size = self._range(cached, where)
            taken = b""

            def take(fd: int, offset: int, size: int) -> bool:
                nonlocal taken
                taken = os.pread(fd, size, offset)
                return len(taken) == size

            if cached.lend(offset, size, take) is Lent.TAKEN:
                assert taken == CONTENT[cached.version.key][offset : offset + size]

    def _range(self, cached: CachedObject, where: tuple[float, float]) -> tuple[int, int]:
        offset = int(where[0] * cached.size)
        return offset, 1 + int(where[1] * (cached.size - offset - 1))

    @rule(number=numbers)
    def touch_and_seal(self, number: int) -> None:
        if cached := self._object(number):
            cached.touch(range(cached.blocks))
            cached.seal()

    @rule(number=numbers, kept=st.integers(0, 4))
    def acquire_passthrough(self, number: int, kept: int) -> None:
        if (cached := self._object(number)) and cached.acquire_passthrough():
            self.direct.append(cached)
            assert os.pread(cached.data_fd, cached.size, 0) == CONTENT[cached.version.key]
            self.another_process_evicts(kept)

    @rule(number=numbers)
    def release_passthrough(self, number: int) -> None:
        if (cached := self._object(number)) and cached in self.direct:
            self.direct.remove(cached)
            cached.release_passthrough()

    @rule(number=numbers)
    def give_a_second_name(self, number: int) -> None:
        path = self.home / f"name{len(self.names)}"
        cached = self._object(number)
        keys = {*self.truncated, *(key for _, key in self.names)}
        if self.count > 25 and cached and cached.version.key not in keys and cached.link(path):
            self.names.append((path, cached.version.key))

    @rule()
    def recover(self) -> None:
        """What the engine does once a second."""
        for cached in self.open_objects:
            cached.recover_if_damaged()

    @rule()
    def trim(self) -> None:
        self.cache.trim()

    @rule()
    def restart(self) -> None:
        for cached in list(self.open_objects):
            self._close(cached)
        self.cache.close()
        self.cache = Cache(self.home, LIMIT, min_free=0)
        self.open("long")

    # what others do

    @rule(kept=st.integers(0, 4))
    def another_process_evicts(self, kept: int) -> None:
        other = Cache(self.home, kept * BLOCK, min_free=0)
        other.trim()
        other.close()

    @rule(key=st.sampled_from(list(SIZES)))
    def another_process_reads(self, key: str) -> None:
        other = Cache(self.home, LIMIT, min_free=0)
        cached = other.open(version(SIZES[key], key))
        for block in range(cached.blocks):
            data = cached.read_verified(block)
            assert data in (None, CONTENT[key][block * BLOCK :][:BLOCK])
        cached.close()
        other.close()

    @rule(
        number=numbers,
        part=st.floats(0, 1),
        suffix=st.sampled_from(["data", "map"]),
        junk=st.binary(min_size=1),
        is_sealed=st.booleans(),
    )
    def the_disk_rots(self, number: int, part: float, suffix: str, junk: bytes, is_sealed: bool) -> None:
        """While the file is not open: what is trusted already is read again by the scrubber alone."""
        if not (cached := self._object(number)):
            return
        if is_sealed:
            cached.seal()
        for other in [other for other in self.open_objects if other.path == cached.path]:
            self._close(other)
        path, key = cached.path.with_suffix(f".{suffix}"), cached.version.key
        if path.exists() and cached.path.with_suffix(".data").stat().st_nlink == 1:
            time.sleep(_CLOCK_TICK)
            with path.open("r+b") as file:
                file.seek(int(part * max(0, path.stat().st_size - len(junk))))
                file.write(junk)
        self.open(key)
        assert self.open_objects[-1].read(0, SIZES[key]) in (None, CONTENT[key])

    @rule(number=numbers, part=st.floats(0, 0.999), suffix=st.sampled_from(["data", "map"]))
    def a_file_is_truncated(self, number: int, part: float, suffix: str) -> None:
        if not (cached := self._object(number)):
            return
        path = cached.path.with_suffix(f".{suffix}")
        if path.exists() and cached.path.with_suffix(".data").stat().st_nlink == 1:
            os.truncate(path, int(part * path.stat().st_size))
            self.truncated.add(cached.version.key)

    @rule()
    def fill_disk(self) -> None:
        try:
            with (self.disk / "filler").open("ab", buffering=0) as file:
                while True:
                    file.write(bytes(64 << 10))
        except OSError:
            pass

    @rule()
    def empty_disk(self) -> None:
        (self.disk / "filler").unlink(missing_ok=True)

    # what holds all the time

    @invariant()
    def count_steps(self) -> None:
        self.count += 1

    @invariant()
    def used_bytes_stay_within_the_limit(self) -> None:
        used = sum(
            found.st_blocks * 512
            for path in self.home.rglob("??/*")
            if path.suffix in {".data", ".map"} and (found := path.stat()).st_nlink == 1
        )
        assert used <= LIMIT + _SLACK

    @invariant()
    def files_in_passthrough_are_never_punched(self) -> None:
        for cached in self.direct:
            if cached.version.key not in self.truncated:
                assert os.pread(cached.data_fd, cached.size, 0) == CONTENT[cached.version.key]

    @invariant()
    def second_names_stay_whole(self) -> None:
        for path, key in self.names:
            assert path.read_bytes() == CONTENT[key]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "size=24m") as path:
        yield path


def test_the_cache_does_as_its_model(disk: Path) -> None:
    class OnDisk(CacheModel):
        pass

    OnDisk.disk = disk
    run_state_machine_as_test(
        OnDisk,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
