"""What /proc says of a process. Imports nothing but the standard library, so that the supervisor can have it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def is_stuck(pid: int) -> bool:
    """Whether a process was killed but is not gone: its main thread has ended, and all others that it has left sleep
    inside the kernel, where no signal reaches them. It does nothing more, but keeps its locks. False for one that does
    not exist."""
    states = {}
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):  # it may end meanwhile
                states[int(task.name)] = (task / "stat").read_bytes().rpartition(b") ")[2][:1]
    return states.pop(pid, b"") == b"Z" and set(states.values()) == {b"D"}
