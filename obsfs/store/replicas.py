"""Which of several endpoints to ask, when a bucket is replicated across regions. Pure: no I/O; the clock is passed in.

The nearest healthy endpoint comes first, by a moving average of its latency. One that failed is skipped for 1 to 30
seconds (doubling), unless all have failed. One that was never asked counts as the nearest, so that each is measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_WEIGHT = 0.2
"""Of the newest latency in the moving average."""
_PAUSE_SECONDS = 1.0, 30.0
"""How long an endpoint that failed is skipped: the first time, and at most."""
_RENEW_SECONDS = 60.0
"""How old a latency may be before it is measured again."""


@dataclass(slots=True)
class Health:
    """What is known of one endpoint. Moments are monotonic seconds."""

    latency: float | None = None
    """Seconds to the first byte; None while unknown."""
    measured: float = float("-inf")
    failures: int = 0
    """In a row."""
    skipped_until: float = float("-inf")
    lagging: int = 0
    """How often it did not have a version yet."""


class Replicas:
    """The order in which to ask endpoints, which are known by their numbers. Safe to use from many threads."""

    def __init__(self, count: int, now: Callable[[], float] = time.monotonic) -> None:
        self.health = [Health() for _ in range(count)]
        self._now = now
        self._guard = threading.Lock()

    def order(self) -> list[int]:
        """Return all endpoints, the one to ask first at the front."""
        if len(self.health) == 1:
            return [0]
        now = self._now()

        def rank(number: int) -> tuple[bool, float, int]:
            health = self.health[number]
            is_old = now - health.measured > _RENEW_SECONDS
            return health.skipped_until > now, 0.0 if health.latency is None or is_old else health.latency, number

        with self._guard:
            order = sorted(range(len(self.health)), key=rank)
            # Only one request measures it again.
            self.health[order[0]].measured = now
            return order

    def answered(self, number: int, seconds: float | None) -> None:
        """Note that an endpoint answered.

        Args:
            number: The endpoint.
            seconds: Its latency; None if the request is not comparable with others.
        """
        health = self.health[number]
        with self._guard:
            if seconds is not None:
                health.latency = (
                    seconds if health.latency is None else health.latency + _WEIGHT * (seconds - health.latency)
                )
                health.measured = self._now()
            health.failures = 0
            health.skipped_until = float("-inf")

    def failed(self, number: int) -> None:
        """Note that an endpoint did not answer, or broke off."""
        health = self.health[number]
        with self._guard:
            now = self._now()
            if health.skipped_until > now:
                return  # requests in flight together count as one failure
            low, high = _PAUSE_SECONDS
            health.skipped_until = now + min(high, low * 2.0**health.failures)
            health.failures += 1

    def lagged(self, number: int) -> None:
        """Note that an endpoint did not have a version that another one had."""
        with self._guard:
            self.health[number].lagging += 1
