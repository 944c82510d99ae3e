"""Which known name a mistyped one may stand for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LEAST_PART = 3
"""Letters of a name that may stand for a longer one that contains it."""
_LONG_NAME = 8
"""Letters from which on two of them may be wrong."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'NAME'?`` for the known name that `name` is a typo, or a part, of; empty if there is none.

    Two words that are merely alike, such as ``revision`` and ``region``, mean two things.
    """
    names = list(known)
    for written in (name.replace("-", "_"), name):  # in a file or variable, a hyphen is often written for an underscore
        close = difflib.get_close_matches(written, [one for one in names if _is_typo(written, one)], 1, 0)
        if close:
            return f"did you mean {close[0]!r}?"
    return ""


def _is_typo(written: str, meant: str) -> bool:
    """Return whether one name contains the other, or they differ by one letter (two, from eight letters on)."""
    if min(len(written), len(meant)) >= _LEAST_PART and (written in meant or meant in written):
        return True
    most = 1 if len(written) < _LONG_NAME else 2
    return abs(len(written) - len(meant)) <= most and _edits(written, meant) <= most


def _edits(one: str, other: str) -> int:
    """Return the Damerau-Levenshtein distance: letters to add, remove or replace, and neighbours to swap."""
    above, last = list[int](), list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        line = [row]
        for column, beside in enumerate(other, 1):
            cost = min(last[column] + 1, line[-1] + 1, last[column - 1] + (letter != beside))
            if row > 1 < column and letter == other[column - 2] and one[row - 2] == beside:
                cost = min(cost, above[column - 2] + 1)
            line.append(cost)
        above, last = last, line
    return last[-1]
