"""Pulling a model by its name, to a directory or to a hub's cache; ``snapshot_download`` and ``resolve``."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from obsfs.errors import UsageError
from obsfs.library import catalog
from obsfs.library.catalog import Model
from obsfs.library.hub_cache import commit_of, finish, hub_directory, repository_of
from obsfs.library.manifest import File
from obsfs.library.model_directory import read_manifest
from obsfs.library.names import ModelName, matches_patterns, parse_model
from obsfs.library.pull import SNAPSHOTS, Pull, PullResult
from obsfs.library.safe_paths import path_below
from obsfs.library.transfer import Advance
from obsfs.settings import GivenValue, Settings, keywords
from obsfs.store import open_store


def default_directory(settings: Settings, name: ModelName) -> Path:
    """Return the directory that a model is pulled to by default: in the cache directory."""
    below = f"{SNAPSHOTS}/{name.bucket}/{name.library}{name.label}"
    return path_below(settings.cache_dir, f"{below}/x").parent


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
    """Pull files of a model to a directory, or into the caches of hubs. Return the result for each."""
    model = pulling.model
    done = []
    for hub in hubs:
        name = repository_of(model, settings, repository)
        place = hub_directory(model, name, hub)
        done.append(pulling.run(place, files=files, force=force, advance=advance))
        finish(model, name, hub, place, files)
    if directory is not None or not hubs:
        place = directory or default_directory(settings, model.name)
        done.append(pulling.run(place, files=files, force=force, advance=advance))
    return done


def resolve(name: str, **settings: Any) -> str:
    """Return the URL of the model, with its version, that a name stands for.

    ``NAME`` stands for the model in ``NAME/``, or else for its newest version.

    Args:
        name: ``obs://BUCKET/NAME[@VERSION]``, or ``NAME[@VERSION]`` in the library that ``OBSFS_LIBRARY`` names.
        settings: Fields of :class:`~obsfs.settings.Settings`.

    Raises:
        NotFoundError: There is no such model. It names the nearest ones.
        ObsfsError: The bucket cannot be read.
    """
    chosen = Settings.load(**keywords(settings, resolve))
    model = parse_model(name, chosen.library)
    return str(catalog.resolve(open_store(model.address, chosen), model).name)


@dataclass(frozen=True)
class DryRunFileInfo:
    """What ``snapshot_download(dry_run=True)`` says of a file. It has the fields of huggingface_hub's class.

    `file_size` is in bytes. `is_cached`: the file is in `local_path` already, and verified.
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
        revision: Its version. "main" and None mean the one that the name stands for.
        cache_dir: Directory of obsfs's block cache.
        local_dir: The directory to pull to; by default one below `cache_dir`.
        library_name: Ignored, as `library_version` and `user_agent` are: they are for a hub's statistics.
        etag_timeout: Most seconds for finding the model in the bucket.
        force_download: Replace local files that have other content.
        token: Must be None or False: a bucket takes keys, not a hub's token.
        local_files_only: Do not connect. Return `local_dir`, or the default directory, if a model was pulled there.
        allow_patterns: Only files whose paths match one of these.
        ignore_patterns: Skip files whose paths match one of these.
        max_workers: Most connections.
        tqdm_class: Makes a progress bar of bytes; it is called as ``tqdm.tqdm`` is. By default there is none.
        headers: Must be None: requests to a bucket are signed as a whole.
        endpoint: URL of the server.
        dry_run: Download nothing. Return each file, and whether it would be downloaded.
        settings: Fields of :class:`~obsfs.settings.Settings`.

    Raises:
        ObsfsError: It cannot be done. The files in the directory are right, and the next call resumes.
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
    return DryRunFileInfo(commit_of(model), file.size, file.path, path, is_here, not is_here)


@contextmanager
def _bar(tqdm_class: Any, size: int, label: str) -> Iterator[Advance]:
    """Yield what is told of each piece, and shows it on a bar of tqdm's kind, if there is one."""
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
