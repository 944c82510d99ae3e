"""The flags of :class:`~obsfs.settings.Settings`, made from its fields, so that each knob is written down once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from obsfs.commands.output import human
from obsfs.errors import UsageError
from obsfs.settings import Knob, knobs, parse_seconds, parse_size

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

CACHE = ("cache_dir",)
BUCKET = ("endpoint_url", "region", "profile", "no_sign_request", "insecure_tls", "addressing_style", "md5_etags")
PUBLISH = (*BUCKET, "library", "connections")
LIBRARY = (*PUBLISH, *CACHE, "cache_size")
_SEVERAL = ("endpoint_url",)


def settings_options(*names: str) -> Callable[[_Decorated], _Decorated]:
    """A decorator that adds the flags of these settings (by default all); none given means None."""

    def decorate(function: _Decorated) -> _Decorated:
        for name in reversed(names or tuple(knobs())):
            function = _option(knobs()[name])(function)
        return function

    return decorate


def _option(knob: Knob) -> Callable[[_Decorated], _Decorated]:
    text = knob.text
    if knob.default not in (None, False):
        text += f"  [default: {_shown(knob)}]"
    if knob.type is bool:
        switch = f"{knob.flag}/--no-{knob.flag[2:]}" if knob.default else knob.flag
        return click.option(switch, knob.name, is_flag=True, default=None, help=text)
    if knob.choices:
        return click.option(knob.flag, knob.name, type=click.Choice(knob.choices), help=text)
    if knob.name in _SEVERAL:
        return click.option(
            knob.flag, knob.name, metavar="URL", multiple=True, callback=lambda _, __, v: v or None, help=text
        )
    return click.option(knob.flag, knob.name, metavar=knob.metavar, help=text)


def _shown(knob: Knob) -> str:
    if knob.metavar == "SIZE":
        return human(knob.default).replace(" ", "")
    if knob.metavar == "OCTAL":
        return f"{knob.default:03o}"
    if isinstance(knob.default, bool):
        return "on"
    return f"{knob.default:g}s" if isinstance(knob.default, float) else str(knob.default)


def age(value: str | None) -> float:
    """``--older-than``: seconds. Raises UsageError for what is no time."""
    if value is None:
        return 0.0
    try:
        return parse_seconds(value)
    except ValueError as error:
        raise UsageError("--older-than", str(error)) from None


def byte_size(flag: str, value: str) -> int:
    """Bytes from text such as ``500MB`` or ``1GiB``. Raises UsageError for what is no size."""
    try:
        return parse_size(value)
    except ValueError as error:
        raise UsageError(f"{flag} {value}", str(error)) from None
