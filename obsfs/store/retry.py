"""How long to go on asking a server that does not answer, and how often. Pure policy."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

_BACKOFF = (0.1, 5.0)


def backoff(attempt: int) -> float:
    """Seconds to pause after failure number `attempt` (from 1): doubling from 0.1 to 5, with full jitter."""
    low, high = _BACKOFF
    return random.uniform(0.5, 1.0) * min(high, low * 2.0 ** min(attempt - 1, 10))


class Retries:
    """Those of all who ask one bucket for names and small objects; safe to use from many threads.

    They end `seconds` after the first of the failures in a row, for all of them, so that those who queue up wait no
    longer than the first one. A server that has never answered is not waited for: its address may be wrong.
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
        """The server has answered, if only that it is busy."""
        self._has_answered = True

    def succeeded(self) -> None:
        """The server has done what it was asked."""
        self._has_answered = True
        self._since = None

    def failed(self, attempt: int, began: float) -> float | None:
        """Seconds to pause after failure number `attempt` (from 1) of somebody who `began` to ask then (monotonic
        seconds); None when nobody should try again.

        Failures that lie further apart than the retries would last are not in a row.
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
