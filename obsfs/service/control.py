"""The control socket of a mount: other programs of the same user ask its server, without using the file system.

A question that goes through the file system waits in the kernel, where nothing can end it, if the server hangs. A
question over a socket can time out. It needs no thread of those that serve readers.

The socket is a Unix stream socket, ``mount-DEVICE.sock`` in the state directory, with mode 0600. The device number is
that of the FUSE connection (``st_dev`` of the mount), so that bind mounts have the same socket. A client sends one JSON
object on one line, and gets one back:

====================================================== ============================================
``{"format": 1, "call": "status"}``                    ``{"format": 1, "result": {"pid": ...}}``
``{"format": 1, "call": "refresh", "path": "a/b"}``    ``{"format": 1, "result": {"path": "a"}}``
``{"format": 1, "call": "upgrade"}``, ``"stop"``       ``{"format": 1, "result": {}}``
any of them, where it fails                            ``{"format": 1, "error": {"message": ...}}``
====================================================== ============================================

Both sides ignore keys that they do not know, and refuse a later format. The server of a mount makes the socket when the
mount answers, and a successor replaces it by its own under the same name.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from obsfs.errors import ObsfsError, UsageError

log = logging.getLogger(__name__)

FORMAT = 1
MAX_REQUEST_BYTES = 64 << 10
"""A path has 4,096 bytes at most (PATH_MAX, <linux/limits.h>), and JSON writes up to 6 characters for each."""
MAX_ANSWER_BYTES = 1 << 20
CALL_SECONDS = 5.0
"""For a client to send its request, and again for it to take the answer."""
_MAX_CLIENTS = 32
_BACKLOG = 128
_UCRED = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid
_RETRY_ACCEPT_SECONDS = 0.1

Call = Callable[[str], dict[str, Any]]
"""Does what one call asks for. Its argument is the ``path`` of the request, its result goes to the client."""


class Request(NamedTuple):
    """What a client asks for. `path` is relative to the root of the file system."""

    call: str
    path: str = ""

    def encode(self) -> bytes:
        """Return the request as the line that is sent."""
        return _line({"call": self.call, **({"path": self.path} if self.path else {})})

    @staticmethod
    def parse(line: bytes) -> Request:
        """Read a request.

        Raises:
            UsageError: it is not one line of JSON, or has a later format.
        """
        message = _parse(line, "the request")
        if _format_of(message) > FORMAT:
            raise UsageError(
                f"the mount is served by an earlier version of obsfs, which reads requests up to format {FORMAT}",
                "use that version, or `obsfs upgrade` with it",
            )
        call, path = message.get("call"), message.get("path", "")
        if not isinstance(call, str) or not isinstance(path, str):
            raise UsageError("the request names no call")
        return Request(call, path)


def parse_answer(line: bytes) -> dict[str, Any]:
    """Read the answer of a server, and return its result.

    Raises:
        UsageError: the server reports an error, or the line is not an answer, or has a later format.
    """
    message = _parse(line, "the answer")
    if _format_of(message) > FORMAT:
        raise UsageError("the mount is served by a later version of obsfs", "use that version")
    error, result = message.get("error"), message.get("result")
    if isinstance(error, dict):
        raise UsageError(str(error.get("message", "")), str(error.get("remedy", "")))
    if not isinstance(result, dict):
        raise UsageError("the server of the mount sent an answer without a result")
    return result


def peer_uid(connection: socket.socket) -> int:
    """Return the user of the process at the other end of a Unix socket (SO_PEERCRED, unix(7))."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[1])


def connect(path: Path) -> socket.socket:
    """Connect to the control socket at `path`, if it is this user's own.

    Returns:
        A socket that does not block.

    Raises:
        OSError: there is no socket, no process serves it, or it belongs to another user.
    """
    # Through a descriptor, so that the socket that was checked is the one that is connected to, whatever happens to its
    # name. It also keeps the address short: sun_path holds 108 bytes (unix(7)), a path 4,096.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(1, "not a socket of this user", str(path))
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.connect(f"/proc/self/fd/{fd}")
            if peer_uid(connection) != os.geteuid():
                raise PermissionError(1, "another user serves this socket", str(path))
        except BaseException:
            connection.close()
            raise
        return connection
    finally:
        os.close(fd)


