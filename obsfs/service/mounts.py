"""Mounts, as commands and programs use them: make one, ask it, have it served by another version, end it.

The parts: :mod:`~obsfs.service.starting` starts a mount, :mod:`~obsfs.service.finding` tells which mounts there are and
how they are, :mod:`~obsfs.service.asking` asks their servers. The process behind a mount is
:mod:`~obsfs.service.daemon`.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from obsfs import mountinfo
from obsfs.errors import UsageError
from obsfs.fuse.kernel import channel
from obsfs.mountinfo import MountEntry
from obsfs.service import state
from obsfs.service.asking import Question, ask
from obsfs.service.finding import (
    MountedPath,
    MountInfo,
    State,
    explain_no_refresh,
    find_mounts,
    on_mount,
    own_mount,
    owner,
    refresh,
    status,
)
from obsfs.service.starting import END_SECONDS, START_SECONDS, prepare, resolve_mountpoint, start
from obsfs.settings import Settings, keywords

__all__ = [
    "Mount",
    "MountInfo",
    "MountedPath",
    "State",
    "explain_no_refresh",
    "find_mounts",
    "mount",
    "on_mount",
    "prepare",
    "refresh",
    "replace_server",
    "resolve_mountpoint",
    "start",
    "status",
    "stop",
    "unmount",
]

_BUSY_SECONDS = 1.0
"""For so long something that only looks at a mount now and then, as ``obsfs status`` does, may keep it in use."""
_PAUSE_SECONDS = 0.05


class Mount:
    """A mount of this process: it ends with :meth:`close`, with the ``with`` block, or with the process."""

    def __init__(self, source: str, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.source = source
        self.path = path
        self._process = process

    @property
    def pid(self) -> int:
        """The pid of the supervisor."""
        return self._process.pid

    def status(self) -> dict[str, Any]:
        """Return what ``obsfs status --json`` shows of it."""
        return status(self.path)

    def close(self) -> None:
        """Unmount. What is still mapped from it stays readable until it is dropped, or this process ends."""
        if self._process.poll() is not None:
            return
        try:
            channel.unmount(self.path)
        except UsageError:
            if mountinfo.mounted_at(self.path) is not None:
                channel.unmount(self.path, lazy=True)
            return
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.terminate()
        if self._process.stdin:
            self._process.stdin.close()

    def __enter__(self) -> Mount:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def mount(source: str, mountpoint: str | os.PathLike[str] | None = None, **settings: Any) -> Mount:
    """Mount a bucket, or a part of it, and return when the directory answers.

    Args:
        source: ``obs://BUCKET[/PREFIX]``.
        mountpoint: an empty directory; by default a new temporary one.
        settings: the fields of :class:`~obsfs.settings.Settings`.

    Returns:
        The mount. It lives as long as this process, or until it is closed: use it in a ``with`` statement.

    Raises:
        ObsfsError: it cannot be mounted; nothing is left behind.
    """
    chosen = Settings.load(**keywords(settings, mount))
    if mountpoint is not None:
        path = resolve_mountpoint(mountpoint)
        return Mount(source, path, start(source, path, chosen, lifeline=True))
    path = resolve_mountpoint(tempfile.mkdtemp(prefix="obsfs-mount-"))
    try:
        return Mount(source, path, start(source, path, chosen, lifeline=True, is_temporary=True))
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


def replace_server(mountpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Have a process of the version that is installed now serve a mount.

    Returns:
        The status before and after.

    Raises:
        UsageError: no obsfs is mounted there, it has no supervisor, or the new process refuses or does not answer.
    """
    entry = mountinfo.mounted_at(mountpoint)
    if entry is None or not entry.is_obsfs:
        raise UsageError(f"no obsfs is mounted on {mountpoint}", "see `obsfs status`")
    before = status(mountpoint)
    if reason := before.get("no_supervisor"):
        raise UsageError(
            f"{mountpoint} has no supervisor now: it was killed, and another cannot be started ({reason})",
            f"mend the installation; it is tried again every 30 s (see {before.get('log')})",
        )
    if not before.get("can_be_followed"):
        raise UsageError(
            f"the server of {mountpoint} cannot be replaced",
            "it needs Linux 6.9, the native FUSE backend, and no --foreground",
        )
    if not _call(entry, "upgrade"):
        state.request_replacement(mountpoint)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        after = before
        with suppress(UsageError):  # the next server may take longer than one question does
            after = status(mountpoint)
        if after["pid"] != before["pid"]:
            return before, after
        refused = after.get("upgrade_refused")
        if refused and refused != before.get("upgrade_refused"):
            raise UsageError(
                f"the server of {mountpoint} stays: the obsfs that is installed now cannot follow it",
                str(refused.get("reason")),
            )
        time.sleep(_PAUSE_SECONDS)
    raise UsageError(f"the server of {mountpoint} was not replaced", f"see {state.file_path(mountpoint, 'log')}")


def stop(mountpoint: Path) -> None:
    """Have a mount unmounted by its own server, also while files are open; they stay readable for 5 more seconds.

    Returns when the processes of the mount have ended, or after 10 seconds.

    Raises:
        UsageError: no mount of this user is there, or nothing serves its control socket, or it does not answer.
    """
    entry = own_mount(mountpoint)
    if not _call(entry, "stop"):
        raise UsageError(
            f"the mount {entry.mountpoint} has no control socket: its obsfs is of an earlier version, or dead",
            f"obsfs umount --lazy {entry.mountpoint}",
        )
    state.wait_until_free(entry.mountpoint, END_SECONDS)


def _call(entry: MountEntry, call: str) -> bool:
    """Ask for a call that only the control socket knows. Returns False where nothing serves the socket.

    Raises:
        UsageError: the server refuses, or does not answer.
    """
    outcome = ask([Question(entry, call)])[0]
    if isinstance(outcome, OSError) and outcome.errno == errno.ECONNREFUSED:
        return False
    if isinstance(outcome, Exception):
        raise outcome
    if outcome is None:
        raise UsageError(f"the server of {entry.mountpoint} does not answer", f"obsfs umount --lazy {entry.mountpoint}")
    return True


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount, and wait until the processes of the mount have ended.

    Args:
        mountpoint: an absolute path without symbolic links.
        lazy: unmount also while files are open, and do not wait: their mount is served until the last one is closed.

    Raises:
        UsageError: no obsfs is mounted there, it is in use, or another user has made it (root may unmount that, too).
    """
    entry = mountinfo.mounted_at(mountpoint)
    if entry is None:
        above = mountinfo.mount_of(mountpoint)
        if above is not None and above.is_obsfs:
            raise UsageError(f"{mountpoint} lies on the mount {above.mountpoint}", f"obsfs umount {above.mountpoint}")
        raise UsageError(f"nothing is mounted on {mountpoint}", "see `obsfs status`")
    if not entry.is_obsfs:
        raise UsageError(f"what is mounted on {mountpoint} is no obsfs ({entry.fs_type})", "use umount(8)")
    if not entry.is_ours and os.geteuid() != 0:
        raise UsageError(
            f"the mount on {mountpoint} was made by {owner(entry)}", "only that user, or root, can unmount it"
        )
    if lazy:
        channel.unmount(mountpoint, lazy=True, force=entry.is_ours and state.is_abandoned(mountpoint))
        return
    channel.unmount(mountpoint, patience=_BUSY_SECONDS)
    state.wait_until_free(mountpoint, END_SECONDS)
