"""``torchrun -m trainer CONFIG.yaml`` and ``accelerate launch -m trainer CONFIG.yaml``: what `obsfs train` does."""

from __future__ import annotations

import sys

from obsfs.commands import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
