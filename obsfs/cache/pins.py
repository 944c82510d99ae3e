"""Which object versions eviction leaves alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from obsfs import private
from obsfs.cache.layout import identity, is_linked, is_pinned, map_path, pin_path, read_blocks
from obsfs.cache.locks import DirectoryLock
from obsfs.errors import CacheError
from obsfs.store.types import ObjectVersion

_MAX_SHARE = 0.9


class Pins:
    """The pins of a cache directory, shared by all its processes.

    Args:
        root: ``CACHE_DIR/v1/``.
        limit: Returns the most bytes that the cache may hold.
        how_to_enlarge: Returns what a user must do so that it may hold more.
        directory_lock: Held while a pin is made or removed.
    """

    def __init__(
        self, root: Path, limit: Callable[[], int], how_to_enlarge: Callable[[], str], directory_lock: DirectoryLock
    ) -> None:
        self._root, self._limit, self._how_to_enlarge, self._directory_lock = (
            root,
            limit,
            how_to_enlarge,
            directory_lock,
        )

    def add(self, version: ObjectVersion) -> None:
        """Keep what is cached of a version, now and later, until it is unpinned.

        Raises:
            CacheError: The pin cannot be written, or pins would leave no room for anything else.
        """
        path = map_path(self._root, version)
        with self._directory_lock:
            if not is_pinned(path) and self.size() + version.size > self._limit() * _MAX_SHARE:
                raise CacheError(
                    f"pins would fill more than {_MAX_SHARE:.0%} of the cache",
                    f"unpin others, or {self._how_to_enlarge()}",
                )
            try:
                private.make_level(path.parent)
                private.write_file(pin_path(path), json.dumps(identity(version)).encode())
            except OSError as error:
                raise CacheError(f"{pin_path(path)} cannot be written ({error.strerror})", "make room") from None

    def remove(self, selects: Callable[[ObjectVersion], bool]) -> int:
        """Unpin the versions that `selects` is true for. Returns how many there were."""
        count = 0
        with self._directory_lock:
            for version, path in self._all():
                if selects(version):
                    path.unlink(missing_ok=True)
                    count += 1
        return count

    def size(self) -> int:
        """Return the bytes of all pinned objects, cached or not."""
        return sum(version.size for version, _ in self._all())

    def cached_bytes(self) -> int:
        """Return the bytes of pinned objects that are cached, and count as such."""
        maps = (path.with_suffix(".map") for _, path in self._all())
        return sum(block.size for path in maps if not is_linked(path) for block in read_blocks(path))

    def _all(self) -> Iterator[tuple[ObjectVersion, Path]]:
        for path in list(self._root.glob("??/*.pin")):
            try:
                yield ObjectVersion(**json.loads(path.read_bytes())), path
            except (OSError, ValueError, TypeError):
                path.unlink(missing_ok=True)
