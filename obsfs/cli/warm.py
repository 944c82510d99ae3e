"""``obsfs warm`` and ``obsfs unpin``."""

from __future__ import annotations

from typing import Any

import click

from obsfs.cli import places
from obsfs.cli.options import CACHE, LIBRARY, Command, byte_size, settings_options
from obsfs.cli.output import counted, human, progress, tell, tell_json
from obsfs.errors import UsageError
from obsfs.settings import Settings
from obsfs.store.address import parse_address

_EPILOG = """\b
Examples:
  obsfs warm obs://models/Qwen2-7B-Instruct --pin --region cn-south-1
  obsfs warm /mnt/models/Qwen2-7B-Instruct --max-bytes 2GiB
  obsfs warm obs://models/Qwen2-72B --record tp4-rank0  # once it is loaded
  obsfs warm obs://models/Qwen2-72B --for tp4-rank0     # elsewhere
"""


@click.command(cls=Command, short_help="Download into the cache what a load will need", epilog=_EPILOG)
@click.argument("targets", metavar="PATH_OR_URL...", nargs=-1, required=True)
@click.option("--for", "recorded", metavar="PROFILE", help="Only the blocks in this recorded profile of the model.")
@click.option(
    "--record",
    metavar="PROFILE",
    help="Download nothing. Record which blocks are cached now as a profile, in the bucket.",
)
@click.option("--max-bytes", metavar="SIZE", help="Most bytes of each target.")
@click.option("--pin", is_flag=True, help="Keep them: eviction and `obsfs cache clean` skip pinned objects.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings_options(*LIBRARY)
def warm(
    targets: tuple[str, ...],
    *,
    recorded: str | None,
    record: str | None,
    max_bytes: str | None,
    pin: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Download into the cache what a load will need.

    Each target is a model, a file or a prefix in a bucket, or a path on a mount.
    """
    most = byte_size("--max-bytes", max_bytes) if max_bytes else None
    if record and (recorded or pin or max_bytes):
        raise UsageError("--record goes with no other option", "record first, then warm --for it")
    done = []
    for target in targets:
        url, settings = places.locate(target, given)
        if record:
            done.append(_record(url, settings, record))
        else:
            done.append(_warm(url, settings, profile=recorded, most=most, pin=pin, quiet=as_json))
    if as_json:
        tell_json(done)
        return
    for one in done:
        if record:
            tell(f"{one['url']}: profile {record} has {human(one['bytes'])}")
        else:
            pinned = ", pinned" if pin else ""
            tell(f"{one['url']}: {human(one['bytes'])} cached, {human(one['bytes_fetched'])} fetched{pinned}")


def _warm(
    url: str, settings: Settings, *, profile: str | None, most: int | None, pin: bool, quiet: bool
) -> dict[str, Any]:
    from obsfs.fetch.engine import Engine
    from obsfs.library import catalog
    from obsfs.library import warm as warming
    from obsfs.library.names import parse_model
    from obsfs.store import open_store

    address = parse_address(url)
    bucket = open_store(address, settings)
    if profile:
        model = catalog.resolve(bucket, parse_model(url, settings.library))
        wanted = warming.read_profile(bucket, model, profile)
    else:
        wanted = [warming.whole(version) for version in warming.versions_at(bucket, address)]
    if most is not None:
        wanted = warming.at_most(wanted, most)
    size = sum(one.size for one in wanted)
    engine = Engine(bucket, settings, seals=False)
    try:
        if size > (limit := engine.cache.limit):
            raise UsageError(
                f"{url} needs {human(size)} of a cache of {human(limit)}",
                f"{engine.cache.how_to_enlarge}; or give --max-bytes",
            )
        if pin:
            for one in wanted:
                engine.cache.pins.add(one.version)
        with progress(f"warming {url}", size, quiet=quiet) as advance:
            warming.warm(engine, wanted, advance)
    finally:
        engine.close()
    return {"url": url, "bytes": size, "bytes_fetched": engine.fetcher.stats.bytes_fetched, "pinned": pin}


def _record(url: str, settings: Settings, profile: str) -> dict[str, Any]:
    from obsfs.cache.directory import Cache
    from obsfs.library import catalog
    from obsfs.library import warm as warming
    from obsfs.library.names import parse_model
    from obsfs.store import open_store

    name = parse_model(url, settings.library)
    bucket = open_store(name.address, settings)
    cache = Cache.of(settings)
    size = warming.record_profile(bucket, cache, catalog.resolve(bucket, name), profile)
    return {"url": url, "profile": profile, "bytes": size}


@click.command(
    cls=Command,
    short_help="Undo `obsfs warm --pin`",
    epilog="\b\nExamples:\n  obsfs unpin obs://models/Qwen2-7B-Instruct\n  obsfs unpin --all\n",
)
@click.argument("targets", metavar="PATH_OR_URL...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Unpin all objects.")
@settings_options("library", *CACHE)
def unpin(targets: tuple[str, ...], *, everything: bool, **given: Any) -> None:
    """Let objects be evicted again that `obsfs warm --pin` has pinned."""
    from obsfs.cache.directory import Cache

    if bool(targets) == everything:
        raise UsageError("what should be unpinned?", "give PATH_OR_URL, or --all")
    settings = Settings.load(**given)
    is_meant = places.covering([places.locate(target, given)[0] for target in targets])
    found = Cache.of(settings).pins.remove(lambda version: everything or is_meant(version))
    tell(f"{counted(found, 'object')} unpinned in {settings.cache_dir}")
