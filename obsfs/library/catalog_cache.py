"""What a library held when it was last looked at, kept on this machine, so that looking again at once costs nothing."""

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

_DIRECTORY = "library"
_FORMAT = 1
"""Of what is kept; without a number it is format 0, which is the same."""


def _path(settings: Settings, library: str) -> Path:
    # Who may see what is the bucket's to say: another key pair or endpoint has a file of its own.
    names = sorted(name for name in os.environ if name.startswith(("AWS_", "HUAWEICLOUD_", "OBSFS_")))
    parts = [library, *(f"{name}={os.environ[name]}" for name in names)]
    parts += [str(settings.endpoint_url), str(settings.region), str(settings.profile), str(settings.no_sign_request)]
    name = hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()[:24]
    return settings.cache_dir / _DIRECTORY / f"{name}.json"


def load(settings: Settings, library: str) -> dict[str, Any] | None:
    """What was kept, if it is not older than the metadata lifetime."""
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
    """Keep it; a disk that takes nothing is no reason to fail."""
    path = _path(settings, library)
    try:
        private.make_directory(settings.cache_dir, "cache directory", "choose another --cache-dir")
        private.make_level(path.parent)
        private.write_file(path, json.dumps({"format": _FORMAT, **document}).encode())
    except (OSError, UsageError):
        pass


def clear(settings: Settings) -> None:
    """Forget all libraries: one of them has changed. A disk that takes no changes is no reason to fail."""
    for path in (settings.cache_dir / _DIRECTORY).glob("*.json"):
        with suppress(OSError):
            path.unlink()
