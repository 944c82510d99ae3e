"""The program ``transformers`` without libraries' chatter: ``python -m trainer.backend serve ...`` or ``chat ...``."""

from __future__ import annotations

import builtins
import os
import sys
from importlib.metadata import entry_points
from typing import Any

from trainer.quiet import silence_libraries

_read_line = builtins.input


def _input(prompt: object = "") -> str:
    """Read a line as ``input`` does. Ctrl-D raises KeyboardInterrupt, by which a chat ends as if asked to."""
    try:
        return _read_line(prompt)
    except EOFError:
        raise KeyboardInterrupt from None


def main() -> Any:
    """Run the program that the package transformers installs by this name."""
    silence_libraries()
    os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"  # it asks PyPI, and tells the user to upgrade
    builtins.input = _input
    (program,) = entry_points(group="console_scripts", name="transformers")
    sys.argv[0] = "transformers"
    return program.load()()


if __name__ == "__main__":
    sys.exit(main())
