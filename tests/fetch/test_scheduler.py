"""The scheduler, step by step: pure, with a clock and a cache of the test's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from obsfs.blocks import BLOCK, PIECE
from obsfs.errors import ObsfsError, UnavailableError, VersionChangedError
from obsfs.fetch.pending import InFlightRange, ObjectFetch
from obsfs.fetch.scheduler import (
    FULL_RANGE_DISTANCE_BLOCKS,
    MIN_RANGE_BLOCKS,
    Scheduler,
    demand_reserve,
    range_stop,
)
from obsfs.store.types import ObjectVersion

TIMEOUT = 20.0
BLOCKS = 40


class FakeBlocks:
    """The blocks of one version, in a set."""

    def __init__(self, name: str, blocks: int) -> None:
        self.blocks = blocks
        self.size = blocks * BLOCK
        self.version = ObjectVersion("e", "b", name, '"t"', self.size)
        self.here: set[int] = set()

    def is_present(self, block: int) -> bool:
        return block in self.here

    is_trusted = ensure_verified = is_present

    def length_of(self, block: int) -> int:
        return BLOCK

    def claim(self, blocks: range) -> bool:
        return True

    def release_claim(self, blocks: range) -> None:
        pass

    def store_block(self, block: int, data: memoryview) -> None:
        self.here.add(block)


class Waiter:
    """Counts what it was told."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks
        self.error: ObsfsError | None = None

    def landed(self) -> None:
        assert self.left > 0, "told of more blocks than it waits for"
        self.left -= 1

    def failed(self, error: ObsfsError) -> None:
        self.error = self.error or error

    @property
    def is_answered(self) -> bool:
        return self.left == 0 or self.error is not None


class Steps:
    """A scheduler with its surroundings, which do only what the test says."""

    def __init__(self, connections: int, pause: float = 1.0, sizes: Iterable[int] = (BLOCKS,)) -> None:
        self.scheduler = Scheduler(connections, TIMEOUT, pause=lambda attempt: pause)
        self.caches = [FakeBlocks(f"k{number}", size) for number, size in enumerate(sizes)]
        self.fetches = [ObjectFetch(cached) for cached in self.caches]
        self.now = 100.0
        self._arrived: Counter[InFlightRange] = Counter()

    def demand(self, *blocks: int, fetch: int = 0) -> Waiter:
        waiter = Waiter(len(blocks))
        landed, error = self.scheduler.demand(self.fetches[fetch], blocks, waiter, self.now)
        for _ in range(landed):
            waiter.landed()
        if error is not None:
            waiter.failed(error)
        return waiter

    def prefetch(self, *blocks: int, fetch: int = 0) -> None:
        self.scheduler.prefetch(self.fetches[fetch], [(block, block) for block in blocks])

    def begin(self) -> InFlightRange:
        flight = self.scheduler.next_range(self.now)
        assert flight is not None
        return flight

    def begin_all(self) -> list[InFlightRange]:
        found = []
        while (flight := self.scheduler.next_range(self.now)) is not None:
            found.append(flight)
        return found

    def arrive(self, flight: InFlightRange, count: int = 1) -> list[int]:
        """The next blocks of a range arrive. Returns those that were stored."""
        stored = []
        for _ in range(count):
            block = flight.blocks.start + self._arrived[flight]
            self._arrived[flight] += 1
            if self.scheduler.block_arrived(flight, block, self.now):
                self.store(flight.fetch, block, BLOCK)
                stored.append(block)
        return stored

    def store(self, fetch: ObjectFetch, block: int, size: int) -> None:
        fetch.cached.store_block(block, memoryview(b""))
        pending = self.scheduler.block_stored(fetch, block, size, self.now)
        for waiter in pending.waiters if pending else ():
            waiter.landed()

    def finish(self, flight: InFlightRange) -> None:
        self.arrive(flight, len(flight.blocks) - self._arrived[flight])
        self.scheduler.range_ended(flight)

    def fail(self, flight: InFlightRange, error: ObsfsError | None = None, *, is_final: bool = False) -> int:
        """A range fails. Returns how many of its blocks are tried again."""
        failure = self.scheduler.range_failed(flight, error or UnavailableError("busy"), self.now, is_final=is_final)
        self.scheduler.range_ended(flight)
        for waiter, said in failure.told.items():
            waiter.failed(said)
        return failure.retried

    def check_stalls(self) -> list[InFlightRange]:
        stalls = self.scheduler.check_stalls(self.now)
        for waiter, said in stalls.told.items():
            waiter.failed(said)
        return stalls.hedged


