"""Threads for requests that wait for the bucket. Requests about one directory never hold up those about another.

A thread starts when a request comes and all threads are busy, and ends when it was idle for a while. Requests about one
directory mostly wait for the same answer, so only a few of them take a thread. The others wait in a queue of their
directory, start when one of the few is done, and find its answer.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)

_MAX_THREADS = 512
"""A thread that waits for a socket costs about 50 KiB of memory."""
_MAX_PER_GROUP = 8
"""Calls about one directory mostly wait for the same answer."""
_SHARED = 64
_IDLE_SECONDS = 5.0


class WaitingPool:
    """Runs calls that may wait for long, each for a group. Groups do not wait for each other.

    Args:
        name: of the threads.
        max_threads: threads at a time.
        max_per_group: threads at a time for one group.
        shared: beyond its first thread, a group takes at most half of what is left of this many, so that the next
            group gets some, too.
        idle_seconds: a thread that has nothing to do for so long ends.
    """

    def __init__(
        self,
        name: str,
        *,
        max_threads: int = _MAX_THREADS,
        max_per_group: int = _MAX_PER_GROUP,
        shared: int = _SHARED,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        self._name = name
        self._max_threads = max_threads
        self._max_per_group = max_per_group
        self._shared = shared
        self._idle_seconds = idle_seconds
        self._changed = threading.Condition()
        self._ready: deque[tuple[Hashable, Callable[[], object]]] = deque()
        self._behind: dict[Hashable, deque[Callable[[], object]]] = {}
        self._active: dict[Hashable, int] = {}
        """For each group, how many of its calls are ready or running."""
        self._all_active = 0
        self._threads = 0
        self._idle = 0
        self._closed = False

    @property
    def thread_count(self) -> int:
        """Threads that exist now."""
        return self._threads

    def submit(self, group: Hashable, call: Callable[[], object]) -> None:
        """Run `call` soon, after the calls that were submitted for its group before, or while they run. Does not wait.

        Raises:
            RuntimeError: there is no thread, and the system gives none.
        """
        with self._changed:
            if self._closed:
                return
            if self._has_room(group):
                self._make_ready(group, call)
            else:
                self._behind.setdefault(group, deque()).append(call)

    def close(self) -> None:
        """Drop the calls that have not begun. Those that run end by themselves; the process does not wait for them."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._behind.clear()
            self._changed.notify_all()

    def _has_room(self, group: Hashable) -> bool:
        active = self._active.get(group, 0)
        return not active or (active < self._max_per_group and active < self._shared - self._all_active)

    def _make_ready(self, group: Hashable, call: Callable[[], object]) -> None:
        if len(self._ready) >= self._idle and self._threads < self._max_threads:
            self._start()
        self._active[group] = self._active.get(group, 0) + 1
        self._all_active += 1
        self._ready.append((group, call))
        self._changed.notify()

    def _start(self) -> None:
        try:
            threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()
        except RuntimeError:
            # The system gives no more threads; the present ones do the work.
            if not self._threads:
                raise
            log.warning("no more threads than %d can be started", self._threads)
        else:
            self._threads += 1

    def _run(self) -> None:
        with self._changed:
            while True:
                is_told = True
                while not self._ready:
                    if self._closed or not is_told:
                        self._threads -= 1
                        return
                    self._idle += 1
                    is_told = self._changed.wait(self._idle_seconds)
                    self._idle -= 1
                group, call = self._ready.popleft()
                self._changed.release()
                try:
                    call()
                except Exception:
                    log.exception("a call failed")
                finally:
                    del call
                    self._changed.acquire()
                self._end(group)

    def _end(self, group: Hashable) -> None:
        self._active[group] -= 1
        self._all_active -= 1
        if not self._active[group]:
            del self._active[group]
        while (behind := self._behind.get(group)) and self._has_room(group):
            self._make_ready(group, behind.popleft())
            if not behind:
                del self._behind[group]
