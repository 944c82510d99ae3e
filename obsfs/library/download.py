"""Where a pulled model goes: a directory, or the cache of Hugging Face or ModelScope, so that their names find it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from obsfs import private
from obsfs.errors import UsageError
from obsfs.library import catalog
from obsfs.library.catalog import Model
from obsfs.library.manifest import File
from obsfs.library.model_directory import read_manifest
from obsfs.library.names import ModelName, matches_patterns, parse_model
from obsfs.library.pull import SNAPSHOTS, Pull, PullResult
from obsfs.library.safe_paths import path_below
from obsfs.library.transfer import Advance
from obsfs.settings import GivenValue, Settings, keywords
from obsfs.store import open_store

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_REVISIONS = "snapshots"

HUGGING_FACE = "hf"
MODEL_SCOPE = "ms"


def default_directory(settings: Settings, name: ModelName) -> Path:
    """Where a model is pulled to when no place is given: beside the block cache."""
    below = f"{SNAPSHOTS}/{name.bucket}/{name.library}{name.label}"
    return path_below(settings.cache_dir, f"{below}/x").parent


def repository_of(model: Model, settings: Settings, given: str | None) -> str:
    """The name that a hub would have for a model: as given, or where it lies in the library.

    Never the `source` that its manifest names: who may write to one model would so choose which repository of the
    hub's cache is replaced.
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
    """The directory in a hub's cache that a model's files go to."""
    if hub == HUGGING_FACE:
        home = _hf_repository(repository)
        return path_below(home.parent, f"{home.name}/{_REVISIONS}/{_commit(model)}/x").parent
    # As modelscope_hub has it: {cache}/models/{owner}--{name}/snapshots/{revision}
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    return path_below(cache, f"models/{repository.replace('/', '--')}/{_REVISIONS}/master/x").parent


def finish_hub(model: Model, repository: str, hub: str, directory: Path, files: Sequence[File]) -> None:
    """Make what was pulled there findable by the hub's own library."""
    if hub != HUGGING_FACE:
        return
    # As huggingface_hub has it: blobs by their hashes, links to them in snapshots, and what a branch stands for.
    home = _hf_repository(repository)
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
        private.write_file(refs / branch, _commit(model).encode(), 0o644)


def _hf_repository(repository: str) -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return cache / f"models--{repository.replace('/', '--')}"


def _commit(model: Model) -> str:
    revision = model.manifest.revision
    return revision if _COMMIT.fullmatch(revision) else model.manifest.content[:40]


def pull(
    pulling: Pull,
    settings: Settings,
    *,
    directory: Path | None = None,
    hubs: Sequence[str] = (),
    repository: str | None = None,
    files: Sequence[File],
    force: bool = False,
    advance: Advance = lambda size: None,
) -> list[PullResult]:
    """Pull files of a model to a directory, or into the caches of hubs; what was done, of each place."""
    model = pulling.model
    done = []
    for hub in hubs:
        name = repository_of(model, settings, repository)
        place = hub_directory(model, name, hub)
        done.append(pulling.run(place, files=files, force=force, advance=advance))
        finish_hub(model, name, hub, place, files)
    if directory is not None or not hubs:
        place = directory or default_directory(settings, model.name)
        done.append(pulling.run(place, files=files, force=force, advance=advance))
    return done


def resolve(name: str, **settings: Any) -> str:
    """The URL of the model, and version, that a name stands for: ``NAME`` is what lies there, or its newest version.

    Raises NotFoundError, with the nearest names that there are, and other kinds of ObsfsError.
    """
    chosen = Settings.load(**keywords(settings, resolve))
    model = parse_model(name, chosen.library)
    return str(catalog.resolve(open_store(model.address, chosen), model).name)


@dataclass(frozen=True)
class DryRunFileInfo:
    """A file as ``snapshot_download(dry_run=True)`` tells of it: huggingface_hub's class of this name, field by field.

    `file_size` in bytes; `is_cached`: it is in `local_path` already, and verified.
    """

    commit_hash: str
    file_size: int
    filename: str
    local_path: str
    is_cached: bool
    will_download: bool


