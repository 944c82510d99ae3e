"""A model from the bucket into a local directory, through the block cache, verified.

Each file is verified before it gets its name: by the SHA-256 of the manifest, else by the checksum that the bucket has
of the whole object, else by size and pinned ETag. An interrupted pull resumes from the block cache and, if the cache is
smaller than the model, from the incomplete files, which are hashed again from their start.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from obsfs.blocks import BLOCK
from obsfs.cache.directory import cached_sizes
from obsfs.errors import ObsfsError, UsageError, VersionChangedError
from obsfs.fetch.engine import Engine
from obsfs.library import catalog
from obsfs.library.file_download import FileDownload, pieces_of
from obsfs.library.manifest import File
from obsfs.library.model_directory import PIECE, ModelDirectory
from obsfs.library.names import ModelName, matches_patterns
from obsfs.library.transfer import Advance, WorkerPool
from obsfs.settings import Settings
from obsfs.store import open_store
from obsfs.store.types import ObjectVersion

_WORKERS = 8
"""Threads that read, hash and write pieces."""
SNAPSHOTS = "snapshots"
"""Directory below the cache directory for models that are pulled without a directory."""


class PullResult(NamedTuple):
    """The directory that has the files, and how many bytes were fetched from the bucket."""

    directory: Path
    fetched: int


class Pull:
    """A model to pull into one directory, or several.

    Args:
        name: The model.
        settings: How to reach the bucket.
        lookup_timeout: Most seconds for finding the model; None for the timeouts of the settings.

    Raises:
        ObsfsError: It cannot be found.
    """

    def __init__(self, name: ModelName, settings: Settings, *, lookup_timeout: float | None = None) -> None:
        self._settings = settings
        self._bucket = open_store(name.address, settings)
        asked = self._bucket
        if lookup_timeout is not None:
            timeout = min(lookup_timeout, settings.request_timeout)
            asked = open_store(name.address, replace(settings, request_timeout=timeout, retry_timeout=lookup_timeout))
        self.model = catalog.resolve(asked, name)

    def files(self, allow: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[File]:
        """Return the files of the model whose paths match one of `allow` (if any are given) and none of `ignore`."""
        return [file for file in self.model.manifest.files if matches_patterns(file.path, allow, ignore)]

    def has(self, directory: Path, file: File) -> bool:
        """Return whether a directory has a file of the model, unchanged since it was verified."""
        return self._local(directory).has(file)

    def _local(self, directory: Path) -> ModelDirectory:
        cache_dir = self._settings.cache_dir
        return ModelDirectory(directory, cache_dir if directory.is_relative_to(cache_dir / SNAPSHOTS) else None)

    def run(
        self,
        directory: Path,
        *,
        files: Sequence[File],
        force: bool = False,
        advance: Advance = lambda size: None,
    ) -> PullResult:
        """Pull files of the model.

        Args:
            directory: Where to; it is made if it is missing.
            files: Of :meth:`files`.
            force: Replace files with other content, too, that obsfs did not put there.
            advance: Is told of the bytes of each piece that is done.

        Raises:
            ObsfsError: It cannot be done. The files that are there by then are right, and the next pull resumes.
        """
        local = self._local(directory)
        missing = []
        for file in files:
            if local.has(file):
                advance(file.size)
            else:
                missing.append(file)
        fetched = 0
        try:
            if missing:
                local.prepare(missing, force=force)
                with local.locked():
                    fetched = self._fetch(local, missing, advance)
            local.finish(self.model.manifest)
        except OSError as error:
            raise _local_error(error, directory) from None
        return PullResult(directory, fetched)

    def _fetch(self, local: ModelDirectory, files: Sequence[File], advance: Advance) -> int:
        engine = Engine(self._bucket, self._settings, seals=False)
        shared = self._settings.cache_dir / SNAPSHOTS
        # There, large files are hard links to the files of the block cache: no second copy.
        largest = engine.cache.limit // 2 if local.directory.is_relative_to(shared) else 0
        # The pieces in flight must fit into a part of the cache.
        width = max(1, engine.window * BLOCK // PIECE)
        pool = WorkerPool(min(_WORKERS, width))
        downloads: list[FileDownload] = []

        def tasks() -> Iterator[Callable[[], None]]:
            ahead = pieces_of(downloads)
            for position, (download, index) in enumerate(pieces_of(downloads)):
                for coming, number in islice(ahead, 1 if position else width):
                    coming.expect(number)
                yield download.task(index, advance)

        try:
            identical_versions = self._identical_versions(files)
            for file in files:
                version = self.model.version_of(file, self._bucket.endpoint)
                is_linked = PIECE <= file.size <= largest
                vouching = partial(self._bucket.checksum, version)
                downloads.append(
                    FileDownload(
                        file,
                        version,
                        engine,
                        local,
                        pool,
                        vouching=vouching,
                        identical_version=identical_versions.get(file.sha256),
                        is_linked=is_linked,
                    )
                )
            pool.run(tasks())
            return engine.fetcher.stats.bytes_fetched
        except VersionChangedError as error:
            raise VersionChangedError(
                f"{self.model.name} was replaced since it was published ({error.message})",
                "it may be being pushed just now: try again",
            ) from None
        finally:
            for download in downloads:
                download.close()
            engine.close()

    def _identical_versions(self, files: Sequence[File]) -> dict[str, ObjectVersion]:
        """Return cached object versions with the same bytes, of other versions of the model, by their SHA-256."""
        name, endpoint = self.model.name, self._bucket.endpoint
        family = (name.at(None).prefix, f"{name.library}{name.name}@")
        wanted = {file.sha256 for file in files if file.sha256 and file.size >= PIECE}
        cached = cached_sizes(self._settings.cache_dir, endpoint, name.bucket) if wanted else {}
        if not any(key.startswith(family) and not key.startswith(name.prefix) for key, *_ in cached):
            return {}
        found: dict[str, tuple[int, ObjectVersion]] = {}
        for model in catalog.published_under(self._bucket, name):
            for file in model.manifest.files if model.name != name else ():
                version = model.version_of(file, endpoint)
                size = cached.get((version.key, version.etag, version.size), 0)
                if file.sha256 in wanted and size > found.get(file.sha256, (0,))[0]:
                    found[file.sha256] = size, version
        return {sha256: version for sha256, (_, version) in found.items()}


def _local_error(error: OSError, directory: Path) -> ObsfsError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UsageError(f"{directory} is full", "make room, then pull again: it goes on where it stopped")
    return UsageError(
        f"{error.filename2 or error.filename or directory} cannot be written ({error.strerror})", "choose another place"
    )
