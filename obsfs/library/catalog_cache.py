"""The listing of a library, kept on this machine for ``--metadata-ttl``, so that the next listing asks nobody."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from obsfs import private
from obsfs.errors import UsageError
from obsfs.settings import Settings
from obsfs.store.credentials import KEY_VARIABLES

_DIRECTORY = "library"
_FORMAT = 1
"""Format number of a listing. Without one it has format 0, which is the same."""
_BUCKET_SETTINGS = ("endpoint_url", "region", "profile", "no_sign_request", "addressing_style")


def _path(settings: Settings, library: str) -> Path:
    # The bucket decides who may see what. So each identity, which is how obsfs finds its keys and its endpoint, has a
    # file of its own: the keys' variables, those of the AWS SDKs, and the settings of the bucket.
    names = sorted({*KEY_VARIABLES, *(name for name in os.environ if name.startswith("AWS_"))} & set(os.environ))
    parts = [library, *(f"{name}={os.environ[name]}" for name in names)]
    parts += [f"{name}={getattr(settings, name)}" for name in _BUCKET_SETTINGS]
    name = hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:24]
    return settings.cache_dir / _DIRECTORY / f"{name}.json"


def load(settings: Settings, library: str) -> dict[str, Any] | None:
    """Return the listing that was saved, or None if there is none that is younger than the metadata lifetime."""
    path = _path(settings, library)
    if not private.is_private(path.parent):
        return None
    try:
        if time.time() - path.stat().st_mtime > settings.metadata_ttl:
            return None
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.pop("format", 0) not in (0, _FORMAT):
        return None
    return found if set(found) >= {"library", "endpoint", "models", "problems"} else None


def save(settings: Settings, library: str, document: dict[str, Any]) -> None:
    """Save a listing. A disk that cannot be written is ignored."""
    path = _path(settings, library)
    try:
        private.make_directory(settings.cache_dir, "cache directory", "choose another --cache-dir")
        private.make_level(path.parent)
        private.write_file(path, json.dumps({"format": _FORMAT, **document}).encode())
    except (OSError, UsageError):
        pass


def clear(settings: Settings) -> None:
    """Remove all listings, since a library has changed. A disk that cannot be written is ignored."""
    for path in (settings.cache_dir / _DIRECTORY).glob("*.json"):
        with suppress(OSError):
            path.unlink()
