"""What to want next: the read-ahead policy of one object version. Pure: no I/O, no clock, no threads.

Reads arrive as block numbers. They come from many threads and processes through any number of descriptors, and as
page faults, so descriptors mean nothing here: a *stream* is a run of reads that continue each other in one region,
and any number of streams run through a file side by side.

* A stream earns its window by what it has read: nothing for the first 3 MiB, which may be one random read; then half
  as much, so that one tensor costs at most one and a half times its bytes; as much after 16 MiB, up to the largest
  window. A file that is read from its start, before anything else of it, is being copied: there the window is three
  times what was read from the second block on; as is that of a load that was announced. (Who looks elsewhere first, as
  into the directory of a zip file or the footer of a Parquet file, wants a part.)
* A stream that skips blocks (every fourth tensor, one column of many) loses as much of its window as it skips, so that
  it asks for less, and in the end for nothing beyond what is read. Skipped blocks that come sooner than another request
  would be answered (`cheap_gap`) cost nothing of it. In any case what it has skipped and what it has not yet read
  are together no more than what it has read, and 4 MiB: a part costs at most twice its bytes. The kernel's own
  read-ahead arrives out of order; a block counts as skipped for as long as it has not come.
* A read that continues no stream begins a new one, and gets nothing beyond what it asked for. Only in a loader's order
  (below), where streams have gone on until now (:class:`Credit`; loaders jump from layer to layer and from shard to
  shard), a new one is lent a quarter of what they have earned.
* Where the file says what lies in it (*extents*: the tensors of a safetensors file), a young stream is given the rest
  of the extent that it is in at once, and nothing beyond; in the first, 3 MiB more, as far as a mapped reader's kernel
  reads: if it goes on there, it copies the file. One that goes from extent to extent is a loader's, though it may read
  only the start of each: after the second its window is 16 MiB, and doubles with each further one. It may leave out a
  fifth of the bytes that it passes, as long as no other stream reads them either, which costs it twice as much of its
  window. Who leaves out more (every third tensor, one kind of layer) is given the rest of the extent that it is in.
* Streams share the largest window, so that eight readers together do not want more than one.

A loader reads tensors in the natural order of their names (layer 2 before layer 10), which is not their order in the
file, and goes from shard to shard. So files with extents are watched in both orders, by two policies: in the
loader's own, which runs through all shards of a model, a load is one stream.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from obsfs.access.ranges import runs
from obsfs.access.safetensors import Extent, load_order
from obsfs.cache.layout import BLOCK, PIECE

_MAX_STREAMS = 64
_TAIL_TOLERANCE_BLOCKS = 8
_ACTIVE_READS = 64
_PROBATION_BLOCKS = 4
_ESTABLISHED_BLOCKS = 16
_COPY_FACTOR = 3
_FREE_WASTE_BLOCKS = 4
_REORDER_BLOCKS = 32
"""Positions behind a stream's tail that may still be read: by other threads, or the kernel's read-ahead."""
_MIN_SHARED_WINDOW_BLOCKS = 32
_MAX_CREDIT_BLOCKS = 256
_LOADER_EXTENTS = 2
_READ_PER_MISSED = 4
"""A loader leaves out one position for so many that it reads in. It may be more, or none: reads come out of order."""
_FAULT_AROUND_BLOCKS = 2
_GROUPING_DISTANCE_BLOCKS = 32
_SPARSE_RATIO = 2
_EXTENT_START_PRIORITY = 8
_MAX_MODEL_BLOCKS = 1 << 16
"""Blocks of shards that are watched as one model: in 64 GiB, what the turn of a shard costs is nothing."""


@dataclass(slots=True)
class Credit:
    """What the streams of one model have earned by going on, in blocks, and may lend to those that begin.

    It is spent when it is lent, so that a reader who turns to jumping about costs little.
    """

    balance: int = 0

    def earn(self, blocks: int) -> None:
        """A stream has gone on by so many blocks."""
        self.balance = min(self.balance + blocks, _MAX_CREDIT_BLOCKS)

    def lend(self) -> int:
        """Blocks that a new stream counts as read by it."""
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
    """Blocks that count as read by it besides."""
    from_start: bool
    passed: int
    """The extent in which it began: how many fences lay behind it."""
    begin: int
    last_read: int
    unread: dict[int, bool] = field(default_factory=dict)
    """Positions before the tail that were not read, and may yet be; and whether the gap that they lie in is costly."""
    skipped: int = 0
    """Positions that were not read, and are too far behind to be."""
    skipped_costly: int = 0
    """Those of them that took longer to fetch than to ask anew."""
    dense_from: int = 0
    """Where it went on after it skipped something for the last time."""
    is_filled: bool = False
    """Whether what it skipped before it was known for a loader's has been wanted."""
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
    """Streams through `blocks` positions, with a largest window of `max_window` blocks.

    `fences` are the ascending positions where an extent ends, none if that is not known; `borders` those where a piece
    ends, none if that is every PIECE positions. With `gives_extents`, a young stream is given the rest of its extent.
    """

    blocks: int
    max_window: int
    credit: Credit = field(default_factory=Credit)
    extent_ends: Sequence[int] = ()
    piece_ends: Sequence[int] = ()
    gives_extents: bool = True
    cheap_gap: int = 0
    """Positions that arrive in the time that another request would take to be answered."""
    is_mapped: bool = False
    """Whether a stream was seen that looks at the start of each extent: a loader that has mapped the file, and may read
    what was wanted for it without a read that is seen here."""
    _streams: list[_Stream] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)
    """Extents that any stream has read in."""
    _reads: int = 0

    def on_read(self, first: int, last: int) -> list[tuple[int, int]]:
        """Note a read of the positions `first` to `last`; ``(urgency, position)`` of those wanted now, 0 most urgent.

        A position is wanted once per stream; the caller leaves out those that it has.
        """
        self._reads += 1
        stream = self._continuing(first)
        if stream is None:
            stream = self._begin(first, last)
        else:
            self._go_on(stream, first, last)
        stream.last_read = self._reads
        start = max(stream.tail, stream.ahead)
        stop = min(self.blocks, stream.tail + self._window(stream))
        if start - stream.tail >= _GROUPING_DISTANCE_BLOCKS and stop < self.blocks:
            # By whole pieces: block by block, each would become a request wherever a connection is idle.
            stop = self._border_before(stop)
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

    def _enter(self, stream: _Stream, first: int, last: int) -> None:
        """Note in which extents a stream reads, and which it leaves out. `stream.tail` is where it was before."""
        fences = self.extent_ends
        begin = self._ends_behind(first)
        if first > stream.tail:
            # Two extents share the block at their border: who comes to it from afar means the second.
            # Not within the extent that it is in already: reads of the kernel come out of order.
            begin += stream.extent < begin < len(fences) and first + 1 == fences[begin]
            for extent in range(stream.extent + 1, begin):
                # What is put into the page cache of a loader as it arrives, is read unseen.
                is_unseen = self.is_mapped and fences[extent] <= stream.ahead
                if extent not in self._seen and not is_unseen:
                    stream.missed[extent] = self._size_of(extent)
                    stream.missed_positions += stream.missed[extent]
        end = max(begin, self._ends_behind(last))
        for extent in range(begin, end + 1):
            size = self._size_of(extent)
            if extent > stream.extent:
                stream.entered += size
            # Its last block alone may be read for the next extent's sake.
            if extent not in self._seen and (size == 1 or extent == len(fences) or first + 1 < fences[extent]):
                self._seen.add(extent)
                for other in self._streams:
                    found = other.missed.pop(extent, 0)
                    other.missed_positions -= found
                    other.entered += found
        stream.extent = max(stream.extent, end)

    def _size_of(self, extent: int) -> int:
        stop = self.extent_ends[extent] if extent < len(self.extent_ends) else self.blocks
        return stop - (self.extent_ends[extent - 1] if extent else 0)

    def _go_on(self, stream: _Stream, first: int, last: int) -> None:
        if self.extent_ends:
            self._enter(stream, first, last)
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
        """Whether a read of this position continues a stream without a gap."""
        return any(stream.tail == position for stream in self._streams)

    def forget_wanted(self) -> None:
        """What was wanted and has not come will not come: streams want it again when they go on."""
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

    def _begin(self, first: int, last: int) -> _Stream:
        lent = 0 if self.gives_extents else self.credit.lend()
        count = last + 1 - first
        passed = self._ends_behind(last)
        extent = self.extent_ends[passed - 1] if passed else 0
        # A page fault reads around its page: who begins inside an extent, right before its end, means the next one.
        if (
            passed < len(self.extent_ends)
            and extent < first
            and self.extent_ends[passed] <= last + _FAULT_AROUND_BLOCKS
        ):
            passed += 1
        from_start = first == 0 and not self.extent_ends and not self._streams
        if self.gives_extents:
            # Who has only looked at the start so far wants more than to copy the file.
            for other in self._streams:
                other.from_start = other.from_start and other.own > _PROBATION_BLOCKS
        stream = _Stream(last + 1, last + 1, count, lent, from_start, passed, first, self._reads)
        if self.extent_ends:
            stream.extent = passed - 1
            self._enter(stream, first, last)
        return self._add(stream)

    def begin(self, count: int) -> list[tuple[int, int]]:
        """The first `count` positions are about to be read in order: as `on_read`, before the first read."""
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
            # The kernel's own read-ahead goes on beyond what is read, and must not be taken for a reader.
            if is_young or not crossed:
                window = max(0, min(window, rest)) if self.gives_extents or not is_young else 0
        if missed:
            rest = self.extent_ends[stream.extent] - stream.tail if stream.extent < len(self.extent_ends) else 0
            window = min(window, max(rest, stream.entered - 2 * missed))
        return window

    def _is_from_start(self, stream: _Stream) -> bool:
        """Whether it copies the file, as far as can be told.

        With extents only when it has gone on beyond the first by more than the kernel reads ahead: before that it may
        want no more than one.
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

    def _border_before(self, position: int) -> int:
        if not self.piece_ends:
            return position - position % PIECE
        behind = bisect.bisect_right(self.piece_ends, position)
        return self.piece_ends[behind - 1] if behind else 0

    def _ends_behind(self, position: int) -> int:
        return bisect.bisect_right(self.extent_ends, position)


class LoadOrder:
    """Streams through the blocks of a model's files in the order in which a loader wants them.

    Files have names; a block is a name and a number.
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
        """Take a file in (again); False when there would be too much to watch.

        The order is made anew, and the streams in it begin anew: loaders open the files before they read in them.
        """
        tensors_of = {**self._tensors, name: tensors}
        size = sum(extent.stop - extent.start for found in tensors_of.values() for extent in found)
        if len(tensors_of) > 1 and size > _MAX_MODEL_BLOCKS * BLOCK:
            return False
        self._tensors = tensors_of
        self._order, fences = load_order(tensors_of, BLOCK)
        pieces = [(file, number // PIECE) for file, number in self._order]
        borders = [position for position in range(1, len(pieces)) if pieces[position - 1] != pieces[position]]
        self._position = {block: position for position, block in enumerate(self._order)}
        self._strays = self._find_strays(fences)
        self._policy = ReadAhead(len(self._order), self._max_window, self._credit, fences, borders, gives_extents=False)
        return True

    def _find_strays(self, fences: Sequence[int]) -> set[int]:
        """The blocks at whose end a tensor begins that comes elsewhere in the order, and is read from there."""
        strays = set()
        for name, tensors in self._tensors.items():
            for tensor in tensors:
                block = tensor.start // BLOCK
                if tensor.stop - tensor.start >= BLOCK and tensor.stop > (block + 1) * BLOCK:
                    border, inner = self._position[name, block], self._position[name, block + 1]
                    if bisect.bisect_right(fences, inner) - bisect.bisect_right(fences, border) not in (0, 1):
                        strays.add(border)
        return strays

    @property
    def is_mapped(self) -> bool:
        """As :attr:`ReadAhead.is_mapped`."""
        return self._policy.is_mapped

    def begin(self, count: int) -> list[tuple[int, str, int]]:
        """A load is about to begin: the first `count` blocks, as from `on_read`."""
        return [(urgency, *self._order[position]) for urgency, position in self._policy.begin(count)]

    def on_read(self, name: str, first: int, last: int) -> list[tuple[int, str, int]]:
        """Note a read of blocks; ``(urgency, name, block)`` of those wanted now."""
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
