"""``obsfs cache info``, ``obsfs cache verify`` and ``obsfs cache clean``."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import click

from obsfs.cache.directory import Cache
from obsfs.cache.layout import CacheEntry
from obsfs.cli import Group, places
from obsfs.cli.options import CACHE, age, settings_options
from obsfs.cli.output import (
    columns,
    counted,
    human,
    progress,
    tell,
    tell_json,
    terminal_width,
)
from obsfs.errors import UsageError
from obsfs.settings import Settings
from obsfs.suggestions import did_you_mean


@click.group(
    cls=Group, epilog="\b\nExamples:\n  obsfs cache info\n  obsfs cache verify\n  obsfs cache clean --older-than 7d\n"
)
def cache() -> None:
    """Inspect, verify and clean the block cache."""


@cache.command(epilog="Example: obsfs cache info --json")
@settings_options(*CACHE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool, **given: Any) -> None:
    """List the cached objects, the least recently used last."""
    store = _open(given)
    entries = sorted(store.entries(), key=lambda entry: -entry.last_used)
    if as_json:
        tell_json(_document(store, entries))
        return
    rows = [
        (
            f"obs://{entry.version.bucket}/{entry.version.key}",
            human(entry.cached_bytes),
            human(entry.version.size),
            _ago(max(0.0, time.time() - entry.last_used)),
        )
        for entry in entries
    ]
    tell(store.directory)
    if rows:
        tell(*columns(("object", ">cached", ">of", ">last used"), rows, terminal_width()))
    tell(f"{human(sum(entry.cached_bytes for entry in entries))} in {counted(len(entries), 'object')}")


def _document(store: Cache, entries: list[CacheEntry]) -> dict[str, Any]:
    return {
        "cache_dir": str(store.directory),
        "cache_bytes": sum(entry.cached_bytes for entry in entries),
        "objects": [
            {
                "endpoint": entry.version.endpoint,
                "bucket": entry.version.bucket,
                "key": entry.version.key,
                "etag": entry.version.etag,
                "size": entry.version.size,
                "cached_bytes": entry.cached_bytes,
                "last_used": entry.last_used,
            }
            for entry in entries
        ],
    }


@cache.command(epilog="Example: obsfs cache verify && echo all is well")
@settings_options(*CACHE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(as_json: bool, **given: Any) -> None:
    """Read every cached block and compare it with its checksum.

    Damaged blocks are removed and fetched again when they are read; the exit status is 1 then. Mounts can stay in use.
    """
    store = _open(given)
    entries = list(store.entries())
    size = sum(entry.cached_bytes for entry in entries)
    damaged: dict[str, int] = {}
    with progress("verifying", size, quiet=as_json) as advance:
        for entry in entries:
            with closing(store.open(entry.version)) as found:
                if count := found.check(advance):
                    name = f"obs://{entry.version.bucket}/{entry.version.key}"
                    damaged[name] = damaged.get(name, 0) + count
    if as_json:
        document = {
            "cache_dir": str(store.directory),
            "bytes": size,
            "objects": len(entries),
            "damaged_blocks": damaged,
        }
        tell_json(document)
    else:
        for name, count in damaged.items():
            tell(f"{name}: damaged blocks: {count}; they will be fetched again")
        verdict = f"damaged: {counted(sum(damaged.values()), 'block')}" if damaged else "all is well"
        tell(f"{human(size)} in {counted(len(entries), 'object')}: {verdict}")
    if damaged:
        click.get_current_context().exit(1)


@cache.command(
    short_help="Remove blocks from the cache",
    epilog="\b\nExamples:\n  obsfs cache clean --older-than 7d\n"
    "  obsfs cache clean obs://models/Qwen2-7B-Instruct\n  obsfs cache clean /mnt/models/Qwen2-7B-Instruct\n",
)
@click.argument("path", metavar="[PATH_OR_URL]", required=False)
@click.option("--older-than", metavar="TIME", help="Only objects that were not used for this long, for example 7d.")
@settings_options("library", *CACHE)
def clean(path: str | None, older_than: str | None, **given: Any) -> None:
    """Remove blocks from the cache: all, or those below a URL, a path on a mount, or of a model of the library.

    Open files stay readable. A file that the kernel reads itself keeps its blocks until it is closed. Pinned objects
    stay: see `obsfs unpin`.
    """
    url, settings = places.locate(path, given) if path else ("", Settings.load(**given))
    store = _cache_of(settings)
    is_meant = places.covering([url]) if path else None
    if is_meant and not any(is_meant(entry.version) for entry in store.entries()):
        cached = {f"obs://{entry.version.bucket}/{entry.version.key.rpartition('/')[0]}" for entry in store.entries()}
        hint = did_you_mean(url.replace("s3://", "obs://", 1), cached) or "see `obsfs cache info`"
        tell(f"nothing of {url} is cached in {store.directory}: {hint}")
        return
    freed = store.clean(older_than=age(older_than), selects=is_meant)
    pinned = store.pins.size()
    kept = f"; pins stay ({human(pinned)}, see `obsfs unpin`)" if pinned else ""
    tell(f"{human(freed)} freed in {store.directory}{kept}")


def _open(given: dict[str, Any]) -> Cache:
    return _cache_of(Settings.load(**given))


def _cache_of(settings: Settings) -> Cache:
    if not settings.cache_dir.is_dir():
        raise UsageError(f"there is no cache at {settings.cache_dir}", "choose --cache-dir")
    return Cache.of(settings)


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "now"
