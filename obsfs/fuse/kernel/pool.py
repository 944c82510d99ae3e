"""Threads for requests that wait for the bucket, so that those about one directory never hold up those about another.

A thread is started when a request comes and all threads are busy, and ends when it has had nothing to do for a while.
Requests about one directory mostly wait for the same answer, so only a few of them hold a thread; the others wait in
a queue of their directory. They follow when one of the few is done, and find its answer.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)

_MOST = 512
"""Threads. One that waits in a socket costs about 50 KiB of memory."""
_MOST_OF_ONE = 8
"""Threads for one directory, which mostly wait for the same answer."""
_FEW = 64
_IDLE_SECONDS = 5.0


class WaitingPool:
    """Runs calls that may wait for long, each for a group; groups do not wait for each other.

    At most `most` threads run at a time, and `most_of_one` for a group. Beyond its first, a group takes no more than
    half of what is left of `few`, so that something is left for the next one. A thread that has had nothing to do for
    `idle_seconds` ends.
    """

    def __init__(
        self,
        name: str,
        *,
        most: int = _MOST,
        most_of_one: int = _MOST_OF_ONE,
        few: int = _FEW,
        idle_seconds: float = _IDLE_SECONDS,
    ) -> None:
        self._name = name
        self._most = most
        self._most_of_one = most_of_one
        self._few = few
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
        """How many threads there are now."""
        return self._threads

    def submit(self, group: Hashable, call: Callable[[], object]) -> None:
        """Run `call` soon, after what was submitted for its group before, or beside it. Does not wait.

        Raises RuntimeError when there is no thread, and the system gives none.
        """
        with self._changed:
            if self._closed:
                return
            if self._has_room(group):
                self._make_ready(group, call)
            else:
                self._behind.setdefault(group, deque()).append(call)

    def close(self) -> None:
        """Forget what has not begun. What is running is left to end by itself; no process waits for its threads."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._behind.clear()
            self._changed.notify_all()

    def _has_room(self, group: Hashable) -> bool:
        active = self._active.get(group, 0)
        return not active or (active < self._most_of_one and active < self._few - self._all_active)

    def _make_ready(self, group: Hashable, call: Callable[[], object]) -> None:
        if len(self._ready) >= self._idle and self._threads < self._most:
            self._start()
        self._active[group] = self._active.get(group, 0) + 1
        self._all_active += 1
        self._ready.append((group, call))
        self._changed.notify()

    def _start(self) -> None:
        try:
            threading.Thread(target=self._run, name=f"{self._name}-{self._threads}", daemon=True).start()
        except RuntimeError:
            # The system gives no more threads; those that there are go on.
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
