"""A model from the bucket into a local directory, through the block cache, verified.

Files are written under ``.obsfs/incomplete/`` and renamed when they are right: by SHA-256 where the manifest has it,
else by the checksum that the bucket has of the whole object, if it has one (size and pinned ETag for others).
``.obsfs/manifest.json`` is written last. A pull that was cut off finds what it had in the block cache, and, where the
cache is smaller than the model, in the incomplete files, which are hashed again from their start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec

from obsfs import private
from obsfs.access.readahead import runs
from obsfs.cache.directory import cached_sizes
from obsfs.cache.layout import BLOCK, block_count
from obsfs.cache.object import CachedObject
from obsfs.errors import CacheError, ObsfsError, UnavailableError, UsageError, VersionChangedError
from obsfs.fetch.reader import Engine, Reader
from obsfs.library import catalog
from obsfs.library.manifest import File, Manifest, parse_manifest
from obsfs.library.names import MANIFEST, METADATA_DIRECTORY, ModelName, is_safe_path, matches_patterns
from obsfs.library.safe_paths import open_file, path_below, read_small, size_and_mtime, write_whole
from obsfs.library.transfer import Advance, OrderedHash, WorkerPool
from obsfs.settings import Settings
from obsfs.store import open_store
from obsfs.store.base import MAX_SMALL
from obsfs.store.checksums import Checksum
from obsfs.store.types import ObjectVersion

_STEP = 8 << 20
_WORKERS = 8
_RECORD = f"{METADATA_DIRECTORY}pulled.json"
_FORMAT_AT = f"{METADATA_DIRECTORY}format"
"""Under which name the record of what was pulled says its format: no model has a file of that name."""
_FORMAT = 1
"""Without a number it is format 0, which is the same. Of a later one nothing is believed: files are hashed again."""
_LOCK = f"{METADATA_DIRECTORY}lock"
SNAPSHOTS = "snapshots"
"""Where models go, in the cache directory, when no place is given."""
_INCOMPLETE = f"{METADATA_DIRECTORY}incomplete"
_MARGIN = 64 << 20
_of_thread = threading.local()


class PullResult(NamedTuple):
    """Where files were brought, and how many bytes of them came from the bucket."""

    directory: Path
    fetched: int


class Pull:
    """A model that is to be brought to directories.

    Raises ObsfsError; what is in a directory by then is right, and the next pull goes on from there.
    """

    def __init__(self, name: ModelName, settings: Settings, *, patience: float | None = None) -> None:
        """With `patience`, the bucket is asked for the model for so many seconds at most."""
        self._settings = settings
        self._bucket = open_store(name.address, settings)
        asked = self._bucket
        if patience is not None:
            timeout = min(patience, settings.request_timeout)
            asked = open_store(name.address, replace(settings, request_timeout=timeout, retry_timeout=patience))
        self.model = catalog.resolve(asked, name)

    def files(self, allow: Sequence[str] = (), ignore: Sequence[str] = ()) -> list[File]:
        """The files of the model whose paths match one of `allow` (if any are given) and none of `ignore`."""
        return [file for file in self.model.manifest.files if matches_patterns(file.path, allow, ignore)]

    def has(self, directory: Path, file: File) -> bool:
        """Whether a directory has a file of the model as it was when it was verified."""
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
        """Bring files of the model into `directory`, which is made.

        A file there that is something else, and that obsfs did not put there as it is now, is replaced only by
        `force`.
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
                with local.alone():
                    fetched = self._fetch(local, missing, advance)
            local.finish(self.model.manifest)
        except OSError as error:
            raise _local_error(error, directory) from None
        return PullResult(directory, fetched)

    def _fetch(self, local: ModelDirectory, files: Sequence[File], advance: Advance) -> int:
        engine = Engine(self._bucket, self._settings, seals=False)
        shared = self._settings.cache_dir / SNAPSHOTS
        # There, large files need no second copy: they are what the cache has, by another name.
        largest = engine.cache.limit // 2 if local.directory.is_relative_to(shared) else 0
        # What is under way at the same time must fit into a part of the cache.
        width = max(1, engine.window * BLOCK // _STEP)
        pool = WorkerPool(min(_WORKERS, width))
        downloads: list[FileDownload] = []

        def tasks() -> Iterator[Callable[[], None]]:
            ahead = _pieces(downloads)
            for position, (download, index) in enumerate(_pieces(downloads)):
                for coming, number in islice(ahead, 1 if position else width):
                    coming.expect(number)
                yield download.task(index, advance)

        try:
            identical_versions = self._identical_versions(files)
            for file in files:
                version = self.model.version_of(file, self._bucket.endpoint)
                is_linked = _STEP <= file.size <= largest
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
        """What the cache has of files with the same bytes in other versions of the model, by their SHA-256."""
        name, endpoint = self.model.name, self._bucket.endpoint
        family = (name.at(None).prefix, f"{name.library}{name.name}@")
        wanted = {file.sha256 for file in files if file.sha256 and file.size >= _STEP}
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


def _pieces(downloads: Sequence[FileDownload]) -> Iterator[tuple[FileDownload, int]]:
    return ((download, index) for download in downloads for index in range(download.pieces))


class FileDownload:
    """One file on its way: its pieces are read and written by several threads at the same time, and hashed in order."""

    def __init__(
        self,
        file: File,
        version: ObjectVersion,
        engine: Engine,
        local: ModelDirectory,
        pool: WorkerPool,
        *,
        vouching: Callable[[], Checksum | None],
        identical_version: ObjectVersion | None,
        is_linked: bool,
    ) -> None:
        self._vouching = vouching
        self._identical_version = identical_version
        self._copyable_blocks = frozenset(engine.cache.present_blocks(identical_version) if identical_version else ())
        self._pool = pool
        self._is_linked = is_linked
        self._file = file
        self._version = version
        self._engine = engine
        self._local = local
        self.pieces = max(1, -(-file.size // _STEP))
        self._left = self.pieces
        self._guard = threading.Lock()
        self._opened: tuple[Reader, int, int] | None = None
        self._checksum: Checksum | None = None
        self._digest: OrderedHash | None = None

    def _blocks(self, index: int) -> range:
        first = index * (_STEP // BLOCK)
        return range(first, min(first + _STEP // BLOCK, block_count(self._file.size)))

    def expect(self, index: int) -> None:
        """This piece will soon be wanted."""
        _, _, start = self._open()
        if index * _STEP >= start:
            wanted = [block for block in self._blocks(index) if block not in self._copyable_blocks]
            self._engine.prefetch([(block, self._version, block) for block in wanted])

    def task(self, index: int, advance: Advance) -> Callable[[], None]:
        """Have this piece; whoever has the last one gives the file its name."""

        def work() -> None:
            reader, target, start = self._open()
            offset = index * _STEP
            size = min(_STEP, self._file.size - offset)
            data = _piece_buffer()[:size]
            if offset + size <= start:
                os.preadv(target, [data], offset)
            else:
                self._bring(reader, index, data)
                if not self._is_linked:
                    _write(target, data, offset)
            if self._digest:
                self._digest.update(index, data)
            advance(size)
            with self._guard:
                self._left -= 1
                is_last = not self._left
            if is_last:
                self._finish()

        return work

    def _bring(self, reader: Reader, index: int, data: memoryview) -> None:
        """Fill `data` with a piece: from the identical_version, as far as the cache has it, else from the bucket."""
        missing = []
        for block in self._blocks(index):
            had = (
                self._engine.peek(self._identical_version, block)
                if self._identical_version and block in self._copyable_blocks
                else None
            )
            if had is None:
                missing.append(block)
            else:
                start = block * BLOCK - index * _STEP
                data[start : start + len(had)] = had
        self._engine.fill(self._version, missing)
        for run in runs(missing):
            offset, stop = run.start * BLOCK, min(run.stop * BLOCK, self._file.size)
            part = data[offset - index * _STEP : stop - index * _STEP]
            if not reader.cached.readinto(offset, part):
                part[:] = reader.read(offset, len(part))

    def _open(self) -> tuple[Reader, int, int]:
        with self._guard:
            if self._opened is None:
                self._checksum = Checksum("sha256", self._file.sha256) if self._file.sha256 else self._vouching()
                self._digest = OrderedHash(self._pool, self._checksum.hasher()) if self._checksum else None
                reader = self._engine.open(self._version)
                self._opened = (reader, -1, 0) if self._is_linked else (reader, *self._local.begin(self._file))
            return self._opened

    def _finish(self) -> None:
        file = self._file
        if self._digest and self._checksum and self._digest.hexdigest() != self._checksum.hexdigest:
            self._local.drop(file)
            self._engine.cache.drop(self._version)
            if self._identical_version:
                self._engine.cache.drop(self._identical_version)
            raise UnavailableError(
                f"{file.path} is not what its {'manifest' if file.sha256 else self._checksum.algorithm} says",
                "pull again; if that does not help, the bucket has other bytes",
            )
        reader, *_ = self._open()
        if self._identical_version:
            # Not before: until now it was only said that the bytes are the same.
            self._engine.copy_identical(self._version, self._copyable_blocks, self._identical_version)
        if self._is_linked and not self._local.link(file, reader.cached):
            self._copy(reader)
        self._local.accept(file)
        self.close()

    def _copy(self, reader: Reader) -> None:
        """Some of it has left the cache, or links cannot be: then it is read again, and written."""
        digest = self._checksum.hasher() if self._checksum else hashlib.sha256()
        target, _ = self._local.begin(self._file)
        try:
            for offset in range(0, self._file.size, _STEP):
                data = reader.read(offset, min(_STEP, self._file.size - offset))
                _write(target, data, offset)
                digest.update(data)
        finally:
            os.close(target)
        if self._checksum and digest.hexdigest() != self._checksum.hexdigest:
            raise UnavailableError(f"{self._file.path} changed while it was copied", "pull again")

    def close(self) -> None:
        """Whether it has arrived or not: give back what was opened."""
        with self._guard:
            opened, self._opened = self._opened, None
        if opened:
            reader, target, _ = opened
            if target >= 0:
                os.close(target)
            self._engine.release(reader)


class ModelDirectory:
    """A directory that models are pulled into. Below the cache directory, if it is in `cache_dir`, all is private."""

    def __init__(self, directory: Path, cache_dir: Path | None = None) -> None:
        self.directory = directory
        self._cache_dir = cache_dir
        self._guard = threading.Lock()
        if cache_dir is not None and directory.exists():
            self._check_cache_dir(cache_dir)  # before anything in it is believed
        self._record = _read_record(directory)

    @staticmethod
    def _check_cache_dir(path: Path) -> None:
        private.make_directory(path, "cache directory", "choose another --cache-dir", CacheError)

    @property
    def _mode(self) -> int:
        return 0o644 if self._cache_dir is None else private.FILE_MODE

    def _mkdir(self, path: Path) -> None:
        if self._cache_dir is None:
            path.mkdir(parents=True, exist_ok=True)
            return
        self._check_cache_dir(self._cache_dir)
        level = self._cache_dir
        for part in path.relative_to(level).parts:
            level /= part
            private.make_level(level)

    def _write(self, path: Path, data: bytes) -> None:
        if self._cache_dir is None:
            write_whole(path, data)
        else:
            private.write_file(path, data)

    def has(self, file: File) -> bool:
        """Whether the file is there, as it was when it was verified."""
        found = size_and_mtime(self.directory, file.path)
        return found is not None and self._record.get(file.path) == [*found, _identity(file)]

    def _is_ours(self, path: str) -> bool:
        found = size_and_mtime(self.directory, path)
        return found is not None and (self._record.get(path) or [])[:2] == list(found)

    def prepare(self, files: Sequence[File], *, force: bool) -> None:
        """See that these files can be written. Raises UsageError, and leaves everything as it is then."""
        try:
            self._mkdir(self.directory)
        except OSError as error:
            raise UsageError(f"{self.directory} cannot be made ({error.strerror})", "choose another place") from None
        path_below(self.directory, f"{_INCOMPLETE}/x")
        for file in files:
            path = path_below(self.directory, file.path)
            if (
                not force
                and os.path.lexists(path)
                and not self._is_ours(file.path)
                and not _holds(self.directory, file)
            ):
                raise UsageError(f"{path} is there, with other content", "move it away, or --force replaces it")
        incomplete = self.directory / _INCOMPLETE
        had = sum(path.stat().st_size for path in incomplete.iterdir()) if incomplete.is_dir() else 0
        needed = sum(file.size for file in files) - had
        free = shutil.disk_usage(self.directory).free
        if needed + _MARGIN > free:
            raise UsageError(
                f"{self.directory} has {free >> 20} MiB free, of {needed + _MARGIN >> 20} MiB needed", "make room"
            )
        self._mkdir(incomplete)

    def begin(self, file: File) -> tuple[int, int]:
        """A descriptor of the incomplete file, and how many bytes of it are there from an earlier pull."""
        fd = os.open(self._incomplete(file), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, self._mode)
        # Only what will be hashed again can be gone on with. Pieces are written in any order: the first hole ends it.
        start = os.lseek(fd, 0, os.SEEK_HOLE) if file.sha256 and os.fstat(fd).st_size else 0
        return fd, start - start % _STEP

    def _incomplete(self, file: File) -> Path:
        name = hashlib.sha256(f"{file.path}\0{_identity(file)}".encode()).hexdigest()[:32]
        return path_below(self.directory, f"{_INCOMPLETE}/{name}")

    def drop(self, file: File) -> None:
        """What was written of it is wrong."""
        self._incomplete(file).unlink(missing_ok=True)

    def link(self, file: File, cached: CachedObject) -> bool:
        """Have the cache's own file as the incomplete one; False when that cannot be."""
        path = self._incomplete(file)
        path.unlink(missing_ok=True)
        try:
            return cached.link(path)
        except OSError:
            return False

    def accept(self, file: File) -> None:
        """It is right: give it its name."""
        path = path_below(self.directory, file.path)
        self._mkdir(path.parent)
        self._incomplete(file).replace(path_below(self.directory, file.path))
        self._note(file)

    def _note(self, file: File) -> None:
        found = size_and_mtime(self.directory, file.path)
        assert found is not None
        with self._guard:
            self._record[file.path] = [*found, _identity(file)]
            self._save()

    def _save(self) -> None:
        self._write(path_below(self.directory, _RECORD), json.dumps({_FORMAT_AT: _FORMAT, **self._record}).encode())

    def finish(self, manifest: Manifest) -> None:
        """What was wanted is there: files of an earlier version that are not in this one go, and the manifest comes.

        It names those files of the model that are there.
        """
        wanted = {file.path for file in manifest.files}
        stale = [path for path in self._record if path not in wanted]
        here = tuple(file for file in manifest.files if self.has(file))
        text = msgspec.structs.replace(manifest, files=here).to_json()
        path = path_below(self.directory, MANIFEST)
        if not here or (not stale and path.is_file() and path.read_bytes() == text):
            return
        for gone in stale:
            if self._is_ours(gone):
                path_below(self.directory, gone).unlink(missing_ok=True)
            del self._record[gone]
        self._mkdir(path.parent)
        self._save()
        self._write(path, text)
        # The directory stays: in a third of the pulls, removing it waited 0.5 to 2 s for the file system's journal.
        for left in (self.directory / _INCOMPLETE).glob("*"):
            left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other process pulls into the directory meanwhile. Raises UsageError when one does."""
        path = path_below(self.directory, _LOCK)
        self._mkdir(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, self._mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UsageError(f"another process pulls into {self.directory}", "wait for it") from None
        finally:
            os.close(fd)


def read_local(directory: Path) -> Manifest:
    """The manifest of a directory that was pulled. Raises UsageError when it has none."""
    try:
        data = read_small(directory, MANIFEST, MAX_SMALL)
    except OSError:
        raise UsageError(f"{directory} has no manifest", "it was not pulled by obsfs, or not wholly") from None
    return parse_manifest(data, str(directory / MANIFEST))


def _read_record(directory: Path) -> dict[str, list[object]]:
    """Which files were brought, with their size, mtime and identity; what no pull has written is left out."""
    try:
        found = json.loads(read_small(directory, _RECORD, MAX_SMALL))
    except (OSError, ValueError, RecursionError, UsageError):
        return {}
    is_known = isinstance(found, dict) and found.get(_FORMAT_AT, 0) in (0, _FORMAT)
    entries = found.items() if is_known else ()
    return {
        path: entry
        for path, entry in entries
        if is_safe_path(path) and isinstance(entry, list) and [type(one) for one in entry] == [int, int, str]
    }


def _piece_buffer() -> memoryview:
    """This thread's own: fresh memory for each piece would cost more than what is done with it."""
    if not hasattr(_of_thread, "buffer"):
        _of_thread.buffer = memoryview(bytearray(_STEP))
    buffer: memoryview = _of_thread.buffer
    return buffer


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _identity(file: File) -> str:
    return file.sha256 or file.etag


def _holds(directory: Path, file: File) -> bool:
    """Whether a file that is there has the right bytes: by the manifest, or an ETag that is their MD5."""
    found = size_and_mtime(directory, file.path)
    if found is None or found[0] != file.size:
        return False
    with os.fdopen(open_file(directory, file.path), "rb") as source:
        digest = hashlib.file_digest(source, "sha256" if file.sha256 else "md5").hexdigest()
    return digest == (file.sha256 or file.etag.strip('"'))


def _local_error(error: OSError, directory: Path) -> ObsfsError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UsageError(f"{directory} is full", "make room, then pull again: it goes on where it stopped")
    return UsageError(
        f"{error.filename2 or error.filename or directory} cannot be written ({error.strerror})", "choose another place"
    )
