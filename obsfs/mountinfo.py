"""What is mounted where, by /proc/self/mountinfo, and where a path lies. Asks no file system that may be hung."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

FS_TYPE = "fuse.obsfs"
"""What mountinfo calls a mount of obsfs, or of something that claims to be one."""
_MAX_LINKS = 40
"""Symbolic links on the way to a file, as the kernel follows them (MAXSYMLINKS, <linux/namei.h>)."""


class MountEntry(NamedTuple):
    """One line of ``/proc/self/mountinfo`` (proc_pid_mountinfo(5)).

    The source of a mount of obsfs is the URL of what it shows, also of a bind mount, which shows a part of another.
    """

    mountpoint: Path
    fs_type: str
    source: str
    minor: int
    """Number of the device, and of a FUSE connection."""
    user: int | None = None
    """The uid that mounted a FUSE file system (``user_id=``, for which the kernel and fusermount3 vouch), else None."""
    number: int = 0
    """ID of the mount."""
    parent: int = 0
    """ID of the mount that it is mounted on."""
    root: str = "/"
    """The path, in the file system, of the directory or file that is mounted; bind mounts have others than "/"."""

    @property
    def is_obsfs(self) -> bool:
        """Whether obsfs serves it, or something that claims to."""
        return self.fs_type == FS_TYPE

    @property
    def is_ours(self) -> bool:
        """Whether this user made it, and obsfs serves it: only the answers of such mounts are believed."""
        return self.is_obsfs and self.user == os.geteuid()


def mounts() -> list[MountEntry]:
    """Return all mounts of this namespace, later ones last."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def parse_mountinfo(content: bytes) -> list[MountEntry]:
    """Parse mountinfo. Only newlines end lines, and only spaces end fields: names may hold any other byte."""
    found = []
    for line in content.split(b"\n"):
        left, _, right = line.partition(b" - ")
        fields, super_fields = left.split(b" "), right.split(b" ")
        if len(fields) < 6 or len(super_fields) < 3:
            continue
        fs_type, options = _unescape(super_fields[0]), super_fields[-1]
        source, root = _unescape(super_fields[1]), _unescape(fields[3])
        if fs_type == FS_TYPE and root != "/":
            source = source.rstrip("/") + root
        user = next((one[8:] for one in options.split(b",") if one.startswith(b"user_id=")), b"")
        found.append(
            MountEntry(
                Path(_unescape(fields[4])),
                fs_type,
                source,
                int(fields[2].partition(b":")[2]),
                int(user) if user.isdigit() else None,
                int(fields[0]),
                int(fields[1]),
                root,
            )
        )
    return found


def _unescape(text: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), text))


def mounted_at(mountpoint: Path) -> MountEntry | None:
    """Return the topmost mount exactly there, or None."""
    return next((entry for entry in reversed(mounts()) if entry.mountpoint == mountpoint), None)


def mount_of(path: Path, entries: list[MountEntry] | None = None) -> MountEntry | None:
    """Return the mount that an absolute path without symbolic links lies on, found as the kernel does.

    Asks no file system. A mount that another one covers is not found, whatever its mountpoint.
    """
    entries = mounts() if entries is None else entries
    numbers = {entry.number for entry in entries}
    on_way = [entry for entry in entries if path.is_relative_to(entry.mountpoint)]
    found: MountEntry | None = None
    while True:
        inside = [
            entry
            for entry in on_way
            if (entry.parent == found.number if found else entry.parent not in numbers or entry.parent == entry.number)
        ]
        if not inside:
            return found
        found = min(inside, key=lambda entry: len(entry.mountpoint.parts))
        on_way.remove(found)


def locate(path: str | os.PathLike[str], entries: list[MountEntry] | None = None) -> tuple[Path, MountEntry | None]:
    """Return the path without symbolic links, and the mount that it lies on. The path need not exist.

    Asks nothing of a mount of obsfs: it shows no symbolic links, and may be hung or belong to another user.

    Raises:
        OSError: ELOOP, too many symbolic links.
    """
    entries = mounts() if entries is None else entries
    rest = list(reversed(Path(path).absolute().parts[1:]))
    place, links = Path("/"), 0
    while rest:
        name = rest.pop()
        if name == "..":
            place = place.parent
            continue
        place /= name
        mount = mount_of(place, entries)
        if mount is not None and mount.is_obsfs:
            continue
        try:
            target = place.readlink()
        except OSError:
            continue  # no link, or not there
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
        place = Path("/") if target.is_absolute() else place.parent
        rest += [part for part in reversed(target.parts) if not part.startswith("/")]
    return place, mount_of(place, entries)
