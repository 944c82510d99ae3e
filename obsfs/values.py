"""How the value of a setting is written: sizes, times, switches, paths; and what it becomes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, NamedTuple

from msgspec import Meta

MIB = 1 << 20
MAX_SIZE = 1 << 60
"""Bytes, 1 EiB: more than any disk or object has, and few enough for every system call (off_t)."""
MAX_SECONDS = 3650.0 * 86400
"""Ten years; Python waits for 292 years at most (2^63 ns)."""
_MAX_ID = (1 << 32) - 2
"""The greatest uid or gid: 2^32 - 1 means none (chown(2))."""
_TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PREFIXES = "kmgtpe"
_SIZE_UNITS = {f"{letter.upper()}iB": 1024**power for power, letter in reversed(list(enumerate(_PREFIXES, 1)))}
_TIME_UNITS = {unit: _TIMES[unit] for unit in ("d", "h", "m", "s")}
_SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def parse_seconds(value: object) -> float:
    """Return seconds from a number or from text such as ``90``, ``500ms``, ``5m``, ``2h`` or ``7d``.

    Raises:
        ValueError: It is something else, negative, or more than ten years.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|[smhdw]?)\s*", str(value))
    if match is None:
        raise ValueError(f"{str(value)!r} is not a time; write for example 90, 500ms, 5m, 2h or 7d")
    seconds = float(match[1]) * _TIMES[match[2]]
    if seconds > MAX_SECONDS:
        raise ValueError(f"it must be at most {_shown_bound(MAX_SECONDS, 'TIME')}")
    return seconds


def parse_size(value: object) -> int:
    """Return bytes from a number or from text such as ``500MB`` (powers of 1000) or ``1GiB`` (powers of 1024).

    Raises:
        ValueError: It is something else, negative, or more than 1 EiB.
    """
    match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*(?:([{_PREFIXES}])(i?))?b?\s*", str(value).lower())
    if match is None:
        raise ValueError(f"{str(value)!r} is not a size; write for example 500MB or 1GiB")
    power = _PREFIXES.index(match[2]) + 1 if match[2] else 0
    size = int(Decimal(match[1]) * (1024 if match[3] else 1000) ** power)
    if size > MAX_SIZE:
        raise ValueError(f"it must be at most {_shown_bound(MAX_SIZE, 'SIZE')}")
    return size


def _shown_bound(number: float, metavar: str) -> str:
    """Return a bound in the largest unit that divides it: ``16MiB``, ``1d``."""
    units = {"SIZE": _SIZE_UNITS, "TIME": _TIME_UNITS}.get(metavar, {})
    unit, size = next(((unit, size) for unit, size in units.items() if number and number % size == 0), ("", 1))
    return f"{number / size:.0f}{unit}" if unit else f"{number:g}" if number % 1 else f"{number:.0f}"


def _octal(value: object) -> object:
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"0?o?[0-7]{1,3}", value) is None:
        raise ValueError(f"{value!r} is not an octal mask; write for example 022")
    return int(value, 8)


def _expand(value: object) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("it must be text")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError:
        raise ValueError("there is no such user") from None


def _joined(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _library(value: object) -> object:
    if isinstance(value, str) and re.match(r"\w+://\S", value) is None:
        raise ValueError("write obs://BUCKET or obs://BUCKET/PREFIX")
    return value


def unchanged(value: object) -> object:
    return value


def _size_or_auto(value: object) -> object:
    return None if value is None or str(value).strip().lower() == "auto" else parse_size(value)


def _switch(value: object) -> object:
    if isinstance(value, str) and value.lower() not in _SWITCHES:
        raise ValueError(f"{value!r} is neither on nor off")
    return _SWITCHES[value.lower()] if isinstance(value, str) else value


class Kind(NamedTuple):
    """How values of a type are read from text, and what ``--help`` calls them."""

    read: Callable[[object], object]
    metavar: str | None = None


Several = Annotated[str | None, Kind(_joined)]
"""Text; several are separated by commas."""
Number = Annotated[int, Kind(unchanged, "N")]
Size = Annotated[int, Kind(parse_size, "SIZE")]
OptionalSize = Annotated[Annotated[int, Meta(ge=0)] | None, Kind(_size_or_auto, "SIZE")]
"""Bytes. None, also written ``auto``, leaves the choice to the part that uses it."""
CacheSize = Annotated[Annotated[int, Meta(ge=16 * MIB)] | None, Kind(_size_or_auto, "SIZE")]
Seconds = Annotated[float, Kind(parse_seconds, "TIME")]
Octal = Annotated[int, Kind(_octal, "OCTAL"), Meta(ge=0, le=0o777)]
Owner = Annotated[Annotated[int, Meta(ge=0, le=_MAX_ID)] | None, Kind(unchanged, "N")]
LocalPath = Annotated[Path, Kind(_expand)]
Library = Annotated[str | None, Kind(_library)]
Switch = Annotated[bool, Kind(_switch)]


def reason_of(said: str, metavar: str) -> str:
    """Return what msgspec says of a value, in words for people."""
    said = said.replace("`", "")
    if bound := re.fullmatch(r"Expected (?:int|float) (>=|>|<=) ([0-9.]+)", said):
        words = {">=": "at least", ">": "more than", "<=": "at most"}
        return f"it must be {words[bound[1]]} {_shown_bound(float(bound[2]), metavar)}"
    if kind := re.fullmatch(r"Expected (\w+)(?: \| null)?, got (\w+)", said):
        names = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}
        return f"it must be {names.get(kind[1], kind[1])}"
    return said
