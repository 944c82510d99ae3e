"""Pulling into the caches of Hugging Face and ModelScope, so that their libraries find a model by its name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from obsfs import private
from obsfs.errors import UsageError
from obsfs.extras import remedy
from obsfs.library.catalog import Model
from obsfs.library.manifest import File
from obsfs.library.names import parse_model
from obsfs.library.safe_paths import path_below
from obsfs.settings import Settings

HUGGING_FACE = "hf"
MODEL_SCOPE = "ms"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_REVISIONS = "snapshots"


def repository_of(model: Model, settings: Settings, given: str | None) -> str:
    """Return the name that a hub would have for a model: as given, or its path in the library.

    It is never the `source` of the manifest: with that, anyone who may write to one model could replace any repository
    in the hub's cache.

    Raises:
        UsageError: It is not a name that a hub can have.
    """
    name = model.name
    below = f"{name.library}{name.name}"
    if given is None and settings.library:
        root = parse_model(f"{settings.library.rstrip('/')}/x").library
        given = below.removeprefix(root) if below.startswith(root) else None
    chosen = given or name.name
    if not _REPOSITORY.fullmatch(chosen):
        raise UsageError(f"{chosen!r} is no name of a hub", "give one with --as ORG/NAME")
    return chosen


def hub_directory(model: Model, repository: str, hub: str) -> Path:
    """Return the directory in a hub's cache for the files of a model.

    Raises:
        UsageError: The hub's library is missing, or there is a symlink on the way.
    """
    if hub == HUGGING_FACE:
        home = _hugging_face_repository(repository)
        return path_below(home.parent, f"{home.name}/{_REVISIONS}/{commit_of(model)}/x").parent
    # modelscope-hub has no public function for its layout: {cache}/models/{owner}--{name}/snapshots/{revision}
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    return path_below(cache, f"models/{repository.replace('/', '--')}/{_REVISIONS}/master/x").parent


def finish(model: Model, repository: str, hub: str, directory: Path, files: Sequence[File]) -> None:
    """Complete the layout of the hub's cache, once the files are in :func:`hub_directory`.

    Hugging Face keeps each file in ``blobs/`` by its hash, links to it in ``snapshots/``, and the commit of each branch
    in ``refs/``.
    """
    if hub != HUGGING_FACE:
        return
    home = _hugging_face_repository(repository)
    blobs, refs = (path_below(home, f"{name}/x").parent for name in ("blobs", "refs"))
    blobs.mkdir(parents=True, exist_ok=True)
    for file in files:
        path = path_below(directory, file.path)
        if path.is_symlink() or not file.sha256:
            continue
        blob = blobs / file.sha256
        path.replace(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    refs.mkdir(exist_ok=True)
    for branch in filter(None, ("main", model.name.version)):
        private.write_file(refs / branch, commit_of(model).encode(), 0o644)


def commit_of(model: Model) -> str:
    """Return the commit (40 hex digits) that stands for a model in a hub's cache."""
    revision = model.manifest.revision
    return revision if _COMMIT.fullmatch(revision) else model.manifest.content[:40]


def _hugging_face_repository(repository: str) -> Path:
    """Return the directory of a repository, as huggingface_hub finds it (HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME)."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name
    except ImportError:
        raise UsageError("the Python package huggingface_hub is missing", remedy("hub")) from None
    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
