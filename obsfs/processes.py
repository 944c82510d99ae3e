"""How other programs are started: none imports code from, or works in, a directory of strangers.

Python looks for modules in the working directory first (``python -m``, ``python -c``, and with that every child of
multiprocessing), and in what PYTHONPATH names. A bucket, a model or another user's directory may hold a ``json.py``.
So children work in ``/`` or in an empty directory of their own, run with a safe path (``-P``, PYTHONSAFEPATH), and are
told only directories that are this user's own or the system's.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from obsfs import mountinfo
from obsfs.errors import UsageError

_NEEDED = ("LD_LIBRARY_PATH",)
_SOURCES = Path(__file__).parents[1]
"""Where obsfs itself is imported from."""


def python_command(*arguments: str) -> list[str]:
    """Return the command that runs this Python with these arguments, and nothing of its working directory."""
    return [sys.executable, "-P", *arguments]


def child_environment() -> dict[str, str]:
    """Return the environment for a child in this Python that imports what this process imports."""
    paths = list(_trusted(sys.path))
    if str(_SOURCES) not in paths:
        paths.append(str(_SOURCES))
    return {**_safe_environment(), "PYTHONPATH": os.pathsep.join(paths)}


def foreign_environment() -> dict[str, str]:
    """Return the environment for a program of somebody else, which may run in another Python: of PYTHONPATH what can
    be trusted."""
    paths = os.pathsep.join(_trusted(os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    return {**_safe_environment(), **({"PYTHONPATH": paths} if paths else {})}


def bare_environment() -> dict[str, str]:
    """Return the environment for a child that imports nothing but the standard library, and must know no secrets."""
    return {name: os.environ[name] for name in _NEEDED if name in os.environ}


def find_program(name: str) -> str:
    """Return the path of an installed program: the one beside this Python, or else on the PATH. A path stays as it is.

    Raises:
        UsageError: there is none.
    """
    if Path(name).is_absolute():
        return name
    beside = Path(sys.executable).with_name(name)
    if os.access(beside, os.X_OK):
        return str(beside)
    entries = mountinfo.mounts()
    known = (one for one in os.get_exec_path() if Path(one).is_absolute() and not _is_on_mount(one, entries))
    paths = os.pathsep.join(known)
    found = shutil.which(name, path=paths)
    if found is None:
        raise UsageError(f"the program {name} is not on the PATH", f"install {name}")
    return found


def secure_import_path() -> None:
    """Keep this process and all its children from importing what lies in the working directory, or on a mount of obsfs.

    For commands, not for programs that use obsfs as a library: it changes ``sys.path`` and the environment.
    """
    entries = mountinfo.mounts()
    os.environ["PYTHONSAFEPATH"] = "1"
    if "PYTHONPATH" in os.environ:
        kept = [one for one in os.environ["PYTHONPATH"].split(os.pathsep) if Path(one).is_absolute()]
        os.environ["PYTHONPATH"] = os.pathsep.join(one for one in kept if not _is_on_mount(one, entries))
    sys.path[:] = [
        one for one in sys.path if _is_ours(one) or not (_is_working_directory(one) or _is_on_mount(one, entries))
    ]


def _safe_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "PYTHONSAFEPATH": "1"}


def _trusted(paths: Sequence[str]) -> Iterator[str]:
    """Those of some directories for imports that hold no code of strangers."""
    entries = mountinfo.mounts()
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    for path in paths:
        if not Path(path).is_absolute() or _is_on_mount(path, entries):
            continue
        if any(Path(path).is_relative_to(prefix) for prefix in prefixes) or _is_ours(path):
            yield path
        elif not _is_working_directory(path):
            with suppress(OSError):
                found = Path(path).stat()
                if found.st_uid in (0, os.geteuid()) and not found.st_mode & stat.S_IWOTH:
                    yield path


def _is_ours(path: str) -> bool:
    """Whether obsfs itself was imported from there."""
    return Path(path).is_absolute() and Path(path) == _SOURCES


def _is_working_directory(path: str) -> bool:
    """Whether an entry of a search path means the working directory, or one in it; the empty one does."""
    try:
        # Others that are relative are no directories, but names for an import hook.
        return Path(path) == Path.cwd() if Path(path).is_absolute() else Path(path).is_dir()
    except OSError:
        return False


def _is_on_mount(path: str, entries: list[mountinfo.MountEntry]) -> bool:
    """Whether a path lies on a mount of obsfs, of whatever user."""
    if not any(one.is_obsfs for one in entries):
        return False
    try:
        entry = mountinfo.locate(path, entries)[1]
    except OSError:
        return False
    return entry is not None and entry.is_obsfs
