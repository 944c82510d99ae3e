"""Run work beside fetching, on two threads: tasks that somebody waits for, and housekeeping that nobody should feel."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)

_IDLE_CHECK_SECONDS = 0.5
_JOIN_SECONDS = 10.0


@dataclass
class _Repeated:
    seconds: float
    task: Callable[[], None]
    due: float


class Background:
    """One thread for background tasks, in order, and one for housekeeping. Close it to end them.

    The thread for housekeeping has three queues, so that none of them waits long for another:

    - work in steps, each of which is short,
    - tasks that are repeated after a pause,
    - tasks that wait until fetching is idle.

    Args:
        is_idle: Whether nothing is being fetched. Asked twice a second while a task waits for that.
    """

    def __init__(self, is_idle: Callable[[], bool]) -> None:
        self._is_idle = is_idle
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._steps: deque[Iterator[object]] = deque()
        self._when_idle: deque[Callable[[], None]] = deque()
        self._next_look = 0.0
        self._repeated: list[_Repeated] = []
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run_tasks, name="obsfs-tasks", daemon=True),
            threading.Thread(target=self._run_housekeeping, name="obsfs-house", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def run_in_background(self, task: Callable[[], None]) -> None:
        """Run a short task that somebody waits for, soon and in order."""
        self._tasks.put(task)

    def run_in_steps(self, steps: Iterator[object]) -> None:
        """Run long housekeeping step by step, in turn with others.

        Args:
            steps: Does one step each time it is advanced. Dropped when the threads end.
        """
        with self._changed:
            self._steps.append(steps)
            self._changed.notify()

    def run_repeatedly(self, seconds: float, task: Callable[[], None]) -> None:
        """Repeat a short task, with a pause of so many seconds or a little more."""
        with self._changed:
            self._repeated.append(_Repeated(seconds, task, time.monotonic() + seconds))
            self._changed.notify()

    def run_when_idle(self, task: Callable[[], None]) -> None:
        """Run a task that holds up the disk once nothing is being fetched, or at the end."""
        with self._changed:
            if not self._when_idle:
                self._next_look = time.monotonic() + _IDLE_CHECK_SECONDS
            self._when_idle.append(task)
            self._changed.notify()

    def close(self) -> None:
        """Run all tasks, then end both threads. Waits 10 s at most."""
        self._tasks.put(None)
        with self._changed:
            self._closing = True
            self._changed.notify()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _run_tasks(self) -> None:
        while (task := self._tasks.get()) is not None:
            _run(task)

    def _run_housekeeping(self) -> None:
        while not self._closing:
            task, steps = self._next()
            if task is not None:
                _run(task)
            elif steps is not None:
                self._step(steps)
        while self._when_idle:
            _run(self._when_idle.popleft())

    def _next(self) -> tuple[Callable[[], None] | None, Iterator[object] | None]:
        """Return a task that is due, or the steps whose turn it is. If there is none, wait, and return neither."""
        with self._changed:
            now = time.monotonic()
            for entry in self._repeated:
                if now >= entry.due:
                    entry.due = now + entry.seconds
                    return entry.task, None
            if self._when_idle and now >= self._next_look:
                self._next_look = now + _IDLE_CHECK_SECONDS
                return (self._when_idle.popleft() if self._is_idle() else None), None
            if self._steps:
                return None, self._steps.popleft()
            if not self._closing:
                next_dues = [entry.due for entry in self._repeated] + ([self._next_look] if self._when_idle else [])
                self._changed.wait(max(0.0, min(next_dues) - now) if next_dues else None)
            return None, None

    def _step(self, steps: Iterator[object]) -> None:
        try:
            next(steps)
        except StopIteration:
            return
        except Exception:
            log.exception("housekeeping failed")
            return
        with self._changed:
            self._steps.append(steps)


def _run(task: Callable[[], None]) -> None:
    try:
        task()
    except Exception:
        log.exception("a background task failed")
