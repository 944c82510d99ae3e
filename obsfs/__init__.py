"""obsfs: a bucket of models as a directory.

>>> with obsfs.mount("obs://models", "/mnt/models") as mount:        # doctest: +SKIP
...     AutoModelForCausalLM.from_pretrained(mount.path / "Qwen2-7B-Instruct")
>>> obsfs.snapshot_download("obs://models/Qwen2-7B-Instruct", local_dir="qwen")  # doctest: +SKIP
>>> fsspec.open("obs://models/Qwen2-7B-Instruct/config.json")         # doctest: +SKIP
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from obsfs.version import __version__

if TYPE_CHECKING:
    from obsfs.errors import ObsfsError
    from obsfs.filesystem import OBSFileSystem
    from obsfs.library.download import resolve, snapshot_download
    from obsfs.library.push import check_model
    from obsfs.library.push import push_directory as push
    from obsfs.service.mounts import Mount, mount, on_mount, refresh, status
    from obsfs.settings import Settings

DISTRIBUTION = "obsfs-mount"
"""Of which distribution this package is: others of its name exist (see :mod:`obsfs.ours`)."""

__all__ = [
    "Mount",
    "OBSFileSystem",
    "ObsfsError",
    "Settings",
    "__version__",
    "check_model",
    "mount",
    "on_mount",
    "push",
    "refresh",
    "resolve",
    "snapshot_download",
    "status",
]

# Whoever wants the log of a program that uses obsfs attaches a handler; mounts write a file.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOMES = {
    "Mount": "obsfs.service.mounts:Mount",
    "OBSFileSystem": "obsfs.filesystem:OBSFileSystem",
    "ObsfsError": "obsfs.errors:ObsfsError",
    "Settings": "obsfs.settings:Settings",
    "check_model": "obsfs.library.push:check_model",
    "mount": "obsfs.service.mounts:mount",
    "on_mount": "obsfs.service.mounts:on_mount",
    "push": "obsfs.library.push:push_directory",
    "refresh": "obsfs.service.mounts:refresh",
    "resolve": "obsfs.library.download:resolve",
    "snapshot_download": "obsfs.library.download:snapshot_download",
    "status": "obsfs.service.mounts:status",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'obsfs' has no attribute {name!r}")
    import importlib

    module, _, found = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), found)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
