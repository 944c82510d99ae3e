"""The flags of :class:`~obsfs.settings.Settings`, made from its fields, so that each knob is written down once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import ByteSize, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from obsfs.errors import UsageError
from obsfs.settings import UMASK, Settings, parse_seconds

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

CACHE = ("cache_dir",)
BUCKET = ("endpoint_url", "region", "profile", "no_sign_request", "insecure_tls", "addressing_style", "md5_etags")
PUBLISH = (*BUCKET, "library", "connections")
LIBRARY = (*PUBLISH, *CACHE, "cache_size")
_SEVERAL = ("endpoint_url",)
_NUMBERS = ("connections", "uid", "gid")


def settings_options(*names: str) -> Callable[[_Decorated], _Decorated]:
    """A decorator that adds the flags of these settings (by default all); none given means None."""

    def decorate(function: _Decorated) -> _Decorated:
        for name in reversed(names or tuple(Settings.model_fields)):
            function = _option(name, Settings.model_fields[name])(function)
        return function

    return decorate


def _option(name: str, field: FieldInfo) -> Callable[[_Decorated], _Decorated]:
    flag = f"--{name.replace('_', '-')}"
    text = field.description or ""
    default = field.get_default(call_default_factory=True)  # type: ignore[call-arg, unused-ignore]
    if default not in (None, False):
        text += f"  [default: {_shown(field.annotation, default)}]"
    if field.annotation is bool:
        switch = f"{flag}/--no-{flag[2:]}" if default else flag
        return click.option(switch, name, is_flag=True, default=None, help=text)
    if get_origin(field.annotation) is Literal:
        return click.option(flag, name, type=click.Choice(get_args(field.annotation)), help=text)
    if name in _SEVERAL:
        return click.option(flag, name, metavar="URL", multiple=True, callback=lambda _, __, v: v or None, help=text)
    if field.annotation is ByteSize:
        metavar = "SIZE"
    elif isinstance(default, float):
        metavar = "TIME"
    elif name == "umask":
        metavar = "OCTAL"
    else:
        metavar = "N" if name in _NUMBERS else name.rsplit("_", 1)[-1].upper()
    return click.option(flag, name, metavar=metavar, help=text)


def _shown(annotation: object, default: Any) -> str:
    if annotation is ByteSize:
        return ByteSize(default).human_readable(separator="")
    if annotation is bool:
        return "on"
    if isinstance(default, float):
        return f"{default:g}s"
    return f"{default:03o}" if default == UMASK else str(default)


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
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise UsageError(f"{flag} {value}", "write for example 500MB or 1GiB") from None
