"""``obsfs status``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from obsfs.cli.options import Command
from obsfs.cli.output import counted, facts, human, tell, tell_heading, tell_json, terminal_width
from obsfs.errors import UsageError
from obsfs.service import mounts, state

_EPILOG = """\b
Examples:
  obsfs status
  obsfs status /mnt/models --json | jq .hit_ratio
"""
_NAMES = 10
"""Columns of most names, so that all mounts are aligned."""
_LOST = {"dead": "mount it again, or `obsfs umount` it", "not answering": "see its log, or `obsfs umount --lazy` it"}
"""The states of a mount that nobody can read, and what to do."""
_NO_TAKEOVER = "none now: the supervisor was killed, and another cannot be started ({}); tried again every 30 s"


@click.command(cls=Command, short_help="Show mounts, cache and transfers", epilog=_EPILOG)
@click.argument("mountpoint", required=False, type=Path)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for one mountpoint, else a list.")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Show mounts, their caches and their transfers.

    The exit status is 1 if a mount is dead or does not answer. Mounts of other users are listed without details.
    """
    path = None if mountpoint is None else mounts.resolve_mountpoint(mountpoint)
    found = [_shown(one) for one in mounts.find_mounts(path)]
    if path is not None and not found:
        raise UsageError(f"no obsfs is mounted on {path}", "see `obsfs status`")
    if path is not None:
        found = found[-1:]  # what lies below it cannot be reached
    if as_json:
        tell_json(found[0] if path is not None else found)
    elif not found:
        tell("Nothing is mounted.")
    else:
        _print(found)
    lost = [one for one in found if one["state"] in _LOST]
    for one in lost:
        tell(f"obsfs: {one['mountpoint']} is {one['state']}: {_LOST[one['state']]}", err=True)
    if lost:
        click.get_current_context().exit(1)


def _shown(mount: mounts.MountInfo) -> dict[str, Any]:
    entry = mount.entry
    shown = {"mountpoint": str(entry.mountpoint), "source": entry.source, "state": mount.state}
    if mount.state in _LOST and (log := state.file_path(entry.mountpoint, "log")).exists():
        shown["log"] = str(log)
    return {**mount.status, **shown}


def _print(found: list[dict[str, Any]]) -> None:
    width = terminal_width()
    for mount in found:
        tell_heading(mount["mountpoint"], mount["source"], width)
        if mount["state"] == "mounted":
            rows = _rows(mount)
        else:
            rows = [("state", mount["state"]), *([("log", mount["log"])] if "log" in mount else [])]
        tell(*facts(rows, width, least=_NAMES))


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
            f"{mount.get('fuse_backend') or mount['engine']} FUSE backend, "
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
        *([("upgrades", str(mount["upgrades"]))] if mount.get("upgrades") else []),
        *([("takeover", _NO_TAKEOVER.format(mount["no_supervisor"]))] if mount.get("no_supervisor") else []),
        ("retries", f"{mount['retries']}, hedges {mount['hedges']}, errors {mount['errors']}"),
    ]
    if mount.get("log"):
        rows.append(("log", mount["log"]))
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
