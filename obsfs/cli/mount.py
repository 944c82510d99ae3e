"""``obsfs mount``."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Any

import click

from obsfs.cli.options import Command, parse_mount_options, settings_options
from obsfs.cli.output import spinner, tell
from obsfs.service import mounts
from obsfs.settings import Settings

_EPILOG = """\b
Examples:
  obsfs mount obs://models /mnt/models --region cn-south-1
  obsfs mount obs://models/Qwen /mnt/qwen --endpoint-url https://minio:9000
  obsfs mount s3://models /mnt/models --cache-dir /ssd --cache-size 500GiB
  obsfs mount obs://public /mnt/public --no-sign-request --foreground
  obsfs mount obs://models /mnt/models -o region=cn-south-1,allow_other

Credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HUAWEICLOUD_SDK_AK and _SK, OBSFS_ACCESS_KEY_ID
and OBSFS_SECRET_ACCESS_KEY, a profile, or an instance's role. Every flag can also be set as OBSFS_NAME in the
environment (OBSFS_CACHE_SIZE=500GiB) or as a key in ~/.config/obsfs/config.toml (cache_size = "500GiB").
"""


@click.command(cls=Command, short_help="Mount a bucket, or a prefix of it, on a directory", epilog=_EPILOG)
@click.argument("source", metavar="obs://BUCKET[/PREFIX]")
@click.argument("mountpoint", type=Path)
@click.option(
    "--foreground", "-f", is_flag=True, help="Stay in the foreground and log to the terminal. Ctrl-C unmounts."
)
@click.option(
    "-o",
    "mount_options",
    metavar="OPTION[,OPTION...]",
    multiple=True,
    help="Settings as in /etc/fstab: cache_size=500GiB,allow_other. A flag takes precedence.",
)
@settings_options()
def mount(source: str, mountpoint: Path, foreground: bool, mount_options: tuple[str, ...], **given: Any) -> None:
    """Mount a bucket, or a prefix of it, read-only on an empty directory.

    The command returns when the mount is ready. `obsfs umount` ends it.
    """
    in_options = parse_mount_options(",".join(mount_options))
    settings = Settings.load(**{**in_options, **{name: value for name, value in given.items() if value is not None}})
    path = mounts.resolve_mountpoint(mountpoint)
    if foreground:
        _serve_here(source, path, settings)
    else:
        with spinner(f"mounting {source} on {path}"):
            mounts.start(source, path, settings, lifeline=False)


def _serve_here(source: str, path: Path, settings: Settings) -> None:
    from obsfs.service import daemon
    from obsfs.service.serving import serve
    from obsfs.service.stop import Stop

    mounts.prepare(path, settings)
    daemon.log_to(logging.StreamHandler(), settings.log_level)
    # Until it has mounted, a signal ends the command at once. nohup(1) lets it outlive its terminal.
    is_hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    stop = Stop() if is_hangup_ignored else Stop(signal.SIGHUP)

    def on_ready() -> None:
        tell(f"{source} is mounted on {path}; Ctrl-C unmounts", err=True)

    try:
        serve(source, path, settings, on_ready, stop)
    finally:
        stop.ignore_signals()