@overload
def snapshot_download(repo_id: str, *, dry_run: Literal[False] = False, **options: Any) -> str: ...
@overload
def snapshot_download(repo_id: str, *, dry_run: Literal[True], **options: Any) -> list[DryRunFileInfo]: ...
def snapshot_download(
    repo_id: str,
    *,
    repo_type: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    library_name: str | None = None,
    library_version: str | None = None,
    user_agent: Mapping[str, str] | str | None = None,
    etag_timeout: float | None = None,
    force_download: bool = False,
    token: bool | str | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str] | str | None = None,
    ignore_patterns: Sequence[str] | str | None = None,
    max_workers: int | None = None,
    tqdm_class: Any = None,
    headers: Mapping[str, str] | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
    **settings: Any,
) -> str | list[DryRunFileInfo]:
    """Pull a model from the bucket, verified, and return the directory that it is in.

    Takes the arguments of ``huggingface_hub.snapshot_download`` (2.4), by name.

    Args:
        repo_id: ``obs://BUCKET/NAME``, or ``NAME`` in the library that ``OBSFS_LIBRARY`` names.
        repo_type: None or "model".
        revision: Its version; "main" and None mean the one that the name stands for.
        cache_dir: Where obsfs's block cache is.
        local_dir: The directory to pull to; by default one below `cache_dir`.
        library_name: Who asks, for a hub's statistics: no meaning here, as `library_version` and `user_agent`.
        etag_timeout: For how many seconds the bucket is asked for the model.
        force_download: Replace files that are there with other content.
        token: A hub's token. Only None and False are taken: a bucket is asked with keys.
        local_files_only: Ask nobody: `local_dir`, or the default one, if a model was pulled there.
        allow_patterns: Only files like these.
        ignore_patterns: No files like these.
        max_workers: How many connections are used at most.
        tqdm_class: What makes a progress bar, of bytes: it is called as ``tqdm.tqdm`` is. By default there is none.
        headers: Only None: what is sent to a bucket is signed as a whole.
        endpoint: The URL of the server.
        dry_run: Only look: returns what each file is, and whether it would be fetched.
        settings: Fields of :class:`~obsfs.settings.Settings`.

    Raises:
        ObsfsError: It cannot be done; what is in the directory by then is right.
    """
    if repo_type not in (None, "model"):
        raise UsageError(f"repo_type {repo_type!r} is not served", "obsfs keeps models")
    if token:
        raise UsageError("token is a hub's: a bucket is asked with keys", _KEYS)
    if headers:
        raise UsageError("headers cannot be added: what is sent to a bucket is signed as a whole", "leave them out")
    if etag_timeout is not None and not etag_timeout > 0:
        raise UsageError(f"etag_timeout is {etag_timeout}", "give seconds, more than 0")
    own = {"cache_dir": GivenValue("cache_dir=", cache_dir), "connections": GivenValue("max_workers=", max_workers)}
    own["endpoint_url"] = GivenValue("endpoint=", endpoint)
    chosen = Settings.load(**{**own, **keywords(settings, snapshot_download)})
    name = parse_model(repo_id, chosen.library)
    if revision not in (None, "main"):
        name = _at(name, str(revision))
    patterns = _patterns(allow_patterns), _patterns(ignore_patterns)
    if local_files_only:
        directory = Path(local_dir) if local_dir is not None else default_directory(chosen, name)
        manifest = read_manifest(directory)
        files = [file for file in manifest.files if matches_patterns(file.path, *patterns)]
        return [_info(Model(name, manifest), file, directory, True) for file in files] if dry_run else str(directory)
    pulling = Pull(name, chosen, lookup_timeout=etag_timeout)
    files = pulling.files(*patterns)
    directory = Path(local_dir) if local_dir is not None else default_directory(chosen, pulling.model.name)
    if dry_run:
        return [_info(pulling.model, file, directory, pulling.has(directory, file)) for file in files]
    with _bar(tqdm_class, sum(file.size for file in files), pulling.model.name.label) as advance:
        pull(pulling, chosen, directory=directory, files=files, force=force_download, advance=advance)
    return str(directory)


_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give profile="


def _info(model: Model, file: File, directory: Path, is_here: bool) -> DryRunFileInfo:
    path = str(path_below(directory, file.path))
    return DryRunFileInfo(_commit(model), file.size, file.path, path, is_here, not is_here)


@contextmanager
def _bar(tqdm_class: Any, size: int, label: str) -> Iterator[Advance]:
    """What is told of each piece, and shows it by a bar of tqdm's kind; nowhere without one."""
    if tqdm_class is None:
        yield lambda count: None
        return
    guard = threading.Lock()
    with tqdm_class(total=size, unit="B", unit_scale=True, desc=label) as bar:

        def advance(count: int) -> None:
            with guard:
                bar.update(count)

        yield advance


def _at(name: ModelName, version: str) -> ModelName:
    if name.version and name.version != version:
        raise UsageError(f"{name} and revision {version!r} contradict each other", "give one of them")
    return parse_model(f"{name.at(None)}@{version}")


def _patterns(given: Sequence[str] | str | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())
