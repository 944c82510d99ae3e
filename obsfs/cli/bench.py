"""``obsfs bench``."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import click

from obsfs.cli.options import BUCKET, Command, byte_size, settings_options
from obsfs.cli.output import (
    columns,
    human,
    tell,
    tell_heading,
    tell_json,
    terminal_width,
)
from obsfs.settings import Settings
from obsfs.version import __version__

_EPILOG = """\b
Examples:
  obsfs bench obs://models/Qwen2-7B-Instruct --region cn-south-1
  obsfs bench /mnt/models --file Qwen2-7B/model-00001-of-00004.safetensors
  obsfs bench obs://models --size 4GiB --connections 32 --report models.png
  obsfs bench /data/models --no-report --json | jq .figures
"""
_SETTINGS = (*BUCKET, "cache_dir", "connections")


@click.command(cls=Command, short_help="Measure a bucket or a mount, cold and warm", epilog=_EPILOG)
@click.argument("target", metavar="MOUNTPOINT|obs://BUCKET[/PREFIX]")
@click.option(
    "--file", metavar="PATH", help="File to read, relative to the target. Default: the largest that is found."
)
@click.option("--size", metavar="SIZE", default="1GiB", show_default=True, help="Most bytes of it to read.")
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("obsfs-bench.html"),
    show_default=True,
    help="Report to write (.html or .png), with a .json of the figures beside it.",
)
@click.option("--no-report", is_flag=True, help="Write no files.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options(*_SETTINGS)
def bench(
    target: str, *, file: str | None, size: str, report: Path, no_report: bool, as_json: bool, **given: Any
) -> None:
    """Measure reading, listing and stat, cold (from the bucket) and warm (from the SSD).

    A bucket, or the bucket of a MOUNTPOINT, is mounted anew for each case, with an empty cache of its own on the same
    disk. Your mount and your cache are not used. Any other directory is read as it is: then cold means that the file
    was dropped from the page cache, and warm that it is in it.
    """
    from obsfs.bench import measure
    from obsfs.bench import report as reports

    settings = Settings.load(**given)
    most = max(byte_size("--size", size), 1 << 20)
    if not no_report:
        reports.require(report)
    place = measure.place_of(target, settings)
    try:
        sample, figures = _run(place, file, most)
    finally:
        place.close()
    facts = {
        "target": place.name,
        "file": str(sample.path),
        "file_bytes": sample.size,
        "names": len(sample.names),
        "obsfs": __version__,
        "kernel": platform.release(),
        "cores": os.cpu_count() or 0,
    }
    if as_json:
        tell_json(reports.document(facts, figures))
    else:
        _print(place.name, f"{sample.path} ({human(sample.size)})", figures)
    if not no_report:
        reports.write(report, f"obsfs bench {place.name}", facts, figures)
        tell(f"written: {report}, {report.with_suffix('.json')}", err=True)


def _run(place: Any, file: str | None, most: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from obsfs.bench import measure

    parts = (TextColumn("{task.description:34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(measure.CASES) + 1, completed=-1)

        def on_step(title: str) -> None:
            progress.update(task, description=title, advance=1)

        return measure.run(place, file=file, most=most, on_step=on_step)


def _print(name: str, file: str, figures: Any) -> None:
    from obsfs.bench.report import number

    width = terminal_width()
    tell_heading(name, file, width)
    rows = [(one.title, f"{number(one.cold)} {one.unit}", f"{number(one.warm)} {one.unit}") for one in figures]
    tell(*columns(("", ">cold", ">warm"), rows, width))
