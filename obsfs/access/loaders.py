"""How loaders of models open the files of a directory, and what they are about to read. Pure.

A loader opens one file after the other, with a wait for each, and gives itself away by the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from obsfs.access import safetensors
from obsfs.store.types import ObjectInfo
from obsfs.vfs.listings import Entry

CONFIG = "config.json"
INDEX = ".safetensors.index.json"
_SMALL = 256 << 10
_COMPANIONS = 32
_SECONDS = 30.0


def companions(name: str, entries: Mapping[str, Entry]) -> list[ObjectInfo]:
    """The files whose first block a loader wants next, when it opens `name` in a directory of these entries.

    Who opens ``config.json`` is about to read the other small files, and the header of each weights file.
    """
    if name != CONFIG:
        return []  # what nearly every open is, also in a directory of 100,000
    files = [entry.info for entry in entries.values() if entry.info is not None and entry.name != name]
    return [info for info in files if info.size <= _SMALL or info.key.endswith(safetensors.SUFFIX)][:_COMPANIONS]


def shards(name: str, entries: Mapping[str, Entry]) -> list[ObjectInfo]:
    """The files that a loader reads next, when it opens `name`: the shards that an index is about."""
    if not name.endswith(INDEX):
        return []
    start = f"{name.removesuffix(INDEX)}-"
    files = (entry.info for entry in entries.values() if entry.info is not None and entry.name.startswith(start))
    return [info for info in files if info.key.endswith(safetensors.SUFFIX)][:_COMPANIONS]


class Loads:
    """Which directories a model is being loaded from: those whose ``config.json`` was opened within 30 s.

    Who opens weights alone, or an index, may want one tensor. Of files that the kernel reads by itself only opens are
    seen, no reads; and page faults find a shorter read-ahead than on the disk's own file system, because what a loader
    advises (safetensors: POSIX_FADV_SEQUENTIAL) stops at the mount. Weights of a load are worth reading whole, until a
    quarter of the memory that was available when it began is filled.
    """

    def __init__(self, available: Callable[[], int], clock: Callable[[], float]) -> None:
        self._available = available
        self._clock = clock
        self._loads: dict[int, tuple[float, int]] = {}

    def on_open(self, directory: int, name: str) -> None:
        """Note an open, which may begin a load."""
        if name == CONFIG:
            now = self._clock()
            self._loads = {number: load for number, load in self._loads.items() if load[0] > now}
            self._loads[directory] = now + _SECONDS, self._available() // 4

    def is_loading(self, directory: int) -> bool:
        """Whether a model is being loaded from there."""
        return directory in self._loads and self._loads[directory][0] > self._clock()

    def take(self, directory: int, name: str, size: int) -> int:
        """How many bytes of a file, from its start, are worth reading before they are asked for; less is left then."""
        if not name.endswith(safetensors.SUFFIX) or not self.is_loading(directory):
            return 0
        until, budget = self._loads[directory]
        wanted = min(size, budget)
        self._loads[directory] = until, budget - wanted
        return wanted
