"""Mounts from the outside: start one, look at those there are, end them. The process behind is in `daemon`."""

from __future__ import annotations

import errno
import json
import os
import pwd
import select
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from obsfs import mountinfo, processes
from obsfs.errors import UsageError, WaitWarning
from obsfs.fuse.kernel import channel
from obsfs.mountinfo import MountEntry
from obsfs.paths import state_home
from obsfs.service import asker, state
from obsfs.settings import Settings, keywords
from obsfs.store.address import parse_address
from obsfs.text import visible

State = Literal["mounted", "dead", "not answering", "another user's", "covered"]
_STATUS = "user.obsfs.status"
_REFRESH = "user.obsfs.refresh"
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
            if mountinfo.mounted_at(self.path) is not None:
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


class MountedPath(NamedTuple):
    """What a path on a mount of obsfs stands for. `settings` are those by which that mount finds it."""

    url: str
    settings: dict[str, Any]
    mountpoint: Path


class MountInfo(NamedTuple):
    """A mount of obsfs, and how it is.

    Only a mount that this user made is asked: any other may say what it likes, or never answer.

    Attributes:
        entry: what the kernel says of it.
        state: "mounted" when it answers; "covered" when something else is mounted over it.
        status: what its server says of itself; empty unless it is "mounted".
    """

    entry: MountEntry
    state: State
    status: dict[str, Any]


def mount(source: str, mountpoint: str | os.PathLike[str] | None = None, **settings: Any) -> Mount:
    """Mount ``obs://bucket[/prefix]`` on a directory (without one, on a new temporary one), and return when it answers.

    `settings` are the fields of :class:`~obsfs.settings.Settings`. The mount lives as long as this process, or
    until it is closed: use it in a ``with`` statement. Raises ObsfsError, and leaves nothing behind then.
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


def start(
    source: str, mountpoint: Path, settings: Settings, *, lifeline: bool, is_temporary: bool = False
) -> subprocess.Popen[bytes]:
    """Start the process that serves `source` on `mountpoint`, and return it when the directory answers.

    With `lifeline` it ends when its stdin is closed; with `is_temporary` it takes the directory away when it ends.
    Raises ObsfsError; nothing is left behind then.
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
    try:
        request = {
            "settings": settings.to_json(),
            "places": dict(settings.places),
            "lifeline": lifeline,
            "is_temporary": is_temporary,
        }
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        waiting = select.poll()  # select(2) would end at descriptor 1023
        waiting.register(process.stdout, select.POLLIN)
        answer: dict[str, Any] = {"note": None}
        while "note" in answer:
            ready = waiting.poll(_START_SECONDS * 1000)
            line = process.stdout.readline() if ready else b""
            answer = json.loads(line) if line else {}
            if "note" in answer:
                warnings.warn(visible(answer["note"]), WaitWarning, stacklevel=2)
    except BaseException:
        _end(process, mountpoint)
        raise
    if "pid" in answer:
        process.stdout.close()
        process.stderr.close()
        if not lifeline:
            process.stdin.close()
        return process
    if ready and not line:  # it ends without a word: with the interpreter's own on stderr
        with suppress(subprocess.TimeoutExpired):
            process.wait(_FAIL_SECONDS)
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
        if (entry := mountinfo.mounted_at(mountpoint)) and entry.is_ours:
            channel.unmount(mountpoint, lazy=True)


def resolve_mountpoint(mountpoint: str | os.PathLike[str]) -> Path:
    """The absolute path of a mountpoint. Looks at nothing on a mount of obsfs, whose server may be dead.

    Raises UsageError for an empty one, which would mean the working directory, and one that leads nowhere.
    """
    if not os.fspath(mountpoint).strip():
        raise UsageError("the mountpoint is empty", "give a directory")
    try:
        return mountinfo.locate(Path(mountpoint).expanduser())[0]
    except (OSError, RuntimeError) as error:  # a loop of links; a home of nobody
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the mountpoint {mountpoint} cannot be followed ({reason})", "give its path itself") from None


