"""Temporary directories that go with their process; what a killed one leaves, the next one removes."""

from __future__ import annotations

import fcntl
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
def temporary_directory(prefix: str) -> Iterator[Path]:
    """Make a directory for temporary files of this process, and remove it afterwards.

    What a process that is gone has left by the same prefix is removed first. Whether it is gone is told by a lock
    (flock(2)) on its directory, which the kernel ends with the process.

    Args:
        prefix: How its name begins.

    Raises:
        OSError: There is no place for it.
    """
    _sweep(prefix)
    path, lock = _locked(prefix)
    try:
        yield path
    finally:
        with _uninterrupted():
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked(prefix: str) -> tuple[Path, int]:
    """A new directory, and the descriptor that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        with suppress(FileNotFoundError):  # swept by another run before it was locked
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _sweep(prefix: str) -> None:
    """Remove the directories of this user's processes that are gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
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
    """Have signals that end this process wait; it is for what takes no time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
