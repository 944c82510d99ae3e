"""The way to the kernel: mounting, /dev/fuse and its clones, unmounting, and the mount's files in /sys."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from obsfs.errors import UsageError
from obsfs.fuse.kernel import privileges, wire
from obsfs.fuse.kernel.privileges import Rights
from obsfs.mountinfo import FS_TYPE, MountEntry, mounted_at

DEVICE = Path("/dev/fuse")

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4  # <sys/mount.h>
_MNT_FORCE, _MNT_DETACH = 1, 2
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # <asm/unistd.h>, of every architecture
_CLOEXEC, _FSCONFIG_CMD_CREATE = 1, 6  # <linux/mount.h>
_CONTROL = Path("/sys/fs/fuse/connections")
_PAUSE_SECONDS = 0.01

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, mountpoint: Path, *, allow_other: bool) -> int:
    """Mount, and return the connection's descriptor: by mount(2) with CAP_SYS_ADMIN, else by fusermount3.

    Args:
        source: what mountinfo shows as the source.
        mountpoint: a directory.
        allow_other: whether other users may read it.

    Raises:
        UsageError: neither way is permitted.
    """
    if not DEVICE.exists():
        raise UsageError("/dev/fuse is missing", privileges.device_remedy(errno.ENOENT, Rights.of_process()))
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        # fusermount3 opens it with the user's rights too, so it would fail as well.
        remedy = privileges.device_remedy(error.errno or 0, Rights.of_process())
        raise UsageError(f"/dev/fuse cannot be opened ({error.strerror})", remedy) from None
    options = f"fd={fd},rootmode={stat.S_IFDIR:o},user_id={os.getuid()},group_id={os.getgid()},default_permissions"
    if allow_other:
        options += ",allow_other"
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
    target = os.fsencode(mountpoint)
    if _libc.mount(source.encode(), target, FS_TYPE.encode(), ctypes.c_ulong(flags), options.encode()) == 0:
        return fd
    failure = ctypes.get_errno()
    os.close(fd)
    if failure == errno.EPERM:
        return _mount_by_helper(source, mountpoint, allow_other)
    raise UsageError(f"cannot mount on {mountpoint} ({os.strerror(failure)})", privileges.mount_remedy(failure))


def _mount_by_helper(source: str, mountpoint: Path, allow_other: bool) -> int:
    helper = _fusermount()
    if helper is None:
        raise UsageError(
            f"mounting on {mountpoint} is not permitted, and there is no fusermount3",
            privileges.no_helper_remedy(Rights.of_process()),
        )
    ours, theirs = socket.socketpair()
    options = f"ro,nosuid,nodev,default_permissions,fsname={_escape(source)},subtype=obsfs"
    if allow_other:
        options += ",allow_other"
    with ours, theirs:
        done = subprocess.run(
            [helper, "-o", options, "--", str(mountpoint)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C would end it after it has mounted, and leave a dead mount
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        theirs.close()
        fds = socket.recv_fds(ours, 1, 1)[1] if done.returncode == 0 else []
    if not fds:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        remedy = privileges.helper_remedy(reason, Rights.of_process(), Path(helper))
        raise UsageError(f"cannot mount on {mountpoint} ({reason})", remedy)
    os.set_inheritable(fds[0], False)
    return fds[0]


def _fusermount() -> str | None:
    """Return the path of fusermount3, from the absolute entries of PATH only; None if it is not there."""
    return shutil.which(
        "fusermount3", path=os.pathsep.join(entry for entry in os.get_exec_path() if entry.startswith("/"))
    )


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace(",", "\\,")


def unmount(mountpoint: Path, *, lazy: bool = False, force: bool = False, patience: float = 0.0) -> None:
    """Unmount.

    Args:
        mountpoint: where.
        lazy: detach it, even if files are open.
        force: fail the requests that wait for an answer.
        patience: seconds to wait while it is in use.

    Raises:
        UsageError: it is in use (told apart), or cannot be unmounted.
    """
    if force and (entry := mounted_at(mountpoint)):
        Connection(entry).abort()
    deadline = time.monotonic() + patience
    while failure := _try_unmount(mountpoint, lazy, force):
        reason, is_busy = failure
        if not is_busy:
            raise UsageError(f"cannot unmount {mountpoint}", reason)
        if time.monotonic() >= deadline:
            raise UsageError(f"{mountpoint} is in use", "close what has it open (see `fuser -vm`), or add --lazy")
        time.sleep(_PAUSE_SECONDS)


def _try_unmount(mountpoint: Path, lazy: bool, force: bool) -> tuple[str, bool] | None:
    """Try it once. Returns None, or the reason why not and whether it is in use."""
    if os.geteuid() == 0:
        flags = (_MNT_DETACH if lazy else 0) | (_MNT_FORCE if force else 0)
        if _libc.umount2(os.fsencode(mountpoint), flags) == 0:
            return None
        failure = ctypes.get_errno()
        return os.strerror(failure), failure == errno.EBUSY
    helper = _fusermount()
    if helper is None:
        return "unmounting as a user needs fusermount3: install the package fuse3", False
    arguments = [helper, "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
    done = subprocess.run(arguments, cwd="/", capture_output=True, text=True, check=False)
    reason = " ".join(done.stderr.split())
    return (reason, "busy" in reason) if done.returncode else None


class Connection:
    """The connection behind a mount, which can be aborted even after the mount is gone.

    By the file system fusectl: the one in /sys, where the owner of the mount may do it, or a private one, which needs
    CAP_SYS_ADMIN and Linux 5.2. Without both, :meth:`abort` does nothing.
    """

    def __init__(self, entry: MountEntry) -> None:
        self._fd = -1
        with suppress(OSError):
            # Opened now: once this mount is gone, another one may get the number.
            self._fd = _open_control(f"{entry.minor}/abort")

    def abort(self) -> None:
        """Fail all requests that wait for an answer. Works once."""
        if self._fd >= 0:
            with suppress(OSError):
                os.write(self._fd, b"1")
            os.close(self._fd)
            self._fd = -1


def _open_control(name: str) -> int:
    """Open a file of fusectl for writing. Raises OSError."""
    with suppress(FileNotFoundError):
        return os.open(_CONTROL / name, os.O_WRONLY | os.O_CLOEXEC)
    context = _call(_FSOPEN, b"fusectl", _CLOEXEC)
    try:
        _call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        root = _call(_FSMOUNT, context, _CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        return os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=root)
    finally:
        os.close(root)


def _call(number: int, *arguments: int | bytes | None) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def clone(fd: int) -> int:
    """Return another descriptor of the connection, with a queue of its own; where that fails, a duplicate of `fd`."""
    try:
        other = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return os.dup(fd)
    try:
        fcntl.ioctl(other, wire.DEV_IOC_CLONE, struct.pack("=I", fd))
    except OSError:
        os.close(other)
        return os.dup(fd)
    return other


def open_backing(fd: int, file_fd: int) -> int:
    """Register a file for passthrough, and return its backing id. Raises OSError if that is not permitted."""
    return int(fcntl.ioctl(fd, wire.DEV_IOC_BACKING_OPEN, bytearray(wire.BACKING_MAP.pack(file_fd, 0, 0))))


def close_backing(fd: int, backing_id: int) -> None:
    """Unregister a backing id. The kernel still reads the file for handles that are open."""
    fcntl.ioctl(fd, wire.DEV_IOC_BACKING_CLOSE, struct.pack("=I", backing_id))


def set_read_ahead(mountpoint: Path, size: int) -> bool:
    """Set the kernel's read-ahead on a mount to `size` bytes. Returns False if that is not permitted."""
    device = mountpoint.stat().st_dev
    knob = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    try:
        knob.write_text(str(size // 1024))
    except OSError:
        return False
    return True
