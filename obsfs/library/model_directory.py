"""A directory that models are pulled into: what it has, and how files of a model arrive in it.

Files are written below ``.obsfs/incomplete/`` and renamed once they are verified. ``.obsfs/pulled.json`` records each
with its size, mtime and hash, and ``.obsfs/manifest.json`` is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from obsfs import private
from obsfs.cache.object import CachedObject
from obsfs.errors import CacheError, UsageError
from obsfs.library.manifest import File, Manifest, parse_manifest
from obsfs.library.names import MANIFEST, METADATA_DIRECTORY, is_safe_path
from obsfs.library.safe_paths import open_file, path_below, read_small, size_and_mtime
from obsfs.store.base import MAX_SMALL

PIECE = 8 << 20
"""Bytes that are read, hashed and written at a time."""
_RECORD = f"{METADATA_DIRECTORY}pulled.json"
_FORMAT_AT = f"{METADATA_DIRECTORY}format"
"""The key of the record's format number. No model has a file of that name."""
_FORMAT = 1
"""Format number of the record. Without one it has format 0, which is the same. A later one is ignored: files are hashed
again."""
_LOCK = f"{METADATA_DIRECTORY}lock"
_INCOMPLETE = f"{METADATA_DIRECTORY}incomplete"
_MARGIN = 64 << 20
"""Bytes that stay free on the disk."""


class ModelDirectory:
    """A directory that models are pulled into.

    Args:
        directory: It need not exist.
        cache_dir: The cache directory, if the directory lies in it: then all that is made is private.
    """

    def __init__(self, directory: Path, cache_dir: Path | None = None) -> None:
        self.directory = directory
        self._cache_dir = cache_dir
        self._guard = threading.Lock()
        if cache_dir is not None and directory.exists():
            self._check_cache_dir(cache_dir)  # before anything in it is trusted
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
        private.write_file(path, data, self._mode)

    def has(self, file: File) -> bool:
        """Return whether the file is there, unchanged since it was verified."""
        found = size_and_mtime(self.directory, file.path)
        return found is not None and self._record.get(file.path) == [*found, _identity(file)]

    def _is_ours(self, path: str) -> bool:
        found = size_and_mtime(self.directory, path)
        return found is not None and (self._record.get(path) or [])[:2] == list(found)

    def prepare(self, files: Sequence[File], *, force: bool) -> None:
        """Check that these files can be written, and make the directory.

        Raises:
            UsageError: They cannot. Nothing was changed.
        """
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
                and not _has_content(self.directory, file)
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
        """Open the incomplete file. Return its descriptor and how many bytes it has from an earlier pull."""
        fd = os.open(self._incomplete(file), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, self._mode)
        # Only bytes that are hashed again can be kept. Pieces are written in any order, so they end at the first hole.
        start = os.lseek(fd, 0, os.SEEK_HOLE) if file.sha256 and os.fstat(fd).st_size else 0
        return fd, start - start % PIECE

    def _incomplete(self, file: File) -> Path:
        name = hashlib.sha256(f"{file.path}\0{_identity(file)}".encode()).hexdigest()[:32]
        return path_below(self.directory, f"{_INCOMPLETE}/{name}")

    def drop(self, file: File) -> None:
        """Remove the incomplete file: its bytes are wrong."""
        self._incomplete(file).unlink(missing_ok=True)

    def link(self, file: File, cached: CachedObject) -> bool:
        """Make the incomplete file a hard link to the block cache's. Return False if that is not possible."""
        path = self._incomplete(file)
        path.unlink(missing_ok=True)
        try:
            return cached.link(path)
        except OSError:
            return False

    def accept(self, file: File) -> None:
        """Rename the incomplete file to its name: it is verified."""
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
        """Remove files of an earlier version that this one does not have, and write the manifest.

        It names the files of the model that are there.
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
        # The directory itself stays: in a third of pulls, removing it waited 0.5 to 2 s for the file system's journal.
        for left in (self.directory / _INCOMPLETE).glob("*"):
            left.unlink(missing_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from pulling into the directory. Raises UsageError if one does already."""
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


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a directory that was pulled. Raises UsageError if it has none."""
    try:
        data = read_small(directory, MANIFEST, MAX_SMALL)
    except OSError:
        raise UsageError(f"{directory} has no manifest", "it was not pulled by obsfs, or not wholly") from None
    return parse_manifest(data, str(directory / MANIFEST))


def _read_record(directory: Path) -> dict[str, list[object]]:
    """Return size, mtime (ns) and identity of each file that was pulled. Entries that no pull writes are left out."""
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


def _identity(file: File) -> str:
    return file.sha256 or file.etag


def _has_content(directory: Path, file: File) -> bool:
    """Return whether a file that is there has the right bytes: by the manifest, or by an ETag that is their MD5."""
    found = size_and_mtime(directory, file.path)
    if found is None or found[0] != file.size:
        return False
    with os.fdopen(open_file(directory, file.path), "rb") as source:
        digest = hashlib.file_digest(source, "sha256" if file.sha256 else "md5").hexdigest()
    return digest == (file.sha256 or file.etag.strip('"'))
