"""Requests that are not answered at once. The thread that claims the number of one answers it, and no other."""

from __future__ import annotations

import threading
from collections import deque

_MAX_INTERRUPTED = 64
"""Interrupts that came before their requests, and are remembered: another thread is just reading those."""


class Pending:
    """Pending requests by their numbers. An interrupt comes over any descriptor, and claims a request like others."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        # The descriptor that a request came over, and the node whose names it waits for, or 0.
        self._requests: dict[int, tuple[int, int]] = {}
        self._interrupted: deque[int] = deque(maxlen=_MAX_INTERRUPTED)

    def __contains__(self, unique: int) -> bool:
        return unique in self._requests

    def add(self, fd: int, unique: int, names_of: int = 0) -> bool:
        """Note a request. Returns False if its interrupt came first: the caller answers EINTR.

        Args:
            fd: the descriptor that it came over, and that takes the answer.
            unique: its number.
            names_of: the node id of the directory whose names it waits for, or 0.
        """
        with self._guard:
            if unique in self._interrupted:
                return False
            self._requests[unique] = fd, names_of
            return True

    def claim(self, unique: int) -> bool:
        """Take a request out, to answer it. Returns False if it was answered already."""
        with self._guard:
            return self._requests.pop(unique, None) is not None

    def interrupt(self, unique: int) -> int | None:
        """Take a request out, to answer it with EINTR on the descriptor that is returned; None if it is not pending."""
        with self._guard:
            request = self._requests.pop(unique, None)
            if request is None:
                # Answered already, or another thread is just reading it.
                self._interrupted.append(unique)
                return None
            return request[0]

    def is_awaited(self, directory: int) -> bool:
        """Return whether a request waits for names of this directory (a node id)."""
        with self._guard:
            return any(node == directory for _, node in self._requests.values())

    def clear(self) -> None:
        """Drop all requests: no thread answers them any more."""
        with self._guard:
            self._requests.clear()
