"""Which of several endpoints to ask, when a bucket is replicated across regions. Pure: no I/O; the clock is given.

The nearest healthy one first: by measured latency, moving averages of which are kept. One that failed is not asked for
a while (doubling from 1 to 30 seconds), unless all have failed; then it gets one chance. One that was never asked
counts as the nearest, so that each is measured once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_WEIGHT = 0.2
_PAUSES = 1.0, 30.0
_RENEW_SECONDS = 60.0


@dataclass(slots=True)
class Health:
    """What is known of one endpoint. `latency` is in seconds to the first byte, None while it is not known."""

    latency: float | None = None
    measured: float = float("-inf")
    failures: int = 0
    banned_until: float = float("-inf")
    lagging: int = 0
    """How often it had not yet the version that was asked for."""


class Replicas:
    """The order in which to ask `count` endpoints, which are known by their numbers. Safe to use from many threads."""

    def __init__(self, count: int, now: Callable[[], float] = time.monotonic) -> None:
        self.health = [Health() for _ in range(count)]
        self._now = now
        self._guard = threading.Lock()

    def order(self) -> list[int]:
        """All endpoints, the one to ask first at the front."""
        if len(self.health) == 1:
            return [0]
        now = self._now()

        def rank(number: int) -> tuple[bool, float, int]:
            one = self.health[number]
            is_old = now - one.measured > _RENEW_SECONDS
            return one.banned_until > now, 0.0 if one.latency is None or is_old else one.latency, number

        with self._guard:
            order = sorted(range(len(self.health)), key=rank)
            # Whoever goes to measure it again goes alone.
            self.health[order[0]].measured = now
            return order

    def answered(self, number: int, seconds: float | None) -> None:
        """It has answered; after so many seconds, if it was asked for what is comparable."""
        one = self.health[number]
        with self._guard:
            if seconds is not None:
                one.latency = seconds if one.latency is None else one.latency + _WEIGHT * (seconds - one.latency)
                one.measured = self._now()
            one.failures = 0
            one.banned_until = float("-inf")

    def failed(self, number: int) -> None:
        """It has not answered, or broke off."""
        one = self.health[number]
        with self._guard:
            now = self._now()
            if one.banned_until > now:
                return  # requests that were under way together are one failure
            low, high = _PAUSES
            one.banned_until = now + min(high, low * 2.0**one.failures)
            one.failures += 1

    def lagged(self, number: int) -> None:
        """It did not have the version that was asked for, and another had."""
        with self._guard:
            self.health[number].lagging += 1
