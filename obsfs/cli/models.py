"""``obsfs models``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from obsfs.cli import Group
from obsfs.cli.options import LIBRARY, settings_options
from obsfs.cli.output import columns, count, facts, human, spinner, tell, tell_json, terminal_width
from obsfs.errors import UsageError
from obsfs.settings import Settings

if TYPE_CHECKING:
    from obsfs.library import catalog

_NO_MANIFEST = "no manifest"
_EPILOG = """\b
Examples:
  obsfs models obs://models --region cn-south-1
  OBSFS_LIBRARY=obs://models obsfs models --json | jq '.models[].name'
  obsfs models show obs://models/Qwen2-7B-Instruct
"""


class _Models(Group):
    """A group in which ``obsfs models LIBRARY`` means ``obsfs models list LIBRARY``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else "-"
        if "://" in first or (first.startswith("-") and first not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Models, short_help="List the models of a library, or show one", epilog=_EPILOG)
def models() -> None:
    """List the models of a library: `obsfs models [obs://BUCKET/PREFIX]`. Show one: `obsfs models show NAME`."""


@models.command("list", short_help="List the models of a library", epilog=_EPILOG)
@click.argument("library", required=False, metavar="[obs://BUCKET/PREFIX]")
@click.option("--fresh", is_flag=True, help="Ask the bucket, even if it was asked within --metadata-ttl.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options(*(name for name in LIBRARY if name != "library"), "metadata_ttl")
def list_(library: str | None, *, fresh: bool, as_json: bool, **given: Any) -> None:
    """List models with their versions, state, architecture, parameters, dtype, size, and how much is cached here.

    The state is "published", "no manifest", "damaged" (the manifest is invalid) or "not readable". The facts come from
    the manifest, or from the configuration and the headers of the weights of a model without one.
    """
    from obsfs.library import catalog_cache
    from obsfs.store.address import parse_address

    settings = Settings.load(**given)
    chosen = library or settings.library
    if not chosen:
        raise UsageError("no library is given", "write obs://BUCKET/PREFIX, or set OBSFS_LIBRARY")
    parse_address(chosen)
    document = None if fresh else catalog_cache.load(settings, chosen)
    if document is None:
        with spinner(f"looking at {chosen}", quiet=as_json):
            document = _list_models(chosen, settings)
        catalog_cache.save(settings, chosen, document)
    for model in document["models"]:  # an older version has cached no state
        model.setdefault("state", "published" if model["published"] else _NO_MANIFEST)
    _add_cached(document, settings)
    for problem in document["problems"]:
        tell(f"obsfs: {problem}", err=True)
    if as_json:
        for model in document["models"]:
            del model["files"]
        tell_json(document)
    else:
        _print(chosen, document)


def _list_models(library: str, settings: Settings) -> dict[str, Any]:
    from obsfs.access.safetensors import natural_sort_key
    from obsfs.errors import NotFoundError
    from obsfs.library import catalog
    from obsfs.store import open_store
    from obsfs.store.address import parse_address

    address = parse_address(library)
    bucket = open_store(address, settings)
    page = bucket.check()
    if address.prefix and page.is_last and not (page.objects or page.prefixes):
        raise NotFoundError(f"there is nothing in {address}", catalog.nearest_directory(bucket, address))
    found, damaged = catalog.list_models(bucket, address)
    documents = [_document(model, address.prefix) for model in found]
    documents += [_damaged(one, address.prefix) for one in damaged]
    return {
        "library": str(address),
        "endpoint": bucket.endpoint,
        "models": sorted(documents, key=lambda document: natural_sort_key(document["url"])),
        "problems": [str(one.error) for one in damaged],
    }


def _document(model: Any, prefix: str) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "name": f"{model.name.library}{model.name.name}"[len(prefix) :],
        "version": model.name.version,
        "url": str(model.name),
        "published": bool(model.etag),
        "state": "published" if model.etag else _NO_MANIFEST,
        "architecture": manifest.model.architecture,
        "parameters": manifest.model.parameters,
        "dtype": manifest.model.dtype,
        "size": manifest.size,
        "created": manifest.created.isoformat(),
        "author": manifest.author,
        "source": manifest.source,
        "revision": manifest.revision,
        "content": manifest.content,
        "files": [[f"{model.name.prefix}{file.path}", file.etag, file.size] for file in manifest.files],
    }