# which range comes next


def test_demand_comes_before_all_prefetch() -> None:
    steps = Steps(connections=8)
    steps.prefetch(*range(16))
    steps.demand(30)
    steps.demand(20, 21)
    assert [steps.begin().blocks for _ in range(3)] == [range(30, 31), range(20, 22), range(8)]


def test_prefetch_leaves_connections_for_demand() -> None:
    steps = Steps(connections=8, sizes=[400])
    steps.prefetch(*range(400))
    assert len(steps.begin_all()) == 7
    steps.demand(399)
    assert steps.begin().blocks == range(399, 400)
    assert steps.scheduler.next_range(steps.now) is None


def test_prefetch_that_another_process_claims_does_not_become_demand() -> None:
    steps = Steps(connections=1)
    steps.prefetch(1)
    flight = steps.begin()
    steps.scheduler.claimed_elsewhere(flight, steps.now)
    steps.scheduler.range_ended(flight)
    steps.now += 1
    assert steps.begin().blocks == range(1, 2)
    steps.demand(20)
    steps.scheduler.claimed_elsewhere(next(iter(steps.scheduler.flights)), steps.now)
    steps.now += 1
    assert steps.begin().blocks == range(20, 21)


def test_a_block_that_was_demanded_once_has_no_priority_when_it_is_prefetched_later() -> None:
    steps = Steps(connections=1)
    steps.demand(1, 2)
    steps.finish(steps.begin())
    steps.caches[0].here.discard(2)
    steps.prefetch(2)
    steps.demand(30)
    assert steps.begin().blocks == range(30, 31)


def test_what_is_wanted_later_does_not_always_overtake() -> None:
    steps = Steps(connections=1, sizes=[400])
    steps.scheduler.prefetch(steps.fetches[0], [(9, 300)])
    order = []
    for number in range(20):
        steps.scheduler.prefetch(steps.fetches[0], [(8, 2 * number)])
        flight = steps.begin()
        order.append(flight.blocks.start)
        steps.finish(flight)
    assert 0 < order.index(300) < 12


def test_a_range_ends_before_a_block_that_is_in_flight_or_here() -> None:
    steps = Steps(connections=4)
    steps.caches[0].here.add(5)
    steps.prefetch(2)
    first = steps.begin()
    steps.demand(*range(8))
    steps.caches[0].here.discard(5)
    assert first.blocks == range(2, 3)
    assert [flight.blocks for flight in steps.begin_all()] == [range(2), range(3, 4), range(4, 5), range(6, 8)]


def test_a_demand_for_a_block_in_flight_sends_no_request() -> None:
    steps = Steps(connections=4)
    steps.prefetch(*range(4))
    flight = steps.begin()
    waiter = steps.demand(1)
    assert steps.begin_all() == []
    steps.arrive(flight)
    assert not waiter.is_answered
    steps.arrive(flight)
    assert waiter.left == 0, "it hears of its block, not of the range"


def test_a_block_that_has_landed_is_answered_at_once() -> None:
    steps = Steps(connections=4)
    steps.caches[0].here = {1, 2}
    assert steps.demand(1, 2).left == 0
    waiter = steps.demand(2, 3)
    assert waiter.left == 1
    steps.finish(steps.begin())
    assert waiter.left == 0


