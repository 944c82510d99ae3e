"""``obsfs umount``."""

from __future__ import annotations

from pathlib import Path

import click

from obsfs.cli.options import Command
from obsfs.service import mounts


@click.command(
    cls=Command,
    short_help="Unmount, and wait until its process has ended",
    epilog="Example: obsfs umount /mnt/models",
)
@click.argument("mountpoint", type=Path)
@click.option("--lazy", "-z", is_flag=True, help="Detach the mount now, even while files are open. They stay readable.")
def umount(mountpoint: Path, lazy: bool) -> None:
    """Unmount, and wait until the process of the mount has ended. The cache stays."""
    mounts.unmount(mounts.resolve_mountpoint(mountpoint), lazy=lazy)
