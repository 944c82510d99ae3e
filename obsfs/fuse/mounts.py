"""Mounts from the outside: start one, look at those there are, end them. The process behind is in `daemon`."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from obsfs.errors import UsageError
from obsfs.fuse import state
from obsfs.fuse.kernel import channel
from obsfs.remote.address import parse_address
from obsfs.settings import Settings

_T = TypeVar("_T")
_START_SECONDS = 120.0
_STATUS_SECONDS = 5.0
_END_SECONDS = 10.0
_FAIL_SECONDS = 2.0
_LOOK_SECONDS = 1.0
"""For so long a mount may be in use by who only looks at it now and then, as ``obsfs status`` does."""
_PAUSE_SECONDS = 0.05


class Mount:
    """A mount of this process: it ends with :meth:`close`, with the ``with`` block, or with the process."""

    def __init__(self, source: str, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.source = source
        self.path = path
        self._process = process

    @property
    def pid(self) -> int:
        """The supervisor of the process that serves it."""
        return self._process.pid

    def status(self) -> dict[str, Any]:
        """What ``obsfs status --json`` shows of it."""
        return status(self.path)

    def close(self) -> None:
        """Unmount. What is still mapped from it stays readable until it is dropped, or this process ends."""
        if self._process.poll() is not None:
            return
        try:
            channel.unmount(self.path)
        except UsageError:
            if channel.mounted_at(self.path) is not None:
                channel.unmount(self.path, lazy=True)
            return
        try:
            self._process.wait(_END_SECONDS)
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


class OnMount(NamedTuple):
    """What a path on a mount of obsfs stands for. `settings` are those by which that mount finds it."""

    url: str
    settings: dict[str, Any]
    mountpoint: Path


class Stale(NamedTuple):
    """An obsfs mount that does not answer: its server died (`dead`), or is busy with something else."""

    mountpoint: Path
    source: str
    dead: bool


def mount(source: str, mountpoint: str | os.PathLike[str] | None = None, **settings: Any) -> Mount:
    """Mount ``obs://bucket[/prefix]`` on a directory (without one, on a new temporary one), and return when it answers.

    `settings` are the fields of :class:`~obsfs.settings.Settings`. The mount lives as long as this process, or
    until it is closed: use it in a ``with`` statement. Raises ObsfsError, and leaves nothing behind then.
    """
    chosen = Settings.load(**settings)
    if mountpoint is not None:
        path = resolve(mountpoint)
        return Mount(source, path, start(source, path, chosen, lifeline=True))
    path = resolve(tempfile.mkdtemp(prefix="obsfs-mount-"))
    try:
        return Mount(source, path, start(source, path, chosen, lifeline=True, is_temporary=True))
    except BaseException:
        with suppress(OSError):
            path.rmdir()
        raise


def start(
    source: str, mountpoint: Path, settings: Settings, *, lifeline: bool, is_temporary: bool = False
) -> subprocess.Popen[bytes]:
    """Start the process that serves `source` on `mountpoint`, and return it when the directory answers.

    With `lifeline` it ends when its stdin is closed; with `is_temporary` it takes the directory away when it ends.
    Raises ObsfsError; nothing is left behind then.
    """
    parse_address(source)
    prepare(mountpoint)
    arguments = [sys.executable, "-P", "-m", "obsfs.fuse.supervisor", source, str(mountpoint)]
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdin and process.stdout and process.stderr
    try:
        request = {"settings": settings.to_json(), "lifeline": lifeline, "is_temporary": is_temporary}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        waiting = select.poll()  # select(2) would end at descriptor 1023
        waiting.register(process.stdout, select.POLLIN)
        ready = waiting.poll(_START_SECONDS * 1000)
        line = process.stdout.readline() if ready else b""
        answer = json.loads(line) if line else {}
    except BaseException:
        _end(process, mountpoint)
        raise
    if "pid" in answer:
        process.stdout.close()
        process.stderr.close()
        if not lifeline:
            process.stdin.close()
        return process
    reason = b"" if "error" in answer or process.poll() is None else process.stderr.read()[-500:]
    _end(process, mountpoint)
    if "error" in answer:
        raise UsageError(answer["error"], answer["remedy"])
    said = " ".join(reason.decode(errors="replace").split()) or f"no answer within {_START_SECONDS:.0f} s"
    raise UsageError(f"the process that should serve {mountpoint} did not start", said)


def _end(process: subprocess.Popen[bytes], mountpoint: Path) -> None:
    process.terminate()
    try:
        process.wait(_FAIL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        if (entry := channel.mounted_at(mountpoint)) and entry.fs_type == channel.FS_TYPE:
            channel.unmount(mountpoint, lazy=True)


def resolve(mountpoint: str | os.PathLike[str]) -> Path:
    """The absolute path of a mountpoint. Does not look at the mountpoint itself, whose server may be dead."""
    path = Path(mountpoint).expanduser().absolute()
    direct = Path(os.path.realpath(path.parent)) / path.name
    if channel.mounted_at(direct) is not None:
        return direct
    return Path(os.path.realpath(path))


def prepare(mountpoint: Path) -> None:
    """See that `mountpoint` can be mounted on, and clear away a mount of ours whose server died.

    Raises UsageError when it is missing, no directory, not empty, or mounted already.
    """
    entry = channel.mounted_at(mountpoint)
    if entry is not None and entry.fs_type == channel.FS_TYPE and _is_dead(mountpoint):
        channel.unmount(mountpoint, lazy=True, force=True)
        state.wait_until_free(mountpoint, _END_SECONDS)
        entry = channel.mounted_at(mountpoint)
    if entry is not None:
        raise UsageError(f"{mountpoint} is already mounted ({entry.source})", f"obsfs umount {mountpoint}")
    try:
        with os.scandir(mountpoint) as entries:
            is_empty = next(entries, None) is None
    except FileNotFoundError:
        raise UsageError(f"mountpoint {mountpoint} does not exist", f"mkdir -p {mountpoint}") from None
    except NotADirectoryError:
        raise UsageError(f"mountpoint {mountpoint} is no directory", "choose an empty directory") from None
    except OSError as error:
        raise UsageError(f"mountpoint {mountpoint} cannot be used ({error.strerror})", "choose another") from None
    if not is_empty:
        raise UsageError(f"mountpoint {mountpoint} is not empty", "choose an empty directory")


def _is_dead(mountpoint: Path) -> bool:
    """Whether nobody serves a mount of ours: also when its supervisor has died, and its server is about to."""
    deadline = time.monotonic() + _END_SECONDS
    while time.monotonic() < deadline:
        try:
            supervisor = status(mountpoint).get("supervisor")
        except OSError as error:
            if error.errno == errno.ECONNABORTED:  # it died while it was asked
                continue
            return error.errno == errno.ENOTCONN
        except UsageError:
            return state.is_abandoned(mountpoint)
        if supervisor is None or Path(f"/proc/{supervisor}").exists():
            return False
        time.sleep(_PAUSE_SECONDS)
    return False


def status(mountpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """What the server of a mount says of itself: what ``obsfs status --json`` shows.

    Raises UsageError when it does not answer within 5 seconds, and OSError (ENOTCONN) when it died.
    """
    answer: dict[str, Any] = json.loads(_asked(mountpoint, lambda: os.getxattr(mountpoint, "user.obsfs.status")))
    return answer


def refresh(place: str | os.PathLike[str]) -> list[Path]:
    """Have mounts ask the bucket again for what they show of a place, whatever --metadata-ttl says.

    A path means the mount that it is on, ``obs://BUCKET/...`` every mount of this machine that shows it; it need not be
    there (yet). What is open stays as it is. Returns what was refreshed: the nearest paths that the mounts know. A
    mount that is dead, or does not answer within 5 seconds, is left out.
    """
    found = []
    for entry in channel.mounts():
        with suppress(OSError, UsageError):
            path = _path_on(entry, place) if entry.fs_type == channel.FS_TYPE else None
            if path is not None:
                found.append(_asked(entry.mountpoint, partial(_refresh, path, entry.mountpoint)))
    return found


def _path_on(mount: channel.MountEntry, place: str | os.PathLike[str]) -> Path | None:
    """What a mount shows of a place, if anything."""
    text = os.fspath(place)
    if "://" not in text:
        path = Path(text).absolute()
        return path if path.is_relative_to(mount.mountpoint) else None
    wanted, shown = parse_address(text), parse_address(mount.source)
    if wanted.bucket != shown.bucket:
        return None
    if shown.prefix.startswith(wanted.prefix):
        return mount.mountpoint
    return mount.mountpoint / wanted.prefix[len(shown.prefix) :] if wanted.prefix.startswith(shown.prefix) else None


def _refresh(path: Path, mountpoint: Path) -> Path:
    while True:
        try:
            os.getxattr(path, "user.obsfs.refresh")
            return path
        except (FileNotFoundError, NotADirectoryError):
            if path == mountpoint:
                raise
            path = path.parent


def _asked(mountpoint: str | os.PathLike[str], ask: Callable[[], _T]) -> _T:
    """What a call on a mount returns or raises; UsageError when it does not answer within 5 seconds."""
    result: list[_T | OSError] = []

    def work() -> None:
        try:
            result.append(ask())
        except OSError as error:
            result.append(error)

    asking = threading.Thread(target=work, daemon=True)
    asking.start()
    asking.join(_STATUS_SECONDS)
    if not result:
        raise UsageError(f"the server of {mountpoint} does not answer", f"obsfs umount --lazy {mountpoint}")
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def find() -> list[dict[str, Any] | Stale]:
    """The status of every obsfs mount that there is."""
    found: list[dict[str, Any] | Stale] = []
    for entry in channel.mounts():
        if entry.fs_type == channel.FS_TYPE:
            try:
                found.append(status(entry.mountpoint))
            except OSError as error:
                found.append(Stale(entry.mountpoint, entry.source, error.errno == errno.ENOTCONN))
            except UsageError:
                found.append(Stale(entry.mountpoint, entry.source, state.is_abandoned(entry.mountpoint)))
    return found


def on_mount(path: str | os.PathLike[str]) -> OnMount | None:
    """What a path stands for, if it lies on a mount of obsfs: also one that is not there (yet)."""
    place = Path(path).absolute()
    for mount in find():
        if isinstance(mount, dict) and place.is_relative_to(mount["mountpoint"]):
            inside = place.relative_to(mount["mountpoint"]).as_posix()
            url = mount["source"] if inside == "." else f"{mount['source'].rstrip('/')}/{inside}"
            endpoints = [site["endpoint"] for site in mount["endpoints"]] or [mount["endpoint"]]
            settings = {"endpoint_url": endpoints, "cache_dir": mount["cache_dir"]}
            return OnMount(url, settings, Path(mount["mountpoint"]))
    return None


def replace_server(mountpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Have another process serve a mount, of what is installed now. Returns the status before and after.

    Raises UsageError when no obsfs is mounted there, when nobody supervises it, or when the other does not answer.
    """
    entry = channel.mounted_at(mountpoint)
    if entry is None or entry.fs_type != channel.FS_TYPE:
        raise UsageError(f"no obsfs is mounted on {mountpoint}", "see `obsfs status`")
    before = status(mountpoint)
    if not before.get("can_be_followed"):
        raise UsageError(
            f"the server of {mountpoint} cannot be replaced",
            "it needs Linux 6.9, the native engine, and no --foreground",
        )
    os.kill(before["supervisor"], signal.SIGHUP)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
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
    raise UsageError(f"the server of {mountpoint} was not replaced", "see its log in ~/.local/state/obsfs")


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount, and wait until its process has ended (unless `lazy`: it serves on until the last file is closed).

    Raises UsageError when no obsfs is mounted there, or when it is in use.
    """
    entry = channel.mounted_at(mountpoint)
    if entry is None:
        raise UsageError(f"nothing is mounted on {mountpoint}", "see `obsfs status`")
    if entry.fs_type != channel.FS_TYPE:
        raise UsageError(f"what is mounted on {mountpoint} is no obsfs ({entry.fs_type})", "use umount(8)")
    if lazy:
        channel.unmount(mountpoint, lazy=True, force=state.is_abandoned(mountpoint))
        return
    channel.unmount(mountpoint, patience=_LOOK_SECONDS)
    state.wait_until_free(mountpoint, _END_SECONDS)
