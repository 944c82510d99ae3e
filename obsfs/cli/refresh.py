"""``obsfs refresh``."""

from __future__ import annotations

import click

from obsfs.cli.options import Command
from obsfs.cli.output import tell
from obsfs.service import mounts

_EPILOG = """\b
Examples:
  obsfs refresh /mnt/models
  obsfs refresh /mnt/models/Qwen2-7B-tuned
  obsfs refresh obs://models/Qwen2-7B-tuned    # on all mounts here
"""


@click.command(cls=Command, short_help="Make a mount show changes in the bucket at once", epilog=_EPILOG)
@click.argument("places", metavar="PATH_OR_URL...", nargs=-1, required=True)
def refresh(places: tuple[str, ...]) -> None:
    """Make mounts show changes in the bucket at once, without waiting for --metadata-ttl.

    Open files keep the version that was opened. `push`, `import` and `train` refresh the mounts of their machine
    themselves.
    """
    for place in places:
        found = mounts.refresh(place)
        if not found:
            raise mounts.explain_no_refresh(place)
        for path in found:
            tell(f"{path}: asks the bucket again")
