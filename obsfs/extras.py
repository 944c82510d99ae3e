"""Optional dependencies: which of an extra's packages are missing, and the command that installs them."""

from __future__ import annotations

import shlex
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import InvalidRequirement, Requirement

from obsfs.errors import UsageError
from obsfs.ours import DISTRIBUTION


def missing(extra: str) -> list[str]:
    """Return the requirements of an extra (``demo``, ``train``, ...) that this Python does not satisfy.

    Each is a requirement as ``pip install`` takes it, such as ``peft>=0.19``.
    """
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            one = Requirement(line)
        except InvalidRequirement:
            continue
        # Without an extra the marker of a plain dependency is true: those are always installed.
        if one.marker is None or one.marker.evaluate({"extra": ""}) or not one.marker.evaluate({"extra": extra}):
            continue
        if one.name == DISTRIBUTION:  # an extra made of others
            for inner in sorted(one.extras):
                found += missing(inner)
        elif not _is_satisfied(one):
            one.marker = None
            found.append(str(one))
    return list(dict.fromkeys(found))


def _is_satisfied(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def remedy(extra: str) -> str:
    """Return the command that installs what is missing of an extra, for the user to type.

    It names the packages themselves, so it works from any directory and however obsfs was installed.
    """
    packages = missing(extra)
    if not packages:
        return f"in a clone of obsfs: pip install '.[{extra}]'"
    return f"pip install {shlex.join(packages)}"


def require(extra: str, *modules: str) -> None:
    """Raise UsageError, with the remedy, if one of `modules` (by import name) of an extra cannot be found."""
    for name in modules:
        try:
            is_there = find_spec(name) is not None
        except (ImportError, ValueError):
            is_there = False
        if not is_there:
            raise UsageError(f"the Python package {name!r} is missing", remedy(extra))