def test_dropping_prefetch_keeps_what_is_demanded_or_in_flight() -> None:
    steps = Steps(connections=1)
    steps.prefetch(*range(16))
    steps.demand(9)
    flight = steps.begin()
    assert flight.blocks.start == 9
    steps.demand(30)
    steps.scheduler.drop_prefetch(steps.fetches[0])
    assert set(steps.fetches[0].pending) == {*flight.blocks, 30}
    steps.finish(flight)
    assert steps.begin().blocks == range(30, 31)
    assert steps.scheduler.queued == 0


@given(
    start=st.integers(0, 10_000),
    queued=st.integers(1, 10_000),
    connections=st.integers(1, 256),
    urgency=st.integers(0, 256),
)
def test_ranges_are_aligned_and_long_when_much_is_wanted_or_nothing_soon(
    start: int, queued: int, connections: int, urgency: int
) -> None:
    stop = range_stop(start, queued, connections, urgency)
    length = PIECE if queued >= 2 * connections or urgency >= FULL_RANGE_DISTANCE_BLOCKS else MIN_RANGE_BLOCKS
    assert start < stop <= start + length
    assert stop % length == 0
    assert demand_reserve(connections) < connections


# failures


def test_a_failed_demand_is_tried_again_after_a_pause() -> None:
    steps = Steps(connections=1, pause=3.0)
    waiter = steps.demand(1, 2)
    assert steps.fail(steps.begin()) == 2
    assert (waiter.error, steps.scheduler.next_due) == (None, steps.now + 3)
    assert steps.scheduler.next_range(steps.now + 2.9) is None
    steps.now += 3
    steps.finish(steps.begin())
    assert waiter.left == 0
    assert (steps.scheduler.stats.retries, steps.scheduler.stats.errors) == (1, 0)


def test_a_demand_fails_when_the_retry_timeout_is_over_and_not_before() -> None:
    steps = Steps(connections=1, pause=8.0)
    began = steps.now
    waiter = steps.demand(1)
    tries = []
    while waiter.error is None:
        steps.fail(steps.begin())
        tries.append(steps.now - began)
        steps.now = steps.scheduler.next_due or steps.now
    assert tries == [0, 8, 16, TIMEOUT], "the last try is when it ends"
    assert steps.demand(1).error is waiter.error, "the same read asks again"
    steps.now += 1.1
    assert steps.demand(1).error is None


def test_a_file_that_is_opened_again_is_tried_again() -> None:
    steps = Steps(connections=1, pause=TIMEOUT)
    waiter = steps.demand(1)
    steps.fail(steps.begin())
    steps.now += TIMEOUT
    steps.fail(steps.begin())
    assert waiter.error is not None
    steps.scheduler.forget_failures(steps.fetches[0])
    assert steps.demand(1).error is None


def test_a_version_that_is_gone_is_told_at_once_and_not_remembered() -> None:
    steps = Steps(connections=1)
    waiter = steps.demand(1, 2)
    gone = VersionChangedError("gone")
    assert steps.fail(steps.begin(), gone, is_final=True) == 0
    assert waiter.error is gone
    assert steps.demand(1).error is None


def test_a_failed_prefetch_is_dropped_but_for_what_is_demanded() -> None:
    steps = Steps(connections=1)
    steps.prefetch(*range(4))
    flight = steps.begin()
    waiter = steps.demand(2)
    assert steps.fail(flight) == 1
    assert set(steps.fetches[0].pending) == {2}
    steps.now += 1
    steps.finish(steps.begin())
    assert waiter.left == 0


def test_another_process_that_fetches_the_blocks_is_looked_at_again_soon() -> None:
    steps = Steps(connections=1)
    waiter = steps.demand(1, 2)
    flight = steps.begin()
    steps.scheduler.claimed_elsewhere(flight, steps.now)
    steps.scheduler.range_ended(flight)
    assert steps.scheduler.next_range(steps.now) is None
    steps.now += 0.05
    flight = steps.begin()
    for block in (1, 2):
        steps.store(steps.fetches[0], block, 0)
    steps.scheduler.range_ended(flight)
    assert waiter.left == 0
    assert steps.scheduler.stats.bytes_fetched == 0


