"""Move ranges from a store into the cache.

A transport takes ranges from a :class:`RangeFeed` and reports to it. It decides nothing: which ranges, in which order,
and what a failure means is up to the scheduler behind the feed. :class:`ThreadTransport` is the one of today, with a
thread for each request in flight.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from obsfs.blocks import BLOCK, runs
from obsfs.errors import ObsfsError, UnavailableError
from obsfs.fetch.pending import InFlightRange
from obsfs.store.base import RangeReader
from obsfs.store.types import ObjectVersion

log = logging.getLogger(__name__)

_JOIN_SECONDS = 1.0


OpenRange = Callable[[ObjectVersion, int, int], RangeReader]
"""Request bytes ``[start, stop)`` of a version: :meth:`~obsfs.store.base.ObjectStore.open_range`. Raises ObsfsError."""


class RangeFeed(Protocol):
    """Where a transport gets its ranges, and to whom it reports. Safe to use from many threads."""

    def take(self) -> InFlightRange | None:
        """Wait for the next range. None when there will be no more."""

    def request_sent(self) -> None:
        """A request is about to be sent."""

    def request_answered(self, seconds: float) -> None:
        """It was answered so many seconds later; its body may take longer."""

    def request_ended(self) -> None:
        """It has ended, whether it failed or not."""

    def block_arrived(self, flight: InFlightRange, block: int, seconds: float | None) -> bool:
        """The next block has arrived. Returns whether to store it.

        Args:
            flight: The range.
            block: The block's number.
            seconds: How long it took after the block before it in the same answer, None for the first.
        """

    def block_stored(self, flight: InFlightRange, block: int, size: int) -> None:
        """A block is in the cache: `size` bytes were fetched for it, 0 when another process fetched it."""

    def claimed_elsewhere(self, flight: InFlightRange) -> None:
        """Another process fetches a block of the range, which so was not begun."""

    def claims_of(self, flight: InFlightRange) -> list[int]:
        """The blocks of a range that has ended which no other range of this process is at."""

    def range_failed(self, flight: InFlightRange, error: ObsfsError, *, is_final: bool) -> None:
        """The rest of the range did not arrive. `is_final`: another try would fail in the same way."""

    def range_ended(self, flight: InFlightRange) -> None:
        """The range is over, whatever became of it. The last report on it."""


class Transport(Protocol):
    """What a fetcher wants of a transport."""

    @property
    def capacity(self) -> int:
        """How many ranges it can have in flight."""

    def grow(self, count: int) -> None:
        """Become able to have `count` more ranges in flight. Called with the feed's lock held."""

    def close(self) -> None:
        """Wait a moment for the ranges in flight. The feed has no more of them."""


class ThreadTransport:
    """One thread for each range in flight.

    Args:
        open_range: Requests a range of a version.
        feed: Where the ranges come from.
    """

    def __init__(self, open_range: OpenRange, feed: RangeFeed) -> None:
        self._open_range = open_range
        self._feed = feed
        self._threads: list[threading.Thread] = []

    @property
    def capacity(self) -> int:
        """How many ranges it can have in flight."""
        return len(self._threads)

    def grow(self, count: int) -> None:
        """Start `count` more threads."""
        for _ in range(count):
            thread = threading.Thread(target=self._work, name=f"obsfs-fetch-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Wait for the threads, a second for each at most."""
        for thread in self._threads:
            thread.join(timeout=_JOIN_SECONDS)

    def _work(self) -> None:
        feed = self._feed
        buffer = memoryview(bytearray(BLOCK))
        while (flight := feed.take()) is not None:
            try:
                self._fetch(flight, buffer)
            except Exception:
                log.exception("fetching %s failed", flight.fetch.cached.version.key)
                feed.range_failed(flight, UnavailableError("internal error, see the log"), is_final=True)
            feed.range_ended(flight)

    def _fetch(self, flight: InFlightRange, buffer: memoryview) -> None:
        feed, blocks, cached = self._feed, flight.blocks, flight.fetch.cached
        if not cached.claim(blocks):
            feed.claimed_elsewhere(flight)
            return
        try:
            # Another process may have fetched some of them.
            missing = [block for block in blocks if not cached.ensure_verified(block)]
            for block in blocks:
                if block not in missing:
                    feed.block_stored(flight, block, 0)
            for run in [blocks] if flight.fetch.is_whole and missing else runs(missing):
                self._fetch_run(flight, run, buffer)
        except ObsfsError as error:
            feed.range_failed(flight, error, is_final=not isinstance(error, UnavailableError))
        finally:
            for run in runs(feed.claims_of(flight)):
                cached.release_claim(run)

    def _fetch_run(self, flight: InFlightRange, blocks: range, buffer: memoryview) -> None:
        """Request some blocks of a range that follow each other, and store each when it has arrived."""
        feed, fetch = self._feed, flight.fetch
        cached = fetch.cached
        body = None
        feed.request_sent()
        try:
            sent = time.monotonic()
            body = self._open_range(cached.version, blocks.start * BLOCK, min(blocks.stop * BLOCK, cached.size))
            feed.request_answered(time.monotonic() - sent)
            for block in blocks:
                view = buffer[: cached.length_of(block)]
                began = time.monotonic()
                body.readinto(view)
                # A whole object comes out of memory, where its checksum was compared: that says nothing of the link.
                measures_link = block > blocks.start and not fetch.is_whole
                if feed.block_arrived(flight, block, time.monotonic() - began if measures_link else None):
                    cached.store_block(block, view)
                    feed.block_stored(flight, block, len(view))
                elif flight.is_superseded:
                    return
        finally:
            feed.request_ended()
            if body is not None:
                body.close()
