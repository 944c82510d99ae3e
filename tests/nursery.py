"""A process that has imported the packages below obsfs, and forks one for each command: half a second less for each.

What it forks then does what ``python -m obsfs`` does, from the first line of obsfs on: with the arguments, environment,
working directory, umask and streams of its own, as a process of its own that ends as every Python does.

    python -P nursery.py SOCKET_FD      one request at a time comes on the socket: see :meth:`Nursery.start`
"""

from __future__ import annotations

import array
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

_PACKAGES = (
    "awscrt.auth", "awscrt.checksums", "botocore.client", "botocore.config", "botocore.httpsession",
    "botocore.loaders", "botocore.session", "botocore.signers", "click", "importlib.metadata", "msgspec",
    "packaging.version", "rich.console", "rich.progress", "rich.table", "urllib3", "xxhash",
)  # fmt: skip
_OWN = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_")
"""Variables that count when a Python starts, by how their names begin: a command with others starts by itself."""


class Nursery:
    """The face of it, for the process that wants commands to be run."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._environment = _of_a_start(os.environ)
        self._guard = threading.Lock()
        self._socket = ours
        with theirs:
            command = [sys.executable, "-P", __file__, str(theirs.fileno())]
            pipe = subprocess.PIPE  # Python's streams are made for pipes, as those of the commands are
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], cwd="/", stdout=pipe, stderr=pipe)

    @property
    def pid(self) -> int:
        """Of the process that forks."""
        return self._process.pid

    def can_start(self, environment: dict[str, str]) -> bool:
        """Whether a Python with this environment would start as the one here has."""
        return _of_a_start(environment) == self._environment

    def run(self, arguments: list[str], environment: dict[str, str], timeout: float) -> tuple[int, bytes, bytes]:
        """The exit status of ``python -m obsfs ARGUMENTS`` (negative: of a signal), and what it and its children wrote.

        Raises:
            subprocess.TimeoutExpired: it was killed, for it took longer than `timeout` seconds.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        outputs = [os.pipe(), os.pipe()]
        request = {"arguments": arguments, "environment": environment, "cwd": str(Path.cwd()), "umask": _umask()}
        with ours, os.fdopen(outputs[0][0], "rb") as out, os.fdopen(outputs[1][0], "rb") as err:
            with theirs, os.fdopen(os.memfd_create("request"), "w+b") as body:
                body.write(json.dumps(request).encode())
                body.flush()
                given = array.array("i", [body.fileno(), theirs.fileno(), 0, outputs[0][1], outputs[1][1]])
                with self._guard:
                    self._socket.sendmsg([b"?"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, given)])
            for _, end in outputs:
                os.close(end)
            pid = int.from_bytes(ours.recv(4), "little")
            assert pid, "the nursery has ended"
            try:
                written = _read_all([out.fileno(), err.fileno(), ours.fileno()], time.monotonic() + timeout)
            except TimeoutError:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(["obsfs", *arguments], timeout) from None
            return int.from_bytes(written[2], "little", signed=True), written[0], written[1]

    def close(self) -> None:
        """End it; what it forked goes on."""
        self._socket.close()
        self._process.communicate(timeout=10)


def _of_a_start(environment: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_OWN)}


def _umask() -> int:
    found = os.umask(0o077)
    os.umask(found)
    return found


def _read_all(fds: list[int], deadline: float) -> list[bytes]:
    """What comes on each of them until it is closed. Raises TimeoutError."""
    found = dict.fromkeys(fds, b"")
    with selectors.DefaultSelector() as selector:
        for fd in fds:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                raise TimeoutError
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                found[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
    return [found[fd] for fd in fds]


def _serve(requests: socket.socket) -> dict[str, object] | None:
    """Fork for each request; returns it in the process that was forked, and None at the end."""
    running: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd != requests.fileno():
                    pid, asker = running.pop(key.fd)
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with asker, suppress(OSError):
                        asker.send(status.to_bytes(4, "little", signed=True))
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    continue
                said, fds, _, _ = socket.recv_fds(requests, 16, 8)
                if not said:
                    return None
                asker = socket.socket(fileno=fds[1])
                pid = os.fork()
                if pid == 0:
                    with os.fdopen(fds[0], "rb") as body:
                        body.seek(0)
                        request: dict[str, object] = json.load(body)
                    for number, fd in enumerate(fds[2:]):
                        os.dup2(fd, number)
                        os.close(fd)
                    asker.close()
                    requests.close()
                    for fd in running:
                        os.close(fd)
                    for _, other in running.values():
                        other.close()
                    return request
                for fd in (fds[0], *fds[2:]):
                    os.close(fd)
                with suppress(OSError):
                    asker.send(pid.to_bytes(4, "little"))
                pidfd = os.pidfd_open(pid)
                running[pidfd] = (pid, asker)
                selector.register(pidfd, selectors.EVENT_READ)


def main() -> None:
    """Serve; in what was forked, be the command."""
    for package in _PACKAGES:
        import_module(package)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["cwd"]))
    os.umask(int(str(request["umask"])))
    sys.argv = ["obsfs", *request["arguments"]]
    runpy.run_module("obsfs", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
