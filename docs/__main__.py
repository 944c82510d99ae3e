"""``python -m docs``: build the pages into ``build/site``, and fail on any warning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run ``mkdocs build --strict``, with further arguments of the command line. Return its exit status."""
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # the theme's advertisement of its successor is not about our pages
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
