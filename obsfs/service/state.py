"""The files of a mount outside of the cache: lock, takeover log, log and control socket, in the XDG state directory."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from obsfs import private
from obsfs.errors import UsageError
from obsfs.paths import state_dir

_MAX_NAME = 220
"""Bytes of a mountpoint's name in that of a file: with all that is added, a name has 255 (<linux/limits.h>)."""
_SETTLE_SECONDS = 2.0
"""For a new server to hand its lock to its supervisor."""
_PAUSE_SECONDS = 0.02


def file_path(mountpoint: Path, suffix: str) -> Path:
    """Return the file of a mount with this suffix: ``lock``, ``journal`` (takeover log), ``snapshot`` or ``log``."""
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:8]
    name = os.fsdecode(os.fsencode(mountpoint.name[:100])[:_MAX_NAME])
    return state_dir() / f"{name}-{digest}.{suffix}"


def control_path(device: int) -> Path:
    """Return where the control socket of a mount is.

    Args:
        device: the minor number of the mount's device, which no other mount of this machine has.
    """
    return state_dir() / f"mount-{device}.sock"


def acquire_lock(mountpoint: Path, supervisor: int) -> int:
    """Take the lock that makes this process the only one at a mountpoint.

    Args:
        mountpoint: its absolute path.
        supervisor: the pid of the process with which the mount ends.

    Returns:
        A descriptor: the lock ends when the last copy of it is closed.

    Raises:
        UsageError: another process has the lock, or the state directory cannot be written.
    """
    file = file_path(mountpoint, "lock")
    try:
        fd = private.open_file(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror})", "set XDG_STATE_HOME") from None
    if not _flock(fd, fcntl.LOCK_EX):
        os.close(fd)
        raise UsageError(f"{mountpoint} is being mounted or served by another obsfs", "see `obsfs status`")
    record_supervisor(fd, supervisor)
    return fd


def record_supervisor(lock: int, supervisor: int) -> None:
    """Write into the file of a lock that is ours with which process the mount ends."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{supervisor} {start_ticks(supervisor)}".encode(), 0)


def is_abandoned(mountpoint: Path) -> bool:
    """Return whether the process is gone with which the mount there should have ended; False if that is not known."""
    supervisor = _recorded_supervisor(mountpoint)
    if supervisor is None:
        return False
    pid, noted = supervisor
    return start_ticks(pid) == 0 or (noted is not None and start_ticks(pid) != noted)


def open_supervisor(mountpoint: Path) -> int:
    """Return a pidfd of the process with which a mount ends, to signal it.

    That process is proven, not believed: our own lock file names it, it runs as this user, and it holds that lock. Of
    a mount that has just begun it is about to get the lock, and is waited for.

    Raises:
        UsageError: there is no such process.
    """
    unproven = UsageError(
        f"it cannot be proven which process serves {mountpoint}", "see whether XDG_STATE_HOME is as it was at its start"
    )
    supervisor = _recorded_supervisor(mountpoint)
    if supervisor is None:
        raise unproven
    try:
        pidfd = os.pidfd_open(supervisor[0])
    except OSError:
        raise unproven from None
    # What is looked at from here on is that process, or one that came after it, and then the signal goes nowhere.
    deadline = time.monotonic() + _SETTLE_SECONDS
    with suppress(OSError):
        while Path(f"/proc/{supervisor[0]}").stat().st_uid == os.geteuid():
            if _holds_lock(supervisor[0], mountpoint):
                return pidfd
            if time.monotonic() > deadline:
                break
            time.sleep(_PAUSE_SECONDS)
    os.close(pidfd)
    raise unproven


def request_replacement(mountpoint: Path) -> None:
    """Have the supervisor of a mount replace its server by one of the version that is installed now.

    Raises:
        UsageError: it cannot be proven which process supervises the mount.
    """
    supervisor = open_supervisor(mountpoint)
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(supervisor, signal.SIGHUP)
    finally:
        os.close(supervisor)


def _recorded_supervisor(mountpoint: Path) -> tuple[int, int | None] | None:
    """The pid of the process with which a mount ends, and when it started; the first versions did not note that."""
    try:
        fd = os.open(file_path(mountpoint, "lock"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(fd, "rb") as file:
            if os.fstat(fd).st_uid != os.geteuid():
                return None
            numbers = [int(word) for word in file.read(100).split()]
    except (OSError, ValueError, UsageError):
        return None
    if not numbers or numbers[0] <= 0:
        return None
    return numbers[0], numbers[1] if len(numbers) > 1 else None


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks after the boot (proc_pid_stat(5), field 22); 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def _holds_lock(pid: int, mountpoint: Path) -> bool:
    """Whether a process has the lock of a mountpoint, by an open file that it shares with who took it. Raises OSError.

    As the kernel says: the locks of an open file are in its fdinfo (proc_pid_fdinfo(5)).
    """
    fd = os.open(file_path(mountpoint, "lock"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        wanted = _inode_line(Path(f"/proc/self/fdinfo/{fd}").read_bytes())
    finally:
        os.close(fd)
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            content = info.read_bytes()
        except FileNotFoundError:
            continue  # closed meanwhile
        if wanted and _inode_line(content) == wanted:
            locks = [line for line in content.split(b"\n") if line.startswith(b"lock:")]
            if any(b"FLOCK" in line and b"WRITE" in line for line in locks):
                return True
    return False


def _inode_line(info: bytes) -> bytes:
    return next((line for line in info.split(b"\n") if line.startswith(b"ino:")), b"")


def wait_until_free(mountpoint: Path, timeout: float) -> bool:
    """Wait at most `timeout` seconds until the process that serves a mountpoint has ended."""
    try:
        fd = private.open_file(file_path(mountpoint, "lock"), os.O_RDWR)
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
