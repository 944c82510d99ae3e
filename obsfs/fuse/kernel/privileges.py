"""Why a mount is not permitted, and what would permit it: by what failed, and the rights of this process."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

_CONTAINER = "in a container: --device /dev/fuse --cap-add SYS_ADMIN (Kubernetes: securityContext.privileged: true)"


@dataclass(frozen=True)
class Rights:
    """The rights of a process that mounting depends on."""

    is_root: bool
    no_new_privileges: bool
    """Whether set-uid programs (fusermount3) run without root's rights here (PR_SET_NO_NEW_PRIVS, prctl(2))."""

    @classmethod
    def of_process(cls) -> Rights:
        """Return the rights of this process."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            lines = []
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        no_new = fields.get("NoNewPrivs", "0").strip() == "1"
        return cls(os.geteuid() == 0, no_new)


def device_remedy(failure: int, rights: Rights) -> str:
    """Return what to do when /dev/fuse cannot be opened, by the errno of open(2)."""
    if failure in (errno.ENODEV, errno.ENXIO, errno.ENOENT):
        return "load the kernel's module (modprobe fuse); " + _CONTAINER
    if failure == errno.EPERM or rights.is_root:
        return f"the container's devices do not include it; {_CONTAINER}"
    return "chmod 666 /dev/fuse as root (udev does so with the package fuse3); " + _CONTAINER


def mount_remedy(failure: int) -> str:
    """Return what to do when mount(2) fails with an errno other than EPERM."""
    if failure == errno.EACCES:
        return "a security module forbids it; " + _CONTAINER + " --security-opt apparmor=unconfined"
    if failure == errno.ENODEV:
        return "the kernel has no FUSE: modprobe fuse"
    if failure in (errno.ENOTDIR, errno.ENOENT):
        return "give a directory that is there"
    if failure == errno.ENOSPC:
        return "there are too many mounts (/proc/sys/fs/mount-max)"
    return "see dmesg"


def no_helper_remedy(rights: Rights) -> str:
    """Return what to do where mount(2) is not permitted and there is no fusermount3."""
    if rights.is_root:
        return f"root has no CAP_SYS_ADMIN here; {_CONTAINER}"
    return "install the package fuse3 (apt, dnf), which has fusermount3, or run as root"


def helper_remedy(said: str, rights: Rights, helper: Path) -> str:
    """Return what to do when fusermount3 failed, by its message."""
    if "user_allow_other" in said:
        return "add the line user_allow_other to /etc/fuse.conf as root, or leave out --allow-other"
    if "mount_max" in said or "too many" in said:
        return "unmount another one, or raise mount_max in /etc/fuse.conf"
    if "write access" in said or "owner" in said:
        return "give a directory that you own and may write to"
    if "/dev/fuse" in said:
        return device_remedy(errno.ENOENT if "not found" in said else errno.EACCES, rights)
    if "Operation not permitted" in said or "ermission denied" in said:
        if rights.is_root:
            return f"root has no CAP_SYS_ADMIN here; {_CONTAINER}"
        if rights.no_new_privileges:
            return f"this process may gain no rights (no_new_privs), and fusermount3 needs root's; {_CONTAINER}"
        if not _is_set_uid(helper):
            return f"chmod u+s {helper} as root, or reinstall the package fuse3"
        return f"fusermount3 may not mount here; {_CONTAINER}"
    return "see fusermount3(1)"


def _is_set_uid(program: Path) -> bool:
    try:
        return bool(program.stat().st_mode & 0o4000)
    except OSError:
        return True
