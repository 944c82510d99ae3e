"""What the operations ask of the native front end: names and blocks told to the kernel, and passthrough.

The kernel may make a process that tells it something wait for a reader. So names are told by threads that serve no
requests, and each of them by a helper process of its own (:mod:`obsfs.fuse.kernel.notifier`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from queue import Empty, SimpleQueue
from typing import Protocol

from obsfs.fuse.kernel import channel, wire
from obsfs.fuse.kernel.notifier import Notifier
from obsfs.fuse.kernel.pending import Pending
from obsfs.vfs.frontend import FrontEnd

log = logging.getLogger(__name__)

_TRIM_SECONDS = 0.5
_REFRESH_SECONDS = 2.0
_MESSAGES = 64
"""Notifications that the kernel gets at a time."""
_HOLD_SECONDS = 0.25
"""Between two looks whether the kernel can be told of a name without delay."""


class FdStore(Protocol):
    """Keeps descriptors open, by name, for a process that takes over from this one."""

    def store_fds(self, name: str, fds: Sequence[int]) -> None:
        """Keep descriptors under a name, in place of those that it had. They stay the caller's."""

    def remove_fds(self, name: str) -> None:
        """Close what is kept under a name."""


class KernelFront(FrontEnd):
    """The front end of one connection.

    Args:
        fd: a descriptor of the connection.
        pending: the requests that wait for an answer.
        fd_store: keeps the locks of cache files that the kernel reads by itself.
    """

    can_store = True

    def __init__(self, fd: int, pending: Pending, fd_store: FdStore) -> None:
        self._fd = fd
        self._pending = pending
        self._fd_store = fd_store
        self._blocks = Notifier(fd)
        self._over_limit = threading.Event()
        self._is_closed = threading.Event()
        # A message to send now; a parent and name to tell once that delays no request; an event to set when all before
        # it was sent. None ends the thread.
        self._notices: SimpleQueue[bytes | tuple[int, str] | threading.Event | None] = SimpleQueue()

    def start(self, eviction_candidates: Callable[[], list[tuple[int, str]]]) -> None:
        """Start the threads. `eviction_candidates` returns the names that the kernel should forget."""
        threading.Thread(target=self._trim, args=[eviction_candidates], name="obsfs-trim", daemon=True).start()
        threading.Thread(target=self._tell, name="obsfs-notices", daemon=True).start()

    def note_over_limit(self) -> None:
        """Have the kernel forget names soon."""
        self._over_limit.set()

    def stop_trimming(self) -> None:
        """The connection has ended: the kernel needs to forget nothing."""
        self._is_closed.set()
        self._over_limit.set()

    def close(self) -> None:
        """End the threads and helper processes."""
        self.stop_trimming()
        self._notices.put(None)
        self._blocks.close()

    def is_awaited(self, directory: int) -> bool:
        """Return whether a request waits for names of this directory that was not interrupted."""
        return self._pending.is_awaited(directory)

    def forget_names(self, names: Iterable[tuple[int, str]]) -> None:
        """End the lifetime of names, each once no request waits for the bucket in its directory."""
        for place in names:
            self._notices.put(place)

    def forget_names_now(self, names: Iterable[tuple[int, str]]) -> None:
        """End the lifetime of names, and wait until the kernel knows, for 2 s at most.

        It may take longer when the kernel waits for a reader that waits for the bucket.
        """
        for parent, name in names:
            self._notices.put(wire.inval_entry(parent, name.encode()))
        told = threading.Event()
        self._notices.put(told)
        told.wait(_REFRESH_SECONDS)

    def store(self, node: int, fd: int, start: int, size: int, state_word_ref: tuple[int, int, int]) -> bool:
        """Put bytes of a file into the kernel's page cache of a node (FUSE_NOTIFY_STORE)."""
        return self._blocks.store(node, fd, start, size, state_word_ref)

    def open_backing(self, fd: int) -> int:
        """Register a file for passthrough. Raises OSError where kernel or privileges do not allow it."""
        return channel.open_backing(self._fd, fd)

    def close_backing(self, backing: int) -> None:
        """Unregister a file."""
        channel.close_backing(self._fd, backing)

    def keep_lock(self, node: int, fd: int) -> None:
        """Keep a lock on a cache file with the supervisor: the successor finds the file that the kernel reads."""
        self._fd_store.store_fds(f"node {node}", [fd])

    def drop_lock(self, node: int) -> None:
        """Drop the lock of a node's cache file."""
        self._fd_store.remove_fds(f"node {node}")

    # the threads

    def _tell(self) -> None:
        """Send what is in the queue.

        While the kernel waits for a reader, no other process can look up a name in that directory. So a name is held
        back while a lookup in its directory waits for the bucket.
        """
        held: deque[tuple[int, str]] = deque()
        with closing(Notifier(self._fd)) as notifier:
            while True:
                try:
                    notice = self._notices.get(timeout=_HOLD_SECONDS if held else None)
                except Empty:
                    self._tell_held(notifier, held)
                    continue
                if notice is None:
                    return
                if isinstance(notice, bytes):
                    _write(notifier, [notice])
                elif isinstance(notice, tuple):
                    held.append(notice)
                    self._tell_held(notifier, held)
                else:
                    notice.set()

    def _tell_held(self, notifier: Notifier, held: deque[tuple[int, str]]) -> None:
        for _ in range(len(held)):
            parent, name = held.popleft()
            if self.is_awaited(parent):
                held.append((parent, name))
            else:
                _write(notifier, [wire.inval_entry(parent, name.encode())])

    def _trim(self, eviction_candidates: Callable[[], list[tuple[int, str]]]) -> None:
        """Have the kernel forget names beyond the limit. It may wait for a process that lists them."""
        with closing(Notifier(self._fd)) as notifier:
            while self._over_limit.wait() and not self._is_closed.is_set():
                self._over_limit.clear()
                candidates = [place for place in eviction_candidates() if not self.is_awaited(place[0])]
                messages = [wire.inval_entry(parent, name.encode(), drop=True) for parent, name in candidates]
                for start in range(0, len(messages), _MESSAGES):
                    _write(notifier, messages[start : start + _MESSAGES])
                self._is_closed.wait(_TRIM_SECONDS)


def _write(notifier: Notifier, messages: list[bytes]) -> None:
    try:
        notifier.write(messages)
    except OSError as error:
        # ENOENT: the kernel does not hold that name.
        log.debug("notification: %s", error)
