"""How commands speak to people, and hear them."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING

from pydantic import ByteSize

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_WIDE = 240


def make_console() -> Console:
    """Where tables go: as wide as the terminal, or, in a pipe or a file, so wide that no name is folded."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console


def make_table(*columns: str) -> Table:
    """A table without lines: what is described on the left, then these columns of figures."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2), show_edge=False)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def terminate_like_interrupt() -> None:
    """SIGTERM cleans up as Ctrl-C does, from now on."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def human(size: float) -> str:
    """A number of bytes for people: ``1.5 GiB``."""
    return re.sub(r"(?<=\d)(?=[A-Z])", " ", ByteSize(int(size)).human_readable())
