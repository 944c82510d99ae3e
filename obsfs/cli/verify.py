"""``obsfs verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from obsfs.cli import places
from obsfs.cli.options import LIBRARY, Command, settings_options
from obsfs.cli.output import counted, human, progress, tell, tell_json
from obsfs.errors import UsageError
from obsfs.library.names import MANIFEST, is_url, parse_model
from obsfs.service import mounts
from obsfs.settings import Settings

_EPILOG = """\b
Examples:
  obsfs verify obs://models/Qwen2-7B-Instruct@v2 --region cn-south-1
  obsfs verify obs://models/Qwen2-7B-Instruct@v2 --in cache
  obsfs verify /mnt/models/Qwen2-7B-Instruct@v2
  obsfs verify ./qwen --json
"""


@click.command(cls=Command, short_help="Check a model against its manifest", epilog=_EPILOG)
@click.argument("target", metavar="PATH_OR_URL")
@click.option(
    "--in",
    "where",
    type=click.Choice(["bucket", "cache"]),
    help="What to read: the bucket, or the local cache. Default: bucket for a URL, cache for a path on a mount.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options(*LIBRARY)
def verify(target: str, *, where: str | None, as_json: bool, **given: Any) -> None:
    """Hash the files of a model and compare them with its manifest. The exit status is 1 if a file differs.

    PATH_OR_URL is a model in a bucket (of several endpoints, the first is read), a path on a mount, or a directory that
    `obsfs pull` made.
    """
    from obsfs.library import verify as verifying
    from obsfs.library.model_directory import read_manifest

    path = Path(target)
    if not is_url(target) and mounts.on_mount(path) is None and path.is_dir() and (path / MANIFEST).is_file():
        manifest = read_manifest(path)
        with progress(f"verifying {path}", manifest.size, quiet=as_json) as advance:
            result = verifying.in_directory(path, manifest, advance)
        return _tell(target, "the directory", result, as_json)
    url, settings = places.locate(target, given)
    chosen = where or ("bucket" if is_url(target) or not path.exists() else "cache")
    return _verify_model(url, settings, chosen, as_json)


def _verify_model(url: str, settings: Settings, where: str, as_json: bool) -> None:
    from obsfs.cache.directory import Cache
    from obsfs.library import catalog
    from obsfs.library import verify as verifying
    from obsfs.store import open_store

    name = parse_model(url, settings.library)
    bucket = open_store(name.address, settings.at_first_endpoint())
    model = catalog.resolve(bucket, name)
    if not model.etag:
        raise UsageError(f"{model.name} has no manifest", "it was not published by obsfs push")
    with progress(f"verifying {model.name.label}", model.manifest.size, quiet=as_json) as advance:
        if where == "bucket":
            result = verifying.in_bucket(bucket, model, advance)
        else:
            cache = Cache.of(settings)
            result = verifying.in_cache(cache, model, bucket.endpoint, advance)
    _tell(str(model.name), f"the {where}", result, as_json)


def _unseen(result: Any) -> str:
    """Return what was not checked since it is not cached."""
    if not result.absent:
        return ""
    parts = [counted(result.absent_files, "file")] if result.absent_files else []
    parts += [f"parts of {counted(result.partial_files, 'file')}"] if result.partial_files else []
    return f"; not cached, and so not checked: {' and '.join(parts)} ({human(result.absent)})"


def _tell(what: str, where: str, result: Any, as_json: bool) -> None:
    if as_json:
        document = {
            "target": what,
            "where": where.removeprefix("the "),
            "files": result.files,
            "bytes": result.size,
            "unknown": result.unknown,
            "files_not_cached": result.absent_files,
            "files_partly_cached": result.partial_files,
            "bytes_not_cached": result.absent,
            "differences": [one._asdict() for one in result.differences],
        }
        tell_json(document)
    else:
        for one in result.differences:
            tell(f"{one.path}: {one.reason}")
        wrong = len(result.differences)
        verdict = f"{wrong} of them differ" if wrong else "all as in the manifest"
        if not result.files and not result.differences:
            verdict = "nothing to compare"
        tell(f"{what}, in {where}: {counted(result.files, 'file')}, {human(result.size)}: {verdict}{_unseen(result)}")
    if result.differences:
        click.get_current_context().exit(1)
