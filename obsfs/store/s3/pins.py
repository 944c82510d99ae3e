"""By what each answer is known to be of one version of an object: its ETag, or its Last-Modified where it has none.

The request asks for it (``If-Match``, ``If-Unmodified-Since``), and the answer is compared all the same: servers are
known that ignore the question. An answer with nothing to compare is refused, so that no two versions are ever mixed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

from obsfs.errors import RefusedError, UnavailableError, VersionChangedError
from obsfs.store.types import ObjectVersion, last_modified, modified_of, parse_timestamp

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_SETTLED_SECONDS = 2.0
"""How old an object without an ETag must be to be read: Last-Modified counts whole seconds (RFC 9110 5.6.7), so that
one replaced within them has the same."""


@dataclass(frozen=True)
class Pin:
    """What is known of the version that is asked for; nothing, to take whichever is there now."""

    etag: str = ""
    modified: int | None = None
    """Last-Modified in seconds since the epoch."""
    size: int = 0
    version_id: str = ""

    @classmethod
    def of(cls, version: ObjectVersion) -> Pin:
        """Return what pins a version."""
        modified = modified_of(version.etag)
        if modified is not None:
            return cls("", modified or None, version.size, version.version_id)
        return cls(version.etag, int(version.modified) or None, version.size, version.version_id)

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request for this version."""
        if self.etag:
            return {"If-Match": self.etag}
        if self.modified is not None:
            return {"If-Unmodified-Since": format_datetime(self._moment, usegmt=True)}
        return {}

    @property
    def options(self) -> dict[str, Any]:
        """The same as keyword arguments of botocore, with the version id."""
        found: dict[str, Any] = {"VersionId": self.version_id} if self.version_id else {}
        if self.etag:
            found["IfMatch"] = self.etag
        elif self.modified is not None:
            found["IfUnmodifiedSince"] = self._moment
        return found

    @property
    def _moment(self) -> datetime:
        return datetime.fromtimestamp(self.modified or 0, UTC)

    def check_version(self, headers: Mapping[str, str], what: str) -> None:
        """Raise unless an answer (its headers, by their names in lower case) is of this version.

        Raises:
            VersionChangedError: It is of another one.
            RefusedError: It says nothing by which to tell.
            UnavailableError: It cannot be told yet: the object was written just now.
        """
        etag = headers.get("etag", "").strip('"')
        if self.etag and etag:
            if etag != self.etag.strip('"'):
                raise VersionChangedError(f"{what} was replaced while it was open", "open it again")
            return
        modified = last_modified(headers)
        if self.modified is None or not modified:
            missing = "ETag" if self.etag else "ETag and no Last-Modified"
            raise RefusedError(
                f"cannot read {what} safely: the server sends no {missing} with it",
                "it cannot be told from a version that replaces it; use a server that sends ETags",
            )
        if int(modified) != self.modified:
            raise VersionChangedError(f"{what} was replaced while it was open", "open it again")
        if 0 <= _clock(headers) - modified < _SETTLED_SECONDS:
            raise UnavailableError(
                f"{what} was written just now, and the server sends no ETag with it", "it can be read in two seconds"
            )

    def check_range(self, headers: Mapping[str, str], span: range, what: str, stream: Any) -> bool:
        """Raise unless an answer is of this version and of these bytes; its stream is closed then.

        Returns:
            Whether the answer says how long its body is. If not, the body's end has to be looked at.

        Raises:
            UnavailableError: It is of other bytes than were asked for.
            ObsfsError: As `check_version`.
        """
        try:
            self.check_version(headers, what)
            return self._is_framed(headers, span, what)
        except BaseException:
            stream.close()
            raise

    def _is_framed(self, headers: Mapping[str, str], span: range, what: str) -> bool:
        said = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        if said:
            first, last, total = (int(number) for number in said.groups())
            if total != self.size:
                raise VersionChangedError(f"{what} changed its size while it was open", "open it again")
            fits = (first, last + 1) == (span.start, span.stop)
        else:
            # A server that ignores Range sends everything: right only when everything was asked for.
            fits = (span.start, span.stop) == (0, self.size)
        length = headers.get("content-length")
        if not fits or length not in (None, str(len(span))):
            raise UnavailableError(f"the server sent another range of {what} than was asked for")
        return length is not None


def _clock(headers: Mapping[str, str]) -> float:
    """The server's own time; far in the future where it does not say."""
    try:
        return parse_timestamp(headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError, OverflowError):
        return float("inf")
