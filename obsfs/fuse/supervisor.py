"""The small process that outlives the server of a mount, and starts another one when it dies.

It holds what must not close: the descriptors of the connection to the kernel (all of them: a request that was read
from one dies with it), the lock of the mountpoint, and the locks of files that the kernel reads by itself. A server
that was killed is followed by one that inherits them, restores names and opens from the journal, and asks the kernel
to send again what was not answered (FUSE_NOTIFY_RESEND, Linux 6.9). Readers wait for a second, and never know.

It imports nothing but the standard library, so that it is small and has little to die of. When it dies itself, its
server dies too, and the mount with them.

It may be older or newer than its servers. What they say to each other has a format's number (no number is format 0),
and both leave out what they do not know. Before a server is replaced, the program that is installed now is asked
whether it can read what is there (``python -m obsfs.fuse.daemon --probe``); if it cannot, the old server stays. When a
successor fails to start, the program of the last server that did is tried as well, by where its names led then.

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
from typing import Any, NamedTuple

from obsfs.limits import allow_open_files

CONTROL = "OBSFS_SUPERVISOR_FD"
FORMAT = 1
"""Of requests to servers, and of messages between a supervisor and its servers."""
RETRY = 75
"""The exit status (EX_TEMPFAIL) of a successor that could not take over yet."""

_STDIN = 0
_MOST_MESSAGE = 64 << 10
_MOST_FDS = 16
_PATIENCE_SECONDS = 60.0
_PAUSE_SECONDS = 0.5
_QUICK_SECONDS = 0.5
_MOST_QUICK = 300
_PROBE_SECONDS = 60.0
_MOST_REASON = 4000


class Program(NamedTuple):
    """What a server is run by: a Python, and where it looks for modules."""

    executable: str
    path: str

    @staticmethod
    def installed() -> Program:
        """The program that is found at the names by which this one was started."""
        return Program(sys.executable, os.environ.get("PYTHONPATH", ""))

    @property
    def resolved(self) -> Program:
        """The same program, also when the links on the way to it lead elsewhere one day."""
        directory, name = os.path.split(self.executable)
        places = [os.path.realpath(place) for place in self.path.split(os.pathsep) if place]
        return Program(os.path.join(os.path.realpath(directory), name), os.pathsep.join(places))  # noqa: PTH118

    @property
    def environment(self) -> dict[str, str]:
        """For a process of it."""
        return {**os.environ, **({"PYTHONPATH": self.path} if self.path else {})}


class Probe:
    """A run of the program that is installed now, which only says whether it could take over."""

    def __init__(self, program: Program, arguments: list[str], request: bytes) -> None:
        self.pidfd = -1
        self._said = os.memfd_create("obsfs-probe")
        with open(os.memfd_create("obsfs-request"), "w+b") as asked:  # noqa: PTH123 - a descriptor
            asked.write(request)
            asked.seek(0)
            self._process = subprocess.Popen(
                [program.executable, "-P", "-m", "obsfs.fuse.daemon", "--probe", *arguments],
                stdin=asked,
                stdout=self._said,
                stderr=self._said,
                env=program.environment,
            )
        self.pidfd = os.pidfd_open(self._process.pid)
        self._deadline = time.monotonic() + _PROBE_SECONDS

    @property
    def seconds_left(self) -> float:
        """For how long its answer is waited for."""
        return max(0.0, self._deadline - time.monotonic())

    def finish(self) -> str | None:
        """Why it could not take over; None when it could."""
        is_late = self._process.poll() is None
        self._process.kill()
        status = self._process.wait()
        said = os.pread(self._said, _MOST_REASON, 0).decode(errors="replace").strip()
        os.close(self._said)
        os.close(self.pidfd)
        if is_late:
            return f"it did not answer within {_PROBE_SECONDS:.0f} s"
        return None if status == 0 else said.rpartition("\n")[2] or f"it ended with status {status}"


class Supervisor:
    """One mount: its server, and what it has given to keep."""

    def __init__(self, arguments: list[str], request: dict[str, Any]) -> None:
        self._arguments = arguments
        self._request = request
        self._kept: dict[str, list[int]] = {}
        self._state: dict[str, Any] | None = None
        self._restarts = 0
        self._upgrades = 0
        self._is_replaced = False
        self._quick = 0
        self._servers = 0
        self._failed = 0
        self._good: Program | None = None
        self._is_serving = False
        self._probe: Probe | None = None
        self._refusals = 0
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

    def _request_now(self) -> bytes:
        request = {**self._request, "format": FORMAT}
        if self._state is not None:
            request["takeover"] = {
                **self._state,
                "restarts": self._restarts,
                "servers": self._servers,
                "upgrades": self._upgrades,
                "is_upgrade": self._is_replaced,
                "connection": self._kept["connection"],
            }
        return json.dumps(request).encode() + b"\n"

    def _choose(self) -> Program:
        """What is installed now; where that could not be started, in turn with what last could."""
        program = Program.installed()
        return self._good if self._good is not None and self._failed % 2 else program

    def _start(self) -> subprocess.Popen[bytes] | None:
        """Start a server; None when its program cannot even be run, and another server was there before."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = self._choose()
        self._is_serving = False
        self._running = program.resolved
        fds = [theirs.fileno(), *self._kept.get("connection", ())]
        try:
            server = subprocess.Popen(
                [program.executable, "-P", "-m", "obsfs.fuse.daemon", *self._arguments],
                stdin=subprocess.PIPE,
                stdout=None if self._state is None else subprocess.DEVNULL,
                pass_fds=fds,
                env={**program.environment, CONTROL: str(theirs.fileno())},
            )
        except OSError:
            if self._state is None:
                raise
            ours.close()
            return None
        finally:
            theirs.close()
        assert server.stdin is not None
        try:
            server.stdin.write(self._request_now())
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
            for key, _ in self._selector.select(self._probe.seconds_left if self._probe else None):
                status = key.data()
                if status is not None:
                    return int(status)
            if self._probe is not None and not self._probe.seconds_left:
                self._on_probed()

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._ask_to_replace()
            return
        self._is_ending = True
        if self._server is not None:
            self._server.terminate()

    def _ask_to_replace(self) -> None:
        """Have another server follow, if what is installed now says that it can."""
        if self._state is None or self._probe is not None or not self._is_serving:
            return
        try:
            self._probe = Probe(Program.installed(), self._arguments, self._request_now())
        except OSError as error:
            self._refuse(f"{sys.executable}: {error.strerror}")
        else:
            self._selector.register(self._probe.pidfd, selectors.EVENT_READ, self._on_probed)

    def _on_probed(self) -> None:
        assert self._probe is not None
        self._selector.unregister(self._probe.pidfd)
        reason, self._probe = self._probe.finish(), None
        if reason is not None:
            self._refuse(reason)
        elif self._is_serving and self._server is not None:
            self._is_replaced = True
            self._server.kill()

    def _refuse(self, reason: str) -> None:
        """The server shows why it was not replaced."""
        self._refusals += 1
        message = {"format": FORMAT, "refused": {"number": self._refusals, "reason": reason}}
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            pass  # it is older, and does not listen, or it is gone

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
        try:
            message = json.loads(data)
        except ValueError:
            message = None
        self._take(message if isinstance(message, dict) else {}, list(fds))
        return True

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        """What a server says. What is not known of it is left out: it may be a later one."""
        name = message.get("keep")
        if isinstance(name, str):
            for old in self._kept.pop(name, []):
                os.close(old)
            if fds:
                self._kept[name] = fds
        else:
            for fd in fds:
                os.close(fd)
        if isinstance(state := message.get("state"), dict):
            self._state = state
            self._since = time.monotonic()
        if name == "connection" and "state" in message:
            self._is_serving = True
            self._failed = 0
            self._good = self._running

    def _on_end(self) -> int | None:
        assert self._server is not None
        status = self._server.wait()
        self._hear()  # what it said last
        if self._control in self._selector.get_map():
            self._selector.unregister(self._control)
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        self._control.close()
        # One that did not begin to serve has not ended the mount either, unless it says that it is over.
        is_accident = status < 0 or (status != 0 and not self._is_serving)
        if not is_accident or self._is_ending or self._state is None:
            return max(status, 0) if status >= 0 else 1
        # One that dies of what the kernel sends it would do so for ever, and keep its readers waiting.
        self._quick = self._quick + 1 if self._is_serving and time.monotonic() - self._since < _QUICK_SECONDS else 0
        if self._quick >= _MOST_QUICK:
            return 1
        return self._follow(failed=not self._is_serving)

    def _follow(self, *, failed: bool) -> int | None:
        """Start another server, after a pause when the last was `failed`; the exit status when it is given up."""
        while True:
            if failed:
                self._failed += 1
                if time.monotonic() - self._since > _PATIENCE_SECONDS:
                    return 1
                time.sleep(_PAUSE_SECONDS)
            if self._is_replaced:
                self._upgrades += 1
            else:
                self._restarts += 1
            self._servers += 1
            self._server = self._start()
            self._is_replaced = False
            if self._server is not None:
                return None
            failed = True


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
