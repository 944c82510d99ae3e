"""``obsfs pull``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from obsfs.cli.options import LIBRARY, Command, settings_options
from obsfs.cli.output import counted, human, progress, tell, tell_json, tell_path
from obsfs.errors import UsageError
from obsfs.settings import Settings

_EPILOG = """\b
Examples:
  obsfs pull obs://models/Qwen2-7B-Instruct --region cn-south-1
  obsfs pull obs://models/Qwen2-7B-Instruct@v2 ./qwen --include '*.json'
  obsfs pull obs://models/Qwen2-7B --to-hf-cache --as Qwen/Qwen2-7B
  MODEL=$(OBSFS_LIBRARY=obs://models obsfs pull Qwen2-7B-Instruct)
"""


@click.command(cls=Command, short_help="Download a model, verified, and print its directory", epilog=_EPILOG)
@click.argument("name", metavar="obs://BUCKET/NAME[@VERSION]")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Only files whose path matches PATTERN, such as *.json. Repeatable.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Skip files whose path matches PATTERN. Repeatable.")
@click.option(
    "--to-hf-cache", is_flag=True, help="Into Hugging Face's cache, where from_pretrained finds it by its name."
)
@click.option("--to-modelscope-cache", is_flag=True, help="Into ModelScope's cache.")
@click.option(
    "--as",
    "repository",
    metavar="ORG/NAME",
    help="Name of the model in those caches. Default: its path in the library.",
)
@click.option("--force", is_flag=True, help="Replace local files that have other content.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options(*LIBRARY)
def pull(
    name: str,
    directory: Path | None,
    *,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    to_hf_cache: bool,
    to_modelscope_cache: bool,
    repository: str | None,
    force: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Download a model, verify it, and print its directory.

    Without DIRECTORY it goes into the cache directory. Large files there are hard links to the block cache and take no
    extra space: do not change them. Pull into a DIRECTORY what you want to change. Cached blocks are not fetched again.
    A NAME without a version means the model in NAME/, or else its newest version.
    """
    from obsfs.library import download, hub_cache
    from obsfs.library.names import parse_model
    from obsfs.library.pull import Pull

    settings = Settings.load(**given)
    pulling = Pull(parse_model(name, settings.library), settings)
    files = pulling.files(include, exclude)
    if not files:
        raise UsageError(f"no file of {pulling.model.name} is left", "see its files by `obsfs models show`")
    if repository and not (to_hf_cache or to_modelscope_cache):
        raise UsageError("--as names a repository in a hub's cache", "add --to-hf-cache or --to-modelscope-cache")
    hubs = [
        hub for hub, on in ((hub_cache.HUGGING_FACE, to_hf_cache), (hub_cache.MODEL_SCOPE, to_modelscope_cache)) if on
    ]
    size = sum(file.size for file in files) * (len(hubs) + (directory is not None or not hubs))
    with progress(f"pulling {pulling.model.name.label}", size, quiet=as_json) as advance:
        done = download.pull(
            pulling,
            settings,
            directory=directory,
            hubs=hubs,
            repository=repository,
            files=files,
            force=force,
            advance=advance,
        )
    model = pulling.model
    if as_json:
        document = {
            "url": str(model.name),
            "directories": [str(one.directory) for one in done],
            "bytes": sum(file.size for file in files),
            "bytes_fetched": sum(one.fetched for one in done),
            "verified": all(file.sha256 for file in files),
            "content": model.manifest.content,
        }
        tell_json(document)
        return
    fetched = sum(one.fetched for one in done)
    how = (
        ""
        if all(file.sha256 for file in files)
        else "; it has no manifest, so only the bucket's own checksums were verified"
    )
    tell(f"{model.name}: {counted(len(files), 'file')}, {human(fetched)} fetched{how}", err=True)
    for one in done:
        tell_path(one.directory)
