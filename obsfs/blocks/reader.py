"""Reading one pinned version through cache and fetcher; and :class:`Engine`, which hands out such readers."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from obsfs.blocks import safetensors
from obsfs.blocks.cache import Cache, CachedObject
from obsfs.blocks.fetcher import Fetcher, Target, Waiter
from obsfs.blocks.layout import BLOCK, block_count
from obsfs.blocks.readahead import Credit, LoadOrder, ReadAhead
from obsfs.errors import ObsfsError, UnavailableError
from obsfs.remote.client import Bucket, ObjectVersion
from obsfs.settings import Settings

log = logging.getLogger(__name__)

_IDLE_READERS = 64
_DIRECTORIES = 256
_STRAINED_WINDOW = 16
_WARM_STEP = 64


class Reader:
    """The bytes of one object version, shared by all who have it open. Safe to use from many threads."""

    def __init__(self, engine: Engine, cached: CachedObject) -> None:
        self.version = cached.version
        self.size = cached.size
        self.cached = cached
        self.users = 0
        self._engine = engine
        self.target = Target(cached, self._on_idle)
        window = min(engine.read_ahead, engine.cache.limit // 4)
        self._has_tensors = cached.version.key.endswith(safetensors.SUFFIX)
        self._load_order: LoadOrder | None = None
        # Until the tensors are known, the start of such a file is its header, and nobody's stream.
        fences = (0,) if self._has_tensors else ()
        self._policy = ReadAhead(cached.blocks, max(0, window // BLOCK), engine.credit(cached.version), fences)
        self._guard = threading.Lock()
        self._is_complete = cached.is_complete()
        if not self._is_complete and all(map(cached.is_present, range(cached.blocks))):
            engine.fetcher.later(self._settle)

    @property
    def is_complete(self) -> bool:
        """Whether every byte is verified and in the cache file now."""
        return self.cached.is_complete()

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
        if not (self._is_complete and cached.in_file(blocks)):
            missing = [block for block in blocks if not cached.has(block)]
        if missing:
            self._is_complete = False
            # Demand first: a worker that wakes must find it before the read-ahead.
            self._engine.fetcher.demand(self.target, missing, Waiter(len(missing), done))
        if not again:
            cached.touch(blocks)
            self._engine.count_read(size, len(blocks), len(missing))
            if not self._is_complete:
                self._prefetch(first, last)
        return not missing

    def _prefetch(self, first: int, last: int) -> None:
        with self._guard:
            if self._load_order is None and self._has_tensors:
                self._learn_tensors()
            ahead = self._policy.on_read(first, last)
            if self._load_order is not None:
                ahead += self._load_order.on_read(first, last)
        if self._engine.cache.is_strained:
            ahead = ahead[:_STRAINED_WINDOW]
        wanted = [(urgency, block) for urgency, block in ahead if not self.cached.is_present(block)]
        if wanted:
            self._engine.fetcher.prefetch(self.target, wanted)

    def _learn_tensors(self) -> None:
        """Once the header of a safetensors file is here, watch the file tensor by tensor."""
        found = safetensors.extents(self.size, self._peek)
        if found is None:
            return
        self._has_tensors = False
        if found:
            window, credit = self._policy.max_window, self._policy.credit
            order, fences = safetensors.load_order(found, BLOCK)
            self._load_order = LoadOrder(order, window, credit, fences)
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

    def _on_idle(self) -> None:
        if self.target.wants or self._is_complete:
            return
        # Fetching has paused; whether it is over is looked at once per pause, off the readers' way.
        if self.cached.is_present(0) and self.cached.is_present(self.cached.blocks - 1):
            self._engine.fetcher.later(self._settle)

    def _settle(self) -> None:
        """If the file has become complete: seal it and tell who wants to know."""
        with self._engine.borrowed(self) as alive:
            if not alive or self._is_complete:
                return
            if not all(self.cached.has(block) for block in range(self.cached.blocks)) or not self.is_complete:
                return
            self._is_complete = True
            self._engine.on_complete(self.version)
            self.cached.seal()

    def drop_prefetch(self) -> None:
        """Nobody has it open: fetch no more than what is in flight."""
        self._engine.fetcher.drop_prefetch(self.target)
        with self._guard:
            self._policy.forget_wanted()
            if self._load_order is not None:
                self._load_order.forget_wanted()

    @property
    def is_fetching(self) -> bool:
        """Whether blocks are still wanted or in flight."""
        return self.target.is_busy


class _Borrowed:
    def __init__(self, engine: Engine, reader: Reader) -> None:
        self._engine, self._reader = engine, reader

    def __enter__(self) -> bool:
        return self._engine._borrow(self._reader)

    def __exit__(self, *_: object) -> None:
        self._engine.release(self._reader)


class Engine:
    """One cache, one set of connections: what the mount and the fsspec file system both read through.

    Closing it ends its threads. `on_complete` is called with a version that has become wholly cached.
    """

    def __init__(self, bucket: Bucket, settings: Settings) -> None:
        self.cache = Cache(settings.cache_dir, int(settings.cache_size))
        self.fetcher = Fetcher(
            bucket.open_range, connections=settings.connections, retry_timeout=settings.retry_timeout
        )
        self.read_ahead = int(settings.read_ahead)
        self.on_complete: Callable[[ObjectVersion], None] = lambda version: None
        self.bytes_read = 0
        self.blocks_hit = 0
        self.blocks_missed = 0
        self._readers: OrderedDict[ObjectVersion, Reader] = OrderedDict()
        self._credits: dict[tuple[str, str], Credit] = {}
        self._guard = threading.Lock()
        self.fetcher.later(lambda: self.cache.evict(self.cache.limit))

    def open(self, version: ObjectVersion) -> Reader:
        """A reader of `version`, to be given back with :meth:`release`. Raises CacheError."""
        with self._guard:
            reader = self._readers.get(version)
            if reader is None:
                reader = self._readers[version] = Reader(self, self.cache.open(version))
            self._readers.move_to_end(version)
            reader.users += 1
            self._close_idle()
            return reader

    def release(self, reader: Reader) -> None:
        """Give a reader back. It is kept for a while with what it has learnt about its streams."""
        with self._guard:
            reader.users -= 1
            last = not reader.users
        if last:
            reader.drop_prefetch()

    def borrowed(self, reader: Reader) -> _Borrowed:
        """A context that keeps a reader from being closed; its value is False when it has been already."""
        return _Borrowed(self, reader)

    def _borrow(self, reader: Reader) -> bool:
        with self._guard:
            reader.users += 1
            return self._readers.get(reader.version) is reader

    def _close_idle(self) -> None:
        excess = len(self._readers) - _IDLE_READERS
        for version, reader in list(self._readers.items()) if excess > 0 else ():
            if excess > 0 and not reader.users and not reader.is_fetching:
                del self._readers[version]
                reader.cached.close()
                excess -= 1

    def credit(self, version: ObjectVersion) -> Credit:
        """The credit of the directory that this file is in. The caller holds the engine's guard."""
        place = version.bucket, version.key.rpartition("/")[0]
        credit = self._credits.setdefault(place, Credit())
        if len(self._credits) > _DIRECTORIES:
            del self._credits[next(iter(self._credits))]
        return credit

    def fetch_start(self, version: ObjectVersion) -> None:
        """Have the first block of a file at hand soon: somebody is about to open it. Raises CacheError."""
        reader = self.open(version)

        def done(error: ObsfsError | None) -> None:
            self.fetcher.later(lambda: self.release(reader))

        if reader.is_complete or reader.cached.is_present(0):
            self.release(reader)
        else:
            self.fetcher.demand(reader.target, [0], Waiter(1, done))

    def warm(self, version: ObjectVersion, size: int) -> None:
        """Have the first `size` bytes of a wholly cached file in the kernel's page cache soon, while it is open.

        Raises CacheError.
        """
        reader = self.open(version)
        steps = (range(start, start + _WARM_STEP) for start in range(0, block_count(size), _WARM_STEP))

        def go_on() -> None:
            step = next(steps, None)
            if step is None or reader.users == 1:
                self.release(reader)
            else:
                reader.cached.warm(step)
                self.fetcher.later(go_on)

        self.fetcher.later(go_on)

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
            "retries": stats.retries,
            "errors": stats.errors,
            "last_error": stats.last_error,
            "cache_dir": str(cache.directory),
            "cache_bytes": cache.used_bytes,
            "cache_limit": cache.limit,
            "evicted_bytes": cache.evicted_bytes,
            "corrupt_blocks": cache.corrupt_blocks,
            "cache_write_errors": cache.write_errors,
        }

    def close(self) -> None:
        """End all fetching and close the files."""
        self.fetcher.close()
        with self._guard:
            for reader in self._readers.values():
                if not reader.is_fetching:
                    reader.cached.close()
            self._readers.clear()
        self.cache.close()
