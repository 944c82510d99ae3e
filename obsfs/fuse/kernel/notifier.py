"""Notifications to the kernel, written by a helper process that does nothing else.

A notification (FUSE_NOTIFY_STORE, FUSE_NOTIFY_INVAL_ENTRY) may wait in the kernel for a page or a directory that a
reader has locked while that reader waits for us. No signal ends such a wait: a server killed there would stay, keep its
locks (of the cache, of blocks in flight), and block its successor and so the reader. The helper waits in its place. It
holds no locks.
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

from obsfs.fuse.kernel import notify_helper, wire
from obsfs.fuse.kernel.notify_helper import ANSWER, STORE
from obsfs.fuse.kernel.splice import Pipe

_ENVIRONMENT = ("LD_LIBRARY_PATH",)
_FINISH_SECONDS = 1.0
_MAX_STARTS = 5


def _program() -> bytes:
    """Return the helper's program as one text that needs no package: its only import of ours comes with it.

    Read when this module is imported: an upgrade may replace the files before the helper starts.
    """
    splice, helper = (pkgutil.get_data(__package__, name) or b"" for name in ("splice.py", "notify_helper.py"))
    return (
        b"import sys, types\n"
        b"module = sys.modules['obsfs.fuse.kernel.splice'] = types.ModuleType('splice')\n"
        b"exec(%r, module.__dict__)\n"
        b"exec(%r)\n" % (splice, helper)
    )


_PROGRAM = _program()


class Notifier:
    """Writes notifications, one after the other, to a FUSE connection.

    A caller that must not wait behind another's notification takes a notifier of its own. The helper starts with the
    first notification, and at most four more times if it is killed.

    Args:
        fd: a descriptor of the connection.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._guard = threading.Lock()
        self._running: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._starts = 0
        self._room = 0

    def write(self, messages: Sequence[bytes]) -> None:
        """Write messages, at most 64 KiB in all, and wait until that is done. For one thread.

        Raises:
            OSError: the kernel's error for the last message that it refused; EPIPE if the helper has ended.
        """
        try:
            control = self._start()
            control.sendmsg([b"".join(messages)], _with_fds(self._fd))
            answer = control.recv(ANSWER.size)
        except ConnectionError:
            answer = b""
        if not answer:
            self._drop()
            raise OSError(errno.EPIPE, "the notification helper has ended")
        if number := ANSWER.unpack(answer)[0]:
            raise OSError(number, os.strerror(number))

    def store(self, node: int, fd: int, start: int, size: int, state_word_ref: tuple[int, int, int]) -> bool:
        """Put bytes ``[start, start + size)`` of the file `fd` into the page cache of a node, soon. From any thread.

        Args:
            node: the node id.
            fd: the file; the offset in it is the offset in the node.
            start: bytes.
            size: bytes.
            state_word_ref: descriptor of another file, an offset in it, and the 64-bit number expected there. The
                helper drops the bytes unless the number is there after it took them.

        Returns:
            False, without waiting, when too many are in the queue already.
        """
        map_fd, word_offset, word = state_word_ref
        stop = start + size
        try:
            control = self._start()
            for offset in range(start, stop, self._room):
                count = min(self._room, stop - offset)
                message = STORE.pack(offset, count, word_offset, word) + wire.store(node, offset, count)
                control.sendmsg([message], _with_fds(self._fd, fd, map_fd), socket.MSG_DONTWAIT)
        except ConnectionError:
            self._drop()
            return False
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End the helper, even one that waits in the kernel, and start no other."""
        self._starts = _MAX_STARTS
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
                # A helper that cannot start would be started without end.
                if self._starts == _MAX_STARTS:
                    raise ConnectionError
                self._starts += 1
                pipe = Pipe()
                self._room = pipe.room
                pipe.close()
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs, os.fdopen(os.memfd_create("obsfs-notify-helper"), "wb") as program:
                    program.write(_PROGRAM)
                    program.flush()
                    process = subprocess.Popen(
                        [sys.executable, "-I", "-S", f"/proc/self/fd/{program.fileno()}", notify_helper.FORMAT],
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
