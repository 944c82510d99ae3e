"""Hand out readers of object versions, and fetch for them: one cache, one set of connections."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice

from obsfs.access.loaders import model_of
from obsfs.access.readahead import Credit, LoadOrder
from obsfs.blocks import BLOCK, block_count, runs
from obsfs.cache.directory import Cache
from obsfs.cache.object import CachedObject
from obsfs.cache.scrub import Scrubber
from obsfs.errors import CacheError, ObsfsError, TooManyFilesError
from obsfs.fetch.background import Background
from obsfs.fetch.fetcher import CountdownCallback, Fetcher
from obsfs.fetch.reader import ModelLoad, Reader
from obsfs.fetch.scheduler import Scheduler
from obsfs.fetch.transport import ThreadTransport
from obsfs.limits import allow_open_files
from obsfs.settings import Settings
from obsfs.store.base import ObjectStore
from obsfs.store.types import ObjectVersion

log = logging.getLogger(__name__)

_IDLE_READERS = 64
"""Readers that nobody uses, kept open with what they learned about their streams."""
_LOOK_SECONDS = 1.0
"""How often to look at what others, or the disk, have done to open cache files."""
_MAX_FILES_PER_LOOK = 1000
"""Open files to look at each time, those opened last: it takes 5 ms."""
_COMPLAINT_SECONDS = 10.0
"""Least time between two log lines about the same lack."""
_MAX_MODEL_LOADS = 256
_STRAINED_WINDOW_BLOCKS = 16
"""Blocks to read ahead at most while the cache's disk takes none: they stay in memory."""
_PREFAULT_STEP_BLOCKS = 64
"""Blocks that the kernel is asked for at a time, so that other background tasks get their turn."""
_FIRST_WEIGHTS_BLOCKS = 128
"""Blocks of weights to fetch when a load begins: what arrives while the loader builds the model, in 0.3 s."""
_BEFORE_HEADER_BLOCKS = 32
"""Blocks of the first shard to fetch together with the headers, which would tell what comes first."""
_FILL_PIECE_BLOCKS = 8
"""Blocks to wait for together when filling: one full range."""


