"""Every error that a user can meet.

An error carries what happened, what to do about it, and the errno that a reader of the mount sees.
Commands print ``str(error)`` on one line and exit with status 2; nothing here ever holds a secret.
"""

from __future__ import annotations

import errno

from obsfs.text import visible

_MAX_LINE = 4000
"""Characters of an error's line."""


class ObsfsError(Exception):
    """Base of all errors raised on purpose; ``errno`` is what a system call on the mount returns."""

    errno: int = errno.EIO

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        text = f"{self.message}: {self.remedy}" if self.remedy else self.message
        return visible(" ".join(text.split()), _MAX_LINE)


class UsageError(ObsfsError):
    """What was asked cannot be done as asked: a bad argument, setting or mountpoint."""

    errno = errno.EINVAL


class MovedError(UsageError):
    """The bucket is elsewhere. `region` and `host` are what the server says of the place, empty where it does not."""

    errno = errno.EIO

    def __init__(self, message: str, remedy: str = "", *, region: str = "", host: str = "") -> None:
        super().__init__(message, remedy)
        self.region = region
        self.host = host


class NotFoundError(ObsfsError):
    """The bucket or the object does not exist."""

    errno = errno.ENOENT


class NoBucketError(NotFoundError):
    """The bucket itself does not exist."""


class ExistsError(ObsfsError):
    """It is there already, or somebody else was first."""

    errno = errno.EEXIST


class RefusedError(ObsfsError):
    """The server refused the request for good: the same request will not be answered otherwise."""

    errno = errno.EIO


class UnsupportedError(RefusedError):
    """The server does not have this operation; there may be another way to the same end."""


class ForbiddenError(ObsfsError):
    """The server refused the credentials, or they do not allow this."""

    errno = errno.EACCES


class VersionChangedError(ObsfsError):
    """The object is no longer the version (ETag) that was opened."""

    errno = errno.ESTALE


class UnavailableError(ObsfsError):
    """The server did not answer, or not correctly; worth another try."""

    errno = errno.EIO


class BusyError(UnavailableError):
    """The server answered that it cannot do it now (SlowDown, 5xx)."""


class BrokenOffError(UnavailableError):
    """The server began to answer, and ended too early."""


class CorruptError(UnavailableError):
    """The server sent other bytes than those of its own checksum."""


class ExpiredError(UnavailableError):
    """The token that a request was signed with is over; the next one is signed with another, if there is one."""

    errno = errno.EACCES


class CacheError(ObsfsError):
    """The cache directory cannot be used."""

    errno = errno.EIO


class WaitWarning(UserWarning):
    """Something that a person may have to see to is waited for."""


class SettingWarning(UserWarning):
    """A key of the config file, or a variable, that is not a setting of obsfs and so has no effect."""


class TooManyFilesError(CacheError):
    """The process, or the system, may have no more files open."""

    errno = errno.ENFILE


def first_line(error: BaseException) -> str:
    """What another library's exception says, cut to the line that an error of ours may quote."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
