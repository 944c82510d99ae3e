"""Decide how many connections to use, and when one of them has stalled. Pure: the caller tells the time, in seconds.

What one connection gives depends on the server's limits and the distance. What all give together depends on the link.
Only trying tells which of the two binds. obsfs begins with 16 connections, and with more the longer the first answers
take beyond 60 ms, because a distant server sends less at a time over each. While all connections are busy, it measures
what arrives. Then it tries twice as many, and keeps them if they bring a sixth more.
"""

from __future__ import annotations

_FIRST_CONNECTIONS = 16
_NEAR_SECONDS = 0.06
"""A server that answers within this time gets the first 16 connections."""
_WORTHWHILE_GAIN = 7 / 6
"""More connections are kept if the rate grows by this factor: less is within the noise of a measurement."""
_SETTLE_SECONDS = 0.2
"""How long a change takes to show: a round trip, and the first block over each new connection."""
_MEASURE_SECONDS = 0.3
_MEASURE_BYTES = 64 << 20
"""A measurement of fewer bytes says nothing: they come in blocks of 1 MiB."""
_FRESH_SECONDS = 10.0
"""A measurement older than this is not compared with: the link may be another one by now."""
_HOLD_SECONDS = 60.0
"""After more connections did not help, none are tried for so long."""
_MIN_STALL_SECONDS = 1.0
_STALL_FACTOR = 4
"""A connection has stalled when it is silent for so many times the recent worst block time."""
_FADING = 0.98
"""The recent worst block time fades by 2 % with each block."""
_RISING = 1.02
"""The recent shortest answer time grows by 2 % with each answer."""
_SMOOTH = 0.9
"""Weight of the past in the moving average of block times."""
_MAX_GAP_BLOCKS = 8


class AdaptiveConcurrency:
    """How many connections to use now: `current`, at most `most`. Not safe to use from several threads at once.

    Args:
        most: Connections, at most.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.current = min(_FIRST_CONNECTIONS, most)
        self._latency: float | None = float("inf")
        self._measured_from: float | None = None
        self._bytes = 0
        self._before: tuple[int, float, float] | None = None  # connections, bytes per second, when
        self._hold_until = float("-inf")

    def on_answer(self, latency: float) -> None:
        """Note how long a request took to be answered, in seconds. Counts until the first measurement is over."""
        if self._latency is not None:
            # The first request over a connection waits for its handshakes, too.
            self._latency = min(self._latency, latency)
            self.current = min(
                max(_FIRST_CONNECTIONS, int(_FIRST_CONNECTIONS * self._latency / _NEAR_SECONDS)), self.most
            )

    def on_arrival(self, now: float, size: int, *, is_busy: bool) -> None:
        """Note that bytes have arrived.

        Args:
            now: The time.
            size: The bytes.
            is_busy: Whether more connections would have had something to do.
        """
        if not is_busy:
            self._measured_from = None
            return
        if self._measured_from is None:
            self._measured_from, self._bytes = now + _SETTLE_SECONDS, 0
            return
        if now < self._measured_from:
            return
        self._bytes += size
        seconds = now - self._measured_from
        if seconds >= _MEASURE_SECONDS and self._bytes >= _MEASURE_BYTES:
            self._measured_from = None
            self._decide(now, self._bytes / seconds)

    def _decide(self, now: float, rate: float) -> None:
        before, self._before, self._latency = self._before, None, None
        if before is not None:
            connections, old_rate, when = before
            if now - when > _FRESH_SECONDS:
                self.current = connections  # the link may be another one by now
                return
            if rate < old_rate * _WORTHWHILE_GAIN:
                self.current = connections
                self._hold_until = now + _HOLD_SECONDS
                return
        if self.current < self.most and now >= self._hold_until:
            self._before = self.current, rate, now
            self.current = min(2 * self.current, self.most)


class StallDetector:
    """How long a connection may be silent before it has stalled: `seconds`.

    Four times the recent worst block time, and at least one second. Infinite until the first block has come, because
    nothing is known of the link.
    """

    def __init__(self) -> None:
        self._slowest = 0.0

    def on_block(self, seconds: float) -> None:
        """Note how long a block took after the one before it, or after its request, in seconds."""
        self._slowest = max(seconds, self._slowest * _FADING)

    @property
    def seconds(self) -> float:
        """Seconds of silence after which a connection has stalled. Infinite before the first block."""
        return max(_MIN_STALL_SECONDS, _STALL_FACTOR * self._slowest) if self._slowest else float("inf")


class RoundTrip:
    """How much one connection brings in the time of one round trip."""

    def __init__(self) -> None:
        self._latency = 0.0
        self._block_seconds = 0.0

    def on_answer(self, seconds: float) -> None:
        """Note how long a request took to be answered, in seconds. The recent shortest time counts."""
        self._latency = min(seconds, self._latency * _RISING) if self._latency else seconds

    def on_block(self, seconds: float) -> None:
        """Note how long a block took after the one before it in the same answer, in seconds."""
        before = self._block_seconds
        self._block_seconds = _SMOOTH * before + (1 - _SMOOTH) * seconds if before else seconds

    @property
    def blocks(self) -> int:
        """Blocks that arrive in one round trip, 8 at most: cheaper to fetch than to skip. 0 while unknown."""
        return min(_MAX_GAP_BLOCKS, int(self._latency / self._block_seconds)) if self._block_seconds else 0
