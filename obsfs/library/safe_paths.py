"""Files below a directory, reached through no symbolic link, so that nothing outside is read, written or removed.

An archive or another program may have planted a link in a directory. The directory itself is the user's choice, and may
be a link. One kind of link is followed: that of a hub's cache, from a file of ``snapshots/REVISION/`` to ``blobs/NAME``
beside it, as huggingface_hub makes them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from obsfs.errors import UsageError

_BLOBS = "blobs"
_SNAPSHOTS = "snapshots"


def path_below(directory: Path, relative: str) -> Path:
    """Return the path of a file below `directory`, of which no parent is a symbolic link.

    Raises:
        UsageError: One of them is, or is no directory.
    """
    place = directory
    for name in relative.split("/")[:-1]:
        place = place / name
        try:
            mode = place.lstat().st_mode
        except FileNotFoundError:
            break
        except OSError as error:
            raise UsageError(f"{place} cannot be used ({error.strerror})", "choose another directory") from None
        if stat.S_ISLNK(mode):
            raise _link(place)
        if not stat.S_ISDIR(mode):
            raise UsageError(f"{place} is no directory", "move it away, or choose another place")
    return directory / relative


def real_path(directory: Path, relative: str) -> Path:
    """Return the path of the bytes of a file: its own, or, in a hub's cache, that of its blob.

    Raises:
        UsageError: It, or a parent of it, is a link of another kind.
    """
    path = path_below(directory, relative)
    if not path.is_symlink():
        return path
    if directory.parent.name == _SNAPSHOTS:
        blobs = Path(os.path.normpath(directory.parent.parent / _BLOBS))
        blob = Path(os.path.normpath(path.parent / path.readlink()))
        if blob.parent == blobs and not blobs.is_symlink():
            return blob
    raise _link(path)


def _link(path: Path) -> UsageError:
    return UsageError(f"{path} is a symbolic link, which may lead anywhere", "remove it, or choose another place")


def open_file(directory: Path, relative: str) -> int:
    """Return a descriptor to read a regular file by.

    Raises:
        UsageError: As `real_path`.
        OSError: It is not there, or is no regular file.
    """
    path = real_path(directory, relative)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(0, "no regular file", str(path))
    return fd


def read_small(directory: Path, relative: str, most: int) -> bytes:
    """Return a small file of obsfs's own.

    Raises:
        UsageError: As `real_path`.
        OSError: As `open_file`, or it has more than `most` bytes.
    """
    with os.fdopen(open_file(directory, relative), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(0, "too large", relative)
    return data


def size_and_mtime(directory: Path, relative: str) -> tuple[int, int] | None:
    """Return size (bytes) and mtime (ns) of a regular file; None if there is none."""
    try:
        found = real_path(directory, relative).lstat()
    except (OSError, UsageError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
