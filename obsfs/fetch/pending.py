"""What is pending: blocks that are wanted, ranges in flight, and the objects that they belong to. No decisions here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from obsfs.errors import ObsfsError, UnavailableError
from obsfs.store.types import WHOLE_BYTES, ObjectVersion


class Waiter(Protocol):
    """Somebody who waits for blocks. The scheduler hands it back to the caller, and never calls it."""

    def landed(self) -> None:
        """Note that one more block is in the cache."""

    def failed(self, error: ObsfsError) -> None:
        """Note that a block will not come."""


class BlockStore(Protocol):
    """The blocks of one version in the cache: what fetching needs of :class:`~obsfs.cache.object.CachedObject`."""

    version: ObjectVersion
    size: int
    blocks: int

    def is_present(self, block: int) -> bool:
        """Whether the block is in the file, verified or not."""

    def is_trusted(self, block: int) -> bool:
        """Whether the block is in the file and verified."""

    def ensure_verified(self, block: int) -> bool:
        """Whether the block can be served now. Verifies it if needed, which reads it."""

    def length_of(self, block: int) -> int:
        """Bytes of the block."""

    def claim(self, blocks: range) -> bool:
        """Claim blocks for fetching, among processes. False when another process fetches one of them."""

    def release_claim(self, blocks: range) -> None:
        """Give up a claim."""

    def store_block(self, block: int, data: memoryview) -> None:
        """Store a block."""


class ObjectFetch:
    """One object version that blocks are fetched for.

    Args:
        cached: The cache's side of it.
        on_prefetched: Called with each block that landed before anybody waited for it.
        on_idle: Called when a range has ended; `pending` tells whether more is to come.
        on_changed: Called when the bucket has another version now, before any reader hears of it.
    """

    def __init__(
        self,
        cached: BlockStore,
        on_prefetched: Callable[[int], None] = lambda block: None,
        on_idle: Callable[[], None] = lambda: None,
        on_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.cached = cached
        self.pending: dict[int, PendingBlock] = {}
        self.given_up: dict[int, tuple[float, UnavailableError]] = {}
        """Blocks given up lately: until when demands get the same error (monotonic seconds), and the error."""
        self.ranges_in_flight = 0
        self.on_prefetched = on_prefetched
        self.on_idle = on_idle
        self.on_changed = on_changed
        self.is_whole = cached.size <= WHOLE_BYTES
        """Whether every request fetches all of it, so that it can be compared with the object's checksum."""

    @property
    def is_busy(self) -> bool:
        """Whether a block of it is pending or a range is in flight."""
        return bool(self.pending or self.ranges_in_flight)


@dataclass(slots=True)
class PendingBlock:
    """A block between being wanted and having landed."""

    waiters: list[Waiter] = field(default_factory=list)
    flight: InFlightRange | None = None
    """The newest range that is to bring it, or that is storing it. None while it is queued or paused."""
    is_landing: bool = False
    is_hedged: bool = False
    is_paused: bool = False
    is_demanded: bool = False
    demanded_since: float = 0.0
    attempts: int = 0
    failing_since: float = 0.0
    """When its first failed request was sent (monotonic seconds), 0 before any has failed."""
    error: UnavailableError | None = None
    """Its last failure."""

    @property
    def is_queued(self) -> bool:
        """Whether it waits for a connection."""
        return self.flight is None and not self.is_paused


@dataclass(slots=True, eq=False)
class InFlightRange:
    """One range request."""

    fetch: ObjectFetch
    blocks: range
    last_arrival: float
    """When its last block arrived, or when it was begun (monotonic seconds)."""
    remaining: range
    """Blocks that may not be in the cache yet: from the last one that arrived, which is being stored, to the end."""
    is_hedge: bool = False
    """Whether it was begun because another one stalled."""
    is_superseded: bool = False
    """Whether it stalled, and a hedge was begun."""
