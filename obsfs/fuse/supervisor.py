"""The small process that outlives the server of a mount, and starts another one when it dies.

It holds what must not close: the descriptors of the connection to the kernel (all of them: a request that was read
from one dies with it), the lock of the mountpoint, and the locks of files that the kernel reads by itself. A server
that was killed is followed by one that inherits them, restores names and opens from the journal, and asks the kernel
to send again what was not answered (FUSE_NOTIFY_RESEND, Linux 6.9). Readers wait for a second, and never know.

It imports nothing but the standard library, so that it is small and has little to die of. When it dies itself, its
server dies too, and the mount with them.

:mod:`obsfs.fuse.mounts` starts it as ``python -m obsfs.fuse.supervisor SOURCE MOUNTPOINT``, with the request to the
server (one JSON line) on stdin; with ``lifeline`` in it the mount ends when the other end of stdin closes, and with
``is_temporary`` its directory goes, too. SIGTERM ends the mount, SIGHUP replaces the server by a new one (of the
version that is installed now).
"""

from __future__ import annotations

import io
import json
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from obsfs.limits import allow_open_files

CONTROL = "OBSFS_SUPERVISOR_FD"
RETRY = 75
"""The exit status (EX_TEMPFAIL) of a successor that could not take over yet."""

_STDIN = 0
_MOST_MESSAGE = 64 << 10
_MOST_FDS = 16
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.5
_QUICK_SECONDS = 0.5
_MOST_QUICK = 300


class Supervisor:
    """One mount: its server, and what it has given to keep."""

    def __init__(self, arguments: list[str], request: dict[str, Any]) -> None:
        self._arguments = arguments
        self._request = request
        self._kept: dict[str, list[int]] = {}
        self._state: dict[str, Any] | None = None
        self._restarts = 0
        self._quick = 0
        self._is_ending = False
        self._since = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._listen()
        self._server = self._start()

    def _listen(self) -> None:
        """Signals become events, as does the end of the lifeline."""
        wake, poke = socket.socketpair()
        poke.setblocking(False)
        signal.set_wakeup_fd(poke.fileno())
        self._poke = poke
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._selector.register(wake, selectors.EVENT_READ, lambda: self._on_signal(wake.recv(1)[0]))
        if self._request.get("lifeline"):
            self._selector.register(_STDIN, selectors.EVENT_READ, self._on_lifeline)

    def _start(self) -> subprocess.Popen[bytes]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = dict(self._request)
        if self._state is not None:
            request["takeover"] = {**self._state, "restarts": self._restarts, "connection": self._kept["connection"]}
        fds = [theirs.fileno(), *self._kept.get("connection", ())]
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "obsfs.fuse.daemon", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=None if self._state is None else subprocess.DEVNULL,
            pass_fds=fds,
            env={**os.environ, CONTROL: str(theirs.fileno())},
        )
        theirs.close()
        assert server.stdin is not None
        try:
            server.stdin.write(json.dumps(request).encode() + b"\n")
            server.stdin.close()
        except OSError:
            pass  # it is dead already; its end will be seen
        ours.setblocking(False)
        self._control = ours
        self._pidfd = os.pidfd_open(server.pid)
        self._selector.register(ours, selectors.EVENT_READ, self._hear)
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._on_end)
        if self._state is None:
            # Who waits for the first answer must see the end of the server, if that comes instead.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return server

    def run(self) -> int:
        """Until the mount is over. Returns the exit status of its last server."""
        while True:
            for key, _ in self._selector.select():
                status = key.data()
                if status is not None:
                    return int(status)

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            if self._state is not None:
                self._server.kill()
            return
        self._is_ending = True
        self._server.terminate()

    def _on_lifeline(self) -> None:
        if not os.read(_STDIN, 1):
            self._selector.unregister(_STDIN)
            self._on_signal(signal.SIGTERM)

    def _hear(self) -> None:
        while self._hear_one():
            pass

    def _hear_one(self) -> bool:
        """Take one message, if there is one."""
        if self._control not in self._selector.get_map():
            return False
        try:
            data, fds, *_ = socket.recv_fds(self._control, _MOST_MESSAGE, _MOST_FDS)
        except BlockingIOError:
            return False
        except OSError:
            data, fds = b"", []
        if not data:
            self._selector.unregister(self._control)
            return False
        message = json.loads(data)
        name = message["keep"]
        for old in self._kept.pop(name, []):
            os.close(old)
        if fds:
            self._kept[name] = list(fds)
        if "state" in message:
            self._state = message["state"]
            self._since = time.monotonic()
        return True

    def _on_end(self) -> int | None:
        status = self._server.wait()
        self._hear()  # what it said last
        if self._control in self._selector.get_map():
            self._selector.unregister(self._control)
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        self._control.close()
        is_accident = status < 0 or status == RETRY
        if not is_accident or self._is_ending or self._state is None:
            return max(status, 0) if status >= 0 else 1
        # One that dies of what the kernel sends it would do so for ever, and keep its readers waiting.
        self._quick = self._quick + 1 if status < 0 and time.monotonic() - self._since < _QUICK_SECONDS else 0
        if self._quick >= _MOST_QUICK:
            return 1
        if status == RETRY:
            if time.monotonic() - self._since > _PATIENCE_SECONDS:
                return 1
            time.sleep(_PAUSE_SECONDS)
        self._restarts += 1
        self._server = self._start()
        return None


def main() -> int:
    """Run as a child of :func:`obsfs.fuse.mounts.start`."""
    # The environment holds keys: neither this process nor its servers write it to a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    request = json.loads(io.FileIO(_STDIN, closefd=False).readline())  # unbuffered: what follows is the lifeline
    if request["settings"].get("snapshot") == "now":
        # Every server of this mount shows the same moment.
        request["settings"]["snapshot"] = datetime.now(UTC).isoformat(timespec="seconds")
    allow_open_files()
    os.chdir("/")
    status = Supervisor(sys.argv[1:], request).run()
    if request.get("is_temporary"):
        with suppress(OSError):
            os.rmdir(sys.argv[2])  # noqa: PTH106 - pathlib would stay in memory
    return status


if __name__ == "__main__":
    sys.exit(main())
