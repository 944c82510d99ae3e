"""Read JSON without losing anything: refuse a key that is given twice, where Python takes the last. Pure."""

from __future__ import annotations

import json
from typing import Any

from obsfs.plugin import visible


class NotJson(ValueError):
    """What is wrong with a text, and on which line, counted from 1."""

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(reason)
        self.line = line


def decoded(text: str) -> Any:
    """Return the value of a JSON text. Raises NotJson."""
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} at character {error.pos + 1}", error.lineno) from None
    except RecursionError:
        raise NotJson("nested too deeply") from None
    except ValueError as error:  # a number with too many digits, or a key that is given twice
        raise NotJson(str(error)) from None


def decoded_at(text: str, start: int) -> tuple[Any, int]:
    """Return the value that starts at an offset of a text, and the offset where it ends. Raises NotJson."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise NotJson(error.msg, error.lineno) from None
    except RecursionError:
        raise NotJson("nested too deeply", _line(text, start)) from None
    except ValueError as error:
        raise NotJson(str(error), _line(text, start)) from None


def _line(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{visible(twice)!r} is given twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