def prepare(mountpoint: Path, settings: Settings) -> None:
    """See that `mountpoint` can be mounted on, and clear away a mount of ours whose server died.

    Raises UsageError when it is missing, not a directory, not empty, mounted already, or would hide the cache.
    """
    entry = mountinfo.mounted_at(mountpoint)
    if entry is not None and entry.is_ours and _is_dead(mountpoint):
        channel.unmount(mountpoint, lazy=True, force=True)
        state.wait_until_free(mountpoint, _END_SECONDS)
        entry = mountinfo.mounted_at(mountpoint)
    if entry is not None:
        if entry.is_ours:
            raise UsageError(f"{mountpoint} is already mounted ({entry.source})", f"obsfs umount {mountpoint}")
        what = f"obsfs, by {_owner(entry)}" if entry.is_obsfs else entry.fs_type
        raise UsageError(f"{mountpoint} is already mounted ({what})", "mount on another directory")
    below = mountinfo.mount_of(mountpoint)
    if below is not None and below.is_obsfs:
        raise UsageError(f"{mountpoint} lies on a mount of obsfs ({below.mountpoint})", "mount elsewhere")
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
        raise UsageError(f"mountpoint {mountpoint} is no directory", "choose an empty directory") from None
    except OSError as error:
        raise UsageError(f"mountpoint {mountpoint} cannot be used ({error.strerror})", "choose another") from None
    if not is_empty:
        raise UsageError(f"mountpoint {mountpoint} is not empty", "choose an empty directory")


def _check_apart(mountpoint: Path, what: str, directory: Path, remedy: str) -> None:
    """Refuse a directory that the server needs, and would only reach through a mount: its own, or another of obsfs.

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
    """Whether a path is a directory or lies below it, by whatever name (a bind mount gives it another)."""
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
    """Whether nobody serves a mount of ours: also when its supervisor has died, and its server is about to."""
    deadline = time.monotonic() + _END_SECONDS
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


def status(mountpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the server of a mount says of itself: what ``obsfs status --json`` shows.

    Args:
        mountpoint: the mountpoint, or a path on the mount.

    Raises:
        UsageError: no mount of obsfs that this user made is there, or it does not answer within 5 seconds.
        OSError: ENOTCONN when its server died.
    """
    entry = mountinfo.locate(mountpoint)[1]
    if entry is None or not entry.is_obsfs:
        raise UsageError(f"no obsfs is mounted on {mountpoint}", "see `obsfs status`")
    if not entry.is_ours:
        raise UsageError(f"the mount {entry.mountpoint} is another user's", "its server is not asked")
    return _status_of(entry, _ask([(entry, _STATUS, Path())])[0])


def refresh(place: str | os.PathLike[str]) -> list[Path]:
    """Have mounts ask the bucket again for what they show of a place, whatever --metadata-ttl says.

    A path means the mount that it is on, ``obs://BUCKET/...`` every mount of this user that shows it; it need not be
    there (yet). What is open stays as it is. Returns what was refreshed: the nearest paths that the mounts know. A
    mount that is dead, or does not answer within 5 seconds, is left out.
    """
    text = os.fspath(place)
    asked: list[tuple[MountEntry, str, Path]] = []
    if "://" not in text:
        path, on = mountinfo.locate(text)
        if on is not None and on.is_ours:
            asked = [(on, _REFRESH, path.relative_to(on.mountpoint))]
    else:
        for entry in _reachable():
            with suppress(UsageError):
                if entry.is_ours and (inside := _shown(entry, text)) is not None:
                    asked.append((entry, _REFRESH, inside))
    answers = zip(asked, _ask(asked), strict=True)
    return [one[0].mountpoint / answer.path for one, answer in answers if isinstance(answer, _Answer)]


