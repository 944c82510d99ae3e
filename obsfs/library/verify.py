"""Comparing a model with its manifest: in the bucket, in the cache, or in a directory that was pulled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from obsfs.blocks import BLOCK
from obsfs.cache.directory import Cache
from obsfs.errors import CorruptError, NotFoundError, UsageError, VersionChangedError
from obsfs.library.catalog import Model
from obsfs.library.manifest import File, Manifest
from obsfs.library.names import is_safe_path
from obsfs.library.safe_paths import open_file
from obsfs.library.transfer import Advance, OrderedHash, WorkerPool, tasks_for
from obsfs.store.base import ObjectStore

_STEP = 8 << 20
_WORKERS = 16
_HASHERS = 4


class Difference(NamedTuple):
    """A file that differs from the manifest; `reason` is for people."""

    path: str
    reason: str


class Verified(NamedTuple):
    """The result.

    `files` and `size` (bytes) were hashed and compared; `unknown` files have no SHA-256. In a cache, `absent_files` are
    missing, `partial_files` are cached in part, and `absent` bytes are missing in all.
    """

    differences: list[Difference]
    files: int
    size: int
    unknown: int
    absent_files: int = 0
    partial_files: int = 0
    absent: int = 0


def in_bucket(bucket: ObjectStore, model: Model, advance: Advance) -> Verified:
    """Read every file from the bucket, without the cache. Raises ObsfsError if the bucket cannot be read."""
    pool = WorkerPool(_WORKERS)
    files = model.manifest.files
    digests = {file.path: OrderedHash(pool) for file in files}
    broken: dict[str, str] = {}

    def read(file: File, index: int, offset: int, size: int) -> None:
        data = b""
        if file.path not in broken:
            try:
                data = bucket.read_range(model.version_of(file, bucket.endpoint), offset, offset + size)
            except NotFoundError:
                broken[file.path] = "it is gone"
            except VersionChangedError:
                broken[file.path] = "it was replaced or deleted since (another ETag)"
            except CorruptError:
                broken[file.path] = "other bytes (not even those of the bucket's own checksum)"
        digests[file.path].update(index, data)
        advance(size)

    def tasks() -> Iterator[Callable[[], None]]:
        for file in files:
            for index, offset in enumerate(range(0, file.size, _STEP)):
                size = min(_STEP, file.size - offset)
                yield lambda f=file, i=index, o=offset, s=size: read(f, i, o, s)  # type: ignore[misc]

    pool.run(tasks())
    there = {info.key[len(model.name.prefix) :]: info for info in bucket.walk(model.name.prefix)}
    for file in files:
        if file.path not in there:
            broken.setdefault(file.path, "it is gone")
        elif there[file.path].etag.strip('"') != file.etag.strip('"'):
            broken.setdefault(file.path, "it was replaced since (another ETag)")
    for path in there:
        if is_safe_path(path) and path not in digests:
            broken[path] = "it is in no manifest"
    found = {path: digest.hexdigest() for path, digest in digests.items()}
    return _compared(files, found, broken)


def in_cache(cache: Cache, model: Model, endpoint: str, advance: Advance) -> Verified:
    """Check every cached block against its checksum, and fully cached files against the manifest.

    What differs is removed from the cache, and fetched again when it is read.
    """
    broken: dict[str, str] = {}
    found: dict[str, str] = {}
    checked: list[File] = []
    lacking: dict[str, int] = {}

    def check(file: File) -> None:
        version = model.version_of(file, endpoint)
        blocks = cache.present_blocks(version)
        if lack := file.size - sum(min(BLOCK, file.size - block * BLOCK) for block in blocks):
            lacking[file.path] = lack
        if not blocks:
            advance(file.size)
            return
        checked.append(file)
        digest, bad = cache.check(version, advance)
        if bad:
            broken[file.path] = f"damaged in the cache, first at byte {bad[0]}; dropped"
        elif digest:
            found[file.path] = digest
            if file.sha256 and digest != file.sha256:
                cache.drop(version)
                broken[file.path] = "its bytes in the cache have another SHA-256; dropped"

    WorkerPool(_HASHERS).run(tasks_for(model.manifest.files, check))
    result = _compared(checked, found, broken)
    partial = [file for file in checked if file.path in lacking]
    return result._replace(
        size=result.size - sum(lacking[file.path] for file in partial if file.sha256),
        absent_files=len(lacking) - len(partial),
        partial_files=len(partial),
        absent=sum(lacking.values()),
    )


def in_directory(directory: Path, manifest: Manifest, advance: Advance) -> Verified:
    """Hash the files of a directory and compare them with the manifest."""
    pool = WorkerPool(_HASHERS)
    found: dict[str, str] = {}
    broken: dict[str, str] = {}

    def check(file: File) -> None:
        digest = OrderedHash(pool)
        try:
            with os.fdopen(open_file(directory, file.path), "rb", buffering=0) as source:
                if os.fstat(source.fileno()).st_size != file.size:
                    broken[file.path] = f"{os.fstat(source.fileno()).st_size} bytes, not {file.size}"
                    advance(file.size)
                    return
                for index, offset in enumerate(range(0, file.size, _STEP)):
                    data = os.pread(source.fileno(), _STEP, offset)
                    digest.update(index, data)
                    advance(len(data))
        except FileNotFoundError:
            broken[file.path] = "it is gone"
        except OSError as error:
            broken[file.path] = f"it cannot be read ({error.strerror})"
        except UsageError as error:
            broken[file.path] = f"it cannot be read ({error.message})"
        found[file.path] = digest.hexdigest()

    pool.run(tasks_for(manifest.files, check))
    return _compared(manifest.files, found, broken)


def _compared(files: Sequence[File], found: dict[str, str], broken: dict[str, str]) -> Verified:
    for file in files:
        if file.sha256 and found.get(file.path, file.sha256) != file.sha256:
            broken.setdefault(file.path, "other bytes (another SHA-256)")
    known = [file for file in files if file.sha256]
    differences = [Difference(path, reason) for path, reason in sorted(broken.items())]
    return Verified(differences, len(known), sum(file.size for file in known), len(files) - len(known))
