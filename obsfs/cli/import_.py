"""``obsfs import``."""

from __future__ import annotations

import json
from typing import Any

import click

from obsfs.cli.options import PUBLISH, Command, settings_options
from obsfs.cli.output import counted, human, progress, spinner, tell, tell_json
from obsfs.service import mounts
from obsfs.settings import Settings

_SHOWN = 10
_EPILOG = """\b
Examples:
  obsfs import hf:Qwen/Qwen2-7B-Instruct obs://models/Qwen2-7B-Instruct@v1
  OBSFS_LIBRARY=obs://models obsfs import ms:qwen/Qwen2-7B-Instruct@master
"""


@click.command("import", cls=Command, short_help="Publish a repository of Hugging Face or ModelScope", epilog=_EPILOG)
@click.argument("repository", metavar="hf:ORG/NAME|ms:ORG/NAME")
@click.argument("name", required=False, metavar="obs://BUCKET/NAME[@VERSION]")
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Only files whose path matches PATTERN, such as *.json. Repeatable.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Skip files whose path matches PATTERN. Repeatable.")
@click.option("--no-check", is_flag=True, help="Do not check whether the model is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@settings_options(*PUBLISH)
def import_(
    repository: str,
    name: str | None,
    *,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    no_check: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Publish a repository of Hugging Face (hf:) or ModelScope (ms:). Files do not touch the local disk.

    Without a name, the model gets the repository's name in --library. Files are verified against the hub's hashes. A
    file that is truncated, damaged or missing on the hub gives a warning, and is published as it is. Needs the extra
    `hub`.
    """
    from obsfs.library import hub
    from obsfs.library.names import parse_model
    from obsfs.library.push import publish
    from obsfs.store import open_store

    settings = Settings.load(**given)
    wanted = hub.parse_hub_name(repository)
    model = parse_model(name or wanted.repository.rpartition("/")[2], settings.library)
    open_store(model.address, settings)  # so that missing keys are told before the hub is asked
    with spinner(f"looking at {wanted}", quiet=as_json):
        found = hub.open_repository(wanted).chosen(include, exclude)
        details = found.details()
        problems = [] if no_check else found.problems()
    for problem in problems[:_SHOWN]:
        tell(f"obsfs: warning: {problem}", err=True)
    if len(problems) > _SHOWN:
        tell(f"obsfs: warning: {len(problems) - _SHOWN} more files are damaged or missing", err=True)
    with progress(f"importing {wanted}", sum(file.size for file in found.files), quiet=as_json) as advance:
        manifest, sent = publish(
            model, found.files, details, settings, origin=f"{wanted}@{found.revision}", advance=advance
        )
    mounts.refresh(str(model))
    if as_json:
        tell_json({**json.loads(manifest.to_json()), "bytes_sent": sent, "url": str(model)})
    else:
        tell(f"published {model}: {counted(len(manifest.files), 'file')}, {human(manifest.size)}")
