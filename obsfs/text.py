"""Text from outside (a bucket, a server, another program) made safe to show to a person. Pure."""

from __future__ import annotations

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
