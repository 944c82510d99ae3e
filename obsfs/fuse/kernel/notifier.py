"""What the kernel is told unasked, written by a process that has nothing else to do.

A notification (FUSE_NOTIFY_STORE, FUSE_NOTIFY_INVAL_ENTRY) may have to wait in the kernel for a page or a directory
that a reader has locked, who waits for an answer of ours. No signal reaches whoever waits there: a server that was
killed meanwhile would not be gone, but keep its locks (of the cache, of blocks that it was fetching), for which its
successor waits, and so the reader. The process that waits in its place has no locks, and no part in anything else.

:class:`Notifier` runs this file as a program. It imports little, so that it is small and soon there.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

_STDIN = 0
_MOST = 64 << 10
_SIZE, _ERRNO = 4, 4
"""Bytes of the numbers in messages: a size, as the header of a notification has it first, too; an errno."""
_ENVIRONMENT = ("LD_LIBRARY_PATH",)
_FINISH_SECONDS = 1.0


class Notifier:
    """Writes notifications, one at a time, to the connection of which `fd` is a descriptor.

    For one thread; whoever must not wait for another's notification takes another notifier. The process starts with
    the first one, and again should it have been killed. All methods that write raise OSError: as the kernel says, or
    with EPIPE when the process has ended before it could tell.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._process: subprocess.Popen[bytes] | None = None
        self._control = socket.socket()
        self._is_useless = False

    def write(self, messages: Sequence[bytes]) -> None:
        """Write messages, one after the other, of 64 KiB together at most; raises what the kernel said of the last
        that it did not take."""
        self._ask(b"".join(messages), [self._fd])

    def splice(self, pipe_fd: int, size: int) -> None:
        """Write the message of `size` bytes that lies in a pipe."""
        self._ask(size.to_bytes(_SIZE, sys.byteorder), [self._fd, pipe_fd])

    def close(self) -> None:
        """End the process, which may be held up in the kernel."""
        self._control.close()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_FINISH_SECONDS)
            self._process = None

    def _ask(self, data: bytes, fds: list[int]) -> None:
        is_new = self._process is None
        try:
            if is_new:
                self._start()
            socket.send_fds(self._control, [data], fds)
            answer = self._control.recv(_ERRNO)
        except ConnectionError:
            answer = b""
        if not answer:
            # One that cannot even begin would be started again and again.
            self._is_useless = is_new
            self.close()
            raise OSError(errno.EPIPE, "the process that writes notifications has ended")
        if number := int.from_bytes(answer, sys.byteorder):
            raise OSError(number, os.strerror(number))

    def _start(self) -> None:
        if self._is_useless:
            raise ConnectionError
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            )


def main() -> None:
    """Until the other end of stdin, a socket, is closed: take a message with its descriptors, answer with an errno.

    With one descriptor it is notifications, for it; with two, the size of one that lies in the second, a pipe.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=_STDIN) as control, suppress(ConnectionError):
        while True:
            data, fds, *_ = socket.recv_fds(control, _MOST, 2)
            if not data:
                return
            if len(fds) == 1:
                failure = _write(fds[0], data)
            else:
                failure = _tried(os.splice, fds[1], fds[0], int.from_bytes(data, sys.byteorder))
            for fd in fds:
                os.close(fd)
            control.send(failure.to_bytes(_ERRNO, sys.byteorder))


def _write(fd: int, data: bytes) -> int:
    failure = start = 0
    while start < len(data):
        stop = start + int.from_bytes(data[start : start + _SIZE], sys.byteorder)
        failure = _tried(os.write, fd, data[start:stop]) or failure
        start = stop
    return failure


def _tried(call: Callable[..., int], *arguments: object) -> int:
    try:
        call(*arguments)
    except OSError as error:
        return error.errno or 0
    return 0


if __name__ == "__main__":
    main()
