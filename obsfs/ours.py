"""Which distribution is ours, and whether the packages that are imported are its own. Needs nothing else."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from obsfs.errors import UsageError

DISTRIBUTION = "obsfs-mount"
"""The name of our distribution. It is not on an index, so no hint may say ``pip install 'obsfs-mount[...]'``."""


def check_ours(package: str = "obsfs") -> None:
    """Raise UsageError when another distribution's package of this name (``obsfs`` or ``trainer``) is imported.

    On PyPI there are others of both names, which may lie over ours, or before it on ``sys.path``. Ours lie in one
    directory, and ours is the `obsfs` that says so.
    """
    origin: str | None
    if package == "obsfs":
        imported = sys.modules[package]
        is_ours, origin = getattr(imported, "DISTRIBUTION", "") == DISTRIBUTION, imported.__file__
    else:
        place = find_spec(package)
        origin = place.origin if place else None
        is_ours = origin is not None and Path(origin).resolve().parents[1] == Path(__file__).resolve().parents[1]
    if not is_ours:
        raise UsageError(
            f"the Python package {package!r} that is imported ({origin or 'none'}) is not that of {DISTRIBUTION}",
            f"pip uninstall the other one, then install {DISTRIBUTION} again from its clone",
        )
