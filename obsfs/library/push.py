"""Publishing a model from a local directory; see :mod:`obsfs.library.publish`."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obsfs.errors import UsageError
from obsfs.library import catalog_cache, completeness
from obsfs.library import manifest as manifests
from obsfs.library.manifest import ADAPTER, CONFIG, Manifest
from obsfs.library.names import ModelName, is_safe_path, parse_model
from obsfs.library.publish import Details, Publication
from obsfs.library.resume import resume_state_file
from obsfs.library.transfer import Advance
from obsfs.library.upload import PublishSource
from obsfs.settings import Settings, keywords
from obsfs.store import open_store
from obsfs.text import visible

_CONNECTIONS = 16
_NOT_OURS = {".git", ".obsfs", ".cache", "__pycache__", ".ipynb_checkpoints"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIRECTORY = "give the directory of a model"
_NOT_WHOLE = "the model is not whole: mend it, or publish it as it is with --no-check (check=False)"


@dataclass(frozen=True)
class LocalFile:
    """A file on the disk as it was when it was listed. Reading it after it has changed fails."""

    path: str
    size: int
    place: Path
    mtime_ns: int
    sha256: str = ""

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly these bytes. Raises UsageError if the file has changed."""
        try:
            with self.place.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
                found = os.fstat(file.fileno())
        except OSError as error:
            raise UsageError(f"{self.place} cannot be read ({error.strerror})", "push again") from None
        if len(data) != size or (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            raise UsageError(f"{self.place} changed while it was pushed", "push again when it is finished")
        return data


def find_files(directory: Path, *, any_files: bool = False) -> list[LocalFile]:
    """Return the files of a local model, sorted by path.

    Args:
        directory: The model.
        any_files: Accept a directory that is not a model.

    Raises:
        UsageError: It is not a model, or has a file that a model in a bucket cannot have.
    """
    if not directory.exists():
        raise UsageError(f"there is no directory {directory}", _DIRECTORY)
    try:
        found = sorted(_walk(directory, ""), key=lambda file: file.path)
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror})", "push what you may read") from None
    if not directory.is_dir():
        raise UsageError(f"{directory} is no directory", _DIRECTORY)
    if not found:
        raise UsageError(f"there is nothing in {directory}", _DIRECTORY)
    for file in found:
        if not is_safe_path(file.path):
            raise UsageError(f"{file.place} has a name that no model can have", "rename it")
    if not any_files and not manifests.is_model(file.path for file in found):
        raise UsageError(
            f"{directory} is no model: it has no {CONFIG}, {ADAPTER} or weights", "to push it all the same, add --any"
        )
    return found


def _walk(directory: Path, prefix: str) -> Iterator[LocalFile]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name in _NOT_OURS:
                continue
            if entry.is_dir() and not entry.is_symlink():
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
            elif entry.is_file():  # links count as their targets, as in the hub's cache
                stat = entry.stat()
                yield LocalFile(f"{prefix}{entry.name}", stat.st_size, Path(entry.path), stat.st_mtime_ns)
            else:
                raise UsageError(f"{entry.path} is no file, or a link that leads to none", "remove it")


def push(
    directory: Path,
    name: ModelName,
    settings: Settings,
    *,
    files: Sequence[LocalFile],
    source: str = "",
    revision: str = "",
    check: bool = True,
    advance: Advance = lambda size: None,
) -> tuple[Manifest, int]:
    """Publish a directory. The next push of the same directory to the same name on this machine resumes it.

    Args:
        directory: The model.
        name: Its name and version in the bucket.
        settings: How to reach the bucket.
        files: Of :func:`find_files`.
        source: Origin, for the manifest. By default the directory's name.
        revision: Revision, for the manifest. By default the commit, if the directory is in git.
        check: Refuse a model that is not complete, before anything is sent.
        advance: Is told of the bytes of each piece that is done.

    Returns:
        The manifest, and how many bytes were sent.

    Raises:
        ObsfsError: Nothing is published then.
    """
    found = {file.path: (file.size, file.read) for file in files}
    if check:
        completeness.require_complete(completeness.inspect_files(found), str(directory), _NOT_WHOLE)
    details = Details(
        author=author(),
        source=source or visible(directory.resolve().name),
        revision=revision or revision_of(directory),
        model=manifests.inspect_model(found),
    )
    return publish(name, files, details, settings, origin=str(directory.resolve()), advance=advance)


