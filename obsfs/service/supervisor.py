"""The small process that outlives the server of a mount, and starts another one when it dies.

It holds what must not close: all descriptors of the connection to the kernel (a request that was read from one is
aborted when that one closes), the lock of the mountpoint, and the locks of files that the kernel reads by itself. When
a server is killed, the next one inherits them, restores names and opens from the takeover log, and asks the kernel to
send unanswered requests again (FUSE_NOTIFY_RESEND, Linux 6.9). Readers wait for about a second.

It imports only the standard library, to keep its memory footprint and failure surface small. If it is killed itself,
its server starts another supervisor, which adopts the server (:mod:`obsfs.service.supervisor_client`).

It may be older or newer than its servers. Their messages carry the number of their format (none means 0), and both
sides ignore what they do not know. Before a server is replaced, the program that is installed now is asked whether it
can read what is there (``python -m obsfs.fuse.daemon --probe``); if it cannot, the old server stays. When a successor
fails to start, the supervisor tries in turn the program of the last server that started: where its names led then, and
from the copy that it stored, since another version may lie under the same names by now.

:mod:`obsfs.service.starting` runs it as ``python -m obsfs.fuse.supervisor SOURCE MOUNTPOINT``, with the request to the
server (one JSON line) on stdin. With ``lifeline`` in it, the mount ends when the other end of stdin closes; with
``is_temporary``, its directory is removed, too. SIGTERM ends the mount, also while no server is there; SIGHUP replaces
the server by a new one, of the version that is installed now.
"""

from __future__ import annotations

import io
import json
import os
import resource
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from obsfs.limits import allow_open_files
from obsfs.service.program import MAX_REASON_BYTES, Probe, Program
from obsfs.text import visible

CONTROL = "OBSFS_SUPERVISOR_FD"
FORMAT = 1
"""The format of requests to servers, and of messages between a supervisor and its servers."""
READY = b"ready\n"
"""What a supervisor tells the server that appointed it."""
RETRY = 75
"""The exit status (EX_TEMPFAIL) of a successor that could not take over yet."""

_STDIN = 0
_MAX_MESSAGE_BYTES = 64 << 10
_MAX_FDS = 16
_RETRY_SECONDS = 60.0
_PAUSE_SECONDS = 0.5
_START_SECONDS = 60.0
"""For a successor to begin to serve."""
_END_SECONDS = 20.0
"""For a server to end that was told to; it serves open files for 5 s more."""
_LOOK_SECONDS = 0.5
_QUICK_SECONDS = 0.5
_MAX_QUICK_ENDS = 300


