"""Decide what to read ahead for one object version. Pure: no I/O, no clock, no threads.

Reads arrive as block numbers. They come from many threads and processes through any number of descriptors, and as
page faults, so descriptors mean nothing here. A *stream* is a run of reads that continue each other in one region. Any
number of streams run through a file side by side.

* **A stream earns its window by what it has read.** It gets nothing for its first 3 MiB, which may be one random read.
  Then it gets half as much as it has read, so that one tensor costs at most one and a half times its bytes. From 16 MiB
  on it gets as much as it has read, up to the largest window.
* **A reader that begins at the start of the file copies it.** From its second block on, its window is three times what
  it has read. The same holds for a load that was announced. A reader that looks elsewhere first (the directory of a zip
  file, the footer of a Parquet file) wants a part.
* **A stream that skips blocks gets less.** It loses as much of its window as it skips (every fourth tensor, one column
  of many), and in the end gets nothing beyond what it reads. Gaps shorter than `cheap_gap` cost nothing: their blocks
  arrive sooner than another request would be answered. What a stream skipped and what it has not yet read are together
  at most what it has read, and 4 MiB, so that a part costs at most twice its bytes. The kernel's own read-ahead arrives
  out of order, so a block counts as skipped only until it is read.
* **A read that continues no stream begins a new one**, and gets nothing beyond what it asked for. Only in a loader's
  order (below) is a new stream lent a quarter of what earlier ones earned (:class:`Credit`), because loaders jump from
  layer to layer and from shard to shard.
* **Extents, the tensors of a safetensors file, bound a young stream.** It gets the rest of its extent at once, and
  nothing beyond. In the first extent it gets 3 MiB more, as far as the kernel reads ahead for a mapped reader: a reader
  that continues there copies the file.
* **A stream that goes from extent to extent is a loader's**, though it may read only the start of each. After the
  second extent its window is 16 MiB, and doubles with each further one. It may leave out a fifth of the bytes that it
  passes, unless another stream reads them. Each byte left out costs it twice as much of its window. A stream that
  leaves out more (every third tensor, one kind of layer) gets the rest of its extent.
* **Streams share the largest window**, so that eight readers together do not want more than one.

A loader reads tensors in the natural order of their names (layer 2 before layer 10), which is not their order in the
file, and goes from shard to shard. So two policies watch a file with extents: one in the order of the file, and one in
the loader's order, which runs through all shards of a model and sees a load as one stream.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from obsfs.access.safetensors import Extent, load_order
from obsfs.blocks import BLOCK, PIECE, runs

_MAX_STREAMS = 64
"""Streams remembered for each policy; the one not read for longest is forgotten."""
_TAIL_TOLERANCE_BLOCKS = 8
"""A read so close to a stream's tail, or to what was wanted for it, continues it: reads come out of order."""
_ACTIVE_READS = 64
"""A stream that was read within so many reads of any stream counts as active, and shares the window."""
_PROBATION_BLOCKS = 4
"""A stream of fewer blocks may be one random read, and gets nothing beyond it."""
_ESTABLISHED_BLOCKS = 16
"""A stream of so many blocks is likely to continue: 16 MiB, more than most single reads."""
_COPY_FACTOR = 3
"""The window of a reader that copies the file, in multiples of what it has read."""
_FREE_WASTE_BLOCKS = 4
"""Blocks that a stream may cost beyond twice what it has read."""
_REORDER_BLOCKS = 32
"""Positions behind a stream's tail that may still be read: by other threads, or the kernel's read-ahead."""
_MIN_SHARED_WINDOW_BLOCKS = 32
"""Each active stream's part of the largest window, at least: four full ranges."""
_MAX_CREDIT_BLOCKS = 256
"""Credit never exceeds the largest default window, so that a reader that turns to jumping soon gets nothing."""
_LOADER_EXTENTS = 2
"""A stream that has read in so many extents after its first is a loader's."""
_READ_PER_MISSED = 4
"""A loader reads in so many positions for each that it leaves out. It may be more: reads come out of order."""
_FAULT_AROUND_BLOCKS = 2
"""A page fault reads up to so many blocks around its page, so a read may begin before the extent that it is for."""
_GROUPING_DISTANCE_BLOCKS = 32
"""Beyond this distance, whole pieces are wanted at a time: single blocks would each become a request."""
_SPARSE_RATIO = 2
"""A stream that has read less than one in so many blocks looks at the start of each extent only."""
_EXTENT_START_PRIORITY = 8
"""The start of an extent is so many times more urgent, for a stream that looks at starts."""
_MAX_MODEL_BLOCKS = 1 << 16
"""Blocks of shards that are watched as one model, 64 GiB: the change from one larger shard to the next costs little."""


