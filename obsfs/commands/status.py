"""``obsfs status``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from obsfs.commands.output import counted, human, make_console
from obsfs.errors import UsageError
from obsfs.fuse import mounts

_EPILOG = """\b
Examples:
  obsfs status
  obsfs status /mnt/models --json | jq .hit_ratio
"""


@click.command(epilog=_EPILOG)
@click.argument("mountpoint", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="For machines: one object for a mountpoint, else a list.")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Show what is mounted, what the cache holds, and what is being fetched."""
    found = [_shown(mount) for mount in mounts.find()]
    if mountpoint is not None:
        path = mounts.resolve(mountpoint)
        found = [mount for mount in found if mount["mountpoint"] == str(path)]
        if not found:
            raise UsageError(f"no obsfs is mounted on {path}", "see `obsfs status`")
    if as_json:
        click.echo(json.dumps(found[-1] if mountpoint is not None else found, indent=2))
    elif not found:
        click.echo("Nothing is mounted.")
    else:
        _print(found)


def _shown(mount: dict[str, Any] | mounts.Stale) -> dict[str, Any]:
    if isinstance(mount, mounts.Stale):
        state = "dead" if mount.dead else "not answering"
        return {"mountpoint": str(mount.mountpoint), "source": mount.source, "state": state}
    return {**mount, "state": "mounted"}


def _print(found: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = make_console()
    for mount in found:
        console.print(f"[bold]{escape(mount['mountpoint'])}[/]  {escape(mount['source'])}", highlight=False)
        if mount["state"] != "mounted":
            remedy = "mount it again, or `obsfs umount` it" if mount["state"] == "dead" else "obsfs umount --lazy"
            console.print(f"  {mount['state']}: {remedy}", style="red")
            continue
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", min_width=12)
        table.add_column(overflow="fold")
        for name, text in _rows(mount):
            table.add_row(f"  {name}", escape(text))
        console.print(table, highlight=False)


def _endpoint(site: dict[str, Any]) -> str:
    text = str(site["endpoint"])
    if site["latency"] is not None:
        text += f", {site['latency'] * 1000:.0f} ms"
    if site["failures"]:
        text += ", failing"
    return text + (f", lagged {site['lagging']} times" if site["lagging"] else "")


def _rows(mount: dict[str, Any]) -> list[tuple[str, str]]:
    ratio = mount["hit_ratio"]
    rows = [
        *(("endpoint", _endpoint(site)) for site in mount["endpoints"]),
        *([("snapshot", mount["snapshot"])] if mount["snapshot"] else []),
        (
            "served by",
            f"{mount['engine']} engine, "
            + ("passthrough for files wholly cached, else splice" if mount["passthrough"] else mount["data_path"])
            + f" (pid {mount['pid']})",
        ),
        (
            "read",
            f"{human(mount['bytes_read'])}" + ("" if ratio is None else f", {ratio:.1%} of blocks from the cache"),
        ),
        (
            "fetched",
            f"{human(mount['bytes_fetched'])} in {mount['requests']} requests, now {human(mount['throughput'])}/s "
            f"with {mount['requests_in_flight']} of {mount['connections']} connections in use",
        ),
        ("cache", f"{human(mount['cache_bytes'])} of {human(mount['cache_limit'])} in {mount['cache_dir']}"),
        ("memory", f"{human(mount['memory_bytes'])}"),
        ("files open", str(mount["open_files"])),
        *([("restarts", f"{mount['restarts']}: the server died, and another took over")] if mount["restarts"] else []),
        ("retries", f"{mount['retries']}, hedges {mount['hedges']}, errors {mount['errors']}"),
    ]
    if mount["last_error"]:
        rows.append(("last error", mount["last_error"]))
    if mount["hidden_keys"]:
        rows.append(("hidden keys", f"{mount['hidden_keys']} whose names no directory can show"))
    if mount.get("bad_entries"):
        rows.append(("bad entries", f"{mount['bad_entries']} that the server lists and nobody can read: left out"))
    if mount["corrupt_blocks"] or mount["cache_write_errors"]:
        rows.append(
            ("cache faults", f"{mount['corrupt_blocks']} corrupt blocks, {mount['cache_write_errors']} failed writes")
        )
    if mount.get("last_scrub") or mount.get("scrubbed_bytes"):
        last = mount["last_scrub"]
        when = f"last finished {time.strftime('%Y-%m-%d %H:%M', time.localtime(last))}" if last else "not finished yet"
        damage = f", {counted(mount['scrub_errors'], 'damaged block')} fetched again" if mount["scrub_errors"] else ""
        rows.append(("scrubbing", f"{when}, {human(mount['scrubbed_bytes'])} read by this server{damage}"))
    return rows