class Adopted:
    """A server that is not a child of this process: its supervisor was killed, and it has started us."""

    def __init__(self, pidfd: int) -> None:
        self._pidfd = pidfd

    def send_signal(self, number: int) -> None:
        """Send a signal, as Popen does."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def wait(self) -> int | None:
        """Return None: only its parent is told its exit status."""
        return None


class Supervisor:
    """One mount: its server, and the descriptors that it has stored."""

    def __init__(self, arguments: list[str], request: dict[str, Any]) -> None:
        self._arguments = arguments
        adopt = request.pop("adopt", None)
        self._request = request
        self._installed = Program.installed()
        self._kept: dict[str, list[int]] = {}
        self._state: dict[str, Any] | None = None
        self._restarts = 0
        self._upgrades = 0
        self._is_replaced = False
        self._quick = 0
        self._servers = 0
        self._failed = 0
        self._good: Program | None = None
        self._running = self._installed.resolved
        self._is_serving = False
        self._probe: Probe | None = None
        self._is_wanted = False
        """Whether another server was asked for while none was there."""
        self._refusals = 0
        self._is_ending = False
        self._since = time.monotonic()
        # What is done about the server at a moment that no descriptor tells.
        self._alarm: tuple[float, Callable[[], int | None]] | None = None
        self._said = -1
        self._server: subprocess.Popen[bytes] | Adopted | None = None
        self._selector = selectors.DefaultSelector()
        self._listen()
        if adopt is not None:
            self._adopt(adopt)
        else:
            self._start()

    def _listen(self) -> None:
        """Make events of signals, and of the end of the lifeline."""
        wake, poke = socket.socketpair()
        poke.setblocking(False)
        signal.set_wakeup_fd(poke.fileno())
        self._poke = poke
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._selector.register(wake, selectors.EVENT_READ, lambda: self._on_signal(wake.recv(1)[0]))
        if self._request.get("lifeline"):
            self._selector.register(_STDIN, selectors.EVENT_READ, self._on_lifeline)

    def _adopt(self, adopt: dict[str, Any]) -> None:
        """Supervise the process that has started this one. It stores its descriptors as every server does."""
        self._restarts, self._upgrades = int(adopt["restarts"]), int(adopt["upgrades"])
        self._servers = int(adopt["servers"])
        self._running, self._installed = Program(*adopt["running"]), Program(*adopt["installed"])
        self._watch(Adopted(int(adopt["pidfd"])), socket.socket(fileno=int(adopt["control"])), int(adopt["pidfd"]))
        os.write(1, READY)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def _request_now(self) -> bytes:
        request = {
            **self._request,
            "format": FORMAT,
            "programs": {"installed": self._installed[:2], "running": self._running[:2]},
        }
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
        """Return the program that is installed now; if that could not be started, in turn the last one that could."""
        if self._good is None or not self._failed % 2:
            return self._installed
        return self._good._replace(copy=next(iter(self._kept.get("program", ())), -1))

    def _start(self) -> None:
        """Start a server. Raises OSError when its program cannot even be run, or has it tried again if another server
        was there before."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = self._choose()
        self._is_serving = False
        self._running = program if program.copy >= 0 else program.resolved
        fds = [theirs.fileno(), *program.fds, *self._kept.get("connection", ())]
        is_first = self._state is None
        self._said = -1 if is_first else os.memfd_create("obsfs-said")
        try:
            server = subprocess.Popen(
                [program.executable, "-P", "-m", "obsfs.fuse.daemon", *self._arguments],
                stdin=subprocess.PIPE,
                stdout=None if is_first else self._said,
                stderr=None if is_first else self._said,
                pass_fds=fds,
                env={**program.environment, CONTROL: str(theirs.fileno())},
            )
        except OSError as error:
            if is_first:
                raise
            ours.close()
            self._on_failure(f"{program.executable}: {error.strerror}")
            return
        finally:
            theirs.close()
        assert server.stdin is not None
        try:
            server.stdin.write(self._request_now())
            server.stdin.close()
        except OSError:
            pass  # it is dead already; its end will be seen
        self._watch(server, ours, os.pidfd_open(server.pid))
        if is_first:
            # Who waits for the first answer must see the end of the server, if that comes instead.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        else:
            self._alarm = time.monotonic() + _START_SECONDS, self._kill

    def _watch(self, server: subprocess.Popen[bytes] | Adopted, control: socket.socket, pidfd: int) -> None:
        control.setblocking(False)
        self._server, self._control, self._pidfd = server, control, pidfd
        self._selector.register(control, selectors.EVENT_READ, self._hear)
        self._selector.register(pidfd, selectors.EVENT_READ, self._on_end)

    def run(self) -> int:
        """Run until the mount is over. Returns the exit status of its last server."""
        while True:
            for key, _ in self._selector.select(self._seconds_left()):
                status = key.data()
                if status is not None:
                    return int(status)
            if self._probe is not None and not self._probe.seconds_left:
                self._on_probed()
            status = self._on_time()
            if status is not None:
                return status

    def _seconds_left(self) -> float | None:
        """Return the seconds until something is due that no descriptor tells."""
        left = [self._probe.seconds_left] if self._probe is not None else []
        if self._alarm is not None:
            left.append(max(0.0, self._alarm[0] - time.monotonic()))
        if self._is_between:
            left.append(_LOOK_SECONDS)
        return min(left, default=None)

    def _on_time(self) -> int | None:
        if self._is_between and self._is_over():
            # It was unmounted while nobody served it.
            self._is_ending = True
            if self._server is None:
                return 0
            self._kill()
        elif self._alarm is not None and time.monotonic() >= self._alarm[0]:
            (_, act), self._alarm = self._alarm, None
            return act()
        return None

    @property
    def _is_between(self) -> bool:
        """Whether a server has ended, and the next one does not serve yet."""
        return self._state is not None and not self._is_serving

    def _is_over(self) -> bool:
        """Whether the connection to the kernel has ended, as it does when the mount is gone."""
        looking = select.poll()
        for fd in self._kept.get("connection", ())[1:2]:  # the first is the lock
            looking.register(fd, 0)
        return bool(looking.poll(0))

    def _kill(self) -> None:
        if self._server is not None:
            self._server.send_signal(signal.SIGKILL)

    def _on_signal(self, number: int) -> int | None:
        if number == signal.SIGHUP:
            self._ask_to_replace()
            return None
        self._is_ending = True
        if self._server is None:
            return self._finish(0)
        # One that does not serve yet may be busy with anything, and has nothing to finish.
        self._server.send_signal(signal.SIGKILL if self._is_between else signal.SIGTERM)
        if self._state is not None:
            self._alarm = time.monotonic() + _END_SECONDS, self._kill
        return None

    def _ask_to_replace(self) -> None:
        """Replace the server, if the program that is installed now can follow it, once there is a server to follow."""
        if self._probe is not None or self._is_ending:
            return
        if not self._is_serving:
            self._is_wanted = True
            return
        self._is_wanted = False
        try:
            self._probe = Probe(self._installed, self._arguments, self._request_now())
        except OSError as error:
            self._refuse(f"{self._installed.executable}: {error.strerror}")
        else:
            self._selector.register(self._probe.pidfd, selectors.EVENT_READ, self._on_probed)

    def _on_probed(self) -> None:
        assert self._probe is not None
        self._selector.unregister(self._probe.pidfd)
        reason, self._probe = self._probe.finish(), None
        if reason is not None:
            self._refuse(reason)
        elif self._is_ending:
            return
        elif self._is_serving and self._server is not None:
            self._is_replaced = True
            self._kill()
        else:
            self._is_wanted = True

    def _refuse(self, reason: str) -> None:
        """Tell the server why it is not replaced; its status shows that."""
        self._refusals += 1
        message = {"format": FORMAT, "refused": {"number": self._refusals, "reason": reason}}
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            pass  # it is older, and does not listen, or it is gone

    def _on_lifeline(self) -> int | None:
        if not os.read(_STDIN, 1):
            self._selector.unregister(_STDIN)
            return self._on_signal(signal.SIGTERM)
        return None

    def _hear(self) -> None:
        while self._hear_one():
            pass

    def _hear_one(self) -> bool:
        """Take one message, if there is one."""
        if self._control not in self._selector.get_map():
            return False
        try:
            data, fds, *_ = socket.recv_fds(self._control, _MAX_MESSAGE_BYTES, _MAX_FDS)
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
        """Do what a server asks for. Unknown keys are ignored: it may be of a later version."""
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
            self._drop_said()
            self._failed = 0
            self._good = self._running
            if not self._is_ending:
                self._alarm = None
            if self._is_wanted:
                self._ask_to_replace()

    def _on_end(self) -> int | None:
        assert self._server is not None
        status = self._server.wait()
        self._server = None
        self._alarm = None
        self._hear()  # what it said last
        if self._control in self._selector.get_map():
            self._selector.unregister(self._control)
        self._selector.unregister(self._pidfd)
        os.close(self._pidfd)
        self._control.close()
        if status is None:
            status = 0 if self._is_over() else -signal.SIGKILL
        # One that did not begin to serve has not ended the mount either, unless it says that it is over.
        is_accident = status < 0 or (status != 0 and not self._is_serving)
        if not is_accident or self._is_ending or self._state is None:
            return self._finish(status)
        if not self._is_serving:
            self._on_failure(self._last_words(status))
            return None
        # One that dies of what the kernel sends it would do so for ever, and keep its readers waiting.
        self._quick = self._quick + 1 if time.monotonic() - self._since < _QUICK_SECONDS else 0
        if self._quick >= _MAX_QUICK_ENDS:
            return self._give_up()
        self._is_serving = False
        return self._follow()

    def _last_words(self, status: int) -> str:
        """Return why a server has not begun to serve."""
        said = os.pread(self._said, MAX_REASON_BYTES, 0).decode(errors="replace").strip() if self._said >= 0 else ""
        return said.rpartition("\n")[2] or (f"it ended by signal {-status}" if status < 0 else f"exit status {status}")

    def _follow(self) -> int | None:
        """Start another server."""
        if self._is_over():
            return 0
        if self._is_replaced:
            self._upgrades += 1
        else:
            self._restarts += 1
        self._servers += 1
        self._start()
        self._is_replaced = False
        return None

    def _on_failure(self, reason: str) -> None:
        """A successor did not begin to serve: after a pause there is another one, or none."""
        self._failed += 1
        self._log("ERROR", f"a server that should follow did not start: {reason}")
        is_last = self._failed > 1 and time.monotonic() - self._since > _RETRY_SECONDS
        self._alarm = time.monotonic() + _PAUSE_SECONDS, self._give_up if is_last else self._follow
        self._drop_said()

    def _drop_said(self) -> None:
        """Drop what a server has printed, which matters only until it serves or fails to."""
        if self._said >= 0:
            os.close(self._said)
            self._said = -1

    def _give_up(self) -> int:
        self._log("ERROR", "no server can follow: the mount is dead")
        return 1

    def _finish(self, status: int) -> int:
        """End: unmount if the mount was told to end. Returns the exit status."""
        if not self._is_ending:
            return status if status >= 0 else 1
        if self._state is not None and not self._is_over():
            self._log("INFO", "ended while no server was there")
            with suppress(Exception):
                from pathlib import Path  # only now: these are not small

                from obsfs import mountinfo
                from obsfs.fuse.kernel import channel

                if (entry := mountinfo.mounted_at(Path(self._arguments[1]))) is not None and entry.is_ours:
                    channel.unmount(entry.mountpoint, lazy=True)
        return max(status, 0)

    def _log(self, level: str, text: str) -> None:
        """Write a line to the log of the mount, which its servers write otherwise."""
        now = time.time()
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        line = f"{when},{int(now % 1 * 1000):03} {level} obsfs.service.supervisor: {visible(text)}\n"
        with suppress(OSError, KeyError, TypeError):
            fd = os.open(self._state["log"], os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)  # type: ignore[index]
            with open(fd, "w") as log:  # noqa: PTH123 - a descriptor
                log.write(line)


def main() -> int:
    """Run as a child of :func:`obsfs.service.starting.start`."""
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