def explain_no_refresh(place: str) -> UsageError:
    """Return why :func:`refresh` has refreshed nothing: how the mounts are that a place is on, or may be on."""
    if "://" not in place:
        entry = mountinfo.locate(place)[1]
        if entry is None or not entry.is_obsfs:
            return UsageError(f"{place} lies on no mount of obsfs", "see `obsfs status`")
        found = find_mounts(entry.mountpoint)
    else:
        found = [one for one in find_mounts() if _may_show(one.entry, place)]
    for one in reversed(found):  # the one on top comes last
        if one.state in _UNSEEN:
            reason, remedy = _UNSEEN[one.state]
            words = {"mount": one.entry.mountpoint, "owner": _owner(one.entry)}
            return UsageError(f"{place}: {reason.format(**words)}", remedy.format(**words))
    return UsageError(f"no mount of obsfs shows {place}", "see `obsfs status`")


_UNSEEN: dict[State, tuple[str, str]] = {
    "dead": ("the server of {mount} has died", "mount it again, or `obsfs umount {mount}`"),
    "not answering": ("the server of {mount} does not answer", "`obsfs umount --lazy {mount}` ends it"),
    "another user's": ("the mount {mount} was made by {owner}", "it shows what is new when its --metadata-ttl is over"),
    "covered": ("another mount covers {mount}", "see findmnt(8)"),
}


def _may_show(mount: MountEntry, url: str) -> bool:
    try:
        return _shown(mount, url) is not None
    except UsageError:
        return False


def _owner(entry: MountEntry) -> str:
    """Who made a mount of obsfs, as a person knows them."""
    if entry.user is None:
        return "an unknown user"
    try:
        return f"{pwd.getpwuid(entry.user).pw_name} (uid {entry.user})"
    except KeyError:
        return f"uid {entry.user}"


def _shown(mount: MountEntry, url: str) -> Path | None:
    """What a mount shows of a URL, if anything: a path below the mountpoint. Raises UsageError."""
    wanted, shown = parse_address(url), parse_address(mount.source)
    if wanted.bucket != shown.bucket:
        return None
    if shown.prefix.startswith(wanted.prefix):
        return Path()
    return Path(wanted.prefix[len(shown.prefix) :]) if wanted.prefix.startswith(shown.prefix) else None


class _Answer(NamedTuple):
    """What a mount answered, and which path (below its mountpoint) it was."""

    path: Path
    value: bytes


def _ask(questions: Sequence[tuple[MountEntry, str, Path]]) -> list[_Answer | OSError | None]:
    """Ask mounts for an attribute of a path each, all at the same time.

    Returns an answer to each, or the error that it gave; None where there was none within 5 seconds. Who asks may be
    stuck for good (see :mod:`obsfs.service.asker`), and is left behind.
    """
    askers = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", asker.__file__, str(entry.number), entry.mountpoint, attribute, path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=processes.bare_environment(),
        )
        for entry, attribute, path in questions
    ]
    said = [bytearray() for _ in questions]
    answers: list[_Answer | OSError | None] = [None for _ in questions]
    deadline = time.monotonic() + _STATUS_SECONDS
    with selectors.DefaultSelector() as selector:
        for number, process in enumerate(askers):
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ, number)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                piece = os.read(key.fd, 1 << 16)
                said[key.data] += piece
                if not piece:
                    selector.unregister(key.fileobj)
                    answers[key.data] = _parse(bytes(said[key.data]))
    for process in askers:
        _leave(process)
    return answers


def _parse(said: bytes) -> _Answer | OSError | None:
    code, _, rest = said.partition(b"\n")
    if not code.isdigit():
        return None
    if number := int(code):
        return OSError(number, os.strerror(number))
    path, _, value = rest.partition(b"\0")
    return _Answer(Path(os.fsdecode(path)), value)


