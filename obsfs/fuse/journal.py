"""What a server has told the kernel, in a file that outlives it: one JSON list per line.

Each record is written before the kernel hears of it. A process that dies loses nothing that way, since the page
cache is the kernel's; a machine that goes down loses the mount as well, so that nothing is synced.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

_COMPACT_AFTER = 20_000


class Journal:
    """An append-only file. `snapshot` gives the records that stand for all that was recorded so far.

    With `keep` a predecessor's is gone on with once :meth:`renew` was called, else it begins empty.
    """

    def __init__(
        self, path: Path, snapshot: Callable[[], Iterable[list[object]]] = tuple, *, keep: bool = False
    ) -> None:
        self.path = path
        self.snapshot = snapshot
        self._guard = threading.Lock()
        start = 0 if keep else os.O_TRUNC
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | start | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._records = 0
        self._floor = 0

    def renew(self) -> None:
        """Write it anew from the snapshot, in one go."""
        with self._guard:
            self._compact()

    def record(self, change: list[object]) -> None:
        """Append one record; once in a while, write the file anew without what is over."""
        with self._guard:
            os.write(self._fd, json.dumps(change).encode() + b"\n")
            self._records += 1
            if self._records > max(_COMPACT_AFTER, 4 * self._floor):
                self._compact()

    def _compact(self) -> None:
        fresh = self.path.with_suffix(".new")
        lines = [json.dumps(change).encode() + b"\n" for change in self.snapshot()]
        fresh.write_bytes(b"".join(lines))
        fresh.chmod(0o600)
        fd = os.open(fresh, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        fresh.replace(self.path)
        os.close(self._fd)
        self._fd = fd
        self._records = self._floor = len(lines)

    def close(self) -> None:
        """Close and remove the file: the mount is over."""
        os.close(self._fd)
        self.path.unlink(missing_ok=True)


def read(path: Path) -> list[list[object]]:
    """All whole records of a journal; a last line that was cut off is left out."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
