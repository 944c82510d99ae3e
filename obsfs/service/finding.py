"""Which mounts of obsfs there are, and how each of them is.

Only a mount that this user made is asked. Any other could answer anything, or hang.
"""

from __future__ import annotations

import errno
import os
import pwd
from pathlib import Path
from typing import Any, Literal, NamedTuple

from obsfs import mountinfo
from obsfs.errors import UsageError
from obsfs.mountinfo import MountEntry
from obsfs.service import state
from obsfs.service.asking import Answer, Outcome, Question, ask
from obsfs.store.address import parse_address

State = Literal["mounted", "dead", "not answering", "another user's", "covered"]


class MountInfo(NamedTuple):
    """A mount of obsfs, and how it is.

    Attributes:
        entry: what the kernel says of it.
        state: "mounted" when it answers; "covered" when something else is mounted over it.
        status: what its server says of itself; empty unless the mount is "mounted".
    """

    entry: MountEntry
    state: State
    status: dict[str, Any]


class MountedPath(NamedTuple):
    """What a path on a mount of obsfs stands for.

    Attributes:
        url: the place in the bucket.
        settings: those by which the mount reaches it.
        mountpoint: of the mount.
    """

    url: str
    settings: dict[str, Any]
    mountpoint: Path


def find_mounts(mountpoint: Path | None = None) -> list[MountInfo]:
    """Return how every mount of obsfs is, or only the mounts on `mountpoint`, within 5 seconds in all."""
    entries = [entry for entry in mountinfo.mounts() if entry.is_obsfs and mountpoint in (None, entry.mountpoint)]
    reachable = {entry.number for entry in reachable_mounts()}
    asked = [entry for entry in entries if entry.is_ours and entry.number in reachable]
    outcomes = ask([Question(entry, "status") for entry in asked])
    by_number = {entry.number: outcome for entry, outcome in zip(asked, outcomes, strict=True)}
    infos = []
    for entry in entries:
        if entry.number in by_number:
            infos.append(_info(entry, by_number[entry.number]))
        else:
            infos.append(MountInfo(entry, "another user's" if entry.number in reachable else "covered", {}))
    return infos


def _info(entry: MountEntry, outcome: Outcome) -> MountInfo:
    try:
        return MountInfo(entry, "mounted", _status_of(entry, outcome))
    except OSError as error:
        if error.errno == errno.EXDEV:
            return MountInfo(entry, "covered", {})
        return MountInfo(entry, "dead" if error.errno == errno.ENOTCONN else "not answering", {})
    except UsageError:
        return MountInfo(entry, "dead" if state.is_abandoned(entry.mountpoint) else "not answering", {})


def reachable_mounts() -> list[MountEntry]:
    """Return the mounts of obsfs that no other mount covers."""
    entries = mountinfo.mounts()
    return [entry for entry in entries if entry.is_obsfs and mountinfo.mount_of(entry.mountpoint, entries) == entry]


