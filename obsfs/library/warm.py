"""Downloading into the cache what a load will need, and profiles, which record what a load needs.

A profile of a model lists byte ranges of its files. It is an object below ``.obsfs/profiles/`` in the directory of the
model. It is recorded from the cache after a load, and then used on many machines. A tensor-parallel rank, for example,
reads half of each shard, and a diffusion pipeline one of two variants.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from obsfs.blocks import BLOCK, block_count, runs
from obsfs.cache.directory import Cache
from obsfs.errors import NotFoundError, UsageError
from obsfs.fetch.engine import Engine
from obsfs.library import catalog
from obsfs.library.catalog import Model
from obsfs.library.names import METADATA_DIRECTORY, parse_model, split_label, suggest_names
from obsfs.library.transfer import Advance, WorkerPool, tasks_for
from obsfs.store.address import Address
from obsfs.store.base import ObjectStore
from obsfs.store.types import ObjectVersion

_PROFILES = f"{METADATA_DIRECTORY}profiles/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FILES = 4
_Profile = dict[str, list[tuple[int, int]]]


class Wanted(NamedTuple):
    """Blocks of one object version, ascending."""

    version: ObjectVersion
    blocks: Sequence[int]

    @property
    def size(self) -> int:
        """Bytes of all these blocks."""
        is_last_in = bool(self.blocks) and self.blocks[-1] == block_count(self.version.size) - 1
        spare = block_count(self.version.size) * BLOCK - self.version.size
        return len(self.blocks) * BLOCK - (spare if is_last_in else 0)


def versions_at(bucket: ObjectStore, address: Address) -> list[ObjectVersion]:
    """What is at an address now: the files of a model, all objects under a prefix, or one object.

    Raises NotFoundError.
    """
    prefix = address.prefix
    label = prefix.rstrip("/").rpartition("/")[2]
    if split_label(label):
        name = parse_model(str(address))
        if model := catalog.read_model(bucket, name):
            return [model.version_of(file, bucket.endpoint) for file in model.manifest.files]
    infos = [info for info in bucket.walk(prefix) if info.size and f"/{METADATA_DIRECTORY}" not in f"/{info.key}"]
    if infos:
        return [bucket.version(info) for info in infos]
    if label:
        try:
            return [bucket.version(bucket.head(prefix.rstrip("/")))]
        except NotFoundError:
            model = catalog.resolve(bucket, parse_model(str(address)))
            return [model.version_of(file, bucket.endpoint) for file in model.manifest.files]
    raise NotFoundError(f"there is nothing in {address}", "check the name")


def whole(version: ObjectVersion) -> Wanted:
    """Return all blocks of an object version."""
    return Wanted(version, range(block_count(version.size)))


def at_most(wanted: Sequence[Wanted], size: int) -> list[Wanted]:
    """Return the first of these blocks, `size` bytes of them at most."""
    kept = []
    for version, blocks in wanted:
        part = Wanted(version, blocks)
        if part.size > size:
            part = Wanted(version, blocks[: size // BLOCK])
        if part.blocks:
            kept.append(part)
            size -= part.size
    return kept


def warm(engine: Engine, wanted: Sequence[Wanted], advance: Advance) -> None:
    """Download these blocks into the cache.

    Args:
        engine: Downloads them.
        wanted: The blocks.
        advance: Is told of the bytes of each block that is cached then, or was before.

    Raises:
        ObsfsError: A block cannot be downloaded.
    """
    pool = WorkerPool(_FILES)
    pool.run(tasks_for(wanted, lambda one: engine.fill(one.version, one.blocks, advance, pool.check)))


def read_profile(bucket: ObjectStore, model: Model, profile: str) -> list[Wanted]:
    """Return the blocks in a profile of a model.

    Raises:
        NotFoundError: There is no such profile. It names those that exist.
        UsageError: It is damaged.
    """
    prefix = f"{model.name.prefix}{_PROFILES}"
    try:
        data = bucket.get(f"{prefix}{_checked(profile)}.json").data
    except NotFoundError:
        keys = [info.key for page in bucket.list(prefix) for info in page.objects]
        known = [key[len(prefix) :].removesuffix(".json") for key in keys]
        raise NotFoundError(f"{model.name} has no profile {profile!r}", suggest_names(profile, known)) from None
    try:
        ranges = msgspec.json.decode(data, type=_Profile)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        raise UsageError(f"profile {profile!r} of {model.name} cannot be read", "record it again") from None
    wanted = []
    for file in model.manifest.files:
        version = model.version_of(file, bucket.endpoint)
        last = block_count(version.size)
        found: list[int] = []
        for start, stop in sorted(ranges.get(file.path, ())):
            first = max(start // BLOCK, found[-1] + 1 if found else 0)
            found.extend(range(first, min(block_count(max(stop, 0)), last)))
        wanted.append(Wanted(version, found))
    return [one for one in wanted if one.blocks]


def record_profile(bucket: ObjectStore, cache: Cache, model: Model, profile: str) -> int:
    """Record which blocks of a model are cached now, as a profile in the bucket. Return their size in bytes."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    total = 0
    for file in model.manifest.files:
        version = model.version_of(file, bucket.endpoint)
        present = cache.present_blocks(version)
        found = [(run.start * BLOCK, min(run.stop * BLOCK, version.size)) for run in runs(present)]
        total += sum(stop - start for start, stop in found)
        if found:
            ranges[file.path] = found
    if not ranges:
        raise UsageError(f"nothing of {model.name} is in the cache", "load it through a mount, then record")
    key = f"{model.name.prefix}{_PROFILES}{_checked(profile)}.json"
    bucket.put(key, json.dumps(ranges).encode())
    return total


def _checked(profile: str) -> str:
    if not _NAME.fullmatch(profile):
        raise UsageError(f"{profile!r} is no name for a profile", "letters, digits, dots and hyphens")
    return profile
