"""The takeover log: what a server has told the kernel, for its successor. One JSON list per line.

Each record is written before the kernel hears of it. A process that dies loses nothing, since the page cache is the
kernel's. Nothing is synced: a machine that goes down loses the mount as well.

The first record names the format: ``["obsfs-journal", 1]``. A file without it is of format 0, in which nobody counted
lookups. A reader knows all formats up to its own, and refuses a later one. Within a format, kinds of records may be
added: a reader leaves out those that it does not know.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from obsfs.errors import UsageError

log = logging.getLogger(__name__)

FORMAT = 1
_MAGIC = "obsfs-journal"
_COMPACT_AFTER = 20_000
_MEND_SECONDS = 1.0


class TakeoverLog:
    """An append-only file. `snapshot` gives the records that stand for all that was recorded so far.

    With `keep` a predecessor's is gone on with once :meth:`renew` was called, else it begins empty. `on_whole` is told
    False when the disk does not take a record, and True once the file was written anew, with all of them.
    """

    def __init__(
        self,
        path: Path,
        snapshot: Callable[[], Iterable[list[object]]] = tuple,
        *,
        keep: bool = False,
        on_whole: Callable[[bool], None] = lambda is_whole: None,
    ) -> None:
        self.path = path
        self.snapshot = snapshot
        self.on_whole = on_whole
        self._guard = threading.Lock()
        start = 0 if keep else os.O_TRUNC
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | start | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._records = 0
        self._floor = 0
        self._next_try = 0.0
        self.is_whole = True
        """Whether the file holds everything that was recorded."""
        if not keep:
            self.record([_MAGIC, FORMAT])

    def renew(self) -> None:
        """Write the file again from the snapshot, in one go; later, if the disk takes no more now.

        For a successor that does not serve yet, so that nobody records anything meanwhile.
        """
        # Before the guard: the snapshot takes the lock that everyone holds who records.
        records = list(self.snapshot())
        with self._guard:
            try:
                self._compact(records)
            except OSError as error:
                self._note_loss(error)

    def record(self, *changes: list[object]) -> None:
        """Append records; once in a while, write the file anew without what is over.

        A disk that takes no more fails nobody: a successor will not know what is missing.
        """
        with self._guard:
            try:
                if self.is_whole:
                    data = b"".join(map(_line, changes))
                    if os.write(self._fd, data) != len(data):
                        raise OSError("the disk is full")
                    self._records += len(changes)
                if self._records > max(_COMPACT_AFTER, 4 * self._floor) or self._is_mending_due():
                    self._compact(self.snapshot())
            except OSError as error:
                self._note_loss(error)

    def _note_loss(self, error: OSError) -> None:
        if self.is_whole:
            log.error("%s cannot be written (%s): a server that follows will not know all", self.path, error)
            self.is_whole = False
            self.on_whole(False)
        self._next_try = time.monotonic() + _MEND_SECONDS

    def _is_mending_due(self) -> bool:
        return not self.is_whole and time.monotonic() >= self._next_try

    def _compact(self, records: Iterable[list[object]]) -> None:
        fresh = self.path.with_suffix(".new")
        lines = [_line([_MAGIC, FORMAT]), *map(_line, records)]
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            data = memoryview(b"".join(lines))
            while data:
                data = data[os.write(fd, data) :]
            fresh.replace(self.path)
        except OSError:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd = fd
        self._records = self._floor = len(lines)
        if not self.is_whole:
            self.is_whole = True
            self.on_whole(True)

    def close(self) -> None:
        """Close and remove the file, when the mount is over."""
        os.close(self._fd)
        self.path.unlink(missing_ok=True)


class Records(NamedTuple):
    """What a takeover log holds. `damaged` counts lines that cannot be read; `format` is that of its first record."""

    format: int
    records: list[list[object]]
    damaged: int


def read(path: Path) -> Records:
    """All records of a journal that can be read; a last line that was cut off does not count.

    Raises UsageError for a format that is later than this program's, and OSError.
    """
    number, records, damaged = 0, [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, list) or len(record) < 2:
            damaged += 1
        elif record[0] == _MAGIC:
            number = record[1] if isinstance(record[1], int) else FORMAT + 1
        else:
            records.append(record)
    if number > FORMAT:
        raise UsageError(f"{path} was written by a later version of obsfs", "install that version, or mount again")
    return Records(number, records, damaged)


def _line(record: list[object]) -> bytes:
    return json.dumps(record).encode() + b"\n"
