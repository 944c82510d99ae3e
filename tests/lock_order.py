"""Records which locks obsfs holds when it takes another one, waits, or calls what may wait, to find deadlocks.

A deadlock needs an unlucky moment to hang; the order of locks that allows it is there in every run. `traced` replaces
the locks that modules of obsfs create while its block runs, and reports three faults afterwards:

- two kinds of locks that were taken in both orders, in whichever threads, or in a longer circle;
- a lock that cannot be taken twice by one thread, and would have been;
- a lock that was held by a thread that waited, or that called one of `FREE`: those may wait for room, for the network,
  or for another thread, which may need the lock.

A kind of lock is the attribute of the class that creates it. A lock that is only tried (``blocking=False``) makes
nobody wait, and so begins no circle.
"""

from __future__ import annotations

import linecache
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from types import FrameType
from typing import Any

from obsfs.cache.directory import Cache
from obsfs.cache.locks import DirectoryLock
from obsfs.cache.object import CachedObject
from obsfs.cache.room import Room
from obsfs.fetch import engine, fetcher, reader, transport
from obsfs.fetch.fetcher import CountdownCallback
from obsfs.vfs import listings

FREE: tuple[tuple[type, str], ...] = (
    (Cache, "open"),
    (Room, "reserve"),
    (Room, "trim"),
    (CachedObject, "close"),
    (CachedObject, "store_block"),
    (CountdownCallback, "failed"),
    (CountdownCallback, "landed"),
    (fetcher.Fetcher, "close"),
    (transport.ThreadTransport, "close"),
    (engine.Engine, "_close_evicted"),
    (reader.Reader, "_on_prefetched"),
    (reader.Reader, "_on_changed"),
    (reader.Reader, "_on_idle"),
)
"""What is to be called with no lock held."""
_WAITS: tuple[tuple[type, str], ...] = (
    (Future, "result"),
    (threading.Event, "wait"),
    (threading.Thread, "join"),
    (socket.socket, "connect"),
    (socket.socket, "recv_into"),
    (socket.socket, "sendall"),
)
_BY_FACTORY: tuple[type, ...] = (reader.ModelLoad, listings._Asking)
"""Dataclasses that create a lock by a default factory, which is not looked up when it is called."""

_Lock, _RLock, _Condition = threading.Lock, threading.RLock, threading.Condition


class Tracer:
    """What was seen. `allowed` has pairs of a kind of lock and of what may be called while it is held, on purpose."""

    def __init__(self, allowed: set[tuple[str, str]]) -> None:
        self._allowed = allowed
        self._guard = _RLock()
        self._here = threading.local()
        self.edges: dict[tuple[str, str], str] = {}
        """For each two kinds of locks, where the second was taken while the first was held."""
        self.faults: dict[tuple[str, str], str] = {}
        """For each kind of lock and what was done while it was held, where."""

    @property
    def held(self) -> list[_Traced]:
        """The locks that this thread holds, in the order in which it has taken them."""
        if not hasattr(self._here, "held"):
            self._here.held = []
        found: list[_Traced] = self._here.held
        return found

    def lock(self, kind: str, *, is_reentrant: bool = False) -> Any:
        """A lock of a kind, for what has none of its own here."""
        return _Traced(self, kind, _RLock() if is_reentrant else _Lock(), is_reentrant=is_reentrant)

    def taking(self, lock: _Traced) -> None:
        """A thread is about to wait for a lock."""
        if lock in self.held:
            if not lock.is_reentrant:
                self._note(self.faults, lock.kind, "itself")
                raise RuntimeError(f"this thread holds {lock.kind} already: {self.faults[lock.kind, 'itself']}")
            return
        for other in self.held:
            self._note(self.edges, other.kind, lock.kind)

    def waiting(self, what: str, *, but: _Traced | None = None) -> None:
        """A thread is about to wait for something else than a lock."""
        for lock in self.held:
            if lock is not but and (lock.kind, what) not in self._allowed:
                self._note(self.faults, lock.kind, what)

    def _note(self, notes: dict[tuple[str, str], str], held: str, what: str) -> None:
        if (held, what) not in notes:
            with self._guard:
                notes[held, what] = _stack(sys._getframe(2))

    def circles(self) -> list[str]:
        """The kinds of locks that were taken in a circle, each with where that was."""
        following: dict[str, set[str]] = {}
        for first, second in self.edges:
            following.setdefault(first, set()).add(second)
        found: dict[frozenset[str], list[str]] = {}
        for start in sorted(following):
            paths = [[start]]
            seen = set()
            while paths:
                path = paths.pop()
                for after in following.get(path[-1], ()):
                    if after == start:
                        found.setdefault(frozenset(path), [*path, start])
                    elif after not in seen:
                        seen.add(after)
                        paths.append([*path, after])
        return [
            " -> ".join(path) + "".join(f"\n  {two[0]} -> {two[1]}: {self.edges[two]}" for two in pairwise(path))
            for path in found.values()
        ]

    def report(self) -> list[str]:
        """All faults, one text for each."""
        held = [f"{lock} is held by who calls {what}: {where}" for (lock, what), where in self.faults.items()]
        return self.circles() + held


