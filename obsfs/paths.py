"""Where obsfs keeps its files: the XDG base directories, as platformdirs finds them."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from obsfs.errors import UsageError
from obsfs.private import make_directory

_NAME = "obsfs"


def config_path() -> Path:
    """Return the config file: ``OBSFS_CONFIG``, or ``obsfs/config.toml`` in the XDG config directory."""
    if chosen := os.environ.get("OBSFS_CONFIG"):
        return Path(chosen)
    return platformdirs.user_config_path(_NAME).expanduser() / "config.toml"


def cache_home() -> Path:
    """Return the default cache directory, ``$XDG_CACHE_HOME/obsfs``, by default ``~/.cache/obsfs``."""
    return platformdirs.user_cache_path(_NAME).expanduser()


def state_home() -> Path:
    """Return where :func:`state_dir` is, or would be."""
    return platformdirs.user_state_path(_NAME).expanduser().absolute()


def state_dir() -> Path:
    """Return the directory for what outlives a process and is no cache; make it if it is missing.

    It is ``$XDG_STATE_HOME/obsfs``, by default ``~/.local/state/obsfs``. No other user can look into it.

    Raises:
        UsageError: It cannot be made, or others can look into it.
    """
    path = state_home()
    try:
        make_directory(path, "state directory", "set XDG_STATE_HOME to another place")
    except OSError as error:
        raise UsageError(f"{path} cannot be made ({error.strerror})", "set XDG_STATE_HOME") from None
    return path
