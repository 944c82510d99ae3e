"""What to want next: the read-ahead policy of one object version. Pure: no I/O, no clock, no threads.

Reads arrive as block numbers. They come from many threads and processes through any number of descriptors, and as
page faults, so descriptors mean nothing here: a *stream* is a run of reads that continue each other in one region,
and any number of streams run through a file side by side.

* A stream earns its window by what it has read: half as much at first, so that one tensor costs at most one and a
  half times its bytes; as much after 16 MiB; twice as much after 32 MiB, up to the largest window. A stream from
  the start of the file is how files are copied, so that its window doubles from the second block.
* A read that continues no stream begins a new one, and gets nothing beyond what it asked for. Only in a file that
  has been read in sequence until now (loaders jump from layer to layer) a new stream is lent a quarter of it.
* Streams share the largest window, so that eight readers together do not want more than one.
"""

from __future__ import annotations

from dataclasses import dataclass

_STREAMS = 64
_SLACK = 8
_ACTIVE = 64
_START = 16
_DOUBLE = 32


@dataclass(slots=True)
class _Stream:
    tail: int
    """The block after the furthest read one."""
    ahead: int
    """The block after the furthest wanted one."""
    run: int
    """Blocks read by this stream, those lent to it included."""
    from_start: bool
    last_read: int


class ReadAhead:
    """Streams through an object of `blocks` blocks, with a largest window of `max_window` blocks."""

    def __init__(self, blocks: int, max_window: int) -> None:
        self.blocks = blocks
        self.max_window = max_window
        self._streams: list[_Stream] = []
        self._reads = 0
        self._touched = 0
        self._continued = 0

    def on_read(self, first: int, last: int) -> range:
        """Note a read of the blocks `first` to `last`, and say which blocks beyond it are wanted now, nearest first.

        A block is wanted once per stream; the caller leaves out those that it has.
        """
        self._reads += 1
        count = last - first + 1
        stream = self._continuing(first)
        if stream is None:
            self._touched += count
            stream = self._begin(first, last)
        elif last >= stream.tail:
            fresh = last + 1 - max(first, stream.tail)
            self._touched += fresh
            self._continued += fresh
            stream.run += fresh
            stream.tail = last + 1
        stream.last_read = self._reads
        start = max(stream.tail, stream.ahead)
        stop = min(self.blocks, stream.tail + self._window(stream))
        if start >= stop:
            return range(0)
        stream.ahead = stop
        return range(start, stop)

    def forget_wanted(self) -> None:
        """What was wanted and has not come will not come: streams want it again when they go on."""
        for stream in self._streams:
            stream.ahead = stream.tail

    def _continuing(self, first: int) -> _Stream | None:
        best = None
        nearest = 0
        for stream in self._streams:
            if stream.tail - _SLACK <= first <= max(stream.tail, stream.ahead) + _SLACK:
                distance = abs(first - stream.tail)
                if best is None or distance < nearest:
                    best, nearest = stream, distance
        return best

    def _begin(self, first: int, last: int) -> _Stream:
        run = last - first + 1
        if self._touched >= _START and self._continued * 4 >= self._touched * 3:
            run += self._touched // 4
        stream = _Stream(last + 1, last + 1, run, first == 0, self._reads)
        if len(self._streams) == _STREAMS:
            self._streams.remove(min(self._streams, key=lambda other: other.last_read))
        self._streams.append(stream)
        return stream

    def _window(self, stream: _Stream) -> int:
        run = stream.run
        if run >= _DOUBLE or (stream.from_start and run > 1):
            window = 2 * run
        elif run >= _START:
            window = run
        else:
            window = run // 2
        active = sum(1 for other in self._streams if other.last_read + _ACTIVE > self._reads)
        return min(window, max(self.max_window // max(active, 1), _SLACK))
