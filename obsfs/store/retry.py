"""How long, and how often, to repeat requests to a server that does not answer. Pure policy."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

_BACKOFF_SECONDS = (0.1, 5.0)
"""The first pause, and the longest."""


def backoff(attempt: int) -> float:
    """Return the seconds to pause after failure number `attempt` (from 1): doubling from 0.1 to 5, with jitter."""
    low, high = _BACKOFF_SECONDS
    return random.uniform(0.5, 1.0) * min(high, low * 2.0 ** min(attempt - 1, 10))


class Retries:
    """The retry budget of one bucket, for requests for names and small objects. Safe to use from many threads.

    All requests share it: retries end `seconds` after the first of the failures in a row, so that a queue of readers
    waits no longer than the first of them. A server that has never answered is not waited for: its address may be
    wrong.
    """

    def __init__(self, seconds: float, *, has_answered: bool = False, now: Callable[[], float] = time.monotonic):
        self.count = 0
        self._seconds = seconds
        self._has_answered = has_answered
        self._now = now
        self._guard = threading.Lock()
        self._since: float | None = None
        self._last = 0.0

    @property
    def has_answered(self) -> bool:
        """Whether the server has ever answered."""
        return self._has_answered

    def answered(self) -> None:
        """Note that the server answered, if only that it is busy."""
        self._has_answered = True

    def succeeded(self) -> None:
        """Note that a request succeeded."""
        self._has_answered = True
        self._since = None

    def failed(self, attempt: int, began: float) -> float | None:
        """Note a failure. Returns the seconds to pause before the next attempt; None to give up.

        Failures that lie further apart than the retries would last are not in a row.

        Args:
            attempt: The number of this failure, from 1.
            began: When the request was first sent, in monotonic seconds.
        """
        with self._guard:
            now = self._now()
            if self._since is None or now - self._last > self._seconds:
                self._since = now
            self._last = now
            pause = backoff(attempt)
            if not self._has_answered or now + pause - min(began, self._since) >= self._seconds:
                return None
            self.count += 1
            return pause
