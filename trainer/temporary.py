"""Temporary directories that never stay: if a process is killed, the next one removes what it left."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def temporary_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a directory for temporary files of this process, and remove it afterwards.

    Directories with the same prefix that a dead process left are removed first. A process holds a lock (flock(2)) on
    its directory; the kernel releases the lock when the process dies.

    Args:
        prefix: The beginning of the directory's name.
        parent: The directory to make it in; by default the system's directory for temporary files.

    Raises:
        OSError: The directory cannot be made.
    """
    parent = parent or Path(tempfile.gettempdir())
    _remove_abandoned(prefix, parent)
    path, lock = _make_locked(prefix, parent)
    try:
        yield path
    finally:
        with _uninterrupted():
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _make_locked(prefix: str, parent: Path) -> tuple[Path, int]:
    """Return a new directory, and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        with suppress(FileNotFoundError):  # another process removed it before it was locked
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # NFS locks no directories: then nobody else can lock, and so remove, this one
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _remove_abandoned(prefix: str, parent: Path) -> None:
    """Remove the directories that dead processes of this user left."""
    for path in parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back signals that end this process. Use it only around work that takes no time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
