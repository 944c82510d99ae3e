"""Reading one pinned version through cache and fetcher; and :class:`Engine`, which hands out such readers."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice

from obsfs.access import safetensors
from obsfs.access.readahead import Credit, LoadOrder, ReadAhead, runs
from obsfs.cache.directory import Cache
from obsfs.cache.layout import BLOCK, block_count
from obsfs.cache.object import CachedObject
from obsfs.cache.scrub import Scrubber
from obsfs.errors import CacheError, ObsfsError, TooManyFilesError, UnavailableError
from obsfs.fetch.fetcher import CountdownCallback, Fetcher, ObjectFetch
from obsfs.limits import allow_open_files
from obsfs.settings import Settings
from obsfs.store.base import ObjectStore
from obsfs.store.types import ObjectVersion

log = logging.getLogger(__name__)

_IDLE_READERS = 64
_LOOK_SECONDS = 1.0
_COMPLAIN_SECONDS = 10.0
"""Between two lines of the log about the same lack."""
_MOST_LOOKED_AT = 1000
"""Open files that are looked at once a second, of those that were opened last: 5 ms."""
_LOADS = 256
_STRAINED_WINDOW = 16
_WARM_STEP = 64
_VERIFY_STEP = 8
_FIRST_WEIGHTS = 128
"""Blocks that are fetched when a loader gives itself away: what arrives while it builds the model, in 0.3 s."""
_FIRST_UNSEEN = 32
"""Blocks of the first shard that are fetched with the headers, which would tell what to begin with."""
_MILESTONE = 32
_FILL_BLOCKS = 8
_SEALED_FROM = 64 << 20
"""Bytes. To read and verify a smaller file after a restart takes less time than to sync it now."""
_SHARD = re.compile(r"-\d+-of-(?=\d+)")


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


class Reader:
    """The bytes of one object version, shared by all who have it open. Safe to use from many threads."""

    def __init__(self, engine: Engine, cached: CachedObject) -> None:
        self.version = cached.version
        self.size = cached.size
        self.cached = cached
        self.users = 0
        self.load = engine.load_of(cached.version)
        self._engine = engine
        self.target = ObjectFetch(cached, self._on_prefetched, self._on_idle, self._on_changed)
        self._has_tensors = cached.version.key.endswith(safetensors.SUFFIX)
        self._order: LoadOrder | None = None
        # Until the tensors are known, the start of such a file is its header, and nobody's stream.
        fences = (0,) if self._has_tensors else ()
        self._policy = ReadAhead(cached.blocks, engine.window, self.load.credit, fences)
        self._is_verifying = False
        self._is_complete = cached.is_fully_verified()

    def begin(self) -> None:
        """Look at what an earlier process has left, now that the engine knows this reader."""
        if not self._is_complete and self.cached.is_fully_present():
            self._verify_in_steps()

    @property
    def is_complete(self) -> bool:
        """Whether every byte is verified and in the cache file now."""
        return self.cached.is_fully_verified()

    def ready(self, offset: int, size: int, done: Callable[[ObsfsError | None], None], *, again: bool = False) -> bool:
        """Whether bytes ``[offset, offset + size)`` can be taken from the cache now.

        If not, they are fetched, and `done` is called from a thread of the engine with None once they can be, or
        with what went wrong. Either way they may be evicted at any time: who finds them gone asks `again`, which
        counts as the same read.
        """
        first, last = offset // BLOCK, block_count(offset + size) - 1
        cached = self.cached
        blocks = range(first, last + 1)
        missing: list[int] = []
        if not (self._is_complete and cached.are_verified(blocks)):
            missing = [block for block in blocks if not cached.ensure_verified(block)]
        if missing:
            self._is_complete = False
            # Demand first: a worker that wakes must find it before the read-ahead.
            self._engine.fetcher.demand(self.target, missing, CountdownCallback(len(missing), done))
        if not again:
            cached.touch(blocks)
            self._engine.count_read(size, len(blocks), len(missing))
            if not self._is_complete:
                self._prefetch(first, last)
        return not missing

    def _prefetch(self, first: int, last: int) -> None:
        load, version = self.load, self.version
        with load.guard:
            self._learn_tensors()
            self._policy.cheap_gap = self._engine.fetcher.cheap_gap
            wanted = [(urgency, version, block) for urgency, block in self._policy.on_read(first, last)]
            if self._order is not None and load.shards.get(version.key) == version:
                for urgency, key, block in self._order.on_read(version.key, first, last):
                    wanted.append((urgency, load.shards[key], block))
                load.is_mapped = load.is_mapped or self._policy.is_mapped or self._order.is_mapped
                self._policy.is_mapped = load.is_mapped
        if wanted:
            self._engine.prefetch(wanted)

    def learn_version(self, version: ObjectVersion) -> None:
        """Take over what is told of the same version, and was not known when it was opened: the cache has not kept
        by what it is pinned, or had when it was replaced."""
        known = self.version
        if (version.version_id and not known.version_id) or (version.modified and not known.modified):
            self.version = self.cached.version = replace(
                known,
                version_id=known.version_id or version.version_id,
                modified=known.modified or version.modified,
            )

    def learn_tensors(self) -> None:
        """If the header of a safetensors file is here, watch the file tensor by tensor from now on."""
        with self.load.guard:
            self._learn_tensors()

    def _learn_tensors(self) -> None:
        if not self._has_tensors or (found := safetensors.extents(self.size, self._peek)) is None:
            return
        self._has_tensors = False
        if found:
            load, key, window = self.load, self.version.key, self._engine.window
            self._order = load.order
            if not load.order.add(key, found):
                self._order = LoadOrder(window, load.credit)
                self._order.add(key, found)
            load.shards[key] = self.version
            # In the file's order a loader jumps, which earns and spends nothing.
            self._policy = ReadAhead(self.cached.blocks, window, fences=safetensors.file_fences(found, BLOCK))

    def _peek(self, offset: int, size: int) -> bytes | None:
        last = block_count(min(offset + size, self.size))
        is_here = all(self.cached.is_trusted(block) for block in range(offset // BLOCK, last))
        return self.cached.read(offset, size) if is_here else None

    def read(self, offset: int, size: int) -> bytes:
        """Bytes ``[offset, offset + size)``, less what lies behind the end. Waits for them.

        Raises ObsfsError: VersionChangedError when the object was replaced, UnavailableError when the bucket did
        not deliver within the retry timeout.
        """
        size = max(0, min(size, self.size - offset))
        if not size:
            return b""
        for attempt in range(1000):
            arrived: Future[ObsfsError | None] = Future()
            if not self.ready(offset, size, arrived.set_result, again=attempt > 0) and (error := arrived.result()):
                raise error
            data = self.cached.read(offset, size)
            if data is not None:
                return data
        raise UnavailableError("the cache is too small for this read", "give it more with --cache-size")

    def _on_prefetched(self, block: int) -> None:
        # One in so many is left for the reader to ask for, so that its progress is seen.
        if self.load.is_mapped and self.users and block % _MILESTONE:
            self._engine.on_prefetched(self, block)

    def _on_idle(self) -> None:
        if self.target.wants or self._is_complete:
            return
        # Fetching has paused; whether it is over is looked at once per pause, off the readers' way.
        if self.cached.is_present(0) and self.cached.is_present(self.cached.blocks - 1):
            self._engine.background.run_in_background(self._settle)

    def _on_changed(self) -> None:
        self._engine.on_changed(self)

    def _settle(self) -> None:
        """If the file has become complete, tell who wants to know; it is sealed when there is time."""
        with self._engine.pin(self) as alive:
            if not alive or self._is_complete:
                return
            if not self.is_complete:
                if self.cached.is_fully_present():
                    self._verify_in_steps()
                return
            self._is_complete = True
            self._engine.on_complete(self)
            if self._engine.seals and self.size >= _SEALED_FROM:
                # To sync it now would hold up what is being stored of others.
                self._engine.background.run_when_idle(self._seal)

    def _verify_in_steps(self) -> None:
        """Verify what an earlier process has left, to find out whether the file is complete: that reads all of it."""
        if not self._is_verifying:
            self._is_verifying = True
            self._engine.background.run_in_steps(self._verify())

    def _verify(self) -> Iterator[None]:
        try:
            for start in range(0, self.cached.blocks, _VERIFY_STEP):
                with self._engine.pin(self) as alive:
                    stop = min(start + _VERIFY_STEP, self.cached.blocks)
                    if not alive or self._is_complete or not all(map(self.cached.verify, range(start, stop))):
                        return
                yield
        finally:
            self._is_verifying = False
        self._engine.background.run_in_background(self._settle)

    def _seal(self) -> None:
        with self._engine.pin(self) as alive:
            if alive:
                self.cached.seal()

    def drop_prefetch(self) -> None:
        """Nobody has it open: fetch no more than what is in flight."""
        self._engine.fetcher.drop_prefetch(self.target)
        with self.load.guard:
            self._policy.forget_wanted()
            if self._order is not None:
                self._order.forget_wanted()

    @property
    def is_fetching(self) -> bool:
        """Whether blocks are still wanted or in flight."""
        return self.target.is_busy


class Engine:
    """One cache, one set of connections: what the mount and the fsspec file system both read through.

    Closing it ends its threads. `on_complete` is called with the reader of a version that has become wholly cached,
    `on_changed` with that of a version that the bucket no longer has, before anybody who reads it hears of it, and
    `on_prefetched` with each block of a mapped model that has landed before it was read, from a thread that must not
    be held up.

    `seals`: whether large files are synced and sealed when they are complete, which whoever is in a hurry leaves to
    the next one. `scrubs`: whether the cache is read again in the background, which is for processes that live long.
    """

    def __init__(self, bucket: ObjectStore, settings: Settings, *, seals: bool = True, scrubs: bool = False) -> None:
        self.seals = seals
        self._bucket = bucket
        self.cache = Cache.of(settings)
        self.fetcher = Fetcher(
            bucket.open_range, connections=settings.connections, retry_timeout=settings.retry_timeout
        )
        self.background = self.fetcher.background
        self.window = max(0, min(int(settings.read_ahead), self.cache.limit // 4) // BLOCK)
        self.on_complete: Callable[[Reader], None] = lambda reader: None
        self.on_changed: Callable[[Reader], object] = lambda reader: None
        self.on_prefetched: Callable[[Reader, int], None] = lambda reader, block: None
        self.bytes_read = 0
        self.blocks_hit = 0
        self.blocks_missed = 0
        self._readers: OrderedDict[ObjectVersion, Reader] = OrderedDict()
        self._retired: list[Reader] = []
        """Those that are left to who has them open: who opens their versions from now on gets others."""
        self._opening: dict[ObjectVersion, Future[None]] = {}
        """Those whose files are being opened just now."""
        self._next_complaint = 0.0
        self._loads: dict[tuple[str, str], ModelLoad] = {}
        # Nobody waits for the disk with it: whoever begins or ends a read asks for it.
        self._guard = threading.Lock()
        self._is_trimming = False
        self.cache.subscribe(on_removed=self._close_evicted, on_room_needed=self._trim_soon)
        self._trim_soon()
        self.background.run_repeatedly(_LOOK_SECONDS, self._look)
        self._read_at_last_look = 0
        self._scrubber: Scrubber | None = None
        if scrubs and settings.scrub:
            self._scrubber = Scrubber(self.cache, int(settings.scrub), self._is_idle, self._fetch_again)
            self._scrubber.start()

    def _is_idle(self) -> bool:
        """Whether nothing is fetched, and nothing was read through us since this was asked last."""
        before, self._read_at_last_look = self._read_at_last_look, self.bytes_read
        return before == self.bytes_read and not self.fetcher.stats.requests_in_flight

    def _fetch_again(self, version: ObjectVersion, blocks: list[int]) -> None:
        """These blocks were found damaged. Those of other buckets wait until somebody reads them."""
        if (version.endpoint, version.bucket) == (self._bucket.endpoint, self._bucket.name):
            self.prefetch([(0, version, block) for block in blocks])

    def _trim_soon(self) -> None:
        with self._guard:
            if self._is_trimming:
                return
            self._is_trimming = True
        self.background.run_in_steps(self._trim())

    def _trim(self) -> Iterator[None]:
        try:
            self.cache.trim()
        finally:
            self._is_trimming = False
        yield

    def open(self, version: ObjectVersion) -> Reader:
        """A reader of `version`, to be given back with :meth:`release`. Raises CacheError."""
        reader = self._hold(version)
        with self._guard:
            reader.load.users += 1
        if reader.target.given_up:
            self.fetcher.try_again(reader.target)
        return reader

    def release(self, reader: Reader) -> None:
        """Give a reader back. It is kept for a while with what it has learnt about its streams.

        When nobody has any shard of a model open any more, what is wanted of it is dropped.
        """
        load = reader.load
        with self._guard:
            reader.users -= 1
            load.users -= 1
            dropped = [] if load.users else [other for other in self._readers.values() if other.load is load]
        for other in dropped:
            other.drop_prefetch()

    @contextmanager
    def reader_for(self, version: ObjectVersion) -> Iterator[Reader]:
        """A reader for the engine's own purposes, which is nobody who has the file open. Raises CacheError."""
        reader = self._hold(version)
        try:
            yield reader
        finally:
            self._let_go(reader)

    @contextmanager
    def pin(self, reader: Reader) -> Iterator[bool]:
        """As `held`, for a reader that may have been closed already: then the value is False."""
        with self._guard:
            reader.users += 1
            is_alive = self._readers.get(reader.version) is reader
        try:
            yield is_alive
        finally:
            self._let_go(reader)

    def _hold(self, version: ObjectVersion) -> Reader:
        """One more user of a reader, whose files are opened if they are not. Raises CacheError."""
        while True:
            with self._guard:
                reader = self._readers.get(version)
                if reader is not None and reader.cached.is_beyond_repair:
                    self._retired.append(self._readers.pop(version))
                    reader = None
                if reader is not None:
                    reader.learn_version(version)
                    reader.users += 1
                    self._readers.move_to_end(version)
                    return reader
                opening = self._opening.get(version)
                if opening is None:
                    mine = self._opening[version] = Future()
            if opening is None:
                return self._open_first(version, mine)
            opening.result()

    def _open_first(self, version: ObjectVersion, opening: Future[None]) -> Reader:
        """Open the files of a version, for all who wait for that. The disk may be slow: nobody else waits."""
        try:
            self._close_idle()
            reader = Reader(self, self._open_cached(version))
        except BaseException as error:
            with self._guard:
                del self._opening[version]
            opening.set_exception(error)
            raise
        with self._guard:
            del self._opening[version]
            self._readers[version] = reader
            reader.users += 1
        opening.set_result(None)
        reader.begin()
        return reader

    def is_at_hand(self, version: ObjectVersion) -> bool:
        """Whether its files are open, so that nobody who opens it waits for the disk."""
        return version in self._readers

    def _let_go(self, reader: Reader) -> None:
        with self._guard:
            reader.users -= 1

    def _open_cached(self, version: ObjectVersion) -> CachedObject:
        try:
            return self.cache.open(version)
        except TooManyFilesError as error:
            is_raised = allow_open_files()
            if (now := time.monotonic()) >= self._next_complaint:
                self._next_complaint = now + _COMPLAIN_SECONDS
                log.warning("%s; %d files are open, those that nobody reads are closed", error, len(self._readers))
            if not is_raised:
                self._close_idle(keep=0)
            return self.cache.open(version)

    def _close_idle(self, keep: int = _IDLE_READERS) -> None:
        with self._guard:
            excess = len(self._readers) - keep
            idle = [one for one in self._readers.values() if _is_idle(one)] if excess > 0 else []
            closing = self._forget(idle[: max(0, excess)])
        for reader in closing:
            reader.cached.close()

    def _close_evicted(self) -> None:
        """Close files that nobody reads and that were evicted as a whole: they take their room for as long as somebody
        has them open."""
        with self._guard:
            idle = [one for one in self._readers.values() if _is_idle(one)]
        gone = [one for one in idle if not one.cached.is_in_cache]
        with self._guard:
            closing = self._forget([one for one in gone if _is_idle(one)])
            closing += [one for one in self._retired if _is_idle(one)]
            self._retired = [one for one in self._retired if one not in closing]
        for reader in closing:
            reader.cached.close()

    def _forget(self, readers: list[Reader]) -> list[Reader]:
        """Those of these readers that were known until now. The caller holds the guard."""
        return [one for one in readers if self._readers.get(one.version) is one and self._readers.pop(one.version)]

    def _look(self) -> None:
        """Look at what others, or the disk, may have done to the cache's files meanwhile."""
        self._close_evicted()
        with self._guard:
            open_now = list(islice(reversed(self._readers.values()), _MOST_LOOKED_AT))
            for reader in open_now:
                reader.users += 1
        for reader in open_now:
            try:
                reader.cached.recover_if_damaged()
            finally:
                self._let_go(reader)

    def load_of(self, version: ObjectVersion) -> ModelLoad:
        """The load that this file belongs to."""
        place = version.bucket, _SHARD.sub("-*-of-", version.key)
        with self._guard:
            load = self._loads.get(place)
            if load is None:
                credit = Credit()
                load = self._loads[place] = ModelLoad(credit, LoadOrder(self.window, credit))
                if len(self._loads) > _LOADS:
                    del self._loads[next(iter(self._loads))]
            return load

    def prefetch(self, wanted: list[tuple[int, ObjectVersion, int]]) -> None:
        """Have blocks at hand, ``(urgency, version, block)``, whether anybody has those files open or not."""
        if self.cache.is_overflowing:
            wanted = wanted[:_STRAINED_WINDOW]
        by_version: dict[ObjectVersion, list[tuple[int, int]]] = {}
        for urgency, version, block in wanted:
            by_version.setdefault(version, []).append((urgency, block))
        for version, blocks in by_version.items():
            # It is a favour: whoever opens that file will hear why it cannot be cached.
            with suppress(CacheError), self.reader_for(version) as reader:
                missing = [(urgency, block) for urgency, block in blocks if not reader.cached.is_present(block)]
                if missing:
                    self.fetcher.prefetch(reader.target, missing)

    def fetch_starts(
        self, versions: Iterable[ObjectVersion], then: Callable[[list[Reader]], None] = lambda readers: None
    ) -> None:
        """Have the first block of some files at hand soon: somebody is about to open them.

        When they are, or one of them cannot be had, `then` is called with their readers as a background task.
        """
        holding = ExitStack()
        readers: list[Reader] = []
        for version in versions:
            if version.size:
                with suppress(CacheError):
                    readers.append(holding.enter_context(self.reader_for(version)))
        if not readers:
            return

        def finish() -> None:
            with holding:
                then(readers)

        waiter = CountdownCallback(len(readers), lambda error: self.background.run_in_background(finish))
        for reader in readers:
            self.fetcher.demand(reader.target, [0], waiter)

    def begin_load(self, versions: Iterable[ObjectVersion]) -> None:
        """The shards of a model, in their order, are about to be loaded: have their headers at hand, and the first of
        the weights."""
        versions = list(versions)

        def begin(readers: list[Reader]) -> None:
            for reader in readers:
                reader.learn_tensors()
            load = readers[0].load
            with load.guard:
                first = load.order.begin(_FIRST_WEIGHTS)
                wanted = [(urgency, load.shards[key], block) for urgency, key, block in first]
            self.prefetch(wanted)

        self.fetch_starts(versions, begin)
        unseen = range(1, min(_FIRST_UNSEEN, block_count(versions[0].size)))
        self.prefetch([(block, versions[0], block) for block in unseen])

    def peek(self, version: ObjectVersion, block: int) -> bytes | None:
        """A block, if the cache has it and it matches its checksum. Raises CacheError."""
        with self.reader_for(version) as reader:
            return reader.cached.read_verified(block)

    def copy_identical(self, version: ObjectVersion, blocks: Iterable[int], identical_version: ObjectVersion) -> None:
        """Take blocks from another version that was found to have the same bytes, as far as they are in the cache.

        Raises CacheError.
        """
        with self.reader_for(version) as reader, self.reader_for(identical_version) as other:
            for block in blocks:
                one = range(block, block + 1)
                if not reader.cached.is_present(block) and reader.cached.claim(one):
                    try:
                        if (data := other.cached.read_verified(block)) is not None:
                            reader.cached.store_block(block, memoryview(data))
                    finally:
                        reader.cached.release_claim(one)

    def fill(
        self,
        version: ObjectVersion,
        blocks: Iterable[int],
        advance: Callable[[int], None] = lambda size: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Have blocks of a version in the cache, and return when they are; `advance` is told of their bytes.

        `check` is called now and then, and may raise to end it. Raises ObsfsError when one cannot be had.
        """
        with self.reader_for(version) as reader:
            cached, pieces = reader.cached, _pieces(blocks, _FILL_BLOCKS)
            waiting: deque[tuple[range, Future[ObsfsError | None]]] = deque()
            piece = next(pieces, None)
            while piece is not None or waiting:
                check()
                if piece is not None and len(waiting) < self.fetcher.connections:
                    landed: Future[ObsfsError | None] = Future()
                    missing = [block for block in piece if not cached.ensure_verified(block)]
                    if missing:
                        self.fetcher.demand(reader.target, missing, CountdownCallback(len(missing), landed.set_result))
                    else:
                        cached.touch(piece)
                        landed.set_result(None)
                    waiting.append((piece, landed))
                    piece = next(pieces, None)
                    continue
                done, landed = waiting.popleft()
                if error := landed.result():
                    raise error
                advance(sum(map(cached.length_of, done)))

    def prefault(self, version: ObjectVersion, size: int) -> None:
        """Have the first `size` bytes of a wholly cached file in the page cache soon, while its model is open."""
        steps = (range(start, start + _WARM_STEP) for start in range(0, block_count(size), _WARM_STEP))

        def go_on() -> None:
            with self.reader_for(version) as reader:
                step = next(steps, None) if reader.load.users else None
                if step is not None:
                    reader.cached.prefault(step)
                    self.background.run_in_background(go_on)

        self.background.run_in_background(go_on)

    def count_read(self, size: int, blocks: int, missed: int) -> None:
        """Note a read of `size` bytes in `blocks` blocks, of which `missed` were not there."""
        self.bytes_read += size
        self.blocks_hit += blocks - missed
        self.blocks_missed += missed

    def statistics(self) -> dict[str, object]:
        """Counts for ``obsfs status``: bytes, bytes per second, ratios of 1."""
        stats, cache = self.fetcher.stats, self.cache
        blocks = self.blocks_hit + self.blocks_missed
        return {
            "bytes_read": self.bytes_read,
            "bytes_fetched": stats.bytes_fetched,
            "throughput": round(self.fetcher.throughput()),
            "hit_ratio": round(self.blocks_hit / blocks, 4) if blocks else None,
            "requests": stats.requests,
            "requests_in_flight": stats.requests_in_flight,
            "connections": self.fetcher.connections,
            "retries": stats.retries + self._bucket.stats().retries,
            "hedges": stats.hedges,
            "errors": stats.errors,
            "last_error": stats.last_error,
            "cache_dir": str(cache.directory),
            "cache_bytes": cache.used_bytes,
            "cache_limit": cache.limit,
            "evicted_bytes": cache.evicted_bytes,
            "corrupt_blocks": cache.corrupt_blocks,
            "cache_write_errors": cache.overflow.count,
            "cache_min_free": cache.min_free,
            "scrubbed_bytes": self._scrubber.bytes if self._scrubber else 0,
            "scrub_errors": self._scrubber.errors if self._scrubber else 0,
            "last_scrub": self._scrubber.last_pass if self._scrubber else None,
        }

    def close(self) -> None:
        """End all fetching and close the files."""
        if self._scrubber is not None:
            self._scrubber.close()
        self.fetcher.close()
        with self._guard:
            closing = [one for one in (*self._readers.values(), *self._retired) if not one.is_fetching]
            self._readers.clear()
            self._retired.clear()
        # With no lock held: closing a file waits for everyone who writes to it.
        for reader in closing:
            reader.cached.close()
        self.cache.close()

    def abandon(self) -> None:
        """In a forked child: close the descriptors that were inherited, by which it would hold the parent's locks for
        longer than the parent lives. Takes no lock; the engine must not be used afterwards."""
        for reader in [*self._readers.values(), *self._retired]:
            reader.cached.abandon()
        self.cache.abandon()


def _is_idle(reader: Reader) -> bool:
    """Whether nobody has it open, and nothing is being fetched for it."""
    return not (reader.users or reader.is_fetching)


def _pieces(blocks: Iterable[int], longest: int) -> Iterator[range]:
    """Blocks that follow each other, so many at a time."""
    for run in runs(blocks):
        for start in range(run.start, run.stop, longest):
            yield range(start, min(start + longest, run.stop))
