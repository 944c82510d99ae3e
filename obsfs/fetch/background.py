"""Work beside fetching, on two threads: what somebody waits for, and housekeeping, which nobody should feel."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)

_QUIET_SECONDS = 0.5
_JOIN_SECONDS = 10.0


@dataclass
class _Round:
    seconds: float
    task: Callable[[], None]
    due: float


class Background:
    """One thread for prompt tasks, in order, and one for housekeeping. Close it to end them.

    Housekeeping comes in pieces: tasks that are run while `is_quiet` (looked at twice per second), rounds that come
    again and again, and steps, of which each is short, so that none waits long for another.
    """

    def __init__(self, is_quiet: Callable[[], bool]) -> None:
        self._is_quiet = is_quiet
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._steps: deque[Iterator[object]] = deque()
        self._quiet: deque[Callable[[], None]] = deque()
        self._next_look = 0.0
        self._rounds: list[_Round] = []
        self._closing = False
        self._threads = [
            threading.Thread(target=self._run_tasks, name="obsfs-tasks", daemon=True),
            threading.Thread(target=self._keep_house, name="obsfs-house", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def run_in_background(self, task: Callable[[], None]) -> None:
        """Run something that somebody waits for, and that takes a moment at most, soon and in order."""
        self._tasks.put(task)

    def run_in_steps(self, steps: Iterator[object]) -> None:
        """Run a long piece of housekeeping step by step, in turn with others; what is left at the end is dropped."""
        with self._changed:
            self._steps.append(steps)
            self._changed.notify()

    def run_repeatedly(self, seconds: float, task: Callable[[], None]) -> None:
        """Run a short piece of housekeeping over and over, with a pause of so many seconds or somewhat more."""
        with self._changed:
            self._rounds.append(_Round(seconds, task, time.monotonic() + seconds))
            self._changed.notify()

    def run_when_idle(self, task: Callable[[], None]) -> None:
        """Run something that holds up the disk when it is quiet, or at the end."""
        with self._changed:
            if not self._quiet:
                self._next_look = time.monotonic() + _QUIET_SECONDS
            self._quiet.append(task)
            self._changed.notify()

    def close(self) -> None:
        """End both threads, after the tasks."""
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

    def _keep_house(self) -> None:
        while not self._closing:
            task, steps = self._next()
            if task is not None:
                _run(task)
            elif steps is not None:
                self._step(steps)
        while self._quiet:
            _run(self._quiet.popleft())

    def _next(self) -> tuple[Callable[[], None] | None, Iterator[object] | None]:
        """A task whose time has come, or whose step is next; neither after a wait for one."""
        with self._changed:
            now = time.monotonic()
            for one in self._rounds:
                if now >= one.due:
                    one.due = now + one.seconds
                    return one.task, None
            if self._quiet and now >= self._next_look:
                self._next_look = now + _QUIET_SECONDS
                return (self._quiet.popleft() if self._is_quiet() else None), None
            if self._steps:
                return None, self._steps.popleft()
            if not self._closing:
                next_dues = [one.due for one in self._rounds] + ([self._next_look] if self._quiet else [])
                self._changed.wait(max(0.0, min(next_dues) - now) if next_dues else None)
            return None, None

    def _step(self, steps: Iterator[object]) -> None:
        try:
            next(steps)
        except StopIteration:
            return
        except Exception:
            log.exception("a piece of housekeeping failed")
            return
        with self._changed:
            self._steps.append(steps)


def _run(task: Callable[[], None]) -> None:
    try:
        task()
    except Exception:
        log.exception("a background task failed")