class Engine:
    """What the mount, the library and the fsspec file system read through. Safe to use from many threads.

    Closing it ends its threads.

    Args:
        bucket: Where the objects are.
        settings: Cache, connections, read-ahead, timeouts.
        seals: Whether to sync and seal large files when they are complete. A short-lived process leaves that to the
            next one.
        scrubs: Whether to verify the cache in the background. For long-lived processes.
    """

    def __init__(self, bucket: ObjectStore, settings: Settings, *, seals: bool = True, scrubs: bool = False) -> None:
        self.seals = seals
        self._bucket = bucket
        self.cache = Cache.of(settings)
        scheduler = Scheduler(settings.connections, settings.retry_timeout)
        self.fetcher = Fetcher(scheduler, partial(ThreadTransport, bucket.open_range))
        self.background = Background(lambda: self.fetcher.is_idle)
        """Work beside fetching. It counts as idle when nothing is being fetched."""
        self.window = max(0, min(int(settings.read_ahead), self.cache.limit // 4) // BLOCK)
        self.bytes_read = 0
        self.blocks_hit = 0
        self.blocks_missed = 0
        self._on_complete: list[Callable[[Reader], object]] = []
        self._on_changed: list[Callable[[Reader], object]] = []
        self._on_prefetched: list[Callable[[Reader, int], object]] = []
        self._readers: OrderedDict[ObjectVersion, Reader] = OrderedDict()
        self._retired: list[Reader] = []
        """Readers beyond repair that somebody still has open. Whoever opens their versions now gets new ones."""
        self._opening: dict[ObjectVersion, Future[None]] = {}
        """Versions whose cache files are being opened now."""
        self._next_complaint = 0.0
        self._loads: dict[tuple[str, str], ModelLoad] = {}
        # Held for a moment only, never while the disk is asked: every open and every release takes it.
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

    def subscribe(
        self,
        *,
        on_complete: Callable[[Reader], object] | None = None,
        on_changed: Callable[[Reader], object] | None = None,
        on_prefetched: Callable[[Reader, int], object] | None = None,
    ) -> None:
        """Call back from now on. Subscribe before the first open.

        Args:
            on_complete: Gets the reader of each version that has become fully cached.
            on_changed: Gets the reader of a version that the bucket no longer has, before anybody who reads it hears
                of it.
            on_prefetched: Gets each block of a mapped model that landed before it was read. Called from a thread that
                must not be held up.
        """
        for callback, subscribers in ((on_complete, self._on_complete), (on_changed, self._on_changed)):
            if callback is not None:
                subscribers.append(callback)
        if on_prefetched is not None:
            self._on_prefetched.append(on_prefetched)

    # what readers report

    def note_complete(self, reader: Reader) -> None:
        """Tell the subscribers that a version is fully cached."""
        for callback in self._on_complete:
            callback(reader)

    def note_changed(self, reader: Reader) -> None:
        """Tell the subscribers that the bucket no longer has a version."""
        for callback in self._on_changed:
            callback(reader)

    def note_prefetched(self, reader: Reader, block: int) -> None:
        """Tell the subscribers that a block of a mapped model has landed before it was read."""
        for callback in self._on_prefetched:
            callback(reader, block)

    def count_read(self, size: int, blocks: int, missed: int) -> None:
        """Count a read of `size` bytes in `blocks` blocks, of which `missed` were not in the cache."""
        self.bytes_read += size
        self.blocks_hit += blocks - missed
        self.blocks_missed += missed

    # readers: open, close

    def open(self, version: ObjectVersion) -> Reader:
        """Return a reader of `version`, to be given back with :meth:`release`.

        Raises:
            CacheError: The cache cannot open its files.
        """
        reader = self._hold(version)
        with self._guard:
            reader.load.users += 1
        if reader.fetch.given_up:
            self.fetcher.forget_failures(reader.fetch)
        return reader

    def release(self, reader: Reader) -> None:
        """Give a reader back. It stays open for a while with what it has learned about its streams.

        When nobody has any shard of a model open, the model's prefetch is dropped.
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
        """Give the block a reader that does not count as an open file.

        Raises:
            CacheError: The cache cannot open its files.
        """
        reader = self._hold(version)
        try:
            yield reader
        finally:
            self._let_go(reader)

    @contextmanager
    def pin(self, reader: Reader) -> Iterator[bool]:
        """Keep a reader open while the block runs. False when it has been closed already."""
        with self._guard:
            reader.users += 1
            is_alive = self._readers.get(reader.version) is reader
        try:
            yield is_alive
        finally:
            self._let_go(reader)

    def is_at_hand(self, version: ObjectVersion) -> bool:
        """Say whether the version's cache files are open, so that opening it does not wait for the disk."""
        return version in self._readers

    def _hold(self, version: ObjectVersion) -> Reader:
        """Count one more user of a reader, and open its files if they are not. Raises CacheError."""
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

    def _let_go(self, reader: Reader) -> None:
        with self._guard:
            reader.users -= 1

    def _open_cached(self, version: ObjectVersion) -> CachedObject:
        try:
            return self.cache.open(version)
        except TooManyFilesError as error:
            is_raised = allow_open_files()
            if (now := time.monotonic()) >= self._next_complaint:
                self._next_complaint = now + _COMPLAINT_SECONDS
                log.warning("%s; %d files are open, those that nobody reads are closed", error, len(self._readers))
            if not is_raised:
                self._close_idle(keep=0)
            return self.cache.open(version)

    def _close_idle(self, keep: int = _IDLE_READERS) -> None:
        with self._guard:
            excess = len(self._readers) - keep
            idle = [reader for reader in self._readers.values() if _is_unused(reader)] if excess > 0 else []
            closing = self._forget(idle[: max(0, excess)])
        for reader in closing:
            reader.cached.close()

    def _close_evicted(self) -> None:
        """Close files that nobody reads and that were evicted whole: open, they still take their room."""
        with self._guard:
            idle = [reader for reader in self._readers.values() if _is_unused(reader)]
        gone = [reader for reader in idle if not reader.cached.is_in_cache]
        with self._guard:
            closing = self._forget([reader for reader in gone if _is_unused(reader)])
            closing += [reader for reader in self._retired if _is_unused(reader)]
            self._retired = [reader for reader in self._retired if reader not in closing]
        for reader in closing:
            reader.cached.close()

    def _forget(self, readers: list[Reader]) -> list[Reader]:
        """Forget readers. Returns those that were known until now. The caller holds the guard."""
        known = [reader for reader in readers if self._readers.get(reader.version) is reader]
        for reader in known:
            del self._readers[reader.version]
        return known

    # housekeeping

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

    def _look(self) -> None:
        """Look at what others, or the disk, have done to the cache's files."""
        self._close_evicted()
        with self._guard:
            open_now = list(islice(reversed(self._readers.values()), _MAX_FILES_PER_LOOK))
            for reader in open_now:
                reader.users += 1
        for reader in open_now:
            try:
                reader.cached.recover_if_damaged()
            finally:
                self._let_go(reader)

    def _is_idle(self) -> bool:
        """Say whether nothing is being fetched, and nothing was read since the last call."""
        before, self._read_at_last_look = self._read_at_last_look, self.bytes_read
        return before == self.bytes_read and not self.fetcher.stats.requests_in_flight

    def _fetch_again(self, version: ObjectVersion, blocks: list[int]) -> None:
        """Fetch damaged blocks again. Those of other buckets wait until somebody reads them."""
        if (version.endpoint, version.bucket) == (self._bucket.endpoint, self._bucket.name):
            self.prefetch([(0, version, block) for block in blocks])

    # fetching before somebody reads

    def model_load_of(self, version: ObjectVersion) -> ModelLoad:
        """Return what the readers of this version's model share."""
        model = version.bucket, model_of(version.key)
        with self._guard:
            load = self._loads.get(model)
            if load is None:
                credit = Credit()
                load = self._loads[model] = ModelLoad(credit, LoadOrder(self.window, credit))
                if len(self._loads) > _MAX_MODEL_LOADS:
                    del self._loads[next(iter(self._loads))]
            return load

    def prefetch(self, wanted: list[tuple[int, ObjectVersion, int]]) -> None:
        """Fetch blocks that somebody will want, whether their files are open or not.

        Args:
            wanted: ``(urgency, version, block)``, urgency 0 first.
        """
        if self.cache.is_overflowing:
            wanted = wanted[:_STRAINED_WINDOW_BLOCKS]
        by_version: dict[ObjectVersion, list[tuple[int, int]]] = {}
        for urgency, version, block in wanted:
            by_version.setdefault(version, []).append((urgency, block))
        for version, blocks in by_version.items():
            # Errors do not matter here: whoever opens that file will hear why it cannot be cached.
            with suppress(CacheError), self.reader_for(version) as reader:
                missing = [(urgency, block) for urgency, block in blocks if not reader.cached.is_present(block)]
                if missing:
                    self.fetcher.prefetch(reader.fetch, missing)

    def fetch_starts(
        self, versions: Iterable[ObjectVersion], then: Callable[[list[Reader]], None] = lambda readers: None
    ) -> None:
        """Fetch the first block of some files now: somebody is about to open them.

        Args:
            versions: The files.
            then: Called with their readers as a background task when all have landed, or when one failed.
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
            self.fetcher.demand(reader.fetch, [0], waiter)

    def begin_load(self, versions: Iterable[ObjectVersion]) -> None:
        """Fetch the headers of a model's shards, and the first of its weights: a load is about to begin.

        Args:
            versions: The shards, in their order.
        """
        versions = list(versions)

        def begin(readers: list[Reader]) -> None:
            for reader in readers:
                reader.learn_tensors()
            load = readers[0].load
            with load.guard:
                first = load.order.begin(_FIRST_WEIGHTS_BLOCKS)
                wanted = [(urgency, load.shards[key], block) for urgency, key, block in first]
            self.prefetch(wanted)

        self.fetch_starts(versions, begin)
        before_header = range(1, min(_BEFORE_HEADER_BLOCKS, block_count(versions[0].size)))
        self.prefetch([(block, versions[0], block) for block in before_header])

    def prefault(self, version: ObjectVersion, size: int) -> None:
        """Bring the first `size` bytes of a fully cached file into the page cache soon, while its model is open."""
        steps = (
            range(start, start + _PREFAULT_STEP_BLOCKS) for start in range(0, block_count(size), _PREFAULT_STEP_BLOCKS)
        )

        def continue_prefault() -> None:
            with self.reader_for(version) as reader:
                step = next(steps, None) if reader.load.users else None
                if step is not None:
                    reader.cached.prefault(step)
                    self.background.run_in_background(continue_prefault)

        self.background.run_in_background(continue_prefault)

    # blocks for the library

    def peek(self, version: ObjectVersion, block: int) -> bytes | None:
        """Return a block, if the cache has it and it matches its checksum.

        Raises:
            CacheError: The cache cannot open its files.
        """
        with self.reader_for(version) as reader:
            return reader.cached.read_verified(block)

    def copy_identical(self, version: ObjectVersion, blocks: Iterable[int], identical_version: ObjectVersion) -> None:
        """Copy blocks from another version with the same bytes, those that are in the cache.

        Raises:
            CacheError: The cache cannot open its files.
        """
        with self.reader_for(version) as reader, self.reader_for(identical_version) as source:
            for block in blocks:
                claim = range(block, block + 1)
                if not reader.cached.is_present(block) and reader.cached.claim(claim):
                    try:
                        if (data := source.cached.read_verified(block)) is not None:
                            reader.cached.store_block(block, memoryview(data))
                    finally:
                        reader.cached.release_claim(claim)

    def fill(
        self,
        version: ObjectVersion,
        blocks: Iterable[int],
        advance: Callable[[int], None] = lambda size: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Fetch blocks of a version into the cache, and return when they are there.

        Args:
            version: The version.
            blocks: Block numbers.
            advance: Called with the bytes of each piece that is there.
            check: Called between pieces. May raise to end it.

        Raises:
            ObsfsError: A block cannot be fetched.
        """
        with self.reader_for(version) as reader:
            cached, pieces = reader.cached, _pieces(blocks, _FILL_PIECE_BLOCKS)
            waiting: deque[tuple[range, Future[ObsfsError | None]]] = deque()
            piece = next(pieces, None)
            while piece is not None or waiting:
                check()
                if piece is not None and len(waiting) < self.fetcher.connections:
                    landed: Future[ObsfsError | None] = Future()
                    missing = [block for block in piece if not cached.ensure_verified(block)]
                    if missing:
                        self.fetcher.demand(reader.fetch, missing, CountdownCallback(len(missing), landed.set_result))
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

    # status and end

    def statistics(self) -> dict[str, object]:
        """Return counts for ``obsfs status``: bytes, bytes per second, ratios of 1."""
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
        self.fetcher.stop()
        self.background.close()
        self.fetcher.close()
        with self._guard:
            closing = [reader for reader in (*self._readers.values(), *self._retired) if not reader.is_fetching]
            self._readers.clear()
            self._retired.clear()
        # With no lock held: closing a file waits for everyone who writes to it.
        for reader in closing:
            reader.cached.close()
        self.cache.close()

    def abandon(self) -> None:
        """In a forked child: close the inherited descriptors, which would keep the parent's locks after its end.

        Takes no lock. The engine must not be used afterwards.
        """
        for reader in [*self._readers.values(), *self._retired]:
            reader.cached.abandon()
        self.cache.abandon()


def _is_unused(reader: Reader) -> bool:
    """Whether nobody has it open, and nothing is being fetched for it."""
    return not (reader.users or reader.is_fetching)


def _pieces(blocks: Iterable[int], longest: int) -> Iterator[range]:
    """Blocks that follow each other, so many at a time."""
    for run in runs(blocks):
        for start in range(run.start, run.stop, longest):
            yield range(start, min(start + longest, run.stop))
