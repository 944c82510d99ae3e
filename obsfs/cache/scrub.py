"""Reading the cache again in the background, to find damage on the disk before a reader does.

A file that is sealed, or was verified long ago, is read by the kernel alone: nobody verifies its bytes. So each cached
block is read from the disk, past the page cache, once in seven days, slowly, while the cache is idle. A damaged block
is dropped and fetched again into its place, which also heals readers that have the file open.

Of the processes that share a cache, one does it (a lock). Its progress outlives it (``v1/scrub.json``).
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from obsfs import private
from obsfs.blocks import BLOCK
from obsfs.cache.directory import Cache
from obsfs.cache.layout import map_paths, read_entry
from obsfs.cache.object import CachedObject
from obsfs.errors import ObsfsError
from obsfs.store.types import ObjectVersion

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 7 * 86400.0
"""Between the starts of two passes."""
_POLL_SECONDS = 30.0
_BUSY_SECONDS = 1.0
_SAVE_SECONDS = 10.0
_JOIN_SECONDS = 5.0
_MAX_PRESSURE = 10.0
"""Percentage of the last ten seconds in which a process waited for a disk (/proc/pressure/io). Above, it is busy."""
_FORMAT = 1


class Scrubber:
    """Scrubs a cache on a thread of its own, from :meth:`start` to :meth:`close`.

    Args:
        pace: Bytes per second.
        is_idle: Returns whether nothing else reads or fetches.
        on_damage: Called with a version and its blocks that were damaged, and are absent now.
    """

    def __init__(
        self,
        cache: Cache,
        pace: int,
        is_idle: Callable[[], bool] = lambda: True,
        on_damage: Callable[[ObjectVersion, list[int]], None] = lambda version, blocks: None,
    ) -> None:
        self.bytes = 0
        """Bytes read by this process."""
        self.errors = 0
        """Damaged blocks among them."""
        self._cache, self._pace, self._is_idle, self._on_damage = cache, pace, is_idle, on_damage
        self._state_path = cache.root / "scrub.json"
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="obsfs-scrub", daemon=True)
        self._next_save = 0.0

    def start(self) -> None:
        """Start the thread. The first look is half a minute later."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Its progress is kept."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_SECONDS)

    @property
    def last_pass(self) -> float | None:
        """When any process last finished a pass (seconds since the epoch); None: never."""
        return float(self._load()["finished"]) or None

    def _run(self) -> None:
        while not self._stopping.wait(_POLL_SECONDS):
            try:
                self.run_pass()
            except (OSError, ObsfsError) as error:
                log.info("the cache is not scrubbed now: %s", error)
            except Exception:
                log.exception("scrubbing the cache failed")

    def run_pass(self) -> bool:
        """Continue a pass, if one is due and no other process does it. Returns whether it is done. Raises OSError."""
        lock = private.open_file(self._cache.root / "scrub.lock")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return self._pass()
        finally:
            os.close(lock)

    def _pass(self) -> bool:
        state = self._load()
        if state["finished"] >= state["began"]:
            # A clock that was set back must not postpone it forever.
            if 0 <= time.time() - state["began"] < INTERVAL_SECONDS:
                return False
            state.update(began=time.time(), position="")
        for path in sorted(map_paths(self._cache.root)):
            place = f"{path.parent.name}/{path.stem}"
            if place <= state["position"]:
                continue
            if not self._scrub_object(path):
                self._save(state)
                return False
            state["position"] = place
            if time.monotonic() >= self._next_save:
                self._next_save = time.monotonic() + _SAVE_SECONDS
                self._save(state)
        state["finished"] = time.time()
        self._save(state)
        return True

    def _scrub_object(self, path: Path) -> bool:
        """Scrub one object; False if the thread must stop."""
        entry = read_entry(path)
        if entry is None or not entry.cached_bytes:
            return True
        damaged: list[int] = []
        try:
            with closing(self._cache.open(entry.version)) as cached, closing(_UncachedFile(entry.path)) as file:
                for block in self._cache.present_blocks(entry.version):
                    if not self._wait(cached.length_of(block)):
                        return False
                    if not self._scrub_block(cached, file, block):
                        damaged.append(block)
        except FileNotFoundError:
            return True  # it was just evicted
        finally:
            self.errors += len(damaged)
            if damaged:
                self._on_damage(entry.version, damaged)
        return True

    def _wait(self, size: int) -> bool:
        """Keep to the pace, and wait until the cache is idle; False if the thread must stop."""
        if self._stopping.wait(size / self._pace):
            return False
        while not self._is_idle() or _pressure() > _MAX_PRESSURE:
            if self._stopping.wait(_BUSY_SECONDS):
                return False
        return True

    def _scrub_block(self, cached: CachedObject, file: _UncachedFile, block: int) -> bool:
        """Read one block; False if it was damaged."""
        word = cached.present_word(block)
        if not word:
            return True
        data = file.read(block * BLOCK, cached.length_of(block))
        self.bytes += len(data)
        return cached.matches_checksum(block, data) or not cached.drop_damaged(block, word)

    def _load(self) -> dict[str, Any]:
        try:
            state = json.loads(self._state_path.read_bytes())
            if state["format"] == _FORMAT:
                return {
                    "format": _FORMAT,
                    "began": float(state["began"]),
                    "finished": float(state["finished"]),
                    "position": str(state["position"]),
                }
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass
        return {"format": _FORMAT, "began": 0.0, "finished": 0.0, "position": ""}

    def _save(self, state: dict[str, Any]) -> None:
        with suppress(OSError):
            private.write_file(self._state_path, json.dumps(state).encode())


class _UncachedFile:
    """A data file as the disk has it, past the page cache. On file systems without O_DIRECT, as the kernel has it."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        # O_DIRECT needs aligned memory.
        self._buffer = mmap.mmap(-1, BLOCK)
        try:
            self._fd = os.open(path, flags | os.O_DIRECT)
        except FileNotFoundError:
            raise
        except OSError:
            self._fd = os.open(path, flags)

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes from `offset` on; none if the disk fails."""
        try:
            count = os.preadv(self._fd, [self._buffer], offset)
        except OSError:
            return b""
        return self._buffer[: min(count, size)]

    def close(self) -> None:
        os.close(self._fd)
        self._buffer.close()


def _pressure() -> float:
    """Return the percentage of the last ten seconds in which a process waited for a disk; 0 if unknown."""
    try:
        # some avg10=0.00 avg60=0.00 avg300=0.00 total=0
        return float(Path("/proc/pressure/io").read_text().split()[1].partition("=")[2])
    except (OSError, ValueError, IndexError):
        return 0.0