class _Traced:
    """A lock, seen by a tracer. Knows what a Condition wants of its lock."""

    def __init__(self, tracer: Tracer, kind: str, lock: Any, *, is_reentrant: bool) -> None:
        self.kind, self.is_reentrant = kind, is_reentrant
        self._tracer, self._lock = tracer, lock

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if blocking:
            self._tracer.taking(self)
        is_taken: bool = self._lock.acquire(blocking, timeout)
        if is_taken:
            self._tracer.held.append(self)
        return is_taken

    def release(self) -> None:
        held = self._tracer.held
        if self in held:
            # The last of those that are the same.
            del held[len(held) - 1 - held[::-1].index(self)]
        self._lock.release()

    def locked(self) -> bool:
        found: bool = self._lock.locked()
        return found

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_owned(self) -> bool:
        return self in self._tracer.held

    def _release_save(self) -> int:
        count = self._tracer.held.count(self)
        for _ in range(count):
            self.release()
        return count

    def _acquire_restore(self, count: int) -> None:
        # Not in the order of locks: who waits for a condition holds no other one, or is reported for that.
        for _ in range(count):
            self._lock.acquire()
            self._tracer.held.append(self)


class _TracedCondition(_Condition):  # type: ignore[valid-type]
    def __init__(self, tracer: Tracer, lock: _Traced) -> None:
        super().__init__(lock)
        self._tracer, self._traced = tracer, lock

    def wait(self, timeout: float | None = None) -> bool:
        self._tracer.waiting("Condition.wait", but=self._traced)
        is_notified: bool = super().wait(timeout)
        return is_notified


@contextmanager
def traced(allowed: set[tuple[str, str]] = frozenset()) -> Iterator[Tracer]:  # type: ignore[assignment]
    """Trace the locks that obsfs creates while the block runs, and all that is done with them."""
    tracer = Tracer(set(allowed))
    undo = install(tracer)
    try:
        yield tracer
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def install(tracer: Tracer) -> list[tuple[Any, str, Any]]:
    """Replace what is traced; what it was before: owner, attribute and value."""
    undo: list[tuple[Any, str, Any]] = []

    def replace(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def lock() -> Any:
        kind = _kind(sys._getframe(1))
        return tracer.lock(kind) if kind else _Lock()

    def rlock() -> Any:
        kind = _kind(sys._getframe(1))
        return tracer.lock(kind, is_reentrant=True) if kind else _RLock()

    def condition(lock: Any = None) -> Any:
        kind = _kind(sys._getframe(1))
        if not kind:
            return _Condition(lock)
        return _TracedCondition(tracer, tracer.lock(kind, is_reentrant=True))

    replace(threading, "Lock", lock)
    replace(threading, "RLock", rlock)
    replace(threading, "Condition", condition)
    for owner in _BY_FACTORY:
        replace(owner, "__init__", _with_locks(tracer, owner))
    for owner, name in (*FREE, *_WAITS):
        replace(owner, name, _noted(tracer, owner, name))
    replace(time, "sleep", _noted(tracer, time, "sleep"))
    _replace_directory_lock(tracer, replace)
    return undo


def _replace_directory_lock(tracer: Tracer, replace: Callable[[Any, str, Any], None]) -> None:
    begin, enter, leave = DirectoryLock.__init__, DirectoryLock.__enter__, DirectoryLock.__exit__

    def __init__(self: Any, path: Any, prepare: Any) -> None:
        begin(self, path, prepare)
        self.traced = tracer.lock(f"DirectoryLock.{path.name}", is_reentrant=True)

    def __enter__(self: Any) -> None:
        self.traced.acquire()
        enter(self)

    def __exit__(self: Any, *error: object) -> None:
        leave(self, *error)
        self.traced.release()

    for function in (__init__, __enter__, __exit__):
        replace(DirectoryLock, function.__name__, function)


def _with_locks(tracer: Tracer, owner: Any) -> Callable[..., None]:
    """The constructor of a dataclass, with those of its attributes that are locks replaced."""
    begin = owner.__init__

    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        for name in owner.__dataclass_fields__:
            if isinstance(getattr(self, name), type(_Lock())):
                kind = f"{owner.__name__.strip('_')}.{name}"
                setattr(self, name, tracer.lock(kind))

    return __init__


def _noted(tracer: Tracer, owner: Any, name: str) -> Callable[..., Any]:
    call = getattr(owner, name)
    what = f"{owner.__name__}.{name}"

    @wraps(call)
    def noted(*arguments: Any, **options: Any) -> Any:
        # A thread that starts another one waits for that alone.
        if sys._getframe(1).f_globals.get("__name__") != "threading":
            tracer.waiting(what)
        return call(*arguments, **options)

    return noted


def _kind(frame: FrameType) -> str:
    """By which attribute of which class a lock is known; empty for one that is not ours to trace."""
    module = frame.f_globals.get("__name__", "")
    owner = type(frame.f_locals["self"]).__name__ if "self" in frame.f_locals else module
    if not module.startswith("obsfs.") or owner == "DirectoryLock":
        return ""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    named = re.match(r"\s*(?:self\.)?(\w+)\b", line)
    return f"{owner.strip('_')}.{named[1] if named else frame.f_lineno}"


def _stack(frame: FrameType | None) -> str:
    """Where something is done: the functions of obsfs, the innermost first."""
    found = []
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("obsfs") or module == "__main__":
            found.append(f"{module.removeprefix('obsfs.')}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return ", ".join(found)
