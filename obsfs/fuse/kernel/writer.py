"""How messages get to the kernel: with bytes of a file past Python, by splice(2) through a pipe; and, run as a
program, the process behind :class:`obsfs.fuse.kernel.notifier.Notifier`.

Imports nothing of ours and little else: the process is to be small, and there at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
import sys

FORMAT = "1"
"""Of the messages; the process is given that of whoever sends them. Another program may be installed meanwhile."""
MOST_BYTES = 64 << 10
"""Bytes of notifications in one message to the process."""
STORE = struct.Struct("=QQQQ")
"""Start and size of what is to be stored (bytes of a file), and the offset of a word and its value; the notification's
header follows."""
ANSWER = struct.Struct("=i")
GONE = (errno.ENOENT, errno.ENODEV, errno.EBADF, errno.ENOTCONN)
"""What a write says when nobody waits for it: the request was aborted meanwhile, or the mount is gone."""

_STDIN = 0
_MOST_FDS = 3
_SIZE_BYTES = 4  # of the number that a notification begins with
_WORD_BYTES = 8
_MOST = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Pipe:
    """A pipe that takes one whole message: a page for the header, and at most `room` bytes of a file."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()
        capacity = fcntl.fcntl(self._write_fd, fcntl.F_GETPIPE_SZ)
        # More than /proc/sys/fs/pipe-max-size is for the privileged.
        for size in (2 * _MOST, _MOST, _MOST // 4):
            try:
                capacity = fcntl.fcntl(self._write_fd, fcntl.F_SETPIPE_SZ, size)
                break
            except OSError:
                continue
        pages = max(1, min(_MOST, capacity - 2 * _PAGE) // _PAGE)
        # A power of two keeps to the borders of blocks.
        self.room = (1 << (pages.bit_length() - 1)) * _PAGE

    def fill(self, header: bytes, file_fd: int, offset: int, size: int) -> bool:
        """Take a header and bytes ``[offset, offset + size)`` of a file; False when it ends before, or fails."""
        os.write(self._write_fd, header)
        moved = 0
        while moved < size:
            try:
                count = os.splice(file_fd, self._write_fd, size - moved, offset_src=offset + moved)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                count = 0  # the disk cannot read it
            if not count:
                return False
            moved += count
        return True

    def send(self, fd: int, size: int) -> bool:
        """Write the message of `size` bytes to a FUSE descriptor; False when nobody waits for it any more."""
        try:
            os.splice(self.read_fd, fd, size)
        except OSError as error:
            if error.errno in GONE:
                return False
            raise
        return True

    def close(self) -> None:
        """Close it, with what is in it."""
        os.close(self.read_fd)
        os.close(self._write_fd)


class Writer:
    """The process: takes messages with the descriptors that they are about, until the other end is closed."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._pipe = Pipe()

    def run(self) -> None:
        """Notifications come with the connection's descriptor, and get an errno or 0 as answer; what is to be stored
        comes with two more, of the file and of the word that says whether it is right, and gets none."""
        while True:
            data, fds, *_ = socket.recv_fds(self._control, MOST_BYTES, _MOST_FDS)
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
        fd, file_fd, place_fd = fds
        start, size, place, word = STORE.unpack_from(data)
        header = data[STORE.size :]
        if size > self._pipe.room:
            return
        pipe = self._pipe
        try:
            # The word is looked at after the bytes were taken: an evicted block reads as zeros.
            is_sent = (
                pipe.fill(header, file_fd, start, size)
                and os.pread(place_fd, _WORD_BYTES, place) == word.to_bytes(_WORD_BYTES, sys.byteorder)
                and pipe.send(fd, len(header) + size)
            )
        except OSError:
            is_sent = False  # the disk, or no memory: it is read all the same
        if not is_sent:
            pipe.close()
            self._pipe = Pipe()


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
    """Run the process, with the other end of a socket on stdin, and the format of its messages as argument (none is
    the first)."""
    if sys.argv[1:2] not in ([], [FORMAT]):
        sys.exit(f"messages of format {sys.argv[1]} are not known here")
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=_STDIN) as control:
        try:
            Writer(control).run()
        except ConnectionError:
            pass  # nobody waits for the answer


if __name__ == "__main__":
    main()