# stalled connections


def stalled(connections: int = 4, *blocks: int) -> tuple[Steps, Waiter, InFlightRange]:
    """A range that somebody waits for and whose connection is silent, on a link whose blocks took a second."""
    steps = Steps(connections)
    steps.demand(39)
    flight = steps.begin()
    steps.now += 1
    steps.finish(flight)
    waiter = steps.demand(*(blocks or (10, 11)))
    return steps, waiter, steps.begin()


def test_a_stalled_range_is_hedged_after_four_times_the_usual() -> None:
    steps, waiter, flight = stalled()
    steps.now += 3.9
    assert steps.check_stalls() == []
    steps.now += 0.2
    assert steps.check_stalls() == [flight]
    assert steps.check_stalls() == [], "once"
    hedge = steps.begin()
    assert (hedge.blocks, hedge.is_hedge) == (flight.blocks, True)
    assert steps.scheduler.busy == 1, "the stalled one does not count"
    assert steps.arrive(hedge, 2) == [10, 11]
    assert waiter.left == 0
    assert steps.arrive(flight) == [], "too late"


def test_a_stalled_range_that_recovers_first_wins() -> None:
    steps, waiter, flight = stalled()
    steps.now += 5
    steps.check_stalls()
    hedge = steps.begin()
    assert steps.arrive(flight, 2) == [10, 11]
    assert waiter.left == 0
    assert steps.arrive(hedge) == []
    steps.scheduler.range_ended(flight)
    steps.scheduler.range_ended(hedge)
    assert steps.scheduler.busy == steps.scheduler.queued == steps.scheduler.superseded == 0


def test_prefetch_that_stalls_is_not_hedged() -> None:
    steps, _, flight = stalled()
    steps.finish(flight)
    steps.prefetch(20, 21)
    flight = steps.begin()
    steps.now += 60
    assert steps.check_stalls() == []
    steps.demand(21)
    assert steps.check_stalls() == [flight]


def test_one_hedge_at_a_time_for_four_connections() -> None:
    steps, _, first = stalled(4)
    steps.now += 0.1
    steps.demand(20)
    second = steps.begin()
    steps.now += 60
    assert steps.check_stalls() == [first]
    hedge = steps.begin()
    assert steps.check_stalls() == []
    steps.finish(hedge)
    assert steps.check_stalls() == [second]


def test_a_retry_that_stalls_is_given_up_when_the_timeout_is_over() -> None:
    steps = Steps(connections=1)
    waiter = steps.demand(1)
    steps.fail(steps.begin())
    steps.now += 1
    flight = steps.begin()
    steps.now += TIMEOUT - 2
    steps.check_stalls()
    assert waiter.error is None
    steps.now += 2
    steps.check_stalls()
    assert str(waiter.error) == "busy"
    assert steps.arrive(flight) == [], "nobody wants it any more"


# the end


def test_stopping_tells_all_who_wait() -> None:
    """Whether their blocks are queued, in flight or paused."""
    steps = Steps(connections=2, sizes=(BLOCKS, BLOCKS))
    waiters = [steps.demand(1), steps.demand(9), steps.demand(17, fetch=1)]
    steps.fail(steps.begin())
    steps.begin()
    told = steps.scheduler.stop()
    assert set(told) == set(waiters)
    assert steps.scheduler.next_range(steps.now + 60) is None
    assert steps.demand(30).error is not None
    steps.prefetch(31)
    assert 31 not in steps.fetches[0].pending


# every order of events


