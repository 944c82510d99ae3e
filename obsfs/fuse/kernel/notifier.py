"""What the kernel is told unasked, written by a process that has nothing else to do.

A notification (FUSE_NOTIFY_STORE, FUSE_NOTIFY_INVAL_ENTRY) may have to wait in the kernel for a page or a directory
that a reader has locked, who waits for an answer of ours. No signal reaches whoever waits there: a server that was
killed meanwhile would not be gone, but keep its locks (of the cache, of blocks that it was fetching), for which its
successor waits, and so the reader. The process that waits in its place has no locks, and no part in anything else.
"""

from __future__ import annotations

import array
import errno
import os
import pkgutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from obsfs.fuse.kernel import wire, writer
from obsfs.fuse.kernel.writer import ANSWER, STORE, Pipe

_ENVIRONMENT = ("LD_LIBRARY_PATH",)
_PROGRAM = pkgutil.get_data(__package__, "writer.py") or b""
"""As it was when we were loaded: another version may lie at its name when the process is started."""
_FINISH_SECONDS = 1.0
_MOST_STARTS = 5


class Notifier:
    """Writes notifications, one after the other, to the connection of which `fd` is a descriptor.

    Whoever must not wait for another's notification takes another notifier. The process starts with the first one, and
    again, a few times, should it have been killed.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._guard = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._starts = 0
        self._room = 0

    def write(self, messages: Sequence[bytes]) -> None:
        """Write messages, of 64 KiB together at most, and wait until that is done. For one thread.

        Raises OSError: what the kernel said of the last that it did not take, or EPIPE when the process has ended.
        """
        try:
            control = self._start()
            control.sendmsg([b"".join(messages)], _with_fds(self._fd))
            answer = control.recv(ANSWER.size)
        except ConnectionError:
            answer = b""
        if not answer:
            self._drop()
            raise OSError(errno.EPIPE, "the process that writes notifications has ended")
        if number := ANSWER.unpack(answer)[0]:
            raise OSError(number, os.strerror(number))

    def store(self, node: int, fd: int, start: int, size: int, witness: tuple[int, int, int]) -> bool:
        """Have bytes ``[start, start + size)`` of a file put into the page cache of a node, soon. From any thread.

        They are left out unless the `witness` still says that they are right once they are taken: the descriptor of
        another file, an offset in it, and the number (64 bits) to be found there. Waits for nothing; False when too
        many are waiting already.
        """
        place_fd, place, word = witness
        stop = start + size
        try:
            control = self._start()
            for offset in range(start, stop, self._room):
                count = min(self._room, stop - offset)
                message = STORE.pack(offset, count, place, word) + wire.store(node, offset, count)
                control.sendmsg([message], _with_fds(self._fd, fd, place_fd), socket.MSG_DONTWAIT)
        except ConnectionError:
            self._drop()
            return False
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End the process, which may be held up in the kernel, for good."""
        self._starts = _MOST_STARTS
        self._drop()

    def _drop(self) -> None:
        with self._guard:
            if self._running is not None:
                process, control = self._running
                control.close()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_FINISH_SECONDS)
                self._running = None

    def _start(self) -> socket.socket:
        with self._guard:
            if self._running is None:
                # One that cannot even begin would be started for ever.
                if self._starts == _MOST_STARTS:
                    raise ConnectionError
                self._starts += 1
                pipe = Pipe()
                self._room = pipe.room
                pipe.close()
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs, os.fdopen(os.memfd_create("obsfs-writer"), "wb") as program:
                    program.write(_PROGRAM)
                    program.flush()
                    process = subprocess.Popen(
                        [sys.executable, "-I", "-S", f"/proc/self/fd/{program.fileno()}", writer.FORMAT],
                        pass_fds=[program.fileno()],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        cwd="/",
                        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                    )
                self._running = process, ours
            return self._running[1]


def _with_fds(*fds: int) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
