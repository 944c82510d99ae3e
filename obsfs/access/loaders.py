"""What loaders of models open and read next. Pure: names and sizes in, names and sizes out.

A loader opens the files of a model one after the other, and waits for each. The first one tells which others follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from obsfs.access import safetensors

CONFIG = "config.json"
INDEX = ".safetensors.index.json"
_SMALL_BYTES = 256 << 10
"""A loader reads files up to this size at once when it opens a model: tokenizer settings, indexes, templates."""
_MAX_FILES = 32
"""Files to name at most, so that a hint costs at most 32 requests."""
_LOAD_SECONDS = 30.0
"""How long a load is expected to open further files after ``config.json``."""
_MEMORY_SHARE = 4
"""One part in so many of the available memory may be filled with weights that were not yet asked for."""
_SHARD = re.compile(r"-\d+-of-(?=\d+)")

Files = Callable[[], Iterable[tuple[str, int]]]
"""``(name, bytes)`` of the files in one directory. Called only if needed: a directory may have 100,000."""


class OpenHints(NamedTuple):
    """What follows when a file is opened. Names in its directory."""

    starts: list[str]
    """Files whose first block is wanted next."""
    shards: list[str]
    """The shards of the model that is about to be loaded, in the order of the listing."""


def model_of(key: str) -> str:
    """Return a name that the shards of one model share: ``NAME-00001-of-00004.safetensors`` gives ``NAME-*-of-...``."""
    return _SHARD.sub("-*-of-", key)


def companions(name: str, files: Files) -> list[str]:
    """Return the files whose first block a loader wants next when it opens `name`.

    After ``config.json``, a loader reads the other small files, and the header of each weights file.
    """
    if name != CONFIG:
        return []
    return _first(
        other
        for other, size in files()
        if other != name and (size <= _SMALL_BYTES or other.endswith(safetensors.SUFFIX))
    )


def shards(name: str, files: Files) -> list[str]:
    """Return the shards that a loader reads next when it opens `name`, an index."""
    if not name.endswith(INDEX):
        return []
    prefix = f"{name.removesuffix(INDEX)}-"
    return _first(other for other, _ in files() if other.startswith(prefix) and other.endswith(safetensors.SUFFIX))


def _first(names: Iterator[str]) -> list[str]:
    return list(islice(names, _MAX_FILES))


class LoadTracker:
    """Which directories a model is being loaded from: those whose ``config.json`` was opened within 30 s.

    A program that opens weights or an index alone may want one tensor. The weights of a load are worth reading whole,
    as long as they fit into a quarter of the memory that was available when it began. Two reasons:

    - Of files that the kernel reads by itself (passthrough), obsfs sees only opens.
    - Page faults get a shorter read-ahead there than on the disk's own file system, because the loader's advice
      (safetensors: POSIX_FADV_SEQUENTIAL) stops at the mount.

    Args:
        available: Returns the bytes of memory available now.
        clock: Returns the time in seconds.
    """

    def __init__(self, available: Callable[[], int], clock: Callable[[], float]) -> None:
        self._available = available
        self._clock = clock
        self._loads: dict[Hashable, tuple[float, int]] = {}

    def on_open(self, directory: Hashable, name: str) -> None:
        """Note that a file was opened. That may begin a load."""
        if name == CONFIG:
            now = self._clock()
            loads = {place: load for place, load in self._loads.items() if load[0] > now}
            # Replaced, never changed in size: another thread may be here too.
            self._loads = {**loads, directory: (now + _LOAD_SECONDS, self._available() // _MEMORY_SHARE)}

    def is_loading(self, directory: Hashable) -> bool:
        """Say whether a model is being loaded from there."""
        return directory in self._loads and self._loads[directory][0] > self._clock()

    def hints(self, directory: Hashable, name: str, files: Files) -> OpenHints:
        """Return what follows the open of a file."""
        is_load = name.endswith(INDEX) and self.is_loading(directory)
        return OpenHints(companions(name, files), shards(name, files) if is_load else [])

    def take(self, directory: Hashable, name: str, size: int) -> int:
        """Return how many bytes of a file, from its start, to read before they are asked for.

        They count against the memory that the load may fill.

        Args:
            directory: Where the file is.
            name: Its name.
            size: Its bytes.
        """
        if not name.endswith(safetensors.SUFFIX) or not self.is_loading(directory):
            return 0
        until, budget = self._loads[directory]
        wanted = min(size, budget)
        self._loads[directory] = until, budget - wanted
        return wanted
