"""Ranges in flight: who asks the bucket for what, in which order, how often, and who is told.

Blocks are wanted by readers (*demand*) or by read-ahead. A worker takes the most urgent block and the wanted ones
behind it as one range request, aligned, and as long as spreads the queue over all connections. Each block is stored,
and who waits for it is answered, the moment its own bytes have arrived. A block has one entry in `ObjectFetch.wants`
from the moment it is wanted until it has landed, so it is never in flight twice; among processes the cache's locks see
to it.

Failures are tried again with growing, jittered pauses until the reader's patience (``--retry-timeout``) is over, from
when the first request that failed was sent. Who asks for the same block in the next second is told the same at once,
unless the file was opened anew: the kernel asks again, page by page, before one read of a user fails, which would take
three times as long. Read-ahead that fails is dropped: whoever needs the block will demand it. A connection that has
been silent for much longer than the others take is *hedged*: what somebody waits for is asked for once more beside it,
and whichever brings a block first has brought it.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from obsfs.access.readahead import runs
from obsfs.cache.layout import BLOCK, PIECE
from obsfs.cache.object import CachedObject
from obsfs.errors import ObsfsError, UnavailableError, VersionChangedError
from obsfs.fetch.background import Background
from obsfs.fetch.concurrency import AdaptiveConcurrency, RoundTrip, StallDetector
from obsfs.store.retry import backoff
from obsfs.store.types import WHOLE_BYTES, ObjectVersion

log = logging.getLogger(__name__)

MIN_RANGE_BLOCKS = 4
"""Blocks that are not worth a request each: one of 4 MiB takes as long as two round trips of 25 ms at 80 MB/s."""
FULL_RANGE_DISTANCE_BLOCKS = 64
"""Blocks ahead of a reader: what is fetched beyond is not waited for, at 400 MB/s, while a long range arrives."""
_FOREIGN_FETCH_POLL_SECONDS = 0.02
_STALL_CHECK_SECONDS = 0.25
_CONNECTIONS_PER_HEDGE = 4
_SAME_READ_SECONDS = 1.0
"""For so long after a block was given up, who asks for it is taken for the same reader: the kernel asks at once."""


class Body(Protocol):
    """The body of one range request."""

    def readinto(self, buffer: memoryview) -> None: ...
    def close(self) -> None: ...


OpenRange = Callable[[ObjectVersion, int, int], Body]


def range_stop(start: int, queued: int, connections: int, urgency: int = 0) -> int:
    """Where a range from block `start` on is to end at most.

    Short while `queued` blocks would leave connections idle, unless nobody will be there soon (`urgency`): where
    readers are slower than the link, each piece of a window would become a request as soon as it is wanted.

    At a multiple of its length, so that it lies across no two pieces.
    """
    length = PIECE if queued >= 2 * connections or urgency >= FULL_RANGE_DISTANCE_BLOCKS else MIN_RANGE_BLOCKS
    return start - start % length + length


def demand_reserve(connections: int) -> int:
    """Connections of all that read-ahead leaves free: whoever waits does not wait for a whole range first."""
    return connections // 8


class CountdownCallback:
    """Somebody who waits for several blocks; `done` is called once, with None or with what went wrong."""

    __slots__ = ("_done", "_guard", "_left")

    def __init__(self, count: int, done: Callable[[ObsfsError | None], None]) -> None:
        self._left = count
        self._done = done
        self._guard = threading.Lock()

    def landed(self) -> None:
        """One more block is there."""
        with self._guard:
            self._left -= 1
            if self._left:
                return
        self._done(None)

    def failed(self, error: ObsfsError) -> None:
        """A block will not come; later words are ignored."""
        with self._guard:
            if self._left <= 0:
                return
            self._left = 0
        self._done(error)


@dataclass(slots=True)
class PendingBlock:
    waiters: list[CountdownCallback] = field(default_factory=list)
    flight: InFlightRange | None = None
    """Who answers for it: the newest of those that are at it, or who is storing it; None while it is queued."""
    landing: bool = False
    hedged: bool = False
    paused: bool = False
    demanded: bool = False
    demanded_since: float = 0.0
    attempts: int = 0
    failing_since: float = 0.0
    error: UnavailableError | None = None
    """What went wrong the last time."""


@dataclass(slots=True, eq=False)
class InFlightRange:
    """One range that a worker is at. Nothing of it has come since `since` (monotonic seconds)."""

    target: ObjectFetch
    blocks: range
    since: float
    left: range
    is_hedge: bool = False
    """Whether it was begun beside another one."""
    is_given_up: bool = False
    """Whether another one was begun beside it."""


class ObjectFetch:
    """One object version that blocks are fetched for.

    `on_prefetched` is called with each block that has landed before anybody asked for it, `on_idle` when nothing is
    wanted any more, and `on_changed` when the bucket has another version now, before any reader hears of it.
    """

    def __init__(
        self,
        cached: CachedObject,
        on_prefetched: Callable[[int], None] = lambda block: None,
        on_idle: Callable[[], None] = lambda: None,
        on_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.cached = cached
        self.wants: dict[int, PendingBlock] = {}
        self.given_up: dict[int, tuple[float, UnavailableError]] = {}
        """Blocks that were given up lately: until when that is said again (monotonic seconds), and why."""
        self.workers = 0
        self.on_prefetched = on_prefetched
        self.on_idle = on_idle
        self.on_changed = on_changed
        self.is_whole = cached.size <= WHOLE_BYTES
        """Whether all of it is fetched at once, so that it can be checked."""

    @property
    def is_busy(self) -> bool:
        """Whether anything of it is wanted, or a worker is still at it."""
        return bool(self.wants or self.workers)


@dataclass
class FetchStats:
    """Counts since the start. `retries` are requests that failed and that no reader has heard of; `hedges` those that
    were sent beside a silent one."""

    bytes_fetched: int = 0
    requests: int = 0
    requests_in_flight: int = 0
    retries: int = 0
    hedges: int = 0
    errors: int = 0
    last_error: str = ""


class Fetcher:
    """The workers: at most `connections` threads, started when first needed.

    `retry_timeout` is in seconds. Close it to end the threads.
    """

    def __init__(self, open_range: OpenRange, *, connections: int, retry_timeout: float) -> None:
        self._concurrency = AdaptiveConcurrency(connections)
        self.stats = FetchStats()
        self._open_range = open_range
        self._retry_timeout = retry_timeout
        self._changed = threading.Condition()
        self._demand: deque[tuple[ObjectFetch, int]] = deque()
        self._ahead: list[tuple[int, int, ObjectFetch, int]] = []
        # Urgencies count from how far all has come when they are given: what is wanted later does not for ever come
        # before what was wanted a little further ahead.
        self._landed_blocks = 0
        self._paused: list[tuple[float, int, ObjectFetch, int]] = []
        self._order = itertools.count()
        self._queued = 0
        self._idle = 0
        self._workers: list[threading.Thread] = []
        self._patience = StallDetector()
        self._trip = RoundTrip()
        self._flights: set[InFlightRange] = set()
        self._given_up = 0
        self._flying = threading.Event()
        self._watcher: threading.Thread | None = None
        self._stopping = False
        self._recent: deque[tuple[float, int]] = deque(maxlen=4096)
        self.background = Background(lambda: not self._flights)
        """Work beside fetching; it is quiet when nothing is being fetched."""

    @property
    def _busy(self) -> int:
        """Flights that count against the connections: one that was given up has another one in its place."""
        return len(self._flights) - self._given_up

    @property
    def connections(self) -> int:
        """How many connections read-ahead uses at present; who waits may use all."""
        most = self._concurrency.most
        return min(self._concurrency.current, most - demand_reserve(most))

    @property
    def cheap_gap(self) -> int:
        """Blocks that arrive in the time that another request would take to be answered."""
        return self._trip.blocks

    def demand(self, target: ObjectFetch, blocks: Sequence[int], waiter: CountdownCallback) -> None:
        """Fetch blocks that somebody waits for, before all read-ahead."""
        with self._changed:
            error = UnavailableError("the mount is shutting down") if self._stopping else None
            error = error or self._given_up_of(target, blocks)
            landed = []
            if error is None:
                for block in blocks:
                    want = target.wants.get(block)
                    if want is None:
                        # It may have landed since the caller looked.
                        if target.cached.is_trusted(block):
                            landed.append(block)
                            continue
                        want = target.wants[block] = PendingBlock()
                        self._queued += 1
                    want.waiters.append(waiter)
                    if not want.demanded:
                        want.demanded, want.demanded_since = True, time.monotonic()
                        if _is_queued(want):
                            self._demand.append((target, block))
                self._wake()
        if error is not None:
            waiter.failed(error)
        for _ in landed:
            waiter.landed()

    def _given_up_of(self, target: ObjectFetch, blocks: Sequence[int]) -> UnavailableError | None:
        """Why one of these blocks was given up a moment ago."""
        if not target.given_up:
            return None
        now = time.monotonic()
        target.given_up = {block: said for block, said in target.given_up.items() if now < said[0]}
        return next((target.given_up[block][1] for block in blocks if block in target.given_up), None)

    def try_again(self, target: ObjectFetch) -> None:
        """Somebody begins to read: forget what was given up lately."""
        with self._changed:
            target.given_up.clear()

    def prefetch(self, target: ObjectFetch, blocks: Iterable[tuple[int, int]]) -> None:
        """Fetch blocks that a reader will want: ``(urgency, block)``, 0 first among all readers."""
        with self._changed:
            for urgency, block in blocks:
                # It may have landed since the caller looked.
                if block not in target.wants and not target.cached.is_present(block) and not self._stopping:
                    target.wants[block] = PendingBlock()
                    self._queued += 1
                    heapq.heappush(self._ahead, (self._landed_blocks + urgency, next(self._order), target, block))
            self._wake()

    def drop_prefetch(self, target: ObjectFetch) -> None:
        """Forget what is wanted of a target that nobody has open, and is not yet in flight."""
        with self._changed:
            for block, want in list(target.wants.items()):
                if want.flight is None and not want.waiters:
                    del target.wants[block]
                    self._queued -= 0 if want.paused else 1

    def throughput(self, seconds: float = 5.0) -> float:
        """Bytes per second that arrived in the last `seconds`."""
        horizon = time.monotonic() - seconds
        return sum(size for when, size in list(self._recent) if when >= horizon) / seconds

    def close(self) -> None:
        """End the threads; whoever still waits gets an error."""
        with self._changed:
            self._stopping = True
            waiting = [
                waiter for target in self._targets() for want in target.wants.values() for waiter in want.waiters
            ]
            self._changed.notify_all()
        for waiter in waiting:
            waiter.failed(UnavailableError("the mount is shutting down"))
        self._flying.set()
        self.background.close()
        for worker in self._workers:
            worker.join(timeout=1)

    def _targets(self) -> set[ObjectFetch]:
        return {
            *(target for target, _ in self._demand),
            *(target for *_, target, _ in self._ahead),
            *(target for *_, target, _ in self._paused),
        }

    def _wake(self) -> None:
        most = self._concurrency.most if self._demand else self.connections
        useful = min(self._queued, most - self._busy)
        for _ in range(min(useful - self._idle, most + self._given_up - len(self._workers))):
            worker = threading.Thread(target=self._work, name=f"obsfs-fetch-{len(self._workers)}", daemon=True)
            self._workers.append(worker)
            worker.start()
        self._changed.notify(max(useful, 0))

    # the workers

    def _work(self) -> None:
        buffer = memoryview(bytearray(BLOCK))
        while True:
            with self._changed:
                while (flight := self._next()) is None:
                    if self._stopping:
                        return
                    self._idle += 1
                    self._changed.wait(self._paused[0][0] - time.monotonic() if self._paused else None)
                    self._idle -= 1
            target = flight.target
            try:
                self._fetch(flight, buffer)
            except Exception:
                log.exception("fetch worker failed on %s", target.cached.version.key)
                self._fail(flight, UnavailableError("internal error, see the log"), final=True)
            _tell(target.on_idle)
            with self._changed:
                self._flights.discard(flight)
                if not self._flights:
                    self._flying.clear()
                self._given_up -= flight.is_given_up
                target.workers -= 1

    def _next(self) -> InFlightRange | None:
        if self._stopping:
            return None
        now = time.monotonic()
        while self._paused and self._paused[0][0] <= now:
            *_, target, block = heapq.heappop(self._paused)
            want = target.wants.get(block)
            if want is not None and want.paused:
                want.paused = False
                self._queued += 1
                self._demand.append((target, block))
        while self._demand:
            target, block = self._demand.popleft()
            if _is_waiting(target, block):
                return self._take(target, block)
        while self._ahead and self._busy < self.connections:
            due, _, target, block = heapq.heappop(self._ahead)
            if _is_waiting(target, block):
                return self._take(target, block, due - self._landed_blocks)
        return None

    def _take(self, target: ObjectFetch, start: int, urgency: int = 0) -> InFlightRange:
        if target.is_whole:
            blocks = range(target.cached.blocks)
            for block in blocks:
                if block not in target.wants and not target.cached.is_present(block):
                    target.wants[block] = PendingBlock()
                    self._queued += 1
        else:
            stop, last = start + 1, range_stop(start, self._queued, self.connections, urgency)
            while stop < last and _is_waiting(target, stop):
                stop += 1
            blocks = range(start, stop)
        flight = InFlightRange(target, blocks, time.monotonic(), blocks, is_hedge=target.wants[start].hedged)
        for block in blocks:
            want = target.wants.get(block)
            if want is not None and want.flight is None:
                self._queued -= _is_queued(want)
                want.flight, want.paused = flight, False
        target.workers += 1
        self._flights.add(flight)
        self._watch()
        return flight

    def _fetch(self, flight: InFlightRange, buffer: memoryview) -> None:
        target, blocks, cached = flight.target, flight.blocks, flight.target.cached
        if not cached.claim(blocks):
            self._pause(flight, blocks, _FOREIGN_FETCH_POLL_SECONDS)
            return
        try:
            # Another process may have fetched some of them.
            missing = [block for block in blocks if not cached.ensure_verified(block)]
            for block in blocks:
                if block not in missing:
                    self._landed(target, block, 0)
            for run in [blocks] if target.is_whole and missing else runs(missing):
                self._fetch_range(flight, run, buffer)
        except ObsfsError as error:
            self._fail(flight, error, final=not isinstance(error, UnavailableError))
        finally:
            with self._changed:
                wants = [(block, target.wants.get(block)) for block in blocks]
            # A lock is the process's: it stays while another flight is at the block.
            for run in runs(block for block, want in wants if want is None or want.flight in (None, flight)):
                cached.release_claim(run)

    def _fetch_range(self, flight: InFlightRange, blocks: range, buffer: memoryview) -> None:
        target, cached = flight.target, flight.target.cached
        body = None
        with self._changed:
            self.stats.requests += 1
            self.stats.requests_in_flight += 1
        try:
            sent = time.monotonic()
            body = self._open_range(cached.version, blocks.start * BLOCK, min(blocks.stop * BLOCK, cached.size))
            with self._changed:
                self._concurrency.on_answer(time.monotonic() - sent)
                self._trip.on_answer(time.monotonic() - sent)
            for block in blocks:
                view = buffer[: cached.length_of(block)]
                began = time.monotonic()
                body.readinto(view)
                if block > blocks.start and not target.is_whole:
                    self._trip.on_block(time.monotonic() - began)
                if self._arrived(flight, block):
                    cached.store_block(block, view)
                    self._landed(target, block, len(view))
                elif flight.is_given_up:
                    return
        finally:
            with self._changed:
                self.stats.requests_in_flight -= 1
            if body is not None:
                body.close()

    def _arrived(self, flight: InFlightRange, block: int) -> bool:
        """Whether a block that has come is to be stored: not when another flight has brought it."""
        with self._changed:
            now = time.monotonic()
            self._patience.on_block(now - flight.since)
            flight.since, flight.left = now, range(block, flight.left.stop)
            want = flight.target.wants.get(block)
            if want is None or want.landing:
                return False
            self._queued -= _is_queued(want)
            want.flight, want.landing, want.paused = flight, True, False
            return True

    def _landed(self, target: ObjectFetch, block: int, size: int) -> None:
        with self._changed:
            want = target.wants.pop(block, None)
            self._queued -= want is not None and _is_queued(want)
            if size:
                target.given_up.clear()
                self._landed_blocks += 1
                self.stats.bytes_fetched += size
                self._recent.append((time.monotonic(), size))
                self._adapt(size)
        for waiter in want.waiters if want else ():
            _tell(waiter.landed)
        if want and not want.waiters:
            _tell(target.on_prefetched, block)

    def _adapt(self, size: int) -> None:
        before = self.connections
        is_busy = self._queued > 0 and self._busy >= before
        self._concurrency.on_arrival(time.monotonic(), size, is_busy=is_busy)
        if self.connections > before:
            log.debug("trying %d connections", self.connections)
            self._wake()

    def _watch(self) -> None:
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._hedge, name="obsfs-hedge", daemon=True)
            self._watcher.start()
        self._flying.set()

    def _hedge(self) -> None:
        """Begin other flights beside silent ones, for what somebody waits for."""
        while self._flying.wait() and not self._stopping:
            time.sleep(_STALL_CHECK_SECONDS)
            self._give_up_overdue()
            with self._changed:
                horizon = time.monotonic() - self._patience.seconds
                room = max(1, self.connections // _CONNECTIONS_PER_HEDGE) - sum(
                    flight.is_hedge for flight in self._flights
                )
                silent = [one for one in self._flights if one.since < horizon and not one.is_given_up]
                for flight in sorted(silent, key=lambda one: one.since):
                    if room > 0 and self._begin_beside(flight):
                        room -= 1

    def _give_up_overdue(self) -> None:
        """Tell those whose patience is over: what failed before is silent now, and may be for long."""
        told: dict[CountdownCallback, UnavailableError] = {}
        with self._changed:
            latest = time.monotonic() - self._retry_timeout
            for flight in self._flights:
                wants = flight.target.wants
                for block in flight.left:
                    want = wants.get(block)
                    if want and want.error and want.waiters and want.flight is flight and want.failing_since <= latest:
                        told |= self._give_up(flight.target, block, want.error)
            self.stats.errors += bool(told)
        for waiter, error in told.items():
            log.error("giving up: %s", error)
            _tell(waiter.failed, error)

    def _give_up(self, target: ObjectFetch, block: int, error: ObsfsError) -> dict[CountdownCallback, Any]:
        """Forget a block; who is to be told why. The caller holds the lock."""
        want = target.wants.pop(block)
        if want.waiters and isinstance(error, UnavailableError) and not self._stopping:
            target.given_up[block] = time.monotonic() + _SAME_READ_SECONDS, error
        return dict.fromkeys(want.waiters, error)

    def _begin_beside(self, flight: InFlightRange) -> bool:
        target = flight.target
        wants = {block: target.wants.get(block) for block in flight.left}
        again = {block: want for block, want in wants.items() if want and want.flight is flight and not want.landing}
        if not any(want.waiters for want in again.values()):
            return False
        log.info("a connection for %s is silent: asking again beside it", target.cached.version.key)
        for want in again.values():
            want.flight, want.hedged = None, True
        flight.is_given_up = True
        self._demand.extendleft((target, block) for block in reversed(again))
        self._queued += len(again)
        self._given_up += 1
        self.stats.hedges += 1
        self._wake()
        return True

    def _pause(self, flight: InFlightRange, blocks: Iterable[int], seconds: float) -> None:
        due = time.monotonic() + seconds
        with self._changed:
            for block in blocks:
                want = flight.target.wants.get(block)
                if want is not None and want.flight is flight:
                    want.flight, want.landing, want.paused = None, False, True
                    heapq.heappush(self._paused, (due, next(self._order), flight.target, block))
            self._changed.notify(1)

    def _fail(self, flight: InFlightRange, error: ObsfsError, *, final: bool) -> None:
        target, now = flight.target, time.monotonic()
        told: dict[CountdownCallback, ObsfsError] = {}
        retried: dict[int, float] = {}
        with self._changed:
            self.stats.last_error = str(error)
            for block in flight.left:
                want = target.wants.get(block)
                if want is None or want.flight is not flight:
                    continue
                want.attempts += 1
                want.failing_since = want.failing_since or max(flight.since, want.demanded_since)
                left = want.failing_since + self._retry_timeout - now
                if final or not want.waiters or left <= 0 or self._stopping:
                    told |= self._give_up(target, block, error)
                else:
                    # The last time when patience ends: pauses grow fast where neighbours fail together.
                    retried[block] = min(backoff(want.attempts), left)
                    want.error = error if isinstance(error, UnavailableError) else None
            self.stats.retries += not (final or told)
            self.stats.errors += bool(told)
        for block, pause in retried.items():
            self._pause(flight, [block], pause)
        if retried:
            log.warning("trying again: %s", error)
        if told:
            log.error("giving up: %s", error)
        if isinstance(error, VersionChangedError):
            _tell(target.on_changed)
        for waiter in told:
            _tell(waiter.failed, error)


def _is_waiting(target: ObjectFetch, block: int) -> bool:
    want = target.wants.get(block)
    return want is not None and _is_queued(want)


def _is_queued(want: PendingBlock) -> bool:
    return want.flight is None and not want.paused


def _tell(call: Callable[..., None], *arguments: object) -> None:
    try:
        call(*arguments)
    except Exception:
        log.exception("a callback failed")
