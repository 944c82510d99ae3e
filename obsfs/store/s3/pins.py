"""Hold each answer to one version of an object: by its ETag, or by its Last-Modified if it has none.

The request names the version (``If-Match``, ``If-Unmodified-Since``), and the answer is compared all the same, because
some servers ignore conditions. An answer with nothing to compare is refused, so that versions are never mixed.
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
"""How old an object without an ETag must be to be read: Last-Modified counts whole seconds (RFC 9110 5.6.7), so an
object that is replaced within one keeps it."""


@dataclass(frozen=True)
class Pin:
    """What is known of the version to read; nothing, to read whichever is there now."""

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
        options: dict[str, Any] = {"VersionId": self.version_id} if self.version_id else {}
        if self.etag:
            options["IfMatch"] = self.etag
        elif self.modified is not None:
            options["IfUnmodifiedSince"] = self._moment
        return options

    @property
    def _moment(self) -> datetime:
        return datetime.fromtimestamp(self.modified or 0, UTC)

    def check_version(self, headers: Mapping[str, str], what: str) -> None:
        """Raise unless an answer is of this version.

        Args:
            headers: Of the answer; names in lower case.
            what: The object, as an error names it.

        Raises:
            VersionChangedError: It is of another version.
            RefusedError: It has nothing to compare.
            UnavailableError: The object was written just now, and its time does not tell versions apart yet.
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
        """Raise, and close the stream, unless an answer is of this version and of these bytes.

        Returns:
            Whether the answer says how long its body is. If not, the reader must check where the body ends.

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
    """Return the server's own time; infinity if it sends none."""
    try:
        return parse_timestamp(headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError, OverflowError):
        return float("inf")
