"""Read one pinned version of an object through the cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

from obsfs.access import safetensors
from obsfs.access.readahead import Credit, LoadOrder, ReadAhead
from obsfs.blocks import BLOCK, block_count
from obsfs.cache.object import CachedObject
from obsfs.errors import ObsfsError, UnavailableError
from obsfs.fetch.background import Background
from obsfs.fetch.fetcher import CountdownCallback, Fetcher
from obsfs.fetch.pending import ObjectFetch
from obsfs.store.types import ObjectVersion

_VERIFY_STEP_BLOCKS = 8
"""Blocks verified at a time, so that no other housekeeping waits longer than a few milliseconds."""
_MILESTONE_BLOCKS = 32
"""One block in so many is not put into the page cache, so that a mapped reader's progress is seen."""
_SEALED_FROM_BYTES = 64 << 20
"""To read and verify a smaller file after a restart takes less time than to sync it now."""
_READ_ATTEMPTS = 1000
"""How often a read starts over because its blocks were evicted before it took them: the cache is too small for it."""


@dataclass
class ModelLoad:
    """What the readers of one model share: the shards ``NAME-00001-of-00004.safetensors``, or a file by itself."""

    credit: Credit
    order: LoadOrder
    guard: threading.Lock = field(default_factory=threading.Lock)
    shards: dict[str, ObjectVersion] = field(default_factory=dict)
    """Those in `order`, by their keys."""
    users: int = 0
    is_mapped: bool = False
    """Whether a loader has mapped them, and will come back for what it has skipped."""


class ReaderOwner(Protocol):
    """What a reader needs of the engine that hands it out."""

    fetcher: Fetcher
    background: Background
    window: int
    """Blocks to read ahead at most."""
    seals: bool
    """Whether large complete files are synced and sealed."""

    def model_load_of(self, version: ObjectVersion) -> ModelLoad:
        """Return what the readers of this version's model share."""

    def pin(self, reader: Reader) -> AbstractContextManager[bool]:
        """Keep a reader open while the block runs. False when it has been closed already."""

    def prefetch(self, wanted: list[tuple[int, ObjectVersion, int]]) -> None:
        """Fetch blocks that will be wanted: ``(urgency, version, block)``."""

    def count_read(self, size: int, blocks: int, missed: int) -> None:
        """Count a read."""

    def note_complete(self, reader: Reader) -> None:
        """Its file has become complete."""

    def note_changed(self, reader: Reader) -> None:
        """The bucket no longer has its version."""

    def note_prefetched(self, reader: Reader, block: int) -> None:
        """A block of a mapped model has landed before it was read."""


