"""What the kernel is told unasked, written by a process that has nothing else to do.

A notification (FUSE_NOTIFY_STORE, FUSE_NOTIFY_INVAL_ENTRY) may have to wait in the kernel for a page or a directory
that a reader has locked, who waits for an answer of ours. No signal reaches whoever waits there: a server that was
killed meanwhile would not be gone, but keep its locks (of the cache, of blocks that it was fetching), for which its
successor waits, and so the reader. The process that waits in its place has no locks, and no part in anything else.

:class:`Notifier` starts it, with :func:`main`. It imports little, so that it is small and soon there.
"""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from obsfs.fuse.kernel import wire
from obsfs.fuse.kernel.pipe import Pipe

_STDIN = 0
_MOST_BYTES, _MOST_FDS = 64 << 10, 3
_STORE = struct.Struct("=QQQQQ")
_ANSWER = struct.Struct("=i")
_SIZE_BYTES = 4  # of the number that a notification begins with
_WORD_BYTES = 8
_ENVIRONMENT = ("LD_LIBRARY_PATH",)
_FINISH_SECONDS = 1.0
_MOST_STARTS = 5
_PROGRAM = "import sys; sys.path.append(sys.argv[1]); from obsfs.fuse.kernel.notifier import main; main()"
_ROOT = Path(__file__).parents[3]


class Notifier:
    """Writes notifications, one after the other, to the connection of which `fd` is a descriptor.

    Whoever must not wait for another's notification takes another notifier. The process starts with the first one, and
    again, a few times, should it have been killed.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._guard = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control = socket.socket()
        self._starts = 0

    def write(self, messages: Sequence[bytes]) -> None:
        """Write messages, of 64 KiB together at most, and wait until that is done. For one thread.

        Raises OSError: what the kernel said of the last that it did not take, or EPIPE when the process has ended.
        """
        try:
            control = self._start()
            control.sendmsg([b"".join(messages)], _with_fds(self._fd))
            answer = control.recv(_ANSWER.size)
        except ConnectionError:
            answer = b""
        if not answer:
            self.close()
            raise OSError(errno.EPIPE, "the process that writes notifications has ended")
        if number := _ANSWER.unpack(answer)[0]:
            raise OSError(number, os.strerror(number))

    def store(self, node: int, fd: int, start: int, size: int, witness: tuple[int, int, int]) -> bool:
        """Have bytes ``[start, start + size)`` of a file put into the page cache of a node, soon. From any thread.

        They are left out unless the `witness` still says that they are right once they are taken: the descriptor of
        another file, an offset in it, and the number (64 bits) to be found there. Waits for nothing; False when too
        many are waiting already.
        """
        place_fd, place, word = witness
        message = _STORE.pack(node, start, size, place, word)
        try:
            self._start().sendmsg([message], _with_fds(self._fd, fd, place_fd), socket.MSG_DONTWAIT)
        except ConnectionError:
            self.close()
            return False
        except OSError:
            return False
        return True

    def close(self) -> None:
        """End the process, which may be held up in the kernel."""
        with self._guard:
            self._control.close()
            if self._process is not None:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_FINISH_SECONDS)
            self._process = None

    def _start(self) -> socket.socket:
        with self._guard:
            if self._process is None:
                # One that cannot even begin would be started for ever.
                if self._starts == _MOST_STARTS:
                    raise ConnectionError
                self._starts += 1
                self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    self._process = subprocess.Popen(
                        [sys.executable, "-I", "-S", "-c", _PROGRAM, _ROOT],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                    )
            return self._control


def _with_fds(*fds: int) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]


class _Writer:
    """The process: takes messages with the descriptors that they are about, until the other end is closed."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pipe = Pipe()

    def run(self) -> None:
        while True:
            data, fds, *_ = socket.recv_fds(self._control, _MOST_BYTES, _MOST_FDS)
            if not data:
                return
            try:
                if len(fds) == 1:
                    self._control.send(_ANSWER.pack(_write(fds[0], data)))
                else:
                    self._store(fds, data)
            finally:
                for fd in fds:
                    os.close(fd)

    def _store(self, fds: list[int], data: bytes) -> None:
        fd, file_fd, place_fd = fds
        node, start, size, place, word = _STORE.unpack(data)
        stop = start + size
        for offset in range(start, stop, self._pipe.room):
            count = min(self._pipe.room, stop - offset)
            message = wire.store(node, offset, count)
            is_whole = self._pipe.fill(message, file_fd, offset, count)
            # Looked at after the bytes were taken: an evicted block reads as zeros.
            is_right = is_whole and os.pread(place_fd, _WORD_BYTES, place) == word.to_bytes(_WORD_BYTES, sys.byteorder)
            if not is_right or not self._sent(fd, len(message) + count):
                self._pipe.close()
                self._pipe = Pipe()
                return

    def _sent(self, fd: int, size: int) -> bool:
        try:
            return self._pipe.send(fd, size)
        except OSError:
            return False  # no memory, say: it is read all the same


def _write(fd: int, data: bytes) -> int:
    """Write notifications; the errno of the last that was not taken, or 0."""
    failure = start = 0
    while start < len(data):
        stop = start + int.from_bytes(data[start : start + _SIZE_BYTES], sys.byteorder)
        try:
            os.write(fd, data[start:stop])
        except OSError as error:
            failure = error.errno or 0
        start = stop
    return failure


def main() -> None:
    """Run the process, with the other end of a socket on stdin."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=_STDIN) as control, suppress(ConnectionError):
        _Writer(control).run()
