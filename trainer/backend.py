"""Run the ``transformers`` program with less output: ``python -m trainer.backend serve ...`` or ``chat ...``."""

from __future__ import annotations

import builtins
import os
import sys
from importlib.metadata import entry_points
from typing import Any

from trainer.quiet import silence_libraries

_read_line = builtins.input


def _input(prompt: object = "") -> str:
    """Read a line as ``input`` does, but end the chat on Ctrl-D: raise KeyboardInterrupt."""
    try:
        return _read_line(prompt)
    except EOFError:
        raise KeyboardInterrupt from None


def main() -> Any:
    """Run the console script that transformers installs."""
    silence_libraries()
    os.environ["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"  # the check asks PyPI, and tells the user to upgrade
    builtins.input = _input
    (program,) = entry_points(group="console_scripts", name="transformers")
    sys.argv[0] = "transformers"
    return program.load()()


if __name__ == "__main__":
    sys.exit(main())
