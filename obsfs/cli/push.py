"""``obsfs push``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from obsfs.cli.options import PUBLISH, Command, settings_options
from obsfs.cli.output import counted, human, progress, tell, tell_json
from obsfs.errors import UsageError
from obsfs.service import mounts
from obsfs.settings import Settings

_EPILOG = """\b
Examples:
  obsfs push ./Qwen2-7B-tuned obs://models/Qwen2-7B-tuned@v1
  OBSFS_LIBRARY=obs://models obsfs push ./Qwen2-7B-tuned Qwen2-7B-tuned@v2
  obsfs push ./notes obs://models/notes --any

NAME@VERSION never changes once it is published. NAME without a version is replaced in place.
"""


@click.command(cls=Command, short_help="Publish a directory as a model, whole or not at all", epilog=_EPILOG)
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("name", metavar="obs://BUCKET/NAME[@VERSION]")
@click.option("--any", "any_files", is_flag=True, help="Push any directory, even if it is not a model.")
@click.option("--no-check", is_flag=True, help="Push even if files are damaged or missing.")
@click.option("--source", metavar="TEXT", help="Origin of the model, for the manifest. Default: the directory's name.")
@click.option(
    "--revision", metavar="TEXT", help="Revision of the model, for the manifest. Default: the commit, if it is in git."
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest.")
@settings_options(*PUBLISH)
def push(
    directory: Path,
    name: str,
    *,
    any_files: bool,
    no_check: bool,
    source: str | None,
    revision: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Publish a model: upload the files of DIRECTORY in parallel, then a manifest of their hashes.

    Before anything is sent, obsfs checks configurations, indexes and the headers of the weights. A model with a file
    that is truncated, damaged or missing is refused.

    A version exists whole or not at all. Files that this or another version of the name has are not sent again. An
    interrupted push resumes when you run it again on the same machine.
    """
    from obsfs.library import push as pushing
    from obsfs.library.names import parse_model

    settings = Settings.load(**given)
    if not directory.exists() and Path(name).is_dir():
        raise UsageError(
            f"there is no directory {directory}, and {name} is one", f"write obsfs push {name} {directory}"
        )
    model = parse_model(name, settings.library)
    files = pushing.find_files(directory, any_files=any_files)
    with progress(f"pushing {model.label}", sum(file.size for file in files), quiet=as_json) as advance:
        manifest, sent = pushing.push(
            directory,
            model,
            settings,
            files=files,
            source=source or "",
            revision=revision or "",
            check=not no_check,
            advance=advance,
        )
    mounts.refresh(str(model))
    if as_json:
        tell_json({**json.loads(manifest.to_json()), "bytes_sent": sent, "url": str(model)})
    else:
        had = f", {human(manifest.size - sent)} of them were there already" if sent < manifest.size else ""
        tell(f"published {model}: {counted(len(manifest.files), 'file')}, {human(manifest.size)}{had}")
