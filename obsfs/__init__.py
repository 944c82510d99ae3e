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
    from obsfs.fuse.mounts import Mount, mount
    from obsfs.library.download import snapshot_download
    from obsfs.settings import Settings

__all__ = ["Mount", "OBSFileSystem", "ObsfsError", "Settings", "__version__", "mount", "snapshot_download"]

# Whoever wants the log of a program that uses obsfs attaches a handler; mounts write a file.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOMES = {
    "Mount": "obsfs.fuse.mounts",
    "OBSFileSystem": "obsfs.filesystem",
    "ObsfsError": "obsfs.errors",
    "Settings": "obsfs.settings",
    "mount": "obsfs.fuse.mounts",
    "snapshot_download": "obsfs.library.download",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'obsfs' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