def status(mountpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the server of a mount says of itself: what ``obsfs status --json`` shows.

    Args:
        mountpoint: the mountpoint, or a path on the mount.

    Raises:
        UsageError: no mount of obsfs that this user made is there, or it does not answer within 5 seconds.
        OSError: ENOTCONN when its server died.
    """
    entry = own_mount(mountpoint)
    return _status_of(entry, ask([Question(entry, "status")])[0])


def own_mount(path: str | os.PathLike[str]) -> MountEntry:
    """Return the mount of obsfs that a path lies on.

    Raises:
        UsageError: it lies on none, or on one that another user made.
    """
    entry = mountinfo.locate(path)[1]
    if entry is None or not entry.is_obsfs:
        raise UsageError(f"no obsfs is mounted on {path}", "see `obsfs status`")
    if not entry.is_ours:
        raise UsageError(f"the mount {entry.mountpoint} is another user's", "its server is not asked")
    return entry


def _status_of(entry: MountEntry, outcome: Outcome) -> dict[str, Any]:
    """Return the status in an outcome. Where the mount is, and what it shows, is what the kernel says of it.

    Raises:
        OSError, UsageError: as :func:`status`.
    """
    if isinstance(outcome, OSError):
        raise OSError(outcome.errno, outcome.strerror, str(entry.mountpoint))
    if isinstance(outcome, UsageError):
        raise UsageError(f"{entry.mountpoint}: {outcome.message}", outcome.remedy)
    if outcome is None:
        raise UsageError(f"the server of {entry.mountpoint} does not answer", f"obsfs umount --lazy {entry.mountpoint}")
    return {**outcome.value, "mountpoint": str(entry.mountpoint), "source": entry.source}


def on_mount(path: str | os.PathLike[str]) -> MountedPath | None:
    """Return what a path stands for, if it lies on a mount of obsfs of this user. The path need not exist.

    Only the mount that the path lies on is asked, which the kernel knows.

    Raises:
        UsageError: that mount is dead, or does not answer within 5 seconds.
    """
    place, entry = mountinfo.locate(path)
    if entry is None or not entry.is_ours:
        return None
    try:
        shown = status(entry.mountpoint)
    except OSError as error:
        reason = "has died" if error.errno == errno.ENOTCONN else f"does not answer ({error.strerror})"
        raise UsageError(f"the server of {entry.mountpoint} {reason}", "mount it again, or `obsfs umount` it") from None
    inside = place.relative_to(entry.mountpoint).as_posix()
    url = entry.source if inside == "." else f"{entry.source.rstrip('/')}/{inside}"
    endpoints = [site["endpoint"] for site in shown["endpoints"]] or [shown["endpoint"]]
    return MountedPath(url, {"endpoint_url": endpoints, "cache_dir": shown["cache_dir"]}, entry.mountpoint)


def refresh(place: str | os.PathLike[str]) -> list[Path]:
    """Have mounts ask the bucket again for what they show of a place, whatever --metadata-ttl says.

    Files that are open stay the version that was opened.

    Args:
        place: a path, for the mount that it lies on, or ``obs://BUCKET/...``, for every mount of this user that shows
            it. It need not exist (yet).

    Returns:
        What was refreshed: the nearest paths that the mounts know. A mount that is dead, or does not answer within 5
        seconds, is left out.
    """
    text = os.fspath(place)
    questions: list[Question] = []
    if "://" not in text:
        path, entry = mountinfo.locate(text)
        if entry is not None and entry.is_ours:
            questions = [Question(entry, "refresh", path.relative_to(entry.mountpoint))]
    else:
        for entry in reachable_mounts():
            if entry.is_ours and (inside := _shown_path(entry, text)) is not None:
                questions.append(Question(entry, "refresh", inside))
    return [
        question.entry.mountpoint / outcome.path
        for question, outcome in zip(questions, ask(questions), strict=True)
        if isinstance(outcome, Answer)
    ]


def explain_no_refresh(place: str) -> UsageError:
    """Return why :func:`refresh` has refreshed nothing: how the mounts are that show a place, or might."""
    if "://" not in place:
        entry = mountinfo.locate(place)[1]
        if entry is None or not entry.is_obsfs:
            return UsageError(f"{place} lies on no mount of obsfs", "see `obsfs status`")
        infos = find_mounts(entry.mountpoint)
    else:
        infos = [info for info in find_mounts() if _shown_path(info.entry, place) is not None]
    for info in reversed(infos):  # the one on top comes last
        if info.state in _NOT_REFRESHED:
            reason, remedy = _NOT_REFRESHED[info.state]
            words = {"mount": info.entry.mountpoint, "owner": owner(info.entry)}
            return UsageError(f"{place}: {reason.format(**words)}", remedy.format(**words))
    return UsageError(f"no mount of obsfs shows {place}", "see `obsfs status`")


_NOT_REFRESHED: dict[State, tuple[str, str]] = {
    "dead": ("the server of {mount} has died", "mount it again, or `obsfs umount {mount}`"),
    "not answering": ("the server of {mount} does not answer", "`obsfs umount --lazy {mount}` ends it"),
    "another user's": ("the mount {mount} was made by {owner}", "it shows what is new when its --metadata-ttl is over"),
    "covered": ("another mount covers {mount}", "see findmnt(8)"),
}


def owner(entry: MountEntry) -> str:
    """Return who made a mount of obsfs, as a person knows them."""
    if entry.user is None:
        return "an unknown user"
    try:
        return f"{pwd.getpwuid(entry.user).pw_name} (uid {entry.user})"
    except KeyError:
        return f"uid {entry.user}"


def _shown_path(mount: MountEntry, url: str) -> Path | None:
    """Return what a mount shows of a URL: a path below the mountpoint; None if it shows nothing of it."""
    try:
        wanted, shown = parse_address(url), parse_address(mount.source)
    except UsageError:
        return None
    if wanted.bucket != shown.bucket:
        return None
    if shown.prefix.startswith(wanted.prefix):
        return Path()
    return Path(wanted.prefix[len(shown.prefix) :]) if wanted.prefix.startswith(shown.prefix) else None
