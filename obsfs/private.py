"""Directories and files that no other user may read or change, whatever the umask.

This is the one place that decides whether a directory may hold private data: the cache, pulled snapshots, logs, locks,
journals and listings all ask here.
"""

from __future__ import annotations

import fcntl
import grp
import logging
import os
import pwd
import stat
from collections import deque
from contextlib import suppress
from pathlib import Path

from obsfs.errors import ObsfsError, UsageError
from obsfs.text import visible

log = logging.getLogger(__name__)

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_MAX_LINKS = 40
"""Symlinks in one path, as the kernel has it (MAXSYMLINKS, <linux/namei.h>)."""
OTHERS = 0o077
"""Mode bits of everybody else; the umask of processes that are ours alone."""


def make_directory(path: Path, what: str, remedy: str, error: type[ObsfsError] = UsageError) -> None:
    """Make a directory, with those above it, and see that only this user can read or change what it holds.

    Each directory on the way from ``/`` must belong to root or to this user, and nobody else may write to it, unless
    it is sticky as ``/tmp`` is. The last one must belong to this user. If others can read it, or can write to it while
    it is empty, its mode becomes 0700, and the log says so.

    Args:
        path: The directory. Symlinks on the way to it are followed, and judged in the same way.
        what: What it is to the user, such as ``cache directory``.
        remedy: What to do where it cannot be used.
        error: What to raise where it may not hold private data.

    Raises:
        ObsfsError: Of the given kind: others could read or change what is in it.
        OSError: It cannot be made or looked at.
    """
    fault = _walk(path, make=True)
    if fault:
        raise error(f"{what} {path} is not private: {fault[0]}", f"{fault[1]}{remedy}")


def is_private(path: Path) -> bool:
    """Return whether a directory is there and only this user can read or change what it holds."""
    try:
        return _walk(path, make=False) is None
    except OSError:
        return False


def make_level(path: Path) -> None:
    """Make one directory below a private one. A symlink, or what belongs to another user, is not used.

    Raises:
        OSError: It cannot be made, or is something else.
    """
    _mkdir(path)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise NotADirectoryError(20, "not a directory of this user", str(path))
    if found.st_mode & OTHERS:
        path.chmod(DIRECTORY_MODE)


def open_file(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a file of a private directory, or make it with mode 0600. Returns its descriptor.

    Raises:
        OSError: ELOOP, EPERM or what open(2) says: it is a symlink, no regular file, or belongs to another user.
    """
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(1, "not a file of this user", str(path))
        if stat.S_IMODE(found.st_mode) != FILE_MODE:
            os.fchmod(fd, FILE_MODE)
    except OSError:
        os.close(fd)
        raise
    return fd


def write_file(path: Path, data: bytes, mode: int = FILE_MODE) -> None:
    """Write a small file atomically: readers see the old content or the new. No symlink in its way is followed.

    This is the one place for atomic writes. Of the libraries for it, atomicwrites is no longer maintained, and none
    gives the new file its mode when it is made.

    Args:
        path: The file.
        data: Its content.
        mode: Permission bits, less the umask. The default is for private directories, whatever the umask.

    Raises:
        OSError: It cannot be written.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with suppress(FileNotFoundError):
        new.unlink()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    fd = open_file(new, flags) if mode == FILE_MODE else os.open(new, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    new.replace(path)


def try_lock(path: Path) -> int | None:
    """Lock a lock file of a private directory (flock(2)), which is made if it is missing.

    Unlike filelock's, these locks follow no symlink, and :func:`unlock` removes the file.

    Returns:
        A descriptor that holds the lock, for :func:`unlock`; None if another process has the lock.

    Raises:
        OSError: As :func:`open_file`.
    """
    while True:
        fd = open_file(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), path.lstat()):
                return fd
        except FileNotFoundError:
            pass  # its holder has just removed it
        except OSError:
            os.close(fd)
            return None
        os.close(fd)


def unlock(path: Path, fd: int) -> None:
    """Remove a lock file that is held, and release it."""
    path.unlink(missing_ok=True)
    os.close(fd)


def _walk(path: Path, *, make: bool) -> tuple[str, str] | None:
    """What is wrong with a directory, and the beginning of a remedy; None when it may hold private data."""
    current = Path("/")
    seen = current.lstat()
    pending = deque(part for part in str(path.absolute()).split("/") if part not in ("", "."))
    links = 0
    while pending:
        if fault := _fault(current, seen):
            return fault
        name = pending.popleft()
        here = current.parent if name == ".." else current / name
        if make:
            _mkdir(here)
        found = here.lstat()
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise OSError(40, "too many levels of symbolic links", str(path))
            if found.st_uid not in (0, os.geteuid()):
                return f"the symlink {visible(here)} belongs to another user", ""
            target = here.readlink()
            if target.is_absolute():
                current, seen = Path("/"), Path("/").lstat()
            pending.extendleft(reversed([part for part in str(target).split("/") if part not in ("", ".")]))
            continue
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(20, "not a directory", str(here))
        current, seen = here, found
    return _last_fault(current, seen, tighten=make)


def _fault(path: Path, found: os.stat_result) -> tuple[str, str] | None:
    """What is wrong with a directory on the way."""
    if found.st_uid not in (0, os.geteuid()):
        return f"{visible(path)} belongs to another user", ""
    if found.st_mode & stat.S_ISVTX or not _others_write(path, found):
        return None
    return f"other users can write to {visible(path)}", f"chmod go-w {visible(path)}, or "


def _last_fault(path: Path, found: os.stat_result, *, tighten: bool) -> tuple[str, str] | None:
    if found.st_uid != os.geteuid():
        return f"{visible(path)} belongs to another user", ""
    if not found.st_mode & OTHERS:
        return None
    if not tighten:
        return f"other users can look into {visible(path)}", ""
    if _others_write(path, found) and any(path.iterdir()):
        return (
            f"other users can write to {visible(path)}, and it is not empty",
            f"look at what it holds, then chmod 700 {visible(path)}, or ",
        )
    path.chmod(DIRECTORY_MODE)
    if path.lstat().st_mode & OTHERS:
        return f"the file system of {visible(path)} keeps no permissions", ""
    log.warning("other users could look into %s: its mode is 0700 now", visible(path))
    return None


def _others_write(path: Path, found: os.stat_result) -> bool:
    """Whether anybody but this user and root may write to a directory."""
    if not found.st_mode & stat.S_IWGRP or found.st_mode & stat.S_IWOTH:
        return bool(found.st_mode & stat.S_IWOTH)
    # With an access control list these bits are the most that any user named there may do.
    return "system.posix_acl_access" in os.listxattr(path) or not _is_own_group(found.st_gid, found.st_uid)


def _is_own_group(gid: int, uid: int) -> bool:
    """Whether a group is its owner's alone: most Linux systems give each user a group of the user's name."""
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and user.pw_name == group.gr_name and set(group.gr_mem) <= {user.pw_name}


def _mkdir(path: Path) -> None:
    try:
        path.mkdir(mode=DIRECTORY_MODE)
    except FileExistsError:
        return
    except OSError:
        # A directory of others says EACCES or EROFS also of what is there.
        if os.path.lexists(path):
            return
        raise
    path.chmod(DIRECTORY_MODE)