class ControlServer:
    """Answers requests on the control socket, each in a thread of its own. Safe to close from any thread."""

    def __init__(self, calls: Mapping[str, Call], *, stop: Callable[[], None]) -> None:
        """Prepare to answer.

        Args:
            calls: what each call does.
            stop: called once a ``stop`` was answered.
        """
        self._calls = calls
        self._stop = stop
        self._listener: socket.socket | None = None
        self._path: Path | None = None
        self._inode: tuple[int, int] | None = None
        self._slots = threading.BoundedSemaphore(_MAX_CLIENTS)

    def open(self, path: Path) -> None:
        """Serve a socket at `path`, in a private directory, in place of anything that is there.

        Raises:
            OSError: the socket cannot be made.
        """
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The mode that bind(2) gives to the name, less the umask.
            os.fchmod(listener.fileno(), 0o600)
            new.unlink(missing_ok=True)
            listener.bind(f"/proc/self/fd/{directory}/{new.name}")
            listener.listen(_BACKLOG)
            made = new.lstat()
            new.replace(path)
        except BaseException:
            listener.close()
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        finally:
            os.close(directory)
        self._listener, self._path, self._inode = listener, path, (made.st_dev, made.st_ino)
        threading.Thread(target=self._accept, args=(listener,), name="obsfs-control", daemon=True).start()

    def close(self) -> None:
        """Serve no more, and remove the socket, unless another server has replaced it."""
        listener, self._listener = self._listener, None
        if listener is None or self._path is None:
            return
        with suppress(OSError):
            found = self._path.lstat()
            if (found.st_dev, found.st_ino) == self._inode:
                self._path.unlink()
        # Wakes the thread that waits in accept(2), which closes the socket.
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while self._listener is listener:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    # Out of descriptors, or closed.
                    time.sleep(_RETRY_ACCEPT_SECONDS)
                    continue
                self._start(connection)

    def _start(self, connection: socket.socket) -> None:
        """Answer one client in a thread; refuse another user, and clients beyond the limit, by closing."""
        if peer_uid(connection) != os.geteuid():
            log.warning("another user (uid %d) was refused on the control socket", peer_uid(connection))
        elif self._slots.acquire(blocking=False):
            try:
                threading.Thread(target=self._serve, args=(connection,), name="obsfs-call", daemon=True).start()
            except RuntimeError as error:
                self._slots.release()
                log.error("no thread to answer a request: %s", error)
            else:
                return
        connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError):
                line = read_line(connection, MAX_REQUEST_BYTES, CALL_SECONDS)
                call, answer = self._answer(line)
                connection.settimeout(CALL_SECONDS)
                connection.sendall(_line(answer))
                if call == "stop":
                    self._stop()
        finally:
            self._slots.release()

    def _answer(self, line: bytes) -> tuple[str, dict[str, Any]]:
        """Return which call was asked for, if it was done, and the answer."""
        try:
            request = Request.parse(line)
            if (call := self._calls.get(request.call)) is None:
                raise UsageError("this version of obsfs does not know that call", "`obsfs upgrade` the mount")
            return request.call, {"result": call(request.path)}
        except ObsfsError as error:
            return "", {"error": {"message": error.message, "remedy": error.remedy}}
        except Exception as error:
            log.exception("a request on the control socket failed")
            return "", {
                "error": {"message": f"internal error: {type(error).__name__}", "remedy": "see the mount's log"}
            }


def read_line(connection: socket.socket, limit: int, seconds: float) -> bytes:
    """Read one line, of at most `limit` bytes, within so many seconds. What is longer is cut off.

    Raises:
        OSError: the line did not come in time, or the other end has closed.
    """
    deadline = time.monotonic() + seconds
    data = bytearray()
    while b"\n" not in data and len(data) <= limit:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        piece = connection.recv(limit)
        if not piece:
            raise ConnectionAbortedError
        data += piece
    return bytes(data[: limit + 1])


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps({"format": FORMAT, **message}).encode() + b"\n"


def _parse(line: bytes, what: str) -> dict[str, Any]:
    message: object = None
    if line.endswith(b"\n"):
        with suppress(ValueError, RecursionError):
            message = json.loads(line)
    if not isinstance(message, dict):
        raise UsageError(f"{what} is not one JSON object on one line")
    return message


def _format_of(message: dict[str, Any]) -> int:
    """Return the format of a message: no number means 0, and what is not a number is later than any."""
    number = message.get("format", 0)
    return number if isinstance(number, int) else FORMAT + 1