class AnyOrder(RuleBasedStateMachine):
    """Readers, the link, other processes, eviction and the clock, in any order."""

    @initialize(connections=st.sampled_from([1, 2, 4, 16]))
    def begin_with(self, connections: int) -> None:
        self.connections = connections
        self.steps = Steps(connections, pause=2.0, sizes=(BLOCKS, 3, BLOCKS))
        self.waiters = [self.steps.demand(0)]
        first = self.steps.begin()
        self.steps.now += 0.2
        self.steps.finish(first)  # before that, nobody knows what is slow
        self.to_come: dict[InFlightRange, list[int]] = {}
        """What each range in flight is still to bring."""
        self.landing: dict[InFlightRange, int] = {}
        """The block of a range that has arrived and is being stored."""
        self.given_up: set[tuple[InFlightRange, int]] = set()
        """Blocks that a range may still bring, though all who waited were told that it will not."""

    fetch = st.integers(0, 2)
    blocks = st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=6, unique=True)

    def _known(self, fetch: int, blocks: list[int]) -> list[int]:
        return sorted({block % self.steps.caches[fetch].blocks for block in blocks})

    @rule(fetch=fetch, blocks=blocks)
    def demand(self, fetch: int, blocks: list[int]) -> None:
        self.waiters.append(self.steps.demand(*self._known(fetch, blocks), fetch=fetch))

    @rule(fetch=fetch, blocks=blocks, urgency=st.integers(0, 100))
    def prefetch(self, fetch: int, blocks: list[int], urgency: int) -> None:
        wanted = [(urgency + number, block) for number, block in enumerate(self._known(fetch, blocks))]
        self.steps.scheduler.prefetch(self.steps.fetches[fetch], wanted)

    @rule(fetch=fetch)
    def drop_prefetch(self, fetch: int) -> None:
        self.steps.scheduler.drop_prefetch(self.steps.fetches[fetch])

    @rule(fetch=fetch)
    def open_again(self, fetch: int) -> None:
        self.steps.scheduler.forget_failures(self.steps.fetches[fetch])

    @rule(elsewhere=st.lists(st.integers(0, 7), max_size=3))
    def begin(self, elsewhere: list[int]) -> None:
        """A connection is free. Another process may have fetched some of the blocks."""
        scheduler = self.steps.scheduler
        waited_for = {
            (fetch, block)
            for fetch in self.steps.fetches
            for block, pending in fetch.pending.items()
            if pending.is_queued and pending.waiters
        }
        flight = scheduler.next_range(self.steps.now)
        if flight is None:
            assert not waited_for, "somebody waits, and nothing is done"
            assert scheduler.queued == 0 or scheduler.busy >= scheduler.connections
            return
        brought = [pending for block in flight.blocks if (pending := flight.fetch.pending.get(block))]
        is_demand = any(pending.waiters for pending in brought)
        assert is_demand or flight.is_hedge or not waited_for, "prefetch before demand"
        cached = flight.fetch.cached
        for block in {flight.blocks.start + number for number in elsewhere} & set(flight.blocks):
            cached.store_block(block, memoryview(b""))
        missing = [block for block in flight.blocks if not cached.ensure_verified(block)]
        for block in flight.blocks:
            if block not in missing:
                self.steps.store(flight.fetch, block, 0)
        self.to_come[flight] = list(flight.blocks) if flight.fetch.is_whole and missing else missing
        self._end_if_over(flight)

    def _end_if_over(self, flight: InFlightRange) -> None:
        if not self.to_come[flight]:
            self._end(flight)

    def _end(self, flight: InFlightRange) -> None:
        del self.to_come[flight]
        self.landing.pop(flight, None)
        self.given_up = {entry for entry in self.given_up if entry[0] is not flight}
        self.steps.scheduler.range_ended(flight)

    def _one(self, data: st.DataObject) -> InFlightRange:
        return data.draw(st.sampled_from(list(self.to_come)))

    @precondition(lambda self: self.to_come)
    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        """The next block of a range arrives; or the one that has arrived is stored."""
        self._progress(self._one(data))

    def _progress(self, flight: InFlightRange) -> None:
        if (block := self.landing.pop(flight, None)) is not None:
            self.steps.store(flight.fetch, block, BLOCK)
            self._end_if_over(flight)
            return
        block = self.to_come[flight].pop(0)
        if self.steps.scheduler.block_arrived(flight, block, self.steps.now):
            self.landing[flight] = block
        elif flight.is_superseded:
            self._end(flight)
        else:
            self._end_if_over(flight)

    @precondition(lambda self: self.to_come)
    @rule(data=st.data(), is_final=st.booleans())
    def fail(self, data: st.DataObject, is_final: bool) -> None:
        """A connection breaks, the bucket refuses, or the disk does."""
        flight = self._one(data)
        error = VersionChangedError("gone") if is_final else UnavailableError("busy")
        failure = self.steps.scheduler.range_failed(flight, error, self.steps.now, is_final=is_final)
        for waiter, said in failure.told.items():
            waiter.failed(said)
        self._end(flight)

    @precondition(lambda self: any(flight.remaining == flight.blocks for flight in self.to_come))
    @rule(data=st.data())
    def claimed_elsewhere(self, data: st.DataObject) -> None:
        fresh = [flight for flight in self.to_come if flight.remaining == flight.blocks and flight not in self.landing]
        if fresh:
            flight = data.draw(st.sampled_from(fresh))
            self.steps.scheduler.claimed_elsewhere(flight, self.steps.now)
            self._end(flight)

    @rule(fetch=fetch, block=st.integers(0, BLOCKS - 1))
    def evict(self, fetch: int, block: int) -> None:
        self.steps.caches[fetch].here.discard(block)

    @rule(seconds=st.sampled_from([0.1, 2.0, TIMEOUT, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        self.steps.now += seconds
        before = {flight: set(flight.fetch.pending) for flight in self.to_come}
        self.steps.check_stalls()
        for flight, pending in before.items():
            self.given_up |= {(flight, block) for block in pending - set(flight.fetch.pending)}

    @invariant()
    def counts_are_right(self) -> None:
        scheduler = self.steps.scheduler
        pending = [pending for fetch in self.steps.fetches for pending in fetch.pending.values()]
        assert scheduler.queued == sum(block.is_queued for block in pending)
        assert scheduler.flights == set(self.to_come)
        assert scheduler.superseded == sum(flight.is_superseded for flight in self.to_come)
        for fetch in self.steps.fetches:
            assert fetch.ranges_in_flight == sum(flight.fetch is fetch for flight in self.to_come)

    @invariant()
    def no_block_is_fetched_twice_at_once_but_by_a_hedge(self) -> None:
        coming = Counter(
            (flight.fetch, block)
            for flight, blocks in self.to_come.items()
            if not flight.is_superseded and not flight.fetch.is_whole
            for block in blocks
            if (flight, block) not in self.given_up
        )
        assert all(count == 1 for count in coming.values())

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        scheduler = self.steps.scheduler
        if not all(waiter.is_answered for waiter in self.waiters):
            assert scheduler.flights or scheduler.queued or scheduler.next_due is not None
        if scheduler.queued and not scheduler.flights:
            assert scheduler.startable > 0

    def teardown(self) -> None:
        """The bucket answers all from here on: so everybody is answered."""
        if not hasattr(self, "steps"):
            return
        scheduler = self.steps.scheduler
        for _ in range(1000):
            while self.to_come:
                self._progress(next(iter(self.to_come)))
            self.begin([])
            if not self.to_come:
                if scheduler.next_due is None:
                    break
                self.steps.now = max(self.steps.now, scheduler.next_due)
        assert all(waiter.is_answered for waiter in self.waiters)
        assert not any(fetch.is_busy for fetch in self.steps.fetches)
        assert scheduler.busy == scheduler.queued == 0


TestAnyOrder = pytest.mark.timeout(60)(AnyOrder.TestCase)
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
