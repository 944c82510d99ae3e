"""How commands speak to people, and hear them.

stdout has the result, and nothing else: what the verb was asked for, whether a table, a verdict, or what it did. With
``--json`` that is one document. Where a program takes the result on, as of ``MODEL=$(obsfs pull NAME)``, it is a path
alone. stderr has all the rest: progress, remarks, warnings and errors. A verb that runs until it is ended, such as
``obsfs serve``, has no result, and says on stderr that it is ready.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import click

from obsfs.text import to_json, visible

_UNIT = r"(?:(?:[KMGTP]i)?B|m?s)\b"
_MAX_LINE = 4000
"""Characters of a line."""


def tell(*lines: object, err: bool = False) -> None:
    """Print lines, each by `visible`: names, codes and messages from outside do no more than be read.

    Commands, also those of other packages, print by this, by `tell_json`, by `tell_path`, or by rich with
    `escape_markup`, and ask by `ask` and `confirm`: by nothing else.
    """
    for line in lines:
        with suppress(OSError) if err else nullcontext():  # there is nobody else to tell
            click.echo(visible(line, _MAX_LINE), err=err)


def open_streams() -> None:
    """Open stdin, stdout and stderr on nothing where they are closed, so that no file of ours becomes one of them."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free: this one
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def drop_output() -> None:
    """Drop what stdout has not taken, when it takes nothing more, so that the process ends without a word on it."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def tell_json(document: object, *, indent: int | None = 1) -> None:
    """Print a document as JSON (`obsfs.text.to_json`); with an `indent` of None on one line."""
    click.echo(to_json(document, indent=indent))


def tell_path(path: str | os.PathLike[str]) -> None:
    """Print a path or a URL: to a program exactly, to a terminal as `tell` does."""
    if sys.stdout.isatty():
        tell(path)
    else:
        click.echo(os.fsencode(path))


def ask(question: str, *, default: Any = None, type: Any = None) -> Any:
    """Ask for a line on the terminal, until it fits the click type `type`. Return it; `default` for an empty one."""
    shown = visible(question) if default is None else f"{visible(question)} [{visible(default)}]"
    return click.prompt(shown, default=default, type=type, show_default=False)


def confirm(question: str, *, default: bool = False, abort: bool = False) -> bool:
    """Ask a question of yes or no. With `abort`, raise click.Abort for a no."""
    return click.confirm(visible(question), default=default, abort=abort)


def tolerate_any_text() -> None:
    """Have stdout and stderr show a character that their encoding does not have as an escape, as `visible` does."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def counted(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM and the end of the terminal clean up as Ctrl-C does; a second one does not cut it short."""
    ends = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup(1) sets it
        ends.append(signal.SIGHUP)

    def interrupt(*_: object) -> None:
        for number in ends:
            signal.signal(number, ignore)  # unlike SIG_IGN, no child inherits it
        raise KeyboardInterrupt

    def ignore(*_: object) -> None:
        """Do nothing."""

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interrupt) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) in (interrupt, ignore):
                signal.signal(number, handler)


def human(size: float) -> str:
    """A number of bytes for people: ``1.5 GiB``."""
    for unit, power in (("PiB", 5), ("TiB", 4), ("GiB", 3), ("MiB", 2), ("KiB", 1)):
        if size >= 1024**power:
            return f"{size / 1024**power:.1f} {unit}"
    return f"{size:.0f} B"


def terminal_width() -> int | None:
    """Return the columns of the terminal that stdout is, or of COLUMNS; None where a line may be of any length."""
    if "COLUMNS" in os.environ or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def columns(titles: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> Iterator[str]:
    """Lines of a table, the columns aligned: those of figures, whose titles begin with ``>``, to the right.

    A table that is wider than `width` becomes a paragraph for each row: its first cell, then a line for each other
    cell that is not empty, with its title. No word is broken, so that a name can be copied whole.

    For long tables: a thousand rows take rich half a second, and this a hundredth.
    """
    lines = list(_aligned(titles, rows))
    if width is None or all(_width(line) <= width for line in lines):
        yield from lines
        return
    names = [title.lstrip(">") for title in titles]
    room = max(map(_width, names[1:]), default=0)
    for row in rows:
        yield visible(row[0], _MAX_LINE)
        for name, cell in zip(names[1:], row[1:], strict=True):
            if cell:
                yield from _beside(f"  {name}{' ' * (room - _width(name))}  ", cell, width)


def facts(rows: Sequence[tuple[str, str]], width: int | None = None, *, least: int = 0) -> Iterator[str]:
    """Lines of names and what is said of each, which is folded between words where it is wider than `width`.

    `least` are the columns of the widest name of other rows that these stand below or above.
    """
    room = max([least, *(_width(name) for name, _ in rows)])
    for name, text in rows:
        yield from _beside(f"  {name}{' ' * (room - _width(name))}  ", text, width)


def _beside(start: str, text: str, width: int | None) -> Iterator[str]:
    """Lines of a text that begins beside its name, or below it where a word of it would not fit beside."""
    lines = fold(text, width and max(1, width - _width(start)))
    if width is not None and any(_width(start) + _width(line) > width for line in lines):
        yield start.rstrip()
        start = "    "
        lines = fold(text, max(1, width - len(start)))
    for line in lines:
        yield f"{start}{line}".rstrip()
        start = " " * _width(start)


def fold(text: str, width: int | None = None) -> list[str]:
    """Lines of at most `width` columns, but for words that are longer: no word is broken, so that it can be copied.

    A number and its unit are one word.
    """
    lines = [""]
    for word in re.split(rf" (?!{_UNIT})", visible(text, _MAX_LINE)):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and width is not None and _width(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [line.rstrip(" ") for line in lines]


def tell_heading(name: str, rest: str, width: int | None = None) -> None:
    """Print a name, bold on a terminal, and what belongs to it: on the next line where both do not fit on one."""
    shown, after = visible(name, _MAX_LINE), visible(rest, _MAX_LINE)
    between = "\n" if width is not None and _width(f"{shown}  {after}") > width else "  "
    click.echo(f"{click.style(shown, bold=True)}{between}{after}")


def _aligned(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    marks = [title.startswith(">") for title in titles]
    lines = [[title.lstrip(">") for title in titles], *([visible(text, _MAX_LINE) for text in row] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = []
        for text, width, is_figure in zip(line, widths, marks, strict=True):
            space = " " * (width - _width(text))
            cells.append(space + text if is_figure else text + space)
        yield "  ".join(cells).rstrip()


def _width(text: str) -> int:
    """In cells of a terminal, of which Chinese characters take two."""
    return len(text) if text.isascii() else sum(1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


@contextmanager
def progress(title: str, total: int, *, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on the terminal's stderr; yields what to tell of each piece done, from any thread.

    Nothing is shown where stderr is no terminal, or when `quiet`.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda size: None
        return
    columns = (
        # On a narrow terminal the title and the bar give way, so that nothing wraps.
        TextColumn("{task.description}", table_column=Column(ratio=2, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(escape_markup(title), total=total)
        yield lambda size: bar.advance(task, size)


def escape_markup(text: str) -> str:
    """Text, from wherever it comes, that rich and the terminal show as it is, on one line."""
    from rich.markup import escape

    return escape(visible(text))


@contextmanager
def spinner(title: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A sign of life on the terminal's stderr, for what has no length; yields what changes its text."""
    from rich.console import Console

    console = Console(file=sys.stderr)  # this one, also while what libraries write there is kept back
    if quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status(escape_markup(title)) as status:
        yield lambda text: status.update(escape_markup(text))


def count(number: float) -> str:
    """A large number for people: ``7.6B``."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