def _leave(process: subprocess.Popen[bytes]) -> None:
    """End a process that has answered, or will not; wait for one that cannot be ended elsewhere."""
    assert process.stdout is not None
    process.stdout.close()
    try:
        process.wait(_PAUSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        threading.Thread(target=process.wait, name="obsfs-asker", daemon=True).start()


def _status_of(entry: MountEntry, answer: _Answer | OSError | None) -> dict[str, Any]:
    """What an answer says; where the mount is, and what it shows, is the kernel's to say. Raises as :func:`status`."""
    if isinstance(answer, OSError):
        raise OSError(answer.errno, answer.strerror, str(entry.mountpoint))
    found: Any = None
    with suppress(ValueError):
        found = json.loads(answer.value) if answer is not None else None
    if not isinstance(found, dict):
        raise UsageError(f"the server of {entry.mountpoint} does not answer", f"obsfs umount --lazy {entry.mountpoint}")
    return {**found, "mountpoint": str(entry.mountpoint), "source": entry.source}


def _reachable() -> list[MountEntry]:
    """The mounts of obsfs that no other mount covers."""
    entries = mountinfo.mounts()
    return [one for one in entries if one.is_obsfs and mountinfo.mount_of(one.mountpoint, entries) == one]


def find_mounts(mountpoint: Path | None = None) -> list[MountInfo]:
    """Return how every mount of obsfs is, or only what is mounted on `mountpoint`, within 5 seconds altogether."""
    entries = [one for one in mountinfo.mounts() if one.is_obsfs and mountpoint in (None, one.mountpoint)]
    reachable = {one.number for one in _reachable()}
    asked = [one for one in entries if one.is_ours and one.number in reachable]
    answers = dict(zip((one.number for one in asked), _ask([(one, _STATUS, Path()) for one in asked]), strict=True))
    found = []
    for one in entries:
        if one.number in answers:
            found.append(_found(one, answers[one.number]))
        else:
            found.append(MountInfo(one, "covered" if one.number not in reachable else "another user's", {}))
    return found


def _found(entry: MountEntry, answer: _Answer | OSError | None) -> MountInfo:
    try:
        return MountInfo(entry, "mounted", _status_of(entry, answer))
    except OSError as error:
        if error.errno == errno.EXDEV:
            return MountInfo(entry, "covered", {})
        return MountInfo(entry, "dead" if error.errno == errno.ENOTCONN else "not answering", {})
    except UsageError:
        return MountInfo(entry, "dead" if state.is_abandoned(entry.mountpoint) else "not answering", {})


def on_mount(path: str | os.PathLike[str]) -> MountedPath | None:
    """What a path stands for, if it lies on a mount of obsfs of this user: also one that is not there (yet).

    No mount is asked but the one that the path lies on, as the kernel says. Raises UsageError when that one is dead, or
    does not answer within 5 seconds.
    """
    place, entry = mountinfo.locate(path)
    if entry is None or not entry.is_ours:
        return None
    try:
        found = status(entry.mountpoint)
    except OSError as error:
        reason = "has died" if error.errno == errno.ENOTCONN else f"does not answer ({error.strerror})"
        raise UsageError(f"the server of {entry.mountpoint} {reason}", "mount it again, or `obsfs umount` it") from None
    inside = place.relative_to(entry.mountpoint).as_posix()
    url = entry.source if inside == "." else f"{entry.source.rstrip('/')}/{inside}"
    endpoints = [site["endpoint"] for site in found["endpoints"]] or [found["endpoint"]]
    return MountedPath(url, {"endpoint_url": endpoints, "cache_dir": found["cache_dir"]}, entry.mountpoint)


def replace_server(mountpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Have another process serve a mount, of what is installed now. Returns the status before and after.

    Raises UsageError when no obsfs is mounted there, when nobody supervises it, or when the other does not answer.
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
    supervisor = state.open_supervisor(mountpoint)
    try:
        signal.pidfd_send_signal(supervisor, signal.SIGHUP)
    finally:
        os.close(supervisor)
    deadline = time.monotonic() + _START_SECONDS
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


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount, and wait until its process has ended (unless `lazy`: it serves on until the last file is closed).

    Raises UsageError when no obsfs is mounted there, when it is in use, or when another user has made it; root may.
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
            f"the mount on {mountpoint} was made by {_owner(entry)}", "only that user, or root, can unmount it"
        )
    if lazy:
        channel.unmount(mountpoint, lazy=True, force=entry.is_ours and state.is_abandoned(mountpoint))
        return
    channel.unmount(mountpoint, patience=_LOOK_SECONDS)
    state.wait_until_free(mountpoint, _END_SECONDS)
