"""What the system lets a process have. Imports only the standard library: the supervisor of a mount needs it, too."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress

_MOST_FILES = 1 << 20
"""Some programs look at every number up to the limit, which they inherit; Linux itself allows so many by default
(fs.nr_open)."""

LEAST_FILES = 48
"""With which a server can read at all: its own, pipes for splice, and a few connections."""


def allow_open_files() -> bool:
    """Raise the soft limit of open files to the hard limit. Returns whether it is higher now than before."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return False
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        return False
    return True


def open_files_limit() -> int:
    """How many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def available_memory(root: str = "/") -> int:
    """Return the bytes of memory that can be had without swapping: of the machine, and within our control groups.

    What is cached of files counts as available (proc_meminfo(5), Documentation/admin-guide/cgroup-v2.rst). `root` is
    where proc and sys are.
    """
    found = int(_figures(f"{root}/proc/meminfo")["MemAvailable"]) * 1024
    groups = ""
    with suppress(FileNotFoundError):
        groups = _text(f"{root}/proc/self/cgroup")
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        home = f"{root}/sys/fs/cgroup{'/memory' if controllers else ''}"
        # A container may be shown the path on its host, and its own group as the root.
        while found > 0:
            found = min(found, _group_memory(home + path.rstrip("/")))
            if path in ("", "/"):
                break
            path = os.path.dirname(path)  # noqa: PTH120
    return max(found, 0)


def _group_memory(path: str) -> int:
    """What a control group, of version 2 or 1, leaves; very much where it has no limit."""
    for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            room = int(_text(f"{path}/{limit}")) - int(_text(f"{path}/{usage}"))
            figures = _figures(f"{path}/memory.stat")
            return room + sum(int(figures.get(name, 0)) for name in ("inactive_file", "active_file"))
    return sys.maxsize


def _text(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123 - for the supervisor's sake
        return file.read()


def _figures(path: str) -> dict[str, str]:
    """The first word of each line, less a colon, and the second."""
    return {line.split()[0].rstrip(":"): line.split()[1] for line in _text(path).splitlines()}
