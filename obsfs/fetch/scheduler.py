"""Decide which range to request next, and who hears of it. Pure: no threads, no I/O, no clock.

The caller reports events with their times (monotonic seconds), and gets back what to do. It calls from one thread at a
time: :class:`~obsfs.fetch.fetcher.Fetcher` holds a lock around each call.

The life of a block:

1. *Queued*: a reader waits for it (demand), or will want it soon (prefetch). A block has one entry in
   `ObjectFetch.pending` until it has landed or was given up, so two readers never fetch it twice.
2. *In flight*: `next_range` takes the most urgent block and the queued blocks behind it as one range. Demand comes
   before all prefetch. Prefetch leaves one connection in eight free for demand.
3. *Landing*: its bytes arrived (`block_arrived`) and are being stored.
4. *Landed* (`block_stored`): its waiters hear of it now, not when the whole range has arrived.

Failures: a block that somebody waits for is *paused* and retried with growing, jittered pauses, until the retry timeout
has passed since its first failed request was sent. A prefetch that fails is dropped: a reader that needs the block
demands it. Whoever demands a block within a second after it was given up gets the same error at once. The kernel does
so, page by page, before one read of a user fails.

Stalled connections: when nothing arrives for much longer than blocks took of late, the blocks that somebody waits for
are queued again (*hedged*), before all others. Whichever request brings a block first wins.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from obsfs.blocks import PIECE
from obsfs.errors import ObsfsError, UnavailableError
from obsfs.fetch.concurrency import AdaptiveConcurrency, RoundTrip, StallDetector
from obsfs.fetch.pending import InFlightRange, ObjectFetch, PendingBlock, Waiter
from obsfs.store.retry import backoff

MIN_RANGE_BLOCKS = 4
"""Smallest range request: at 80 MB/s, 4 MiB take as long as two 25 ms round trips. Shorter ones waste connections."""
FULL_RANGE_DISTANCE_BLOCKS = 64
"""Beyond this distance from a reader, ranges have full length: at 400 MB/s they arrive long before the reader."""
_FOREIGN_FETCH_POLL_SECONDS = 0.02
"""How often to look whether another process has fetched a block that it claimed: about one round trip."""
_CONNECTIONS_PER_HEDGE = 4
"""One hedged request at a time for so many connections, so that hedges never double the load on a slow server."""
_SAME_READ_SECONDS = 1.0
"""A demand within this time after a block was given up belongs to the same read: the kernel asks again at once."""


@dataclass
class FetchStats:
    """Counts since the start. `retries` counts failed requests that no reader heard of; `hedges` hedged requests."""

    bytes_fetched: int = 0
    requests: int = 0
    requests_in_flight: int = 0
    retries: int = 0
    hedges: int = 0
    errors: int = 0
    last_error: str = ""


class Failure(NamedTuple):
    """What follows from a failed range."""

    told: dict[Waiter, ObsfsError]
    """Who is to hear of it."""
    retried: int
    """How many blocks of it are tried again."""


class Stalls(NamedTuple):
    """What follows from a look at all connections."""

    told: dict[Waiter, ObsfsError]
    """Who is to hear that its block failed before, and that the retry timeout is over."""
    hedged: list[InFlightRange]
    """Ranges whose blocks were queued again."""


def range_stop(start: int, queued: int, connections: int, urgency: int = 0) -> int:
    """Return where a range that begins at block `start` ends at the latest.

    A range is short while few blocks are queued, so that all connections get some of them. It has full length if
    the reader is far away: readers slower than the link want one piece of a window at a time, and each piece would
    become a request of its own.

    Args:
        start: The first block.
        queued: Blocks queued, of all objects.
        connections: Connections in use.
        urgency: Distance from the reader, in blocks.

    Returns:
        The block after the last: a multiple of the range's length, so that no range spans two pieces.
    """
    is_long = queued >= 2 * connections or urgency >= FULL_RANGE_DISTANCE_BLOCKS
    length = PIECE if is_long else MIN_RANGE_BLOCKS
    return start - start % length + length


def demand_reserve(connections: int) -> int:
    """Return how many of all connections prefetch leaves free, so that demand need not wait for a whole range."""
    return connections // 8


class Scheduler:
    """Which ranges to request, in which order, how often. See the module for the rules.

    Args:
        connections: Requests in flight at most, hedges not counted.
        retry_timeout: Seconds after which a demand that keeps failing is given up.
        pause: Seconds to pause after failure number n of a block (from 1).
    """

    def __init__(self, connections: int, retry_timeout: float, pause: Callable[[int], float] = backoff) -> None:
        self.stats = FetchStats()
        self.is_stopping = False
        self.flights: set[InFlightRange] = set()
        self.queued = 0
        """Blocks that wait for a connection."""
        self._retry_timeout = retry_timeout
        self._pause_seconds = pause
        self._concurrency = AdaptiveConcurrency(connections)
        self._stalls = StallDetector()
        self._round_trip = RoundTrip()
        # Entries of these three are not removed when their block lands or is dropped: `next_range` skips them.
        self._demand: deque[tuple[ObjectFetch, int]] = deque()
        self._prefetch: list[tuple[int, int, ObjectFetch, int]] = []
        self._paused: list[tuple[float, int, ObjectFetch, int]] = []
        # Added to each urgency, so that new prefetch does not always overtake what was wanted earlier, a little
        # further ahead.
        self._landed_blocks = 0
        self._order = itertools.count()
        self.superseded = 0
        """Ranges in flight that stalled, and have a hedge."""

    # what the caller may ask

    @property
    def busy(self) -> int:
        """Requests in flight that count against the connections: a stalled one has a hedge in its place."""
        return len(self.flights) - self.superseded

    @property
    def connections(self) -> int:
        """How many connections prefetch uses at present. Demand may use all."""
        most = self._concurrency.most
        return min(self._concurrency.current, most - demand_reserve(most))

    @property
    def most_ranges(self) -> int:
        """Ranges that may be in flight now, stalled ones included."""
        return self._concurrency.most + self.superseded

    @property
    def startable(self) -> int:
        """Ranges that could be begun now, at most."""
        most = self._concurrency.most if self._demand else self.connections
        return min(self.queued, most - self.busy)

    @property
    def next_due(self) -> float | None:
        """When the next paused block is to be tried again (monotonic seconds)."""
        return self._paused[0][0] if self._paused else None

    @property
    def cheap_gap(self) -> int:
        """Blocks that arrive in the time of one round trip: fetching them costs less than another request."""
        return self._round_trip.blocks

    # events from readers

    def demand(
        self, fetch: ObjectFetch, blocks: Sequence[int], waiter: Waiter, now: float
    ) -> tuple[int, ObsfsError | None]:
        """Queue blocks that somebody waits for, before all prefetch.

        Returns:
            How many of them are in the cache already; and why none of them is fetched, if so.
        """
        if self.is_stopping:
            return 0, UnavailableError("the mount is shutting down")
        if fetch.given_up and (error := self._recent_failure(fetch, blocks, now)) is not None:
            return 0, error
        landed = 0
        for block in blocks:
            pending = fetch.pending.get(block)
            if pending is None:
                # It may have landed since the caller looked.
                if fetch.cached.is_trusted(block):
                    landed += 1
                    continue
                pending = fetch.pending[block] = PendingBlock()
                self.queued += 1
            pending.waiters.append(waiter)
            if not pending.is_demanded:
                pending.is_demanded, pending.demanded_since = True, now
                if pending.is_queued:
                    self._demand.append((fetch, block))
        return landed, None

    def _recent_failure(self, fetch: ObjectFetch, blocks: Sequence[int], now: float) -> UnavailableError | None:
        fetch.given_up = {block: entry for block, entry in fetch.given_up.items() if now < entry[0]}
        return next((fetch.given_up[block][1] for block in blocks if block in fetch.given_up), None)

    def forget_failures(self, fetch: ObjectFetch) -> None:
        """Try blocks again that were given up lately: somebody has opened the file."""
        fetch.given_up.clear()

    def prefetch(self, fetch: ObjectFetch, blocks: Iterable[tuple[int, int]]) -> None:
        """Queue blocks that a reader will want.

        Args:
            fetch: The object.
            blocks: ``(urgency, block)``; the urgency is the distance from the reader in blocks, 0 first among all.
        """
        if self.is_stopping:
            return
        for urgency, block in blocks:
            # It may have landed since the caller looked.
            if block not in fetch.pending and not fetch.cached.is_present(block):
                fetch.pending[block] = PendingBlock()
                self.queued += 1
                heapq.heappush(self._prefetch, (self._landed_blocks + urgency, next(self._order), fetch, block))

    def drop_prefetch(self, fetch: ObjectFetch) -> None:
        """Forget the blocks of an object that nobody waits for and that are not in flight."""
        for block, pending in list(fetch.pending.items()):
            if pending.flight is None and not pending.waiters:
                del fetch.pending[block]
                self.queued -= pending.is_queued

    def stop(self) -> list[Waiter]:
        """Begin no further range. Returns whoever still waits."""
        self.is_stopping = True
        queues = ((entry[-2] for entry in queue) for queue in (self._demand, self._prefetch, self._paused))
        fetches = {*itertools.chain(*queues), *(flight.fetch for flight in self.flights)}
        return [waiter for fetch in fetches for pending in fetch.pending.values() for waiter in pending.waiters]

    # events from the transport

    def next_range(self, now: float) -> InFlightRange | None:
        """Begin the most urgent range, if a connection is free for it."""
        if self.is_stopping:
            return None
        while self._paused and self._paused[0][0] <= now:
            *_, fetch, block = heapq.heappop(self._paused)
            pending = fetch.pending.get(block)
            if pending is not None and pending.is_paused:
                pending.is_paused = False
                self.queued += 1
                if pending.is_demanded:
                    self._demand.append((fetch, block))
                else:
                    heapq.heappush(self._prefetch, (self._landed_blocks, next(self._order), fetch, block))
        while self._demand:
            fetch, block = self._demand.popleft()
            pending = fetch.pending.get(block)
            # One that was demanded before it landed may be prefetched again by now.
            if pending is not None and pending.is_queued and (pending.is_demanded or pending.is_hedged):
                return self._begin(fetch, block, now)
        while self._prefetch and self.busy < self.connections:
            due, _, fetch, block = heapq.heappop(self._prefetch)
            if _is_queued(fetch, block):
                return self._begin(fetch, block, now, due - self._landed_blocks)
        return None

    def _begin(self, fetch: ObjectFetch, start: int, now: float, urgency: int = 0) -> InFlightRange:
        if fetch.is_whole:
            blocks = range(fetch.cached.blocks)
            for block in blocks:
                if block not in fetch.pending and not fetch.cached.is_present(block):
                    fetch.pending[block] = PendingBlock()
                    self.queued += 1
        else:
            stop, last = start + 1, range_stop(start, self.queued, self.connections, urgency)
            while stop < last and _is_queued(fetch, stop):
                stop += 1
            blocks = range(start, stop)
        flight = InFlightRange(fetch, blocks, now, blocks, is_hedge=fetch.pending[start].is_hedged)
        for block in blocks:
            pending = fetch.pending.get(block)
            if pending is not None and pending.flight is None:
                self.queued -= pending.is_queued
                pending.flight, pending.is_paused = flight, False
        fetch.ranges_in_flight += 1
        self.flights.add(flight)
        return flight

    def request_sent(self) -> None:
        """Count a request to the bucket."""
        self.stats.requests += 1
        self.stats.requests_in_flight += 1

    def request_answered(self, seconds: float) -> None:
        """Learn how long the bucket took to answer a request."""
        self._concurrency.on_answer(seconds)
        self._round_trip.on_answer(seconds)

    def request_ended(self) -> None:
        """Count the end of a request, whether it failed or not."""
        self.stats.requests_in_flight -= 1

    def block_arrived(self, flight: InFlightRange, block: int, now: float, seconds: float | None = None) -> bool:
        """Note that a block has arrived, in order.

        Args:
            flight: The range that brought it.
            block: Its number.
            now: The time.
            seconds: How long it took to arrive after the block before it, if that measures the link.

        Returns:
            Whether to store it: not when another range has brought it.
        """
        if seconds is not None:
            self._round_trip.on_block(seconds)
        self._stalls.on_block(now - flight.last_arrival)
        flight.last_arrival, flight.remaining = now, range(block, flight.remaining.stop)
        pending = flight.fetch.pending.get(block)
        if pending is None or pending.is_landing:
            return False
        self.queued -= pending.is_queued
        pending.flight, pending.is_landing, pending.is_paused = flight, True, False
        return True

    def block_stored(self, fetch: ObjectFetch, block: int, size: int, now: float) -> PendingBlock | None:
        """Note that a block is in the cache.

        Args:
            fetch: The object.
            block: The block's number.
            size: Bytes that were fetched for it, 0 when another process fetched it.
            now: The time.

        Returns:
            What was pending, with those who are to hear of it.
        """
        pending = fetch.pending.pop(block, None)
        self.queued -= pending is not None and pending.is_queued
        if size:
            fetch.given_up.clear()
            self._landed_blocks += 1
            self.stats.bytes_fetched += size
            is_busy = self.queued > 0 and self.busy >= self.connections
            self._concurrency.on_arrival(now, size, is_busy=is_busy)
        return pending

    def claimed_elsewhere(self, flight: InFlightRange, now: float) -> None:
        """Look again soon: another process fetches a block of this range."""
        for block in flight.blocks:
            self._pause(flight, block, now + _FOREIGN_FETCH_POLL_SECONDS)

    def claims_of(self, flight: InFlightRange) -> list[int]:
        """Return the blocks whose claim ends with a range: a claim is the process's, and stays while another range
        of it is to bring the block."""
        pending = flight.fetch.pending
        others = (pending.get(block) for block in flight.blocks)
        return [
            block
            for block, other in zip(flight.blocks, others, strict=True)
            if other is None or other.flight is None or other.flight is flight
        ]

    def range_failed(self, flight: InFlightRange, error: ObsfsError, now: float, *, is_final: bool) -> Failure:
        """Retry the rest of a range later, or give it up.

        Args:
            flight: The range.
            error: Why it failed.
            now: The time.
            is_final: Whether another try would fail in the same way.
        """
        fetch = flight.fetch
        told: dict[Waiter, ObsfsError] = {}
        retried = 0
        self.stats.last_error = str(error)
        for block in flight.remaining:
            pending = fetch.pending.get(block)
            if pending is None or pending.flight is not flight:
                continue
            pending.attempts += 1
            pending.failing_since = pending.failing_since or max(flight.last_arrival, pending.demanded_since)
            left = pending.failing_since + self._retry_timeout - now
            if is_final or not pending.waiters or left <= 0 or self.is_stopping:
                told |= self._give_up(fetch, block, error, now)
            else:
                # The last try is when the timeout ends: pauses grow fast where neighbours fail together.
                pending.error = error if isinstance(error, UnavailableError) else None
                self._pause(flight, block, now + min(self._pause_seconds(pending.attempts), left))
                retried += 1
        self.stats.retries += not (is_final or told)
        self.stats.errors += bool(told)
        return Failure(told, retried)

    def range_ended(self, flight: InFlightRange) -> None:
        """Free the connection of a range, whatever became of it."""
        self.flights.discard(flight)
        self.superseded -= flight.is_superseded
        flight.fetch.ranges_in_flight -= 1

    # events from the clock

    def check_stalls(self, now: float) -> Stalls:
        """Give up blocks whose retry is silent after the retry timeout, and hedge stalled ranges that somebody waits
        for."""
        if self.is_stopping:
            return Stalls({}, [])
        told = self._give_up_overdue(now)
        hedged: list[InFlightRange] = []
        horizon = now - self._stalls.seconds
        room = max(1, self.connections // _CONNECTIONS_PER_HEDGE) - sum(flight.is_hedge for flight in self.flights)
        silent = [flight for flight in self.flights if flight.last_arrival < horizon and not flight.is_superseded]
        for flight in sorted(silent, key=lambda flight: flight.last_arrival):
            if len(hedged) < room and self._hedge(flight):
                hedged.append(flight)
        return Stalls(told, hedged)

    def _give_up_overdue(self, now: float) -> dict[Waiter, ObsfsError]:
        told: dict[Waiter, ObsfsError] = {}
        latest = now - self._retry_timeout
        for flight in self.flights:
            pending_of = flight.fetch.pending
            for block in flight.remaining:
                pending = pending_of.get(block)
                if pending is None or pending.error is None or pending.flight is not flight:
                    continue
                if pending.waiters and pending.failing_since <= latest:
                    told |= self._give_up(flight.fetch, block, pending.error, now)
        self.stats.errors += bool(told)
        return told

    def _hedge(self, flight: InFlightRange) -> bool:
        fetch = flight.fetch
        again: dict[int, PendingBlock] = {}
        for block in flight.remaining:
            pending = fetch.pending.get(block)
            if pending is not None and pending.flight is flight and not pending.is_landing:
                again[block] = pending
        if not any(pending.waiters for pending in again.values()):
            return False
        for pending in again.values():
            pending.flight, pending.is_hedged = None, True
        flight.is_superseded = True
        self._demand.extendleft((fetch, block) for block in reversed(again))
        self.queued += len(again)
        self.superseded += 1
        self.stats.hedges += 1
        return True

    def _pause(self, flight: InFlightRange, block: int, due: float) -> None:
        pending = flight.fetch.pending.get(block)
        if pending is not None and pending.flight is flight:
            pending.flight, pending.is_landing, pending.is_paused = None, False, True
            heapq.heappush(self._paused, (due, next(self._order), flight.fetch, block))

    def _give_up(self, fetch: ObjectFetch, block: int, error: ObsfsError, now: float) -> dict[Waiter, ObsfsError]:
        """Forget a block. Returns whoever is to hear why."""
        pending = fetch.pending.pop(block)
        if pending.waiters and isinstance(error, UnavailableError) and not self.is_stopping:
            fetch.given_up[block] = now + _SAME_READ_SECONDS, error
        return dict.fromkeys(pending.waiters, error)


def _is_queued(fetch: ObjectFetch, block: int) -> bool:
    pending = fetch.pending.get(block)
    return pending is not None and pending.flight is None and not pending.is_paused
