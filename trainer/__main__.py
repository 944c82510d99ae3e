"""Run ``obsfs train`` under a launcher: ``torchrun -m trainer CONFIG.yaml``, ``accelerate launch -m trainer ...``."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Nothing is imported from the working directory, which ``python -m`` puts first, unless obsfs lies there.
    if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH120
        del sys.path[0]

    from obsfs.plugin import main

    sys.exit(main(["train", *sys.argv[1:]]))
