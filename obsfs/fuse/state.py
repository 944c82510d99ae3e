"""What a mount keeps outside of the cache: a lock, a journal and a log, one file each in the XDG state directory."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from pathlib import Path

from obsfs import private
from obsfs.errors import UsageError
from obsfs.settings import state_dir


def path(mountpoint: Path, suffix: str) -> Path:
    """The file of a mount with this suffix: ``lock``, ``journal`` or ``log``."""
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:8]
    return state_dir() / f"{mountpoint.name[:100]}-{digest}.{suffix}"


def lock(mountpoint: Path, keeper: int) -> int:
    """The descriptor that makes this process the only one at a mountpoint; the lock ends with it. `keeper` is the pid
    of the process with which the mount ends.

    Raises UsageError when another process has it.
    """
    file = path(mountpoint, "lock")
    try:
        fd = private.open_file(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror})", "set XDG_STATE_HOME") from None
    if not _flock(fd, fcntl.LOCK_EX):
        os.close(fd)
        raise UsageError(f"{mountpoint} is being mounted or served by another obsfs", "see `obsfs status`")
    os.ftruncate(fd, 0)
    os.write(fd, str(keeper).encode())
    return fd


def is_abandoned(mountpoint: Path) -> bool:
    """Whether the process is gone with which the mount there should have ended; False where that is not known."""
    try:
        keeper = int(path(mountpoint, "lock").read_bytes())
    except (OSError, ValueError):
        return False
    return not Path(f"/proc/{keeper}").exists()


def wait_until_free(mountpoint: Path, timeout: float) -> bool:
    """Wait at most `timeout` seconds until the process that serves a mountpoint has ended."""
    try:
        fd = private.open_file(path(mountpoint, "lock"), os.O_RDWR)
    except OSError:
        return True
    try:
        deadline = time.monotonic() + timeout
        while not (is_free := _flock(fd, fcntl.LOCK_SH)) and time.monotonic() < deadline:
            time.sleep(0.01)
        return is_free
    finally:
        os.close(fd)


def _flock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno != errno.EWOULDBLOCK:
            raise
        return False
    return True