def _damaged(found: catalog.UnreadableModel, prefix: str) -> dict[str, Any]:
    """Return the same for a model that cannot be read."""
    name = found.name
    state = "damaged" if isinstance(found.error, UsageError) else "not readable"
    unknown = dict.fromkeys(("architecture", "dtype", "created", "author", "source", "revision", "content"), "")
    return {
        "name": f"{name.library}{name.name}"[len(prefix) :],
        "version": name.version,
        "url": str(name),
        "published": False,
        "state": state,
        "error": str(found.error),
        **unknown,
        "parameters": 0,
        "size": 0,
        "files": [],
    }


def _add_cached(document: dict[str, Any], settings: Settings) -> None:
    if not settings.cache_dir.is_dir():
        for model in document["models"]:
            model["cached"] = 0
        return
    from obsfs.cache.directory import cached_sizes

    bucket = document["library"].partition("://")[2].partition("/")[0]
    sizes = cached_sizes(settings.cache_dir, document["endpoint"], bucket)
    for model in document["models"]:
        model["cached"] = sum(sizes.get((key, etag, size), 0) for key, etag, size in model["files"])


def _print(library: str, document: dict[str, Any]) -> None:
    if not document["models"]:
        tell(f"0 models in {library}: obsfs push makes one")
        return
    by_name: dict[str, list[dict[str, Any]]] = {}
    for model in document["models"]:
        by_name.setdefault(model["name"], []).append(model)
    rows = []
    for name, versions in by_name.items():
        versions.sort(key=lambda model: (model["created"], not model["version"]))
        newest = versions[-1]  # that can be read, if there is one: the others have no date
        rows.append(
            (
                name,
                ", ".join(model["version"] or "-" for model in versions),
                _state(versions),
                newest["architecture"],
                count(newest["parameters"]) if newest["parameters"] else "",
                newest["dtype"],
                human(newest["size"]) if newest["files"] else "",
                _share(newest["cached"], newest["size"]),
            )
        )
    titles = ("model", "versions", "state", "architecture", ">parameters", "dtype", ">size", ">cached")
    tell(*columns(titles, rows, terminal_width()))
    tell(f"{len(by_name)} model{'' if len(by_name) == 1 else 's'} in {library}")


def _state(versions: list[dict[str, Any]]) -> str:
    """Return the state of the newest version, and of each version that cannot be read."""
    if len(versions) == 1:
        return str(versions[0]["state"])
    good = [model["state"] for model in versions if "error" not in model]
    bad = [f"{model['version'] or '-'} {model['state']}" for model in versions if "error" in model]
    return ", ".join([*good[-1:], *bad])


def _share(part: int, whole: int) -> str:
    if not part:
        return ""
    return f"{human(part)}" if part < whole else "all"


@models.command(epilog="Example: obsfs models show obs://models/Qwen2-7B-Instruct --json")
@click.argument("name", metavar="NAME|obs://BUCKET/NAME[@VERSION]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options(*LIBRARY)
def show(name: str, *, as_json: bool, **given: Any) -> None:
    """Show one model: its manifest, its versions and its files."""
    from obsfs.library import catalog
    from obsfs.library.names import parse_model
    from obsfs.store import open_store

    settings = Settings.load(**given)
    wanted = parse_model(name, settings.library)
    bucket = open_store(wanted.address, settings)
    with spinner(f"looking at {wanted.label}", quiet=as_json):
        model = catalog.resolve(bucket, wanted)
        versions = [one.name.version for one in catalog.all_versions(bucket, wanted)]
    document = {**_document(model, model.name.library), "versions": versions, "endpoint": bucket.endpoint}
    document["library"] = f"{wanted.scheme}://{wanted.bucket}/{wanted.library}".rstrip("/")
    wrapped = {**document, "models": [document]}
    _add_cached(wrapped, settings)
    document["files"] = [
        {"path": file.path, "size": file.size, "etag": file.etag, "sha256": file.sha256}
        for file in model.manifest.files
    ]
    if as_json:
        tell_json(document)
        return
    _print_one(document)


def _print_one(document: dict[str, Any]) -> None:
    known = {
        "url": document["url"],
        "versions": ", ".join(document["versions"]),
        "architecture": document["architecture"],
        "parameters": count(document["parameters"]) if document["parameters"] else "",
        "dtype": document["dtype"],
        "size": human(document["size"]),
        "cached": human(document["cached"]),
        "published": f"{document['created']} by {document['author']}"
        if document["published"]
        else f"no: {_NO_MANIFEST}",
        "source": f"{document['source']} {document['revision']}".strip(),
        "content": document["content"],
    }
    tell(*facts([(title, text) for title, text in known.items() if text], terminal_width()))
    rows = [(file["path"], human(file["size"]), file["sha256"][:16]) for file in document["files"]]
    tell("", *columns(("file", ">size", "sha256"), rows, terminal_width()))
