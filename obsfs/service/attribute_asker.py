"""The process that asks one mount one question, in place of somebody who must not wait for it.

A thread that waits for a FUSE server which has taken its request, and never answers, cannot be ended by any signal
(request_wait_answer in the kernel's fs/fuse/dev.c), and neither can the process that it belongs to. So a process of its
own asks, and is left behind. It imports next to nothing, to be there in a hundredth of a second.

Only mounts without a control socket are asked in this way (:mod:`obsfs.service.asking`).

Run as ``python -I -S attribute_asker.py MOUNT_ID MOUNTPOINT ATTRIBUTE PATH``. It writes an errno in decimal (0: none),
a newline, the path that has answered, a NUL, and the value of the attribute.
"""

from __future__ import annotations

import errno
import os
import sys


def mount_id(fd: int) -> int:
    """Return the ID of the mount that a descriptor is on (proc_pid_fdinfo(5))."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as info:  # noqa: PTH123 - pathlib takes longer to import than the rest
        lines = dict(line.split(b":", 1) for line in info if b":" in line)
    return int(lines[b"mnt_id"])


def ask(number: int, mountpoint: bytes, attribute: str, path: bytes) -> tuple[bytes, bytes]:
    """Return an attribute of a path on a mount, or of the nearest directory above it that is there; and which it was.

    Args:
        number: the ID of the mount. Another one that lies on the same mountpoint by now is not asked.
        mountpoint: its absolute path.
        attribute: the name of the extended attribute.
        path: relative to the mountpoint; empty for the mountpoint itself.

    Raises:
        OSError: what the mount answers; ENOTCONN when its server is dead, EXDEV when it is covered, or gone.
    """
    fd = os.open(mountpoint, os.O_PATH | os.O_NOFOLLOW)
    if mount_id(fd) != number:
        raise OSError(errno.EXDEV, "another mount is there")
    while True:
        try:
            # Through the descriptor, so that nothing mounted in between is asked instead.
            # A bind mount may be of a file.
            return path, os.getxattr(b"/proc/self/fd/%d%s" % (fd, b"/" + path if path else b""), attribute)
        except OSError as error:
            if not path or error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            path = os.path.dirname(path)  # noqa: PTH120


def main() -> None:
    """Run as the process."""
    try:
        path, value = ask(int(sys.argv[1]), os.fsencode(sys.argv[2]), sys.argv[3], os.fsencode(sys.argv[4]))
        answer = b"0\n" + path + b"\0" + value
    except OSError as error:
        answer = b"%d\n" % (error.errno or errno.EIO)
    os.write(1, answer)


if __name__ == "__main__":
    main()