def push_directory(
    directory: str | os.PathLike[str],
    name: str,
    *,
    any_files: bool = False,
    source: str = "",
    revision: str = "",
    check: bool = True,
    **settings: Any,
) -> str:
    """Publish a directory, as ``obsfs push`` does.

    Args:
        directory: The model.
        name: ``obs://BUCKET/NAME[@VERSION]``, or a name in the library.
        any_files: Accept a directory that is not a model.
        source: Origin, for the manifest. By default the directory's name.
        revision: Revision, for the manifest. By default the commit, if the directory is in git.
        check: Refuse a model that is not complete, before anything is sent.
        settings: Fields of :class:`~obsfs.settings.Settings`.

    Returns:
        Its URL.

    Raises:
        ObsfsError: Nothing is published then.
    """
    chosen = Settings.load(**keywords(settings, push_directory))
    model = parse_model(name, chosen.library)
    files = find_files(Path(directory), any_files=any_files)
    push(Path(directory), model, chosen, files=files, source=source, revision=revision, check=check)
    return str(model)


def check_model(directory: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Check that the model in a directory is complete, by its configuration, its index and the headers of its weights.

    It is complete if transformers and diffusers can load it. A push checks more, so that other loaders can load it too.

    Returns:
        The header of each safetensors file in the directory, by its name: ``{tensor: {dtype, shape, data_offsets}}``.

    Raises:
        UsageError: A file is missing, truncated or damaged. It names the file.
    """
    place = Path(directory)
    try:
        files = {
            entry.name: LocalFile(entry.name, entry.stat().st_size, Path(entry.path), entry.stat().st_mtime_ns)
            for entry in os.scandir(place)
            if entry.is_file()
        }
    except OSError as error:
        raise UsageError(f"{directory} cannot be read ({error.strerror})", _DIRECTORY) from None
    found = completeness.inspect_files(
        {name: (file.size, file.read) for name, file in files.items()}, every_loader=False
    )
    completeness.require_complete(found, str(directory), "the model is not whole: push or pull it again")
    return found.headers


def publish(
    name: ModelName,
    sources: Sequence[PublishSource],
    details: Details,
    settings: Settings,
    *,
    origin: str,
    advance: Advance = lambda size: None,
) -> tuple[Manifest, int]:
    """Publish files from anywhere.

    Args:
        name: The model.
        sources: Its files.
        details: For the manifest.
        settings: How to reach the bucket.
        origin: Identifies the source: the next try with the same one resumes this one.
        advance: Is told of the bytes of each piece that is done.

    Returns:
        The manifest, and how many bytes were sent.

    Raises:
        ObsfsError: Nothing is published then.
    """
    bucket = open_store(name.address, settings.at_first_endpoint())
    with resume_state_file(f"{bucket.endpoint} {name} {origin}", str(name)) as resume_path:
        publication = Publication(
            bucket,
            name,
            sources,
            details,
            resume_path,
            connections=min(settings.connections, _CONNECTIONS),
            retry_timeout=settings.retry_timeout,
            advance=advance,
        )
        manifest = publication.run()
        catalog_cache.clear(settings)
        return manifest, publication.sent_bytes


def author() -> str:
    """Return who publishes: ``user@host``."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):
        return socket.gethostname()


def revision_of(directory: Path) -> str:
    """Return the commit of a directory in the hub's cache or in git; empty if it has none."""
    path = directory.resolve()
    if path.parent.name == "snapshots" and _COMMIT.fullmatch(path.name):
        return path.name
    try:
        found = subprocess.run(
            ["git", "-C", path, "rev-parse", "HEAD"],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    commit = found.stdout.strip()
    return commit if _COMMIT.fullmatch(commit) else ""
