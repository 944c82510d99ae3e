"""The program of the notification helper: a process that writes notifications to the kernel, and may wait there.

:class:`obsfs.fuse.kernel.notifier.Notifier` starts it, with a socket on stdin. Imports only the standard library and
:mod:`obsfs.fuse.kernel.splice`, which is as small, to keep its memory footprint small and its start quick.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import sys

from obsfs.fuse.kernel.splice import Pipe

FORMAT = "1"
"""Version of the messages, given as the argument: the helper refuses a sender that speaks another one."""
MAX_MESSAGE_BYTES = 64 << 10
"""Bytes of notifications in one message to the helper."""
STORE = struct.Struct("=QQQQ")
"""Of bytes to store: start and size in the file, then the offset of the block's state word and its expected value. The
header of the notification follows."""
ANSWER = struct.Struct("=i")

_STDIN = 0
_MAX_FDS = 3
_SIZE_BYTES = 4  # of the number that a notification begins with
_WORD_BYTES = 8


class NotifyHelper:
    """Takes messages, each with the descriptors that it is about, until the other end of `control` is closed."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pipe = Pipe()

    def run(self) -> None:
        """Serve messages until the sender closes the socket.

        A message with one descriptor (the connection's) holds notifications: the answer is an errno, or 0. A message
        with three (the connection's, the data file's and the map's) is a block to store, and gets no answer.
        """
        while True:
            data, fds, *_ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, _MAX_FDS)
            if not data:
                return
            try:
                if len(fds) == 1:
                    self._control.send(ANSWER.pack(_write(fds[0], data)))
                else:
                    self._store(fds, data)
            finally:
                for fd in fds:
                    os.close(fd)

    def _store(self, fds: list[int], data: bytes) -> None:
        fd, file_fd, map_fd = fds
        start, size, word_offset, word = STORE.unpack_from(data)
        header = data[STORE.size :]
        if size > self._pipe.room:
            return
        pipe = self._pipe
        try:
            # Check the word after taking the bytes: an evicted block reads as zeros.
            is_sent = (
                pipe.fill(header, file_fd, start, size)
                and os.pread(map_fd, _WORD_BYTES, word_offset) == word.to_bytes(_WORD_BYTES, sys.byteorder)
                and pipe.send(fd, len(header) + size)
            )
        except OSError:
            is_sent = False  # a bad disk, or no memory: the reader asks for the block itself
        if not is_sent:
            pipe.close()
            self._pipe = Pipe()


def _write(fd: int, data: bytes) -> int:
    """Write notifications. Returns the errno of the last one that the kernel refused, or 0."""
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
    """Run the helper: the socket is stdin, the argument is the format of the messages (no argument means the first)."""
    if sys.argv[1:2] not in ([], [FORMAT]):
        sys.exit(f"this helper does not know messages of format {sys.argv[1]}")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=_STDIN) as control:
        try:
            NotifyHelper(control).run()
        except ConnectionError:
            pass  # the sender has ended


if __name__ == "__main__":
    main()
