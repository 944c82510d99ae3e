"""What the operations ask of the code that speaks to the kernel."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable


class FrontEnd:
    """A front end that can do none of it. One that can overrides what it can.

    No method may wait for the kernel: the threads that call them answer reads.
    """

    can_store = False
    """Whether :meth:`store` does anything."""

    def is_awaited(self, directory: int) -> bool:
        """Return whether a request waits for names of this directory (a node id). Asked between pages of a listing."""
        return True

    def forget_names(self, names: Iterable[tuple[int, str]]) -> None:
        """Have the kernel look up these names again, ``(parent node id, name)``, once that delays no request."""

    def store(self, node: int, fd: int, start: int, size: int, state_word_ref: tuple[int, int, int]) -> bool:
        """Put bytes of the file `fd` into the kernel's page cache of a node. Returns False when too many are waiting.

        Args:
            node: the node id.
            fd: the file; an offset in it is the same offset in the node.
            start: bytes.
            size: bytes.
            state_word_ref: descriptor, offset and expected value (64 bits) of the word that vouches for the bytes.
        """
        return False

    def open_backing(self, fd: int) -> int:
        """Register a file for passthrough, and return the kernel's id of it, which is not 0. Raises OSError."""
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def close_backing(self, backing: int) -> None:
        """Unregister a file. The kernel still reads it for handles that are open."""

    def keep_lock(self, node: int, fd: int) -> None:
        """Keep a lock on a cache file, for the case that this process dies. `fd` stays the caller's."""

    def drop_lock(self, node: int) -> None:
        """End what :meth:`keep_lock` began."""