class Reader:
    """The bytes of one object version, shared by all who have it open. Safe to use from many threads.

    Args:
        owner: The engine that hands it out.
        cached: The version in the cache. The engine closes it.
    """

    def __init__(self, owner: ReaderOwner, cached: CachedObject) -> None:
        self.version = cached.version
        self.size = cached.size
        self.cached = cached
        self.users = 0
        self.load = owner.model_load_of(cached.version)
        self._owner = owner
        self.fetch = ObjectFetch(cached, self._on_prefetched, self._on_idle, self._on_changed)
        self._is_tensor_layout_unknown = cached.version.key.endswith(safetensors.SUFFIX)
        self._order: LoadOrder | None = None
        # Until the tensors are known, the start of such a file is its header, which belongs to no stream.
        ends = (0,) if self._is_tensor_layout_unknown else ()
        self._policy = ReadAhead(cached.blocks, owner.window, self.load.credit, ends)
        self._is_verifying = False
        self._is_complete = cached.is_fully_verified()

    def begin(self) -> None:
        """Verify what an earlier process has left, now that the engine knows this reader."""
        if not self._is_complete and self.cached.is_fully_present():
            self._verify_in_steps()

    @property
    def is_complete(self) -> bool:
        """Whether every byte is verified and in the cache file now."""
        return self.cached.is_fully_verified()

    @property
    def is_fetching(self) -> bool:
        """Whether blocks are pending or in flight."""
        return self.fetch.is_busy

    # reading

    def ready(self, offset: int, size: int, done: Callable[[ObsfsError | None], None], *, again: bool = False) -> bool:
        """Say whether bytes ``[offset, offset + size)`` can be taken from the cache now; fetch them if not.

        Args:
            offset: First byte.
            size: Bytes, at least one, within the file.
            done: Called from another thread when the bytes were fetched, with None or the error. Not called if this
                returns True.
            again: Whether this is the same read as before, whose bytes were evicted before they were taken. That may
                happen at any time.
        """
        first, last = offset // BLOCK, block_count(offset + size) - 1
        cached = self.cached
        blocks = range(first, last + 1)
        missing: list[int] = []
        if not (self._is_complete and cached.are_verified(blocks)):
            missing = [block for block in blocks if not cached.ensure_verified(block)]
        if missing:
            self._is_complete = False
            # Demand first: a worker that wakes must find it before the prefetch.
            self._owner.fetcher.demand(self.fetch, missing, CountdownCallback(len(missing), done))
        if not again:
            cached.touch(blocks)
            self._owner.count_read(size, len(blocks), len(missing))
            if not self._is_complete:
                self._prefetch(first, last)
        return not missing

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes ``[offset, offset + size)``, cut at the end of the file. Waits for them.

        Raises:
            VersionChangedError: The object was replaced.
            UnavailableError: The bucket did not deliver within the retry timeout.
        """
        size = max(0, min(size, self.size - offset))
        if not size:
            return b""
        for attempt in range(_READ_ATTEMPTS):
            arrived: Future[ObsfsError | None] = Future()
            if not self.ready(offset, size, arrived.set_result, again=attempt > 0) and (error := arrived.result()):
                raise error
            data = self.cached.read(offset, size)
            if data is not None:
                return data
        raise UnavailableError("the cache is too small for this read", "give it more with --cache-size")

    # reading ahead

    def _prefetch(self, first: int, last: int) -> None:
        load, version = self.load, self.version
        with load.guard:
            self._learn_tensors()
            self._policy.cheap_gap = self._owner.fetcher.cheap_gap
            wanted = [(urgency, version, block) for urgency, block in self._policy.on_read(first, last)]
            if self._order is not None and load.shards.get(version.key) == version:
                for urgency, key, block in self._order.on_read(version.key, first, last):
                    wanted.append((urgency, load.shards[key], block))
                load.is_mapped = load.is_mapped or self._policy.is_mapped or self._order.is_mapped
                self._policy.is_mapped = load.is_mapped
        if wanted:
            self._owner.prefetch(wanted)

    def drop_prefetch(self) -> None:
        """Fetch no more than what is in flight: nobody has the file open."""
        self._owner.fetcher.drop_prefetch(self.fetch)
        with self.load.guard:
            self._policy.forget_wanted()
            if self._order is not None:
                self._order.forget_wanted()

    def learn_version(self, version: ObjectVersion) -> None:
        """Take over the version's number and date, if it was opened without them.

        The cache keeps neither, so a version that only the cache has told of lacks both.
        """
        known = self.version
        if (version.version_id and not known.version_id) or (version.modified and not known.modified):
            self.version = self.cached.version = replace(
                known,
                version_id=known.version_id or version.version_id,
                modified=known.modified or version.modified,
            )

    def learn_tensors(self) -> None:
        """Watch a safetensors file tensor by tensor from now on, if its header is in the cache."""
        with self.load.guard:
            self._learn_tensors()

    def _learn_tensors(self) -> None:
        if not self._is_tensor_layout_unknown or (tensors := safetensors.extents(self.size, self._peek)) is None:
            return
        self._is_tensor_layout_unknown = False
        if tensors:
            load, key, window = self.load, self.version.key, self._owner.window
            self._order = load.order
            if not load.order.add(key, tensors):
                self._order = LoadOrder(window, load.credit)
                self._order.add(key, tensors)
            load.shards[key] = self.version
            # In the order of the file a loader jumps, which earns and spends no credit.
            self._policy = ReadAhead(self.cached.blocks, window, extent_ends=safetensors.extent_ends(tensors, BLOCK))

    def _peek(self, offset: int, size: int) -> bytes | None:
        last = block_count(min(offset + size, self.size))
        is_here = all(self.cached.is_trusted(block) for block in range(offset // BLOCK, last))
        return self.cached.read(offset, size) if is_here else None

    # what the fetcher reports

    def _on_prefetched(self, block: int) -> None:
        if self.load.is_mapped and self.users and block % _MILESTONE_BLOCKS:
            self._owner.note_prefetched(self, block)

    def _on_idle(self) -> None:
        if self.fetch.pending or self._is_complete:
            return
        # Fetching has paused. Whether the file is complete is looked at once per pause, in another thread.
        if self.cached.is_present(0) and self.cached.is_present(self.cached.blocks - 1):
            self._owner.background.run_in_background(self._settle)

    def _on_changed(self) -> None:
        self._owner.note_changed(self)

    # a complete file

    def _settle(self) -> None:
        """Report the file if it has become complete. Have it sealed when there is time."""
        with self._owner.pin(self) as is_alive:
            if not is_alive or self._is_complete:
                return
            if not self.is_complete:
                if self.cached.is_fully_present():
                    self._verify_in_steps()
                return
            self._is_complete = True
            self._owner.note_complete(self)
            if self._owner.seals and self.size >= _SEALED_FROM_BYTES:
                # To sync it now would hold up blocks of other files that are being stored.
                self._owner.background.run_when_idle(self._seal)

    def _verify_in_steps(self) -> None:
        """Verify what an earlier process has left, to learn whether the file is complete. That reads all of it."""
        if not self._is_verifying:
            self._is_verifying = True
            self._owner.background.run_in_steps(self._verify())

    def _verify(self) -> Iterator[None]:
        try:
            for start in range(0, self.cached.blocks, _VERIFY_STEP_BLOCKS):
                with self._owner.pin(self) as is_alive:
                    stop = min(start + _VERIFY_STEP_BLOCKS, self.cached.blocks)
                    if not is_alive or self._is_complete or not all(map(self.cached.verify, range(start, stop))):
                        return
                yield
        finally:
            self._is_verifying = False
        self._owner.background.run_in_background(self._settle)

    def _seal(self) -> None:
        with self._owner.pin(self) as is_alive:
            if is_alive:
                self.cached.seal()
