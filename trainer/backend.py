"""The program ``transformers`` without libraries' chatter: ``python -m trainer.backend serve ...`` or ``chat ...``."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Any

from trainer.quiet import hush


def main() -> Any:
    """Run the program that the package transformers installs by this name."""
    hush()
    (program,) = entry_points(group="console_scripts", name="transformers")
    sys.argv[0] = "transformers"
    return program.load()()


if __name__ == "__main__":
    sys.exit(main())
