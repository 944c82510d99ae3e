"""What the PATH_OR_URL of a command means: a place in a bucket, by its URL, its name, or a path on a mount."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from obsfs.errors import UsageError
from obsfs.fuse import mounts
from obsfs.library.names import is_url, parse_model
from obsfs.settings import Settings


class OnMount(NamedTuple):
    """What a path on a mount of obsfs stands for. `settings` are those by which that mount finds it."""

    url: str
    settings: dict[str, Any]


def on_mount(path: Path) -> OnMount | None:
    """What a path stands for, if it lies on a mount of obsfs."""
    place = path.absolute()
    for mount in mounts.find():
        if isinstance(mount, dict) and place.is_relative_to(mount["mountpoint"]):
            inside = place.relative_to(mount["mountpoint"]).as_posix()
            url = mount["source"] if inside == "." else f"{mount['source']}/{inside}"
            endpoints = [site["endpoint"] for site in mount["endpoints"]] or [mount["endpoint"]]
            return OnMount(url, {"endpoint_url": endpoints, "cache_dir": mount["cache_dir"]})
    return None


def locate(text: str, given: dict[str, Any]) -> tuple[str, Settings]:
    """The URL of a PATH_OR_URL (or of a name in the library), and the settings to reach it by.

    What is `given` on the command line goes before what a mount uses. Raises UsageError.
    """
    if not is_url(text):
        path = Path(text)
        if path.exists():
            found = on_mount(path)
            if found is None:
                raise UsageError(f"{text} is on no mount of obsfs", "give obs://BUCKET/NAME, or a path on a mount")
            chosen = {name: value for name, value in given.items() if value is not None}
            return found.url, Settings.load(**{**found.settings, **chosen})
    settings = Settings.load(**given)
    return (text if is_url(text) else str(parse_model(text, settings.library))), settings
