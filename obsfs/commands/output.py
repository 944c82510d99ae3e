"""How commands speak to people."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from pydantic import ByteSize

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 240


def make_console() -> Console:
    """Where tables go: as wide as the terminal, or, in a pipe or a file, so wide that no name is folded."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDE
    return console


def human(size: float) -> str:
    """A number of bytes for people: ``1.5 GiB``."""
    return re.sub(r"(?<=\d)(?=[A-Z])", " ", ByteSize(int(size)).human_readable())
