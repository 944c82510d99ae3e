"""A copy of the program that a process runs, for a server that follows it when another version lies in its place.

``pip install --upgrade`` writes the new version over the old one. A server that runs already does not mind, but its
successor would be of the new version, and if that cannot be started, of nothing. So each server gives its supervisor a
zip file of this package to keep, from which Python can run. It is in memory, and sealed: nobody can change it. The
packages that ours needs are not in it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from obsfs.service import state
from obsfs.service.program import FD_PATH

log = logging.getLogger(__name__)

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
_PACKAGE = Path(__file__).resolve().parents[1]
"""Of what runs here, also when a link on the way leads to another version by the time it is copied."""
_SOURCE = str(getattr(__spec__.loader, "archive", ""))
"""The zip file that we were imported from, if it was one."""


def copy_in_steps(started: float, keep: Callable[[int], None], package: Path = _PACKAGE) -> Iterator[None]:
    """Copy our package, a file in each step, and call `keep` with a descriptor that stays ours.

    A process that runs from such a copy keeps that one. Nothing is kept where a file was written after the process had
    `started` (seconds since the epoch): it may be of another version than what was loaded.
    """
    if _SOURCE.startswith(FD_PATH):
        keep(int(_SOURCE.removeprefix(FD_PATH)))
        return
    fd = os.memfd_create("obsfs-program", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(fd), "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as copy:
            for path in sorted(package.rglob("*.py")):
                if path.stat().st_ctime >= started:
                    raise OSError(errno.ESTALE, "it was written just now", str(path))
                copy.write(path, path.relative_to(package.parent))
                yield
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        log.info("no copy of the program is kept: %s", error)
        os.close(fd)
    else:
        keep(fd)


def process_start() -> float:
    """When this process was started, in seconds since the epoch."""
    ticks = state.start_ticks(os.getpid())
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
