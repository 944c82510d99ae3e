"""How many connections to use, as many as still make it faster, and how long to wait for one of them.

Pure: the caller tells the time, in seconds.

What one connection gives is set by the server's limits and the distance, what all give together by the link: only
trying tells which of them binds. It begins with 16, and with more the longer the first answers take beyond 60 ms: a
distant server sends less at a time over each. While all connections are busy, what arrives is measured; then twice as
many are tried, and kept when they bring a sixth more.
"""

from __future__ import annotations

_FIRST = 16
_NEAR = 0.06
_GAIN = 7 / 6
_SETTLE = 0.2
"""Seconds that a change takes to show: a round trip, and the first block over each new connection."""
_MEASURE = 0.3
_LEAST_BYTES = 64 << 20
"""Fewer say nothing: they come in blocks of 1 MiB."""
_FRESH = 10.0
_HOLD = 60.0
_LEAST_PATIENCE = 1.0
_TIMES_AS_LONG = 4
_FADING = 0.98
_RISING = 1.02
_SMOOTH = 0.9
_MOST_GAP = 8


class AdaptiveConcurrency:
    """`current` connections of at most `most`. Not safe to use from several threads at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.current = min(_FIRST, most)
        self._latency: float | None = float("inf")
        self._measured_from: float | None = None
        self._bytes = 0
        self._before: tuple[int, float, float] | None = None  # connections, bytes per second, when
        self._hold_until = float("-inf")

    def on_answer(self, latency: float) -> None:
        """A request was answered so many seconds after it was sent; counts until the first measurement is over."""
        if self._latency is not None:
            # The first request over a connection waits for its handshakes, too.
            self._latency = min(self._latency, latency)
            self.current = min(max(_FIRST, int(_FIRST * self._latency / _NEAR)), self.most)

    def on_arrival(self, now: float, size: int, *, is_busy: bool) -> None:
        """`size` bytes have arrived; `is_busy` tells whether more connections would have had something to do."""
        if not is_busy:
            self._measured_from = None
            return
        if self._measured_from is None:
            self._measured_from, self._bytes = now + _SETTLE, 0
            return
        if now < self._measured_from:
            return
        self._bytes += size
        seconds = now - self._measured_from
        if seconds >= _MEASURE and self._bytes >= _LEAST_BYTES:
            self._measured_from = None
            self._decide(now, self._bytes / seconds)

    def _decide(self, now: float, rate: float) -> None:
        before, self._before, self._latency = self._before, None, None
        if before is not None:
            connections, old_rate, when = before
            if now - when > _FRESH:
                self.current = connections  # the link may be another one by now: compare anew
                return
            if rate < old_rate * _GAIN:
                self.current = connections
                self._hold_until = now + _HOLD
                return
        if self.current < self.most and now >= self._hold_until:
            self._before = self.current, rate, now
            self.current = min(2 * self.current, self.most)


class StallDetector:
    """How long a connection may be silent before another one is tried beside it: `seconds`.

    Four times as long as the slowest block took of late, which was here a moment ago or fades by 2 % with each block;
    at least a second. Before anything has come, without end: nobody knows yet how slow this link is.
    """

    def __init__(self) -> None:
        self._slowest = 0.0

    def on_block(self, seconds: float) -> None:
        """A block has come, so long after the one before it, or after it was asked for."""
        self._slowest = max(seconds, self._slowest * _FADING)

    @property
    def seconds(self) -> float:
        """The patience now; infinite before the first block."""
        return max(_LEAST_PATIENCE, _TIMES_AS_LONG * self._slowest) if self._slowest else float("inf")


class RoundTrip:
    """How much one connection brings in the time that a request takes to be answered."""

    def __init__(self) -> None:
        self._latency = 0.0
        self._block_seconds = 0.0

    def on_answer(self, seconds: float) -> None:
        """A request was answered so long after it was sent. The shortest counts; it fades by 2 % with each answer."""
        self._latency = min(seconds, self._latency * _RISING) if self._latency else seconds

    def on_block(self, seconds: float) -> None:
        """A block has come, so long after the one before it in the same answer."""
        before = self._block_seconds
        self._block_seconds = _SMOOTH * before + (1 - _SMOOTH) * seconds if before else seconds

    @property
    def blocks(self) -> int:
        """Blocks that it is cheaper to fetch on the way than to ask anew beyond them, 8 at most; 0 while unknown."""
        return min(_MOST_GAP, int(self._latency / self._block_seconds)) if self._block_seconds else 0
