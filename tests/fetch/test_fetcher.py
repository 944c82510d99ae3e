"""The order of requests, and who is told what: with a bucket whose answers the test holds back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from obsfs.blocks import BLOCK, PIECE
from obsfs.cache.directory import Cache
from obsfs.cache.layout import read_blocks
from obsfs.cache.removal import evict_blocks
from obsfs.errors import ObsfsError, UnavailableError, VersionChangedError
from obsfs.fetch.background import Background
from obsfs.fetch.fetcher import CountdownCallback, Fetcher
from obsfs.fetch.pending import ObjectFetch
from obsfs.fetch.scheduler import Scheduler
from obsfs.fetch.transport import ThreadTransport
from obsfs.store.memory import MemoryStore, Request
from tests.conftest import wait_for


class HeldStore(MemoryStore):
    """Answers a range of its one object when `allow` is released for each of its blocks."""

    def __init__(self, size: int) -> None:
        super().__init__({"k": bytes(size)})
        self.asked: list[tuple[int, int]] = []
        self.allow = threading.Semaphore(0)
        self.failures: list[ObsfsError] = []
        self.silences: dict[int, threading.Event] = {}
        """Requests, by their numbers, that get nothing before that."""
        self.version_of_it = self.version(self.head("k"))
        self._numbers: dict[int, int] = {}
        self._counting = threading.Lock()
        self.before, self.reading = self._note, self._hold

    def _note(self, request: Request) -> None:
        with self._counting:
            self._numbers[id(request)] = len(self.asked)
            self.asked.append((request.start // BLOCK, -(-request.stop // BLOCK)))
            if self.failures:
                raise self.failures.pop(0)

    def _hold(self, request: Request) -> None:
        silence = self.silences.get(self._numbers[id(request)])
        if silence is not None:
            assert silence.wait(timeout=20)
        assert self.allow.acquire(timeout=20)


class Setup:
    def __init__(self, place: Path, connections: int, retry_timeout: float = 20.0, size: int = 64 * BLOCK) -> None:
        self.bucket = HeldStore(size)
        self.scheduler = Scheduler(connections, retry_timeout)
        self.fetcher = Fetcher(self.scheduler, partial(ThreadTransport, self.bucket.open_range))
        self.cached = Cache(place / "c", 1 << 30).open(self.bucket.version_of_it)
        self.fetch = ObjectFetch(self.cached)
        self.told: list[ObsfsError | None] = []

    def demand(self, *blocks: int) -> None:
        self.fetcher.demand(self.fetch, blocks, CountdownCallback(len(blocks), self.told.append))

    def prefetch(self, *blocks: int) -> None:
        self.fetcher.prefetch(self.fetch, [(block, block) for block in blocks])


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Setup]:
    setup = Setup(tmp_path, connections=1)
    yield setup
    setup.bucket.allow.release(1000)
    setup.fetcher.close()


def test_demand_comes_before_read_ahead(one: Setup) -> None:
    one.prefetch(*range(0, 32))
    wait_for(lambda: len(one.bucket.asked) == 1)
    one.demand(50)
    one.bucket.allow.release(PIECE)
    wait_for(lambda: len(one.bucket.asked) >= 2)
    assert one.bucket.asked[1] == (50, 51)


def test_what_is_a_little_less_urgent_has_its_turn(one: Setup) -> None:
    one.prefetch(0)
    wait_for(lambda: len(one.bucket.asked) == 1)
    one.fetcher.prefetch(one.fetch, [(9, 60)])
    for number in range(1, 30):
        one.fetcher.prefetch(one.fetch, [(8, 2 * number)])
        one.bucket.allow.release(1)
        wait_for(partial(lambda asked: len(one.bucket.asked) == asked, number + 1))
    assert 1 < one.bucket.asked.index((60, 61)) < 12


def test_what_holds_up_the_disk_waits_until_nothing_is_fetched(one: Setup) -> None:
    done: list[str] = []
    background = Background(lambda: one.fetcher.is_idle)
    one.prefetch(*range(0, 8))
    wait_for(lambda: len(one.bucket.asked) == 1)
    background.run_when_idle(lambda: done.append("quiet"))
    background.run_in_background(lambda: done.append("soon"))
    time.sleep(1.2)
    assert done == ["soon"]
    one.bucket.allow.release(8)
    wait_for(lambda: done == ["soon", "quiet"])
    one.prefetch(*range(8, 16))
    wait_for(lambda: len(one.bucket.asked) == 2)
    background.run_when_idle(lambda: done.append("at the end"))
    one.bucket.allow.release(8)
    one.fetcher.stop()
    background.close()
    assert done[-1] == "at the end"


def test_a_waiter_is_told_when_its_block_has_landed_not_its_range(one: Setup) -> None:
    one.prefetch(*range(0, 8))
    wait_for(lambda: len(one.bucket.asked) == 1)
    assert one.bucket.asked[0] == (0, 8)
    one.demand(2)
    one.bucket.allow.release(3)
    wait_for(lambda: one.told == [None])
    assert not one.cached.ensure_verified(3)
    assert len(one.bucket.asked) == 1


def test_no_block_is_in_flight_twice(one: Setup) -> None:
    one.demand(3)
    one.demand(3)
    one.prefetch(3)
    one.demand(3, 4)
    one.bucket.allow.release(10)
    wait_for(lambda: len(one.told) == 3)
    blocks = [block for start, stop in one.bucket.asked for block in range(start, stop)]
    assert sorted(blocks) == [3, 4]


def test_what_has_landed_meanwhile_is_not_fetched_again(one: Setup) -> None:
    one.bucket.allow.release(100)
    one.demand(2)
    wait_for(lambda: one.told == [None])
    one.prefetch(1, 2, 3)
    one.demand(0, 1, 2, 3, 4)
    wait_for(lambda: len(one.told) == 2)
    blocks = [block for start, stop in one.bucket.asked for block in range(start, stop)]
    assert sorted(blocks) == [0, 1, 2, 3, 4]


def test_failures_are_tried_again(one: Setup) -> None:
    one.bucket.failures = [UnavailableError("busy"), UnavailableError("busy")]
    one.bucket.allow.release(1)
    one.demand(0)
    wait_for(lambda: one.told == [None])
    assert one.fetcher.stats.retries == 2
    assert one.fetcher.stats.errors == 0


def test_a_small_object_is_always_fetched_whole(tmp_path: Path) -> None:
    setup = Setup(tmp_path, connections=2, size=3 * BLOCK + 1)
    setup.bucket.failures = [UnavailableError("other bytes than its checksum")]
    setup.bucket.allow.release(1000)
    setup.demand(1)
    setup.demand(3)
    wait_for(lambda: setup.told == [None] * 2 and not setup.fetch.is_busy)
    assert set(setup.bucket.asked) == {(0, 4)}
    assert len(setup.bucket.asked) in (2, 3)  # the second demand may have come before or after the failure
    assert all(map(setup.cached.is_trusted, range(4)))
    # A part of it that was evicted comes with all of it, and is all that is stored.
    evict_blocks(setup.cached.path, [block for block in read_blocks(setup.cached.path) if block.number == 2])
    fetched = setup.fetcher.stats.bytes_fetched
    setup.demand(2)
    wait_for(lambda: setup.told == [None] * 3 and not setup.fetch.is_busy)
    assert setup.bucket.asked[-1] == (0, 4)
    assert setup.fetcher.stats.bytes_fetched == fetched + BLOCK
    assert setup.scheduler.busy == setup.scheduler.queued == 0
    setup.fetcher.close()


def test_a_version_that_is_gone_is_not_tried_again(one: Setup) -> None:
    one.bucket.failures = [VersionChangedError("gone")]
    one.demand(0)
    wait_for(lambda: len(one.told) == 1)
    assert isinstance(one.told[0], VersionChangedError)
    assert len(one.bucket.asked) == 1


def test_patience_ends(tmp_path: Path) -> None:
    setup = Setup(tmp_path, connections=1, retry_timeout=0.3)
    setup.bucket.failures = [UnavailableError("busy")] * 100
    started = time.monotonic()
    setup.demand(0)
    wait_for(lambda: len(setup.told) == 1)
    assert isinstance(setup.told[0], UnavailableError)
    assert time.monotonic() - started < 5
    setup.fetcher.close()


def test_who_asks_again_at_once_for_what_was_given_up_is_told_the_same(tmp_path: Path) -> None:
    """As the kernel does, page by page. Whoever opens the file, or comes later, has it tried again."""
    setup = Setup(tmp_path, connections=1, retry_timeout=0.1)
    setup.bucket.failures = [UnavailableError("busy")] * 100
    setup.demand(0)
    wait_for(lambda: len(setup.told) == 1)
    asked = len(setup.bucket.asked)
    setup.demand(0)
    setup.demand(0, 1)
    assert [str(error) for error in setup.told] == ["busy"] * 3
    assert len(setup.bucket.asked) == asked
    setup.demand(5)
    wait_for(lambda: len(setup.told) == 4)
    assert setup.bucket.asked[-1] == (5, 6), "nobody has asked for that yet"
    setup.bucket.failures.clear()
    setup.bucket.allow.release(1000)
    setup.fetcher.forget_failures(setup.fetch)
    setup.demand(0)
    wait_for(lambda: setup.told[4:] == [None])
    setup.fetcher.close()


def test_what_was_given_up_is_tried_again_a_moment_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsfs.fetch.scheduler._SAME_READ_SECONDS", 0.2)
    setup = Setup(tmp_path, connections=1, retry_timeout=0)
    setup.bucket.failures = [UnavailableError("busy")]
    setup.bucket.allow.release(1000)
    setup.demand(0)
    wait_for(lambda: len(setup.told) == 1)
    time.sleep(0.3)
    setup.demand(0)
    wait_for(lambda: setup.told[1:] == [None])
    setup.fetcher.close()


def test_patience_ends_while_what_is_tried_again_is_silent(tmp_path: Path) -> None:
    setup = Setup(tmp_path, connections=1, retry_timeout=0.5)
    silence = threading.Event()
    setup.bucket.failures = [UnavailableError("busy")]
    setup.bucket.silences = {1: silence}
    setup.demand(0)
    wait_for(lambda: len(setup.told) == 1)
    assert [str(error) for error in setup.told] == ["busy"]
    assert len(setup.bucket.asked) == 2
    assert setup.fetcher.stats.errors == 1
    silence.set()
    setup.bucket.allow.release(1000)
    wait_for(lambda: not setup.fetch.is_busy)
    setup.fetcher.forget_failures(setup.fetch)
    setup.demand(0)
    wait_for(lambda: setup.told[1:] == [None])
    assert setup.scheduler.busy == setup.scheduler.queued == 0
    setup.fetcher.close()


def test_what_waits_on_a_silent_connection_is_asked_for_again_beside_it(tmp_path: Path) -> None:
    setup = Setup(tmp_path, connections=2)
    fetcher, bucket = setup.fetcher, setup.bucket
    bucket.allow.release(1000)
    setup.demand(0)
    wait_for(lambda: setup.told == [None])
    silences = bucket.silences = {1: threading.Event(), 2: threading.Event()}
    setup.prefetch(20)
    wait_for(lambda: len(bucket.asked) == 2)
    setup.demand(12, 13, 14)
    # Both connections are silent. Others bring what is waited for, and what the silent ones bring later is not stored.
    wait_for(lambda: setup.told == [None] * 2)
    assert fetcher.stats.hedges == 1
    assert bucket.asked[1:] == [(20, 21), (12, 15), (12, 15)]
    setup.demand(20)
    wait_for(lambda: setup.told == [None] * 3)
    assert fetcher.stats.hedges == 2
    assert bucket.asked[4:] == [(20, 21)]
    for silence in silences.values():
        silence.set()
    wait_for(lambda: not setup.fetch.is_busy)
    assert fetcher.stats.bytes_fetched == 5 * BLOCK
    assert (fetcher.stats.retries, fetcher.stats.errors) == (0, 0)
    # Everybody is back: nothing of it was counted twice.
    setup.demand(30)
    setup.demand(40)
    wait_for(lambda: setup.told == [None] * 5 and not setup.fetch.is_busy)
    assert setup.scheduler.busy == setup.scheduler.queued == setup.scheduler.superseded == 0
    fetcher.close()


def test_a_silent_connection_that_comes_back_first_has_brought_it(tmp_path: Path) -> None:
    setup = Setup(tmp_path, connections=2)
    bucket = setup.bucket
    bucket.allow.release(1000)
    setup.demand(0)
    wait_for(lambda: setup.told == [None])
    first, second = threading.Event(), threading.Event()
    bucket.silences = {1: first, 2: second}
    setup.demand(10, 11)
    wait_for(lambda: len(bucket.asked) == 3)
    first.set()
    wait_for(lambda: setup.told == [None] * 2)
    second.set()
    wait_for(lambda: not setup.fetch.is_busy)
    assert setup.fetcher.stats.bytes_fetched == 3 * BLOCK
    assert setup.scheduler.busy == setup.scheduler.queued == setup.scheduler.superseded == 0
    setup.fetcher.close()


def test_read_ahead_that_fails_is_dropped(one: Setup) -> None:
    one.bucket.failures = [UnavailableError("busy")]
    one.prefetch(0)
    wait_for(lambda: len(one.bucket.asked) == 1 and not one.fetch.is_busy)
    assert (one.fetcher.stats.retries, one.fetcher.stats.errors) == (1, 0)
    one.bucket.allow.release(1)
    one.demand(0)
    wait_for(lambda: one.told == [None])


def test_a_file_that_nobody_has_open_is_left(one: Setup) -> None:
    one.prefetch(*range(0, 32))
    wait_for(lambda: len(one.bucket.asked) == 1)
    one.fetcher.drop_prefetch(one.fetch)
    one.bucket.allow.release(100)
    wait_for(lambda: not one.fetch.is_busy)
    assert len(one.bucket.asked) == 1


def test_read_ahead_leaves_connections_for_who_waits(tmp_path: Path) -> None:
    setup = Setup(tmp_path, connections=8)
    setup.prefetch(*range(0, 64))
    wait_for(lambda: len(setup.bucket.asked) == 7)
    setup.demand(63)
    wait_for(lambda: (63, 64) in setup.bucket.asked or len(setup.bucket.asked) == 8)
    setup.bucket.allow.release(1000)
    setup.fetcher.close()


def test_closing_tells_who_waits(tmp_path: Path) -> None:
    setup = Setup(tmp_path, connections=1)
    setup.demand(0)
    setup.demand(9)
    wait_for(lambda: len(setup.bucket.asked) == 1)
    setup.bucket.allow.release(1)
    setup.fetcher.close()
    wait_for(lambda: len(setup.told) == 2)