@dataclass(slots=True)
class Credit:
    """Blocks that the streams of one model have earned by continuing, and may lend to new ones.

    Lending spends it, so that a reader that turns to jumping costs little.
    """

    balance: int = 0

    def earn(self, blocks: int) -> None:
        """Count that a stream has continued by so many blocks."""
        self.balance = min(self.balance + blocks, _MAX_CREDIT_BLOCKS)

    def lend(self) -> int:
        """Return how many blocks a new stream may count as read by it, and spend them."""
        lent = self.balance // 4 if self.balance >= _ESTABLISHED_BLOCKS else 0
        self.balance -= lent
        return lent


@dataclass(slots=True)
class _Stream:
    tail: int
    """The position after the furthest read one."""
    ahead: int
    """The position after the furthest wanted one."""
    own: int
    """Blocks read by this stream."""
    lent: int
    """Blocks that count as read by it, though it has not read them."""
    from_start: bool
    passed: int
    """The extent in which it began: how many extents end before it."""
    begin: int
    last_read: int
    unread: dict[int, bool] = field(default_factory=dict)
    """Positions before the tail that may yet be read, and whether each lies in a costly gap."""
    skipped: int = 0
    """Positions that were not read, and are too far behind the tail to be read."""
    skipped_costly: int = 0
    """Those of them that take longer to fetch than another request takes to be answered."""
    dense_from: int = 0
    """Where it continued after its last gap."""
    is_filled: bool = False
    """Whether what it skipped before it was recognised as a loader's has been wanted."""
    extent: int = -1
    """The furthest extent that it has read in."""
    entered: int = 0
    """Positions of all extents that it has passed, and that it or another stream has read in."""
    missed: dict[int, int] = field(default_factory=dict)
    """The other extents that it has passed, and how many positions each has."""
    missed_positions: int = 0
    """How many they have together."""


