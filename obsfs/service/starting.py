"""Starts the processes behind a mount, once it is clear that the directory can be mounted on."""

from __future__ import annotations

import errno
import json
import os
import select
import shlex
import subprocess
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from obsfs import mountinfo, processes
from obsfs.errors import UsageError, WaitWarning
from obsfs.fuse.kernel import channel
from obsfs.paths import state_home
from obsfs.service import state
from obsfs.service.finding import owner, status
from obsfs.settings import Settings
from obsfs.store.address import parse_address
from obsfs.text import visible

START_SECONDS = 120.0
"""For a server to check the bucket and mount."""
END_SECONDS = 10.0
"""For the processes of a mount that was unmounted to end."""
_FAIL_SECONDS = 2.0
_PAUSE_SECONDS = 0.05
_MAX_STDERR = 500


def start(
    source: str, mountpoint: Path, settings: Settings, *, lifeline: bool, is_temporary: bool = False
) -> subprocess.Popen[bytes]:
    """Start the processes that serve `source` on `mountpoint`, and wait until the directory answers.

    Args:
        source: ``obs://BUCKET[/PREFIX]``.
        mountpoint: an absolute path without symbolic links.
        settings: of the mount.
        lifeline: whether the mount ends when the stdin of the returned process is closed.
        is_temporary: whether the directory is removed with the mount.

    Returns:
        The supervisor.

    Raises:
        ObsfsError: it did not start; nothing is left behind.
    """
    parse_address(source)
    prepare(mountpoint, settings)
    process = subprocess.Popen(
        processes.python_command("-m", "obsfs.fuse.supervisor", source, str(mountpoint)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd="/",
        env=processes.child_environment(),
    )
    assert process.stdin and process.stdout and process.stderr
    request = {
        "settings": settings.to_json(),
        "places": dict(settings.places),
        "lifeline": lifeline,
        "is_temporary": is_temporary,
    }
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        answer, is_late = _first_answer(process)
    except BaseException:
        _end(process, mountpoint)
        raise
    if "pid" in answer:
        process.stdout.close()
        process.stderr.close()
        if not lifeline:
            process.stdin.close()
        return process
    if not answer and not is_late:  # it ends without an answer: the interpreter writes the reason to stderr
        with suppress(subprocess.TimeoutExpired):
            process.wait(_FAIL_SECONDS)
    stderr = b"" if "error" in answer or process.poll() is None else process.stderr.read()[-_MAX_STDERR:]
    _end(process, mountpoint)
    if "error" in answer:
        raise UsageError(answer["error"], answer["remedy"])
    reason = " ".join(stderr.decode(errors="replace").split()) or f"no answer within {START_SECONDS:.0f} s"
    raise UsageError(f"the process that should serve {mountpoint} did not start", reason)


def _first_answer(process: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bool]:
    """Return what a server says first, but for notes, which are warned of; and whether it said nothing in time."""
    assert process.stdout
    waiting = select.poll()  # select(2) would end at descriptor 1023
    waiting.register(process.stdout, select.POLLIN)
    while True:
        if not waiting.poll(START_SECONDS * 1000):
            return {}, True
        line = process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {}
        if "note" not in answer:
            return answer, False
        warnings.warn(visible(answer["note"]), WaitWarning, stacklevel=3)


def _end(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    process.terminate()
    try:
        process.wait(_FAIL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        if (entry := mountinfo.mounted_at(mountpoint)) and entry.is_ours:
            channel.unmount(mountpoint, lazy=True)


def resolve_mountpoint(mountpoint: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a mountpoint, without symbolic links.

    Looks at nothing on a mount of obsfs, whose server may be dead.

    Raises:
        UsageError: it is empty, which would mean the working directory, or leads nowhere.
    """
    if not os.fspath(mountpoint).strip():
        raise UsageError("the mountpoint is empty", "give a directory")
    try:
        return mountinfo.locate(Path(mountpoint).expanduser())[0]
    except (OSError, RuntimeError) as error:  # a loop of links; a home of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the mountpoint {mountpoint} cannot be followed ({reason})", "give its path itself") from None


def prepare(mountpoint: Path, settings: Settings) -> None:
    """Check that `mountpoint` can be mounted on, and clear away a mount of ours whose server died.

    Raises:
        UsageError: it is missing, not a directory, not empty, mounted already, or would hide the cache.
    """
    _check_not_mounted(mountpoint)
    _check_apart(mountpoint, "cache directory", settings.cache_dir, "choose another --cache-dir")
    _check_apart(mountpoint, "state directory", state_home(), "set XDG_STATE_HOME to another directory")
    try:
        with os.scandir(mountpoint) as entries:
            is_empty = next(entries, None) is None
    except FileNotFoundError:
        shown = visible(mountpoint)  # a line break in a name is often a mistake of the shell's
        remedy = f"mkdir -p {shlex.quote(shown)}" if shown == str(mountpoint) else "check the name"
        raise UsageError(f"mountpoint {shown} does not exist", remedy) from None
    except NotADirectoryError:
        raise UsageError(f"mountpoint {mountpoint} is not a directory", "choose an empty directory") from None
    except OSError as error:
        raise UsageError(f"mountpoint {mountpoint} cannot be used ({error.strerror})", "choose another") from None
    if not is_empty:
        raise UsageError(f"mountpoint {mountpoint} is not empty", "choose an empty directory")


def _check_not_mounted(mountpoint: Path) -> None:
    """Refuse a directory that is a mountpoint already, or lies on a mount of obsfs; unmount a dead mount of ours."""
    entry = mountinfo.mounted_at(mountpoint)
    if entry is not None and entry.is_ours and _is_dead(mountpoint):
        channel.unmount(mountpoint, lazy=True, force=True)
        state.wait_until_free(mountpoint, END_SECONDS)
        entry = mountinfo.mounted_at(mountpoint)
    if entry is not None:
        if entry.is_ours:
            raise UsageError(f"{mountpoint} is already mounted ({entry.source})", f"obsfs umount {mountpoint}")
        what = f"obsfs, by {owner(entry)}" if entry.is_obsfs else entry.fs_type
        raise UsageError(f"{mountpoint} is already mounted ({what})", "mount on another directory")
    below = mountinfo.mount_of(mountpoint)
    if below is not None and below.is_obsfs:
        raise UsageError(f"{mountpoint} lies on a mount of obsfs ({below.mountpoint})", "mount elsewhere")


def _check_apart(mountpoint: Path, what: str, directory: Path, remedy: str) -> None:
    """Refuse a directory that the server needs, if it would reach it only through a mount of obsfs, its own or another.

    A server that waits for itself cannot even be killed: the kernel waits for its answer first.
    """
    place, entry = mountinfo.locate(directory)
    if entry is not None and entry.is_obsfs:
        raise UsageError(f"the {what} {directory} lies on a mount of obsfs ({entry.mountpoint})", remedy)
    if _is_inside(place, mountpoint):
        raise UsageError(f"the {what} {directory} lies in the mountpoint {mountpoint}", remedy)
    if _is_inside(mountpoint, place):
        raise UsageError(f"the mountpoint {mountpoint} lies in the {what} {directory}", "mount elsewhere")


def _is_inside(path: Path, directory: Path) -> bool:
    """Return whether a path is a directory or lies below it, under any name (a bind mount gives it another)."""
    if path.is_relative_to(directory):
        return True
    with suppress(OSError):
        wanted = directory.stat()
        for above in (path, *path.parents):
            with suppress(OSError):
                if os.path.samestat(above.stat(), wanted):
                    return True
    return False


def _is_dead(mountpoint: Path) -> bool:
    """Return whether nothing serves a mount of ours; also when its supervisor has died, and its server is about to."""
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        try:
            status(mountpoint)
        except OSError as error:
            if error.errno == errno.ECONNABORTED:  # it died while it was asked
                continue
            return error.errno == errno.ENOTCONN
        except UsageError:
            return state.is_abandoned(mountpoint)
        if not state.is_abandoned(mountpoint):
            return False
        time.sleep(_PAUSE_SECONDS)
    return False
