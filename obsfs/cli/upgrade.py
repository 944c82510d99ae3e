"""``obsfs upgrade``."""

from __future__ import annotations

from pathlib import Path

import click

from obsfs.cli.options import Command
from obsfs.cli.output import tell
from obsfs.service import mounts


@click.command(
    cls=Command,
    short_help="Serve a mount with the installed version",
    epilog="Example: pip install --upgrade . && obsfs upgrade /mnt/models",
)
@click.argument("mountpoint", type=Path)
def upgrade(mountpoint: Path) -> None:
    """Serve a mount with the version of obsfs that is installed now, without unmounting it.

    Readers wait for about a second, then continue.
    """
    path = mounts.resolve_mountpoint(mountpoint)
    before, after = mounts.replace_server(path)
    tell(f"{path}: obsfs {before['version']} (pid {before['pid']}) -> {after['version']} (pid {after['pid']})")
