"""The flags of :class:`~obsfs.settings.Settings`, made from its fields, so that each knob is written down once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from obsfs.cli.output import fold, human
from obsfs.errors import UsageError
from obsfs.settings import RENAMED, GivenValue, Knob, knobs
from obsfs.suggestions import did_you_mean
from obsfs.text import visible
from obsfs.values import parse_seconds, parse_size

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])

CACHE = ("cache_dir",)
BUCKET = ("endpoint_url", "region", "profile", "no_sign_request", "insecure_tls", "addressing_style", "md5_etags")
PUBLISH = (*BUCKET, "library", "connections")
LIBRARY = (*PUBLISH, *CACHE, "cache_size")
_SEVERAL = ("endpoint_url",)
_LEAST_TEXT = 30
"""Columns of text beside an option, below which it stands under it."""
_MOUNT_OPTIONS = frozenset(
    {"defaults", "ro", "rw", "dev", "nodev", "suid", "nosuid", "exec", "async", "auto", "noauto", "user", "nouser"}
    | {"users", "nofail", "_netdev", "atime", "noatime", "relatime", "norelatime", "nodiratime", "diratime"}
)
"""Options of mount(8) that every mount may be given and that change nothing here: a mount of ours is always read-only,
and opens no devices and honours no setuid bits, whatever it is told."""


class _Formatter(click.HelpFormatter):
    """Writes help for a terminal of any width: what does not fit beside an option stands below it, no word is broken.

    click itself breaks long words and at hyphens, and takes no terminal for narrower than 50 columns.
    """

    def __init__(self, width: int | None = None, max_width: int | None = None) -> None:
        columns = width or shutil.get_terminal_size().columns
        super().__init__(width=max(20, min(columns, max_width or columns) - 2), max_width=max_width)

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write names and texts, side by side where a line of the texts has room for some words."""
        rows = list(rows)
        fits = [len(name) for name, _ in rows if len(name) <= col_max]
        column = max(fits, default=0) + col_spacing
        start = " " * self.current_indent
        is_narrow = self.width - self.current_indent - column < _LEAST_TEXT
        column = 4 if is_narrow else column
        for name, text in rows:
            lines = fold(text, self.width - self.current_indent - column) if text else []
            is_beside = not is_narrow and len(name) + col_spacing <= column
            first = name + " " * (column - len(name)) + lines.pop(0) if is_beside and lines else name
            self.write(f"{start}{first.rstrip()}\n")
            for line in lines:
                self.write(f"{start}{' ' * column}{line}\n")


class Context(click.Context):
    """What a verb is called with."""

    formatter_class = _Formatter


class Command(click.Command):
    """A verb whose help shows settings under the headings of their groups, and that takes no empty words."""

    context_class = Context

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse what a variable of the shell that is not set leaves, before it becomes the working directory."""
        if not ctx.resilient_parsing:
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
            for parameter in self.get_params(ctx):
                _check_words(ctx, parameter, given.get(parameter.name or ""))
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verb's own options first, then each group of settings."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for option in self.get_params(ctx):
            if (record := option.get_help_record(ctx)) is not None and record[1]:
                knob = knobs().get(option.name or "")
                groups.setdefault(knob.group if knob else "Options", []).append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _check_words(ctx: click.Context, parameter: click.Parameter, given: object) -> None:
    """Refuse an empty word by its name, and a URL where a path is wanted."""
    words = given if isinstance(given, list | tuple) else (given,)
    if parameter.type is click.UNPROCESSED:
        words = words[:1]  # the others are another program's
    is_option = isinstance(parameter, click.Option)
    name = max(parameter.opts, key=len) if is_option else (parameter.metavar or parameter.opts[0].upper())
    for word in words:
        if not isinstance(word, str):
            continue
        if not word.strip():
            raise click.UsageError(f"{name} is empty: give it a value{', or leave it out' if is_option else ''}", ctx)
        is_path = parameter.type.name in ("Path", "path", "file", "directory")
        if is_path and "://" in word:
            raise click.UsageError(
                f"'{visible(word)}' is a URL, and {name} is a path on this machine{_order(ctx)}", ctx
            )


def _order(ctx: click.Context) -> str:
    """In which order to write the arguments of a verb that takes a URL, too."""
    words = [piece for piece in ctx.command.collect_usage_pieces(ctx) if piece != "[OPTIONS]"]
    return f": write {' '.join([ctx.command_path, *words])}" if any("://" in word for word in words) else ""


def settings_options(*names: str) -> Callable[[_Decorated], _Decorated]:
    """A decorator that adds the flags of these settings (by default all); none given means None."""

    def decorate(function: _Decorated) -> _Decorated:
        chosen = names or tuple(knobs())
        for name in reversed(chosen):
            function = _option(knobs()[name])(function)
        for old, name in RENAMED.items():
            if name in chosen:
                function = click.option(f"--{old.replace('_', '-')}", old, hidden=True)(function)
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


def parse_mount_options(text: str) -> dict[str, GivenValue]:
    """Return the settings in the options of mount(8): ``NAME=VALUE``, or ``NAME`` for a switch that is turned on.

    Options that concern mount(8) alone, such as ``_netdev``, are accepted; a name may be written with hyphens. A
    setting given more than once that takes several values has them all.

    Args:
        text: Options separated by commas, as in the fourth column of ``/etc/fstab``.

    Raises:
        UsageError: An option is neither a setting nor one of mount(8).
    """
    found: dict[str, GivenValue] = {}
    for option in filter(None, (part.strip() for part in text.split(","))):
        written, is_given, value = option.partition("=")
        name = written.replace("-", "_")
        if written in _MOUNT_OPTIONS or written.startswith(("x-", "X-")):
            continue
        knob = knobs().get(RENAMED.get(name, name))
        is_off = knob is None and name.startswith("no_") and not is_given
        if is_off:
            knob = knobs().get(name[3:])
        if knob is None:
            hint = did_you_mean(name, [*knobs(), *_MOUNT_OPTIONS]) or "see `obsfs mount --help`"
            raise UsageError(f"-o {written}: there is no such option", hint)
        if is_off or not is_given:
            if knob.type is not bool:
                raise UsageError(f"-o {written} needs a value", f"write {written}={knob.metavar}")
            found[knob.name] = GivenValue(f"-o {written}=", not is_off)
        elif knob.name in _SEVERAL:
            before = found[knob.name].value if knob.name in found else []
            found[knob.name] = GivenValue(f"-o {written}=", [*before, value])
        else:
            found[name if name in RENAMED else knob.name] = GivenValue(f"-o {written}=", value)
    return found
