"""Many tasks at the same time, retried while the server does not answer; and hashing in order."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from obsfs.errors import UnavailableError
from obsfs.store.checksums import Hasher
from obsfs.store.retry import backoff

_T = TypeVar("_T")
_WAIT_SECONDS = 0.2

Advance = Callable[[int], None]
"""Called with the number of bytes of each piece that is done, from any thread."""


class Cancelled(Exception):
    """Another task has failed, so this one need not continue."""


class WorkerPool:
    """Threads that run tasks in order. The first failure cancels all.

    Args:
        workers: How many threads.
        retry_timeout: Seconds for which :meth:`retried` repeats a call.
    """

    def __init__(self, workers: int, retry_timeout: float = 0.0) -> None:
        self._workers = workers
        self._retry_timeout = retry_timeout
        self._guard = threading.Lock()
        self._error: BaseException | None = None
        self._stop = threading.Event()

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Run all tasks; each starts after those before it have started. Raises what the first failure raised."""
        source = iter(tasks)
        threads = [threading.Thread(target=self._work, args=(source,), daemon=True) for _ in range(self._workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # with a timeout, so that Ctrl-C is handled
                    thread.join(_WAIT_SECONDS)
        except BaseException:
            self._stop.set()
            for thread in threads:
                if thread.is_alive():  # a signal may have kept some from starting
                    thread.join(_WAIT_SECONDS)
            raise
        if self._error is not None:
            raise self._error

    def _work(self, source: Iterator[Callable[[], None]]) -> None:
        try:
            while not self._stop.is_set():
                with self._guard:
                    task = next(source, None)
                if task is None:
                    return
                task()
        except Cancelled:
            pass
        except BaseException as error:
            with self._guard:
                self._error = self._error or error
            self._stop.set()

    def retried(self, call: Callable[[], _T]) -> _T:
        """Return what `call` returns. It is repeated while it raises UnavailableError, for the retry timeout."""
        deadline = time.monotonic() + self._retry_timeout
        attempt = 0
        while True:
            self.check()
            try:
                return call()
            except UnavailableError:
                attempt += 1
                pause = backoff(attempt)
                if time.monotonic() + pause > deadline:
                    raise
                self._stop.wait(pause)

    def check(self) -> None:
        """Raise Cancelled if another task has failed."""
        if self._stop.is_set():
            raise Cancelled


class OrderedHash:
    """The hash of pieces that several threads read. Each thread waits for its turn.

    Args:
        pool: The threads.
        hasher: By default SHA-256.
    """

    def __init__(self, pool: WorkerPool, hasher: Hasher | None = None) -> None:
        self._pool = pool
        self._hash = hasher or hashlib.sha256()
        self._next = 0
        self._turn = threading.Condition()

    def update(self, index: int, data: bytes | memoryview) -> None:
        """Add piece number `index`, from 0. Raises Cancelled if another task has failed."""
        with self._turn:
            while self._next != index:
                self._turn.wait(_WAIT_SECONDS)
                self._pool.check()
            self._hash.update(data)
            self._next += 1
            self._turn.notify_all()

    def hexdigest(self) -> str:
        """Return the hash (hex) of all pieces so far."""
        return self._hash.hexdigest()


def tasks_for(items: Iterable[_T], work: Callable[[_T], None]) -> Iterator[Callable[[], None]]:
    """Yield a task for each item, which calls `work` with it."""
    for item in items:
        yield lambda item=item: work(item)  # type: ignore[misc]
