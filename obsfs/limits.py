"""What the system lets a process have. Imports only the standard library: the supervisor of a mount needs it, too."""

from __future__ import annotations

import resource

_MOST_FILES = 1 << 20
"""Some programs look at every number up to the limit, which they inherit; Linux itself allows so many by default
(fs.nr_open)."""


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
