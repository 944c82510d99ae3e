"""A library as it was at a time, for a mount with ``--snapshot``. Later changes in the bucket do not show.

Each model is shown by its manifest: every version that was published by then as ``NAME@VERSION``, and as ``NAME`` the
model in ``NAME/``, or else the newest of those versions. Reads are pinned to the ETags of the manifests: a file that
was replaced since gives ESTALE, never other bytes. In a bucket with versioning it is still read, by the version id that
the manifest has.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from obsfs.errors import NotFoundError, UsageError
from obsfs.library import catalog
from obsfs.library.catalog import Model
from obsfs.library.manifest import parse_manifest
from obsfs.library.names import MANIFEST, ModelName, oldest_first, split_label, suggest_names
from obsfs.store.address import Address
from obsfs.store.base import ObjectStore
from obsfs.store.types import ObjectInfo, ObjectVersion, Page, epoch

log = logging.getLogger(__name__)

FORMAT = 1
"""Format number of :meth:`Snapshot.to_json`."""


class Snapshot:
    """A tree of names (a :class:`~obsfs.vfs.tree.Source`) that stand for fixed object versions.

    `files` are the names, as keys under the prefix that is mounted, with the versions and their mtimes.
    """

    def __init__(self, files: Iterable[tuple[str, ObjectVersion, float]]) -> None:
        self._versions: dict[str, ObjectVersion] = {}
        self._infos: dict[str, dict[str, ObjectInfo]] = {}
        self._below: dict[str, set[str]] = {}
        self._mtimes: dict[str, float] = {}
        for key, version, mtime in files:
            self._versions[key] = version
            self._mtimes[key] = mtime
            prefix = key[: key.rfind("/") + 1]
            self._infos.setdefault(prefix, {})[key] = ObjectInfo(key, version.size, mtime, version.etag)
            while prefix:
                parent = prefix[: prefix.rstrip("/").rfind("/") + 1]
                self._below.setdefault(parent, set()).add(prefix)
                prefix = parent

    def list(self, prefix: str) -> Iterator[Page]:
        """Yield one page: the files and prefixes directly under a prefix."""
        infos = self._infos.get(prefix, {})
        yield Page([infos[key] for key in sorted(infos)], sorted(self._below.get(prefix, ())))

    def head(self, key: str) -> ObjectInfo:
        """Return a file. Raises NotFoundError."""
        info = self._infos.get(key[: key.rfind("/") + 1], {}).get(key)
        if info is None:
            raise NotFoundError(f"{key} does not exist")
        return info

    def version(self, info: ObjectInfo) -> ObjectVersion:
        """Return the object version of a file. Raises KeyError if the file is not of this snapshot."""
        return self._versions[info.key]

    def to_json(self) -> bytes:
        """Return the snapshot as JSON, for :func:`restore` in another process."""
        files = [
            [key, version.key, version.etag, version.size, version.version_id, self._mtimes[key]]
            for key, version in self._versions.items()
        ]
        return json.dumps({"format": FORMAT, "files": files}).encode()


def take(bucket: ObjectStore, address: Address, wanted: str) -> Snapshot:
    """Return the state of a library, or of one model.

    Args:
        bucket: The bucket.
        address: The library, or the model.
        wanted: A time (ISO 8601, or ``now``), or a version.

    Raises:
        UsageError: Nothing was published by that time, or there is no such version.
    """
    models = _models(bucket, address)
    if not models:
        raise UsageError(f"there is no published model in {address}", "obsfs push makes one")
    moment = parse_time(wanted)
    if moment is None:
        return Snapshot(_of_version(bucket, address, models, wanted))
    models = [older for model in models if (older := _as_of(bucket, model, moment))]
    if not models:
        raise UsageError(f"no model of {address} is as old as {wanted}", "see `obsfs models show NAME`")
    return Snapshot(_of_time(bucket, address, models))


def check(data: bytes) -> None:
    """Raise ValueError for what :func:`restore` cannot read."""
    _read(data)


def _read(data: bytes) -> dict[str, Any]:
    found = json.loads(data)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("the snapshot was written by another version of obsfs")
    return found


def restore(data: bytes, bucket: ObjectStore) -> Snapshot:
    """Return the snapshot that :meth:`Snapshot.to_json` wrote. ValueError: it is something else, or a later format."""
    try:
        found = _read(data)
        files = []
        for shown, key, etag, size, version_id, mtime in found["files"]:
            version = bucket.version(ObjectInfo(key, size, mtime, etag))
            files.append((str(shown), replace(version, version_id=version_id), float(mtime)))
        return Snapshot(files)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def parse_time(text: str) -> datetime | None:
    """Return a time in UTC; None if the text is not a time: then it is the name of a version."""
    if text == "now":
        return datetime.now(UTC)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _models(bucket: ObjectStore, address: Address) -> list[Model]:
    """Return the published models of a library; for the address of a model, it and its versions."""
    own = _own_name(address)
    if own is not None:
        plain = catalog.read_model(bucket, own)
        if own.version:
            return [plain] if plain else []
        found = [*([plain] if plain else []), *catalog.versions(bucket, own)]
        if found:
            return found
    return [model for model in catalog.list_models(bucket, address)[0] if model.etag]


def _own_name(address: Address) -> ModelName | None:
    parent, _, label = address.prefix.rstrip("/").rpartition("/")
    parts = split_label(label) if label else None
    return ModelName(address.scheme, address.bucket, f"{parent}/" if parent else "", *parts) if parts else None


def _as_of(bucket: ObjectStore, model: Model, moment: datetime) -> Model | None:
    """Return a model as it was then: as it is now, or, in a bucket with versioning, by an older manifest."""
    if model.manifest.created <= moment:
        return model
    for content in bucket.list_versions(model.name.manifest_key):
        try:
            manifest = parse_manifest(content.data, f"{model.name}/{MANIFEST}")
        except UsageError as error:
            log.warning("%s", error)
            continue
        if manifest.created <= moment:
            return Model(model.name, manifest, content.etag)
    return None


def _of_version(
    bucket: ObjectStore, address: Address, models: list[Model], wanted: str
) -> Iterator[tuple[str, ObjectVersion, float]]:
    chosen = [model for model in models if model.name.version == wanted]
    if not chosen:
        known = [model.name.version for model in models if model.name.version]
        raise UsageError(f"no model of {address} has a version {wanted!r}", suggest_names(wanted, known))
    for model in chosen:
        yield from _files(bucket, address, model, model.name.at(None))


def _of_time(bucket: ObjectStore, address: Address, models: list[Model]) -> Iterator[tuple[str, ObjectVersion, float]]:
    by_name: dict[ModelName, dict[str | None, Model]] = {}
    for model in models:
        by_name.setdefault(model.name.at(None), {})[model.name.version] = model
    for name, versions in by_name.items():
        for model in versions.values():
            yield from _files(bucket, address, model, model.name)
        if None not in versions:
            order = oldest_first(
                (model.manifest.created.timestamp(), str(version)) for version, model in versions.items()
            )
            yield from _files(bucket, address, versions[order[-1]], name)


def _files(
    bucket: ObjectStore, address: Address, model: Model, shown: ModelName
) -> Iterator[tuple[str, ObjectVersion, float]]:
    """Yield the files of a model under the name that it is shown by."""
    # If one model is mounted, its other versions are outside the mount.
    if not shown.prefix.startswith(address.prefix):
        return
    for file in model.manifest.files:
        yield f"{shown.prefix}{file.path}", model.version_of(file, bucket.endpoint), epoch(model.manifest.created)
