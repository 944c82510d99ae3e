"""The server's side of its supervisor (:mod:`obsfs.service.supervisor`): what it stores there for a successor.

A server that serves does not depend on its supervisor. When the supervisor is killed, the server appoints another one
(:func:`appoint`): a process of the same kind, which adopts the server as it is, and gets everything to store again.
"""

from __future__ import annotations

import array
import ctypes
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from obsfs.service.program import Program
from obsfs.service.supervisor import CONTROL, FORMAT, READY

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_UCRED = struct.Struct("3i")  # <linux/socket.h>: pid, uid, gid
_MAX_MESSAGE_BYTES = 64 << 10
_APPOINT_SECONDS = 60.0
_CATCH_UP_SECONDS = 0.1


class SupervisorClient:
    """Speaks to the supervisor of this process; to nothing, when it has none. Safe to use from many threads.

    No caller waits for the supervisor: what a stopped one does not take is sent from a thread once it does.

    A successor outlives its supervisor from the start: it has everything that the mount needs. The first server of a
    mount ends with its supervisor until it serves (:meth:`end_with_it`, :meth:`listen`). A program that gives up then
    needs to end only the supervisor.
    """

    def __init__(self, connection: socket.socket | None = None) -> None:
        """Speak over a socket whose other end the supervisor has; None where there is no supervisor."""
        self._connection = connection
        self.pid: int | None = None
        """The pid of the supervisor that has started this process."""
        self._guard = threading.Lock()
        self._unsent: dict[str, tuple[bytes, list[int]]] = {}
        """The last message about each name that the supervisor has not taken, with descriptors of our own."""
        if connection is not None:
            connection.set_inheritable(False)
            # Not the parent's pid: if the supervisor was killed already, the parent is another process.
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            self.pid = int(_UCRED.unpack(credentials)[0])

    @staticmethod
    def inherited() -> SupervisorClient:
        """Return the client of the supervisor that started this process, and hide the way to it from its children."""
        number = os.environ.pop(CONTROL, None)
        return SupervisorClient(socket.socket(fileno=int(number)) if number else None)

    def end_with_it(self) -> None:
        """Have the kernel kill this process when the supervisor ends, until :meth:`listen`. In the same thread."""
        if self._connection is not None:
            _kill_with_parent(signal.SIGKILL)

    @property
    def is_there(self) -> bool:
        """Whether there is a supervisor."""
        return self._connection is not None

    def listen(self, on_refused: Callable[[dict[str, Any]], None], on_lost: Callable[[], None]) -> None:
        """From now on, outlive the supervisor. Call it in the thread that called :meth:`end_with_it`.

        Args:
            on_refused: told, from a thread, why the supervisor did not replace this server: ``number``, ``reason``.
            on_lost: called from that thread when the supervisor is gone. It may call :meth:`adopt` with another one.
        """
        if self._connection is not None:
            _kill_with_parent(0)
            target, arguments = self._listen, (on_refused, on_lost)
            threading.Thread(target=target, args=arguments, name="obsfs-supervisor", daemon=True).start()

    def _listen(self, on_refused: Callable[[dict[str, Any]], None], on_lost: Callable[[], None]) -> None:
        while (connection := self._connection) is not None:
            try:
                data = connection.recv(_MAX_MESSAGE_BYTES)
            except OSError:
                data = b""
            if not data:
                self._connection = None
                connection.close()
                on_lost()
                continue
            try:
                message = json.loads(data)
            except ValueError:
                continue
            if isinstance(message, dict) and isinstance(message.get("refused"), dict):
                on_refused(message["refused"])

    def adopt(self, connection: socket.socket) -> None:
        """Speak to another supervisor, which has nothing stored yet."""
        self._connection = connection

    def store_fds(self, name: str, fds: Sequence[int], state: dict[str, Any] | None = None) -> None:
        """Have the supervisor keep descriptors open, for a successor, in place of those that the name had.

        Args:
            name: of what they belong to. A successor gets those of ``connection`` and ``program``.
            fds: the descriptors; they stay ours, too.
            state: what the successor is told.
        """
        self._send({"keep": name, **({"state": state} if state is not None else {})}, fds)

    def update_state(self, state: dict[str, Any]) -> None:
        """Change what a successor is told, and nothing that is stored."""
        # A supervisor of format 0 knows no message without a name.
        self._send({"keep": "note", "state": state}, [])

    def remove_fds(self, name: str) -> None:
        """Have the supervisor close the descriptors that are stored under a name."""
        self._send({"keep": name}, [])

    def _send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        data = json.dumps({"format": FORMAT, **message}).encode()
        with self._guard:
            if self._unsent or not self._try(data, fds):
                self._put_off(message["keep"], data, fds)

    def _try(self, data: bytes, fds: Sequence[int]) -> bool:
        """Send a message, if that takes no waiting. The caller holds the guard."""
        if (connection := self._connection) is not None:
            try:
                # Not send_fds: in Python 3.11 and 3.12 it ignores the flags.
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                connection.sendmsg([data], rights, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                pass  # it is gone; the next one is sent everything
        return True

    def _put_off(self, name: str, data: bytes, fds: Sequence[int]) -> None:
        """Send a message later, in place of an earlier one about the same name. The caller holds the guard."""
        is_first = not self._unsent
        self._forget(name)
        try:
            self._unsent[name] = data, [os.dup(fd) for fd in fds]
        except OSError as error:
            log.warning("the supervisor does not answer, and %s cannot be stored with it: %s", name, error)
        if is_first and self._unsent:
            threading.Thread(target=self._catch_up, name="obsfs-unsent", daemon=True).start()

    def _forget(self, name: str) -> None:
        for fd in self._unsent.pop(name, (b"", []))[1]:
            os.close(fd)

    def _catch_up(self) -> None:
        """Send what was put off, in its order, as soon as the supervisor takes it."""
        while True:
            with self._guard:
                for name, (data, fds) in list(self._unsent.items()):
                    if not self._try(data, fds):
                        break
                    self._forget(name)
                if not self._unsent:
                    return
            time.sleep(_CATCH_UP_SECONDS)


def _kill_with_parent(signal_number: int) -> None:
    """Have the kernel send a signal to this process when the thread that started it ends; 0 for none (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal_number)


def appoint(
    arguments: list[str], request: dict[str, Any], counts: dict[str, int], copy: int
) -> tuple[subprocess.Popen[bytes], socket.socket] | str:
    """Start a supervisor for this process, a server whose own was killed.

    It runs the program that is installed now, or, if that cannot be started, the `copy` of our own.

    Args:
        arguments: source and mountpoint.
        request: what the supervisor asked this server for.
        counts: ``restarts``, ``upgrades`` and ``servers`` so far.
        copy: a descriptor of the zip file with the program of this process; -1 where there is none.

    Returns:
        The process and the socket to it, or why there is none.
    """
    here = [sys.executable, os.environ.get("PYTHONPATH", "")]
    programs = request.get("programs") or {"installed": here, "running": here}
    installed = Program(*programs["installed"])
    request = {**request, "adopt": {**counts, "running": programs["running"], "installed": installed[:2]}}
    reason = ""
    for program in (installed, installed._replace(copy=copy)) if copy >= 0 else (installed,):
        started = _start(program, arguments, request)
        if not isinstance(started, str):
            return started
        log.error("%s could not be started as a supervisor: %s", program.executable, started)
        reason = started
    return reason


def _start(
    program: Program, arguments: list[str], request: dict[str, Any]
) -> tuple[subprocess.Popen[bytes], socket.socket] | str:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pidfd = os.pidfd_open(os.getpid())
    adopt = {**request["adopt"], "control": theirs.fileno(), "pidfd": pidfd}
    try:
        process = subprocess.Popen(
            [program.executable, "-P", "-m", "obsfs.fuse.supervisor", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), pidfd, *program.fds],
            start_new_session=True,
            cwd="/",
            env=program.environment,
        )
    except OSError as error:
        ours.close()
        return f"{program.executable}: {error.strerror}"
    finally:
        theirs.close()
        os.close(pidfd)
    assert process.stdin and process.stdout
    said = b""
    try:
        process.stdin.write(json.dumps({**request, "adopt": adopt}).encode() + b"\n")
        process.stdin.close()
        waiting = select.poll()  # select(2) would end at descriptor 1023
        waiting.register(process.stdout, select.POLLIN)
        if waiting.poll(_APPOINT_SECONDS * 1000):
            said = process.stdout.readline()
    except OSError:
        pass  # it has ended
    process.stdout.close()
    if said == READY:
        return process, ours
    process.kill()
    ours.close()
    return f"it ended with status {process.wait()}"
