"""Fetch blocks for many readers: the lock and the clock between readers, scheduler and transport.

The scheduler decides (:mod:`obsfs.fetch.scheduler`), the transport moves bytes (:mod:`obsfs.fetch.transport`). This
module serialises what both report, wakes the transport when a range can begin, and tells those who wait, with no lock
held.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from obsfs.errors import ObsfsError, UnavailableError, VersionChangedError
from obsfs.fetch.pending import InFlightRange, ObjectFetch, Waiter
from obsfs.fetch.scheduler import FetchStats, Scheduler
from obsfs.fetch.transport import RangeFeed, Transport

log = logging.getLogger(__name__)

_STALL_CHECK_SECONDS = 0.25
"""How often to look for stalled connections, a quarter of the shortest stall."""


class CountdownCallback:
    """A callback for when several blocks are there.

    Args:
        count: How many blocks, at least one.
        done: Called once: with None when all are in the cache, or with the first error.
    """

    __slots__ = ("_done", "_guard", "_left")

    def __init__(self, count: int, done: Callable[[ObsfsError | None], None]) -> None:
        self._left = count
        self._done = done
        self._guard = threading.Lock()

    def landed(self) -> None:
        """Count one more block that is there."""
        with self._guard:
            self._left -= 1
            if self._left:
                return
        self._done(None)

    def failed(self, error: ObsfsError) -> None:
        """End the wait: a block will not come. Later calls have no effect."""
        with self._guard:
            if self._left <= 0:
                return
            self._left = 0
        self._done(error)


class Fetcher:
    """Blocks from the bucket to the cache, for any number of objects. Safe to use from many threads.

    Threads start when first needed. Close it to end them.

    Args:
        scheduler: Decides. Nobody else may use it while the fetcher lives.
        make_transport: Makes the transport that takes its ranges from the feed that it is given.
    """

    def __init__(self, scheduler: Scheduler, make_transport: Callable[[RangeFeed], Transport]) -> None:
        self._scheduler = scheduler
        self._changed = threading.Condition()
        """Guards the scheduler. Notified when a range can begin."""
        self._idle = 0
        self._in_flight = threading.Event()
        self._stall_watch: threading.Thread | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=4096)
        self._transport = make_transport(self)

    # readers' side

    @property
    def stats(self) -> FetchStats:
        """Counts since the start."""
        return self._scheduler.stats

    @property
    def connections(self) -> int:
        """How many connections prefetch uses at present. Demand may use all."""
        return self._scheduler.connections

    @property
    def cheap_gap(self) -> int:
        """Blocks that arrive in the time of one round trip: fetching them costs less than another request."""
        return self._scheduler.cheap_gap

    @property
    def is_idle(self) -> bool:
        """Whether no range is in flight."""
        return not self._scheduler.flights

    def throughput(self, seconds: float = 5.0) -> float:
        """Return the bytes per second that arrived in the last `seconds`."""
        horizon = time.monotonic() - seconds
        return sum(size for when, size in list(self._recent) if when >= horizon) / seconds

    def demand(self, fetch: ObjectFetch, blocks: Sequence[int], waiter: Waiter) -> None:
        """Fetch blocks that somebody waits for, before all prefetch.

        Args:
            fetch: The object.
            blocks: Block numbers.
            waiter: Told of each block once it is in the cache, or once of an error.
        """
        with self._changed:
            landed, error = self._scheduler.demand(fetch, blocks, waiter, time.monotonic())
            self._wake()
        if error is not None:
            waiter.failed(error)
        for _ in range(landed):
            waiter.landed()

    def forget_failures(self, fetch: ObjectFetch) -> None:
        """Try blocks again that were given up lately: somebody has opened the file."""
        with self._changed:
            self._scheduler.forget_failures(fetch)

    def prefetch(self, fetch: ObjectFetch, blocks: Iterable[tuple[int, int]]) -> None:
        """Fetch blocks that a reader will want.

        Args:
            fetch: The object.
            blocks: ``(urgency, block)``; the urgency is the distance from the reader in blocks, 0 first among all.
        """
        with self._changed:
            self._scheduler.prefetch(fetch, blocks)
            self._wake()

    def drop_prefetch(self, fetch: ObjectFetch) -> None:
        """Forget the blocks of an object that nobody waits for and that are not in flight."""
        with self._changed:
            self._scheduler.drop_prefetch(fetch)

    def stop(self) -> None:
        """Begin no further range. Whoever still waits gets an error."""
        with self._changed:
            waiting = self._scheduler.stop()
            self._changed.notify_all()
        for waiter in waiting:
            waiter.failed(UnavailableError("the mount is shutting down"))
        self._in_flight.set()

    def close(self) -> None:
        """Stop, and end the threads."""
        self.stop()
        self._transport.close()

    def _wake(self) -> None:
        """Have the transport take the ranges that could begin now. The caller holds the lock."""
        startable = self._scheduler.startable
        more = min(startable - self._idle, self._scheduler.most_ranges - self._transport.capacity)
        if more > 0:
            self._transport.grow(more)
        self._changed.notify(max(startable, 0))

    # the transport's side (RangeFeed)

    def take(self) -> InFlightRange | None:
        """Wait for the next range. None when the fetcher is stopped."""
        scheduler = self._scheduler
        with self._changed:
            while (flight := scheduler.next_range(time.monotonic())) is None:
                if scheduler.is_stopping:
                    return None
                due = scheduler.next_due
                self._idle += 1
                self._changed.wait(None if due is None else due - time.monotonic())
                self._idle -= 1
            self._watch_stalls()
        return flight

    def request_sent(self) -> None:
        """A request is about to be sent."""
        with self._changed:
            self._scheduler.request_sent()

    def request_answered(self, seconds: float) -> None:
        """A request was answered so many seconds after it was sent."""
        with self._changed:
            self._scheduler.request_answered(seconds)

    def request_ended(self) -> None:
        """A request has ended, whether it failed or not."""
        with self._changed:
            self._scheduler.request_ended()

    def block_arrived(self, flight: InFlightRange, block: int, seconds: float | None) -> bool:
        """The next block of a range has arrived. Returns whether to store it."""
        with self._changed:
            return self._scheduler.block_arrived(flight, block, time.monotonic(), seconds)

    def block_stored(self, flight: InFlightRange, block: int, size: int) -> None:
        """A block is in the cache."""
        scheduler, fetch = self._scheduler, flight.fetch
        with self._changed:
            now, before = time.monotonic(), scheduler.connections
            pending = scheduler.block_stored(fetch, block, size, now)
            if size:
                self._recent.append((now, size))
            if scheduler.connections > before:
                log.debug("trying %d connections", scheduler.connections)
                self._wake()
        if pending is None:
            return
        for waiter in pending.waiters:
            _call(waiter.landed)
        if not pending.waiters:
            _call(fetch.on_prefetched, block)

    def claimed_elsewhere(self, flight: InFlightRange) -> None:
        """Another process fetches a block of the range."""
        with self._changed:
            self._scheduler.claimed_elsewhere(flight, time.monotonic())
            self._changed.notify(1)

    def claims_of(self, flight: InFlightRange) -> list[int]:
        """The blocks of a range that has ended which no other range of this process is at."""
        with self._changed:
            return self._scheduler.claims_of(flight)

    def range_failed(self, flight: InFlightRange, error: ObsfsError, *, is_final: bool) -> None:
        """The rest of a range did not arrive."""
        with self._changed:
            failure = self._scheduler.range_failed(flight, error, time.monotonic(), is_final=is_final)
            # Each of these pauses may end before the one that a sleeping thread knows of.
            self._changed.notify(failure.retried)
        if failure.retried:
            log.warning("trying again: %s", error)
        if failure.told:
            log.error("giving up: %s", error)
        if isinstance(error, VersionChangedError):
            _call(flight.fetch.on_changed)
        _fail(failure.told)

    def range_ended(self, flight: InFlightRange) -> None:
        """The range is over, whatever became of it."""
        _call(flight.fetch.on_idle)
        with self._changed:
            self._scheduler.range_ended(flight)
            if not self._scheduler.flights:
                self._in_flight.clear()

    # stalled connections

    def _watch_stalls(self) -> None:
        if self._stall_watch is None:
            self._stall_watch = threading.Thread(target=self._check_stalls, name="obsfs-hedge", daemon=True)
            self._stall_watch.start()
        self._in_flight.set()

    def _check_stalls(self) -> None:
        """Look for stalled connections while a range is in flight."""
        while self._in_flight.wait() and not self._scheduler.is_stopping:
            time.sleep(_STALL_CHECK_SECONDS)
            with self._changed:
                stalls = self._scheduler.check_stalls(time.monotonic())
                if stalls.hedged:
                    self._wake()
            for flight in stalls.hedged:
                log.info("a connection for %s is stalled: sending a hedged request", flight.fetch.cached.version.key)
            for error in set(stalls.told.values()):
                log.error("giving up: %s", error)
            _fail(stalls.told)


def _fail(told: Mapping[Waiter, ObsfsError]) -> None:
    for waiter, error in told.items():
        _call(waiter.failed, error)


def _call(callback: Callable[..., None], *arguments: object) -> None:
    try:
        callback(*arguments)
    except Exception:
        log.exception("a callback failed")
