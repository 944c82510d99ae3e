"""Text from outside (a bucket, a server, another program) made safe to show to a person. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

MAX_SHOWN = 1000
"""Characters of one text from outside that are shown; a server may send an error code of any length."""


def visible(text: object, limit: int = MAX_SHOWN) -> str:
    r"""Return `text` with every character that a terminal would act on, or not show, as an escape such as ``\x1b``.

    This is the only way for names, error codes, ETags and other text from a bucket to reach a terminal or a log.
    ``str.isprintable`` decides: control characters (C0, C1), line and paragraph separators, changes of the writing
    direction and lone surrogates are escaped. Text longer than `limit` characters ends in an ellipsis.
    """
    raw = str(text)
    if len(raw) > limit:
        raw = raw[: limit - 1] + "…"
    if raw.isprintable():
        return raw
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in raw)


def is_utf8(text: str) -> bool:
    """Return whether text has no lone surrogates, by which Python keeps the bytes of a name that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_json(document: object, *, indent: int | None = None) -> str:
    r"""Return a document as JSON that every reader takes: I-JSON (RFC 7493), in ASCII.

    A lone surrogate (a byte of a name that is not UTF-8) is shown as `visible` does, as the characters ``\udcff``; a
    number that is not finite is null.
    """
    return json.dumps(_plain(document), indent=indent, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
