"""A server's side of its supervisor (:mod:`obsfs.service.supervisor`): what it gives to keep, and what it inherits.

A server that serves does not depend on its supervisor. When that is killed, it appoints another one
(:func:`appoint`): a process of the same kind, which adopts the server as it is, and is given all to keep again.
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

from obsfs.service.supervisor import CONTROL, FORMAT, READY, Program

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_UCRED = struct.Struct("3i")  # <linux/socket.h>: pid, uid, gid
_MOST_MESSAGE = 64 << 10
_APPOINT_SECONDS = 60.0
_CATCH_UP_SECONDS = 0.1


class SupervisorClient:
    """Speaks to the supervisor of this process; to nobody, when it has none. Safe to use from many threads.

    Nobody waits for the supervisor: what a stopped one does not take is sent from a thread once it does.

    A successor outlives its supervisor from the first: it has all that the mount needs. Another server ends with it
    until it serves (:meth:`listen`): whoever gives up waiting for a mount ends the supervisor, and no more.
    """

    def __init__(self, *, is_successor: bool = False) -> None:
        number = os.environ.pop(CONTROL, None)
        self._control = socket.socket(fileno=int(number)) if number else None
        self.pid: int | None = None
        """The pid of the supervisor that has started this process."""
        self._guard = threading.Lock()
        self._unsent: dict[str, tuple[bytes, list[int]]] = {}
        """The last message about each name that the supervisor has not taken, with descriptors of our own."""
        if self._control is not None:
            self._control.set_inheritable(False)
            # Not the parent's: of a process whose supervisor was killed already, that is another's.
            credentials = self._control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            self.pid = int(_UCRED.unpack(credentials)[0])
            if not is_successor:
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    @property
    def is_there(self) -> bool:
        """Whether there is a supervisor."""
        return self._control is not None

    def listen(self, on_refused: Callable[[dict[str, Any]], None], on_lost: Callable[[], None]) -> None:
        """From now on, outlive the supervisor. In the thread that has made this object.

        Args:
            on_refused: told, from a thread, why the supervisor did not replace this server: ``number``, ``reason``.
            on_lost: called from that thread when the supervisor is gone. It may have made another one ours by `adopt`.
        """
        if self._control is not None:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
            target, arguments = self._listen, (on_refused, on_lost)
            threading.Thread(target=target, args=arguments, name="obsfs-supervisor", daemon=True).start()

    def _listen(self, on_refused: Callable[[dict[str, Any]], None], on_lost: Callable[[], None]) -> None:
        while (control := self._control) is not None:
            try:
                data = control.recv(_MOST_MESSAGE)
            except OSError:
                data = b""
            if not data:
                self._control = None
                control.close()
                on_lost()
                continue
            try:
                message = json.loads(data)
            except ValueError:
                continue
            if isinstance(message, dict) and isinstance(message.get("refused"), dict):
                on_refused(message["refused"])

    def adopt(self, control: socket.socket) -> None:
        """Speak to another supervisor. It knows of nothing that was kept."""
        self._control = control

    def store_fds(self, name: str, fds: Sequence[int], state: dict[str, Any] | None = None) -> None:
        """Have descriptors kept open under a name, in place of those that it had; `state` is for a successor."""
        self._send({"keep": name, **({"state": state} if state is not None else {})}, fds)

    def update_state(self, state: dict[str, Any]) -> None:
        """Change what a successor is told, and nothing that is kept. (A supervisor of format 0 knows no message
        without a name.)"""
        self._send({"keep": "note", "state": state}, [])

    def remove_fds(self, name: str) -> None:
        """What is kept under a name may close."""
        self._send({"keep": name}, [])

    def _send(self, message: dict[str, Any], fds: Sequence[int]) -> None:
        data = json.dumps({"format": FORMAT, **message}).encode()
        with self._guard:
            if self._unsent or not self._try(data, fds):
                self._put_off(message["keep"], data, fds)

    def _try(self, data: bytes, fds: Sequence[int]) -> bool:
        """Send a message, if that waits for nothing. The caller holds the guard."""
        if (control := self._control) is not None:
            try:
                # Not send_fds: in Python 3.11 and 3.12 it ignores the flags.
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                control.sendmsg([data], rights, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError:
                pass  # it is gone; another one is given all
        return True

    def _put_off(self, name: str, data: bytes, fds: Sequence[int]) -> None:
        """Send a message later, in place of an earlier one about the same name. The caller holds the guard."""
        is_first = not self._unsent
        self._forget(name)
        try:
            self._unsent[name] = data, [os.dup(fd) for fd in fds]
        except OSError as error:
            log.warning("the supervisor does not answer, and %s cannot be kept for it: %s", name, error)
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


def appoint(
    arguments: list[str], request: dict[str, Any], counts: dict[str, int], copy: int
) -> tuple[subprocess.Popen[bytes], socket.socket] | str:
    """Start a supervisor for this process, a server whose own was killed.

    It is of the program that is installed now, or, where that cannot be started, of the `copy` of our own.

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
        found = _start(program, arguments, request)
        if not isinstance(found, str):
            return found
        log.error("%s could not be started as a supervisor: %s", program.executable, found)
        reason = found
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
