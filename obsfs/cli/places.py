"""What the PATH_OR_URL of a command means: a place in a bucket, by its URL, its name, or a path on a mount."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obsfs.errors import UsageError
from obsfs.library.names import is_url, parse_model
from obsfs.service import mounts
from obsfs.settings import Settings
from obsfs.store.address import parse_address

if TYPE_CHECKING:
    from obsfs.store.types import ObjectVersion


def locate(text: str, given: dict[str, Any]) -> tuple[str, Settings]:
    """The URL of a PATH_OR_URL (or of a name in the library), and the settings to reach it by.

    What is `given` on the command line goes before what a mount uses. Raises UsageError.
    """
    if not is_url(text):
        path = Path(text)
        found = mounts.on_mount(path)  # before anything else is asked of the path: its mount may be hung
        if path.exists():
            if found is None:
                raise UsageError(f"{text} is on no mount of obsfs", "give obs://BUCKET/NAME, or a path on a mount")
            chosen = {name: value for name, value in given.items() if value is not None}
            return found.url, Settings.load(**{**found.settings, **chosen})
    settings = Settings.load(**given)
    return (text if is_url(text) else str(parse_model(text, settings.library))), settings


def covering(urls: Sequence[str]) -> Callable[[ObjectVersion], bool]:
    """Return what tells whether an object lies at one of these places, or below it.

    A model's name means all its versions, as it may have meant the newest when they were cached.
    """
    places = [(address.bucket, address.prefix.rstrip("/")) for address in map(parse_address, urls)]

    def is_meant(version: ObjectVersion) -> bool:
        starts = [start for bucket, start in places if bucket == version.bucket]
        return any(
            not start or version.key == start or version.key.startswith((f"{start}/", f"{start}@")) for start in starts
        )

    return is_meant