@dataclass
class ReadAhead:
    """The streams through a file, or through a model's blocks in a loader's order.

    Args:
        blocks: Positions: block numbers, or places in a loader's order.
        max_window: Largest window, in blocks.
        credit: What streams earned, shared by the policies of a model.
        extent_ends: Ascending positions where an extent ends; empty if that is not known.
        piece_ends: Ascending positions where a piece ends; empty if that is every PIECE positions.
        gives_extents: Whether a young stream gets the rest of its extent.
    """

    blocks: int
    max_window: int
    credit: Credit = field(default_factory=Credit)
    extent_ends: Sequence[int] = ()
    piece_ends: Sequence[int] = ()
    gives_extents: bool = True
    cheap_gap: int = 0
    """Positions that arrive in the time that another request takes to be answered."""
    is_mapped: bool = False
    """Whether a stream was seen that looks at the start of each extent: a loader that has mapped the file. It may read
    what was wanted for it from the page cache, without a read that is seen here."""
    _streams: list[_Stream] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)
    """Extents that any stream has read in."""
    _reads: int = 0

    def on_read(self, first: int, last: int) -> list[tuple[int, int]]:
        """Note a read, and return what is wanted now.

        Args:
            first: First position.
            last: Last position.

        Returns:
            ``(urgency, position)``, 0 most urgent. A stream wants a position once; the caller leaves out blocks that
            the cache has.
        """
        self._reads += 1
        extents = self._extents_of(first, last)
        stream = self._continuing(first)
        if stream is None:
            stream = self._begin(first, last, extents)
        else:
            self._continue(stream, first, last, extents)
        stream.last_read = self._reads
        start = max(stream.tail, stream.ahead)
        stop = min(self.blocks, stream.tail + self._window(stream))
        if start - stream.tail >= _GROUPING_DISTANCE_BLOCKS and stop < self.blocks:
            # By whole pieces: each single block would become a request wherever a connection is idle.
            stop = self._piece_end_before(stop)
        if start >= stop:
            return []
        stream.ahead = stop
        wanted = [(position - last, position) for position in range(start, stop)]
        if self._is_loader(stream):
            if stream.own * _SPARSE_RATIO < stream.tail - stream.begin:
                # It looks at the start of each extent, to come back for the rest in the order in which it went.
                self.is_mapped = True
                wanted = [
                    (
                        distance // _EXTENT_START_PRIORITY if self._is_start(position) else position - stream.begin,
                        position,
                    )
                    for distance, position in wanted
                ]
            if not stream.is_filled:
                wanted += [(position - stream.begin, position) for position in range(stream.begin, start)]
                stream.is_filled = True
        return wanted

    def _extents_of(self, first: int, last: int) -> tuple[int, int]:
        """Return the extents of the positions `first` and `last`: how many extents end before each."""
        ends = self.extent_ends
        begin = end = self._ends_behind(first)
        while end < len(ends) and ends[end] <= last:
            end += 1
        return begin, end

    def _enter(self, stream: _Stream, first: int, extents: tuple[int, int]) -> None:
        """Note in which extents a stream reads, and which it leaves out. `stream.tail` is where it was before."""
        ends = self.extent_ends
        begin, end = extents
        if first > stream.tail:
            # Two extents share the block at their border. A stream that comes to it from afar means the second one.
            # Not within the extent that it is in already: the kernel's reads come out of order.
            begin += stream.extent < begin < len(ends) and first + 1 == ends[begin]
            for extent in range(stream.extent + 1, begin):
                # What is put into a loader's page cache as it arrives is read unseen.
                is_unseen = self.is_mapped and ends[extent] <= stream.ahead
                if extent not in self._seen and not is_unseen:
                    stream.missed[extent] = self._size_of(extent)
                    stream.missed_positions += stream.missed[extent]
        end = max(begin, end)
        for extent in range(begin, end + 1):
            size = self._size_of(extent)
            if extent > stream.extent:
                stream.entered += size
            # Its last block alone may be read for the sake of the next extent.
            if extent not in self._seen and (size == 1 or extent == len(ends) or first + 1 < ends[extent]):
                self._seen.add(extent)
                for other in self._streams:
                    positions = other.missed.pop(extent, 0)
                    other.missed_positions -= positions
                    other.entered += positions
        stream.extent = max(stream.extent, end)

    def _size_of(self, extent: int) -> int:
        stop = self.extent_ends[extent] if extent < len(self.extent_ends) else self.blocks
        return stop - (self.extent_ends[extent - 1] if extent else 0)

    def _continue(self, stream: _Stream, first: int, last: int, extents: tuple[int, int]) -> None:
        if self.extent_ends:
            self._enter(stream, first, extents)
        for position in range(first, min(last + 1, stream.tail)):
            if stream.unread.pop(position, None) is not None:
                stream.own += 1
        if last < stream.tail:
            return
        if first > stream.tail and not self.extent_ends:
            is_costly = first - stream.tail > self.cheap_gap
            near = max(stream.tail, first - _REORDER_BLOCKS)
            stream.unread |= dict.fromkeys(range(near, first), is_costly)
            stream.skipped += near - stream.tail
            stream.skipped_costly += (near - stream.tail) * is_costly
            stream.dense_from = first
        stream.own += last + 1 - max(first, stream.tail)
        if stream.own > _PROBATION_BLOCKS:
            self.credit.earn(last + 1 - stream.tail)
        stream.tail = last + 1
        # In ascending order but for what was skipped at different times, which lies behind.
        for position in [position for position in stream.unread if position < stream.tail - _REORDER_BLOCKS]:
            stream.skipped += 1
            stream.skipped_costly += stream.unread.pop(position)
        if stream.skipped and stream.tail - stream.dense_from >= _ESTABLISHED_BLOCKS:
            # It reads all from here on, as if it had begun there.
            stream.begin = stream.dense_from
            stream.own = stream.tail - stream.begin
            stream.skipped = stream.skipped_costly = 0
            stream.unread = {position: costly for position, costly in stream.unread.items() if position >= stream.begin}

    def is_tail(self, position: int) -> bool:
        """Say whether a read of this position continues a stream without a gap."""
        return any(stream.tail == position for stream in self._streams)

    def forget_wanted(self) -> None:
        """Forget what was wanted and has not arrived: streams want it again when they continue."""
        for stream in self._streams:
            stream.ahead = stream.tail

    def _continuing(self, first: int) -> _Stream | None:
        best = None
        nearest = 0
        for stream in self._streams:
            if stream.tail - _TAIL_TOLERANCE_BLOCKS <= first <= max(
                stream.tail, stream.ahead
            ) + _TAIL_TOLERANCE_BLOCKS or self._is_hop(stream, first):
                distance = abs(first - stream.tail)
                if best is None or distance < nearest:
                    best, nearest = stream, distance
        return best

    def _is_hop(self, stream: _Stream, first: int) -> bool:
        """Whether a read is where the extent after the stream's begins, as when a loader looks at one after another."""
        behind = self._ends_behind(stream.tail)
        return (
            behind < len(self.extent_ends)
            and -_FAULT_AROUND_BLOCKS <= first - self.extent_ends[behind] <= _TAIL_TOLERANCE_BLOCKS
        )

    def _begin(self, first: int, last: int, extents: tuple[int, int]) -> _Stream:
        lent = 0 if self.gives_extents else self.credit.lend()
        count = last + 1 - first
        passed = extents[1]
        extent = self.extent_ends[passed - 1] if passed else 0
        # A page fault reads around its page: a read that begins right before the end of an extent is for the next.
        if (
            passed < len(self.extent_ends)
            and extent < first
            and self.extent_ends[passed] <= last + _FAULT_AROUND_BLOCKS
        ):
            passed += 1
        from_start = first == 0 and not self.extent_ends and not self._streams
        if self.gives_extents:
            # A reader that has only looked at the start so far does not just copy the file.
            for other in self._streams:
                other.from_start = other.from_start and other.own > _PROBATION_BLOCKS
        stream = _Stream(last + 1, last + 1, count, lent, from_start, passed, first, self._reads)
        if self.extent_ends:
            stream.extent = passed - 1
            self._enter(stream, first, extents)
        return self._add(stream)

    def begin(self, count: int) -> list[tuple[int, int]]:
        """Return the first `count` positions, as `on_read` does: they are about to be read in order."""
        stop = min(count, self.blocks, self.max_window)
        self._add(_Stream(0, stop, 0, stop // _COPY_FACTOR, True, 0, 0, self._reads))
        return [(position, position) for position in range(stop)]

    def _add(self, stream: _Stream) -> _Stream:
        if len(self._streams) == _MAX_STREAMS:
            self._streams.remove(min(self._streams, key=lambda other: other.last_read))
        self._streams.append(stream)
        return stream

    def _window(self, stream: _Stream) -> int:
        missed = stream.missed_positions
        if missed > stream.entered // _READ_PER_MISSED:
            stream.lent = 0
        gaps = stream.skipped + len(stream.unread) + missed
        run = stream.own + stream.lent - stream.skipped_costly - sum(stream.unread.values()) - missed
        from_start = self._is_from_start(stream)
        if from_start and run > 1 and gaps <= stream.own // 4:
            window = _COPY_FACTOR * run
        else:
            window = run if run >= _ESTABLISHED_BLOCKS else run // 2 if run >= _PROBATION_BLOCKS else 0
            window = min(window, max(0, stream.own + stream.lent + _FREE_WASTE_BLOCKS - gaps))
        active = sum(1 for other in self._streams if other.last_read + _ACTIVE_READS > self._reads)
        window = min(window, max(self.max_window // max(active, 1), min(_MIN_SHARED_WINDOW_BLOCKS, self.max_window)))
        crossed = self._crossed(stream)
        if self._is_loader(stream):
            window = max(window, min(_ESTABLISHED_BLOCKS << crossed - _LOADER_EXTENTS, self.max_window))
        elif stream.passed < len(self.extent_ends) and not from_start:
            beyond = _FAULT_AROUND_BLOCKS + 1 if self._is_first(stream) else 0
            rest = self.extent_ends[stream.passed] + beyond - stream.tail
            is_young = stream.own < _ESTABLISHED_BLOCKS
            if is_young and stream.own > 1:
                window = max(window, min(_ESTABLISHED_BLOCKS, self.max_window))
            # The kernel's own read-ahead reaches beyond what is read, and must not be taken for a reader.
            if is_young or not crossed:
                window = max(0, min(window, rest)) if self.gives_extents or not is_young else 0
        if missed:
            rest = self.extent_ends[stream.extent] - stream.tail if stream.extent < len(self.extent_ends) else 0
            window = min(window, max(rest, stream.entered - 2 * missed))
        return window

    def _is_from_start(self, stream: _Stream) -> bool:
        """Whether it seems to copy the file.

        In a file with extents, that shows only once it has read beyond the first one by more than the kernel reads
        ahead. Before that it may want just one.
        """
        return stream.from_start or (
            self._is_first(stream) and stream.tail > self.extent_ends[0] + _FAULT_AROUND_BLOCKS
        )

    def _is_first(self, stream: _Stream) -> bool:
        return bool(self.extent_ends) and stream.begin <= _FAULT_AROUND_BLOCKS and not stream.passed

    def _is_start(self, position: int) -> bool:
        """Whether an extent begins here or in the next block: a page fault reads around the page."""
        behind = self._ends_behind(position + 1)
        return bool(behind) and position <= self.extent_ends[behind - 1]

    def _is_loader(self, stream: _Stream) -> bool:
        """Whether it goes from extent to extent, and leaves out few."""
        return (
            self._crossed(stream) >= _LOADER_EXTENTS and stream.missed_positions <= stream.entered // _READ_PER_MISSED
        )

    def _crossed(self, stream: _Stream) -> int:
        """How many extents it has read in, after that in which it began."""
        return max(0, stream.extent - stream.passed - len(stream.missed))

    def _piece_end_before(self, position: int) -> int:
        if not self.piece_ends:
            return position - position % PIECE
        behind = bisect.bisect_right(self.piece_ends, position)
        return self.piece_ends[behind - 1] if behind else 0

    def _ends_behind(self, position: int) -> int:
        return bisect.bisect_right(self.extent_ends, position)


class LoadOrder:
    """The streams through a model's files in the order in which a loader reads them.

    Args:
        max_window: Largest window, in blocks.
        credit: What streams earned, shared by the policies of the model.
    """

    def __init__(self, max_window: int, credit: Credit) -> None:
        self._max_window = max_window
        self._credit = credit
        self._tensors: dict[str, Sequence[Extent]] = {}
        self._order: list[tuple[str, int]] = []
        self._position: dict[tuple[str, int], int] = {}
        self._strays: set[int] = set()
        self._policy = ReadAhead(0, max_window, credit)

    def add(self, name: str, tensors: Sequence[Extent]) -> bool:
        """Add a file, or replace what is known of it.

        That makes the order anew, and all streams in it begin again: loaders open the files before they read in them.

        Args:
            name: The file's name, any text.
            tensors: Its tensors.

        Returns:
            False when there would be too much to watch; then nothing has changed.
        """
        tensors_of = {**self._tensors, name: tensors}
        size = sum(extent.stop - extent.start for found in tensors_of.values() for extent in found)
        if len(tensors_of) > 1 and size > _MAX_MODEL_BLOCKS * BLOCK:
            return False
        self._tensors = tensors_of
        self._order, ends = load_order(tensors_of, BLOCK)
        pieces = [(file, number // PIECE) for file, number in self._order]
        piece_ends = [position for position in range(1, len(pieces)) if pieces[position - 1] != pieces[position]]
        self._position = {block: position for position, block in enumerate(self._order)}
        self._strays = self._find_strays(ends)
        self._policy = ReadAhead(
            len(self._order), self._max_window, self._credit, ends, piece_ends, gives_extents=False
        )
        return True

    def _find_strays(self, ends: Sequence[int]) -> set[int]:
        """Return the blocks in whose end a tensor begins that comes elsewhere in the order, and is read from there."""
        strays = set()
        for name, tensors in self._tensors.items():
            for tensor in tensors:
                block = tensor.start // BLOCK
                if tensor.stop - tensor.start >= BLOCK and tensor.stop > (block + 1) * BLOCK:
                    shared, inner = self._position[name, block], self._position[name, block + 1]
                    if bisect.bisect_right(ends, inner) - bisect.bisect_right(ends, shared) not in (0, 1):
                        strays.add(shared)
        return strays

    @property
    def is_mapped(self) -> bool:
        """As :attr:`ReadAhead.is_mapped`."""
        return self._policy.is_mapped

    def begin(self, count: int) -> list[tuple[int, str, int]]:
        """Return the first `count` blocks, as `on_read` does: a load is about to begin."""
        return [(urgency, *self._order[position]) for urgency, position in self._policy.begin(count)]

    def on_read(self, name: str, first: int, last: int) -> list[tuple[int, str, int]]:
        """Note a read of blocks of a file, and return ``(urgency, name, block)`` of those wanted now."""
        wanted = []
        places = (self._position.get((name, block)) for block in range(first, last + 1))
        for run in runs(place for place in places if place is not None):
            if len(run) == 1 and run.start in self._strays and not self._policy.is_tail(run.start):
                continue
            wanted += [(urgency, *self._order[p]) for urgency, p in self._policy.on_read(run.start, run.stop - 1)]
        return wanted

    def forget_wanted(self) -> None:
        """As :meth:`ReadAhead.forget_wanted`."""
        self._policy.forget_wanted()
