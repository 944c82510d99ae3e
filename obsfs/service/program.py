"""The programs that a supervisor runs servers by. Imports only the standard library, to stay small."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import NamedTuple

FD_PATH = "/proc/self/fd/"
"""The name by which a process opens a descriptor that it has, again."""

_PROBE_SECONDS = 60.0
MAX_REASON_BYTES = 4000


class Program(NamedTuple):
    """What a server is run by: a Python, where it looks for modules, and before that, a descriptor of a zip file."""

    executable: str
    path: str
    copy: int = -1

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
        places = [*([f"{FD_PATH}{self.copy}"] if self.copy >= 0 else []), *([self.path] if self.path else [])]
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return {**kept, **({"PYTHONPATH": os.pathsep.join(places)} if places else {})}

    @property
    def fds(self) -> list[int]:
        """What a process of it inherits."""
        return [self.copy] if self.copy >= 0 else []


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
        said = os.pread(self._said, MAX_REASON_BYTES, 0).decode(errors="replace").strip()
        os.close(self._said)
        os.close(self.pidfd)
        if is_late:
            return f"it did not answer within {_PROBE_SECONDS:.0f} s"
        return None if status == 0 else said.rpartition("\n")[2] or f"it ended with status {status}"
