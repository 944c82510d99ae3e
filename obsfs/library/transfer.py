"""Many pieces of work at the same time, tried again while the server is away; and hashing in order meanwhile."""

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
"""Is told of so many more bytes done, from any thread."""


class Cancelled(Exception):
    """Somebody else has failed, and what this one does is of no use any more."""


class WorkerPool:
    """Threads that take on tasks in order; the first failure stops them all."""

    def __init__(self, workers: int, retry_timeout: float = 0.0) -> None:
        self._workers = workers
        self._retry_timeout = retry_timeout
        self._guard = threading.Lock()
        self._error: BaseException | None = None
        self._stop = threading.Event()

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Do all tasks, each begun after those before it were begun. Raises what the first failure was."""
        source = iter(tasks)
        threads = [threading.Thread(target=self._work, args=(source,), daemon=True) for _ in range(self._workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # in pieces, so that Ctrl-C is heard
                    thread.join(_WAIT_SECONDS)
        except BaseException:
            self._stop.set()
            for thread in threads:
                if thread.is_alive():  # not the one that a signal has kept from starting, nor those behind it
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
        """What `call` returns, tried again while it raises UnavailableError, for the retry timeout."""
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
        """Raises Cancelled when it is of no use to go on."""
        if self._stop.is_set():
            raise Cancelled


class OrderedHash:
    """The hash (SHA-256, or another) of pieces that are read by several threads: each waits until it is its turn."""

    def __init__(self, pool: WorkerPool, hasher: Hasher | None = None) -> None:
        self._pool = pool
        self._hash = hasher or hashlib.sha256()
        self._next = 0
        self._turn = threading.Condition()

    def update(self, index: int, data: bytes | memoryview) -> None:
        """Take piece number `index`, from 0. Raises Cancelled when an earlier one will not come."""
        with self._turn:
            while self._next != index:
                self._turn.wait(_WAIT_SECONDS)
                self._pool.check()
            self._hash.update(data)
            self._next += 1
            self._turn.notify_all()

    def hexdigest(self) -> str:
        """Of all pieces so far."""
        return self._hash.hexdigest()


def tasks_for(items: Iterable[_T], work: Callable[[_T], None]) -> Iterator[Callable[[], None]]:
    """Tasks that do this work on each item."""
    for item in items:
        yield lambda item=item: work(item)  # type: ignore[misc]
