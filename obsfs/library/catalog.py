"""Which models a library has, and which model a name stands for.

A directory with a manifest is a model. A directory without one is a model if it has a configuration or weights: then
only the bucket's listing is known of it.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from obsfs.access import safetensors
from obsfs.errors import ForbiddenError, NotFoundError, ObsfsError, UnavailableError, UsageError, VersionChangedError
from obsfs.library import manifest as manifests
from obsfs.library.manifest import File, Manifest, ModelInfo
from obsfs.library.names import (
    LEASE,
    MANIFEST,
    METADATA_DIRECTORY,
    ModelName,
    is_safe_path,
    oldest_first,
    split_label,
    suggest_names,
)
from obsfs.store.address import Address
from obsfs.store.base import ObjectStore
from obsfs.store.types import ObjectInfo, ObjectVersion, Page

log = logging.getLogger(__name__)

_WORKERS = 32
_HEADER = 64 << 10
_LOOKS = 8
"""Most directories that are listed to suggest names, if a model does not exist."""


@dataclass(frozen=True)
class Model:
    """A model in the bucket. `etag` is its manifest's; empty if it has none."""

    name: ModelName
    manifest: Manifest
    etag: str = ""

    def version_of(self, file: File, endpoint: str) -> ObjectVersion:
        """Return the object version that a file of the model must have."""
        key = f"{self.name.prefix}{file.path}"
        return ObjectVersion(endpoint, self.name.bucket, key, file.etag, file.size, file.version_id)


class UnreadableModel(NamedTuple):
    """A model that cannot be read, and why."""

    name: ModelName
    error: ObsfsError


def read_model(bucket: ObjectStore, name: ModelName) -> Model | None:
    """Return the model of exactly this name and version; None without a manifest. UsageError: it is damaged."""
    try:
        content = bucket.get(name.manifest_key)
    except NotFoundError:
        return None
    return Model(name, manifests.parse_manifest(content.data, f"{name}/{MANIFEST}"), content.etag)


def resolve(bucket: ObjectStore, name: ModelName) -> Model:
    """Return the model that a name stands for.

    ``NAME`` stands for the model in ``NAME/``, or else for its newest version; published ones come first.

    Raises:
        NotFoundError: There is none. It names the nearest ones.
        UsageError: It is a file. It names the model that has it.
    """
    found = read_model(bucket, name) or _listed(bucket, name)
    if found is None and name.version is None:
        found = next(iter(reversed(versions(bucket, name) or versions_without_manifest(bucket, name))), None)
    if found is not None:
        return found
    _refuse_file(bucket, name)
    raise NotFoundError(f"there is no model {name}", _near(bucket, name))


def _refuse_file(bucket: ObjectStore, name: ModelName) -> None:
    """Raise UsageError if an object has exactly this name, with what to give instead."""
    try:
        bucket.head(name.prefix.rstrip("/"))
    except (NotFoundError, ForbiddenError):
        return
    above = name.library.rstrip("/")
    while above:
        prefix = f"{above}/"
        if _is_model(next(bucket.list(prefix)), prefix):
            inner = name.prefix.rstrip("/")[len(prefix) :]
            model = Address(name.scheme, name.bucket, above)
            raise UsageError(f"{name} is a file, not a model", f"give {model}, the model that it is in ({inner})")
        above = above.rpartition("/")[0]
    raise UsageError(f"{name} is a file, and in no model", "give a model, or read the file through a mount or fsspec")


def _near(bucket: ObjectStore, name: ModelName) -> str:
    """Return the models whose names are most like one that does not exist, as text for an error."""
    labels = list(_labels(bucket, name.library))
    close = [label for label in labels if (parts := split_label(label)) and parts[0] == name.name]
    close = close or difflib.get_close_matches(name.label, labels, _LOOKS, 0.4)
    known: list[str] = []
    for label in dict.fromkeys([*close[:_LOOKS], *labels[-_LOOKS:]]):
        if known and label not in close:
            break
        prefix = f"{name.library}{label}/"
        page = next(bucket.list(prefix))
        if _is_model(page, prefix):
            known.append(label)
        else:  # perhaps an organisation's, with the model in it
            inner = [below[len(name.library) :].rstrip("/") for below in page.prefixes]
            known += [one for one in inner if label in close or one.startswith(f"{label}/{name.name}")]
    if labels and not known:
        return f"see `obsfs models {Address(name.scheme, name.bucket, name.library)}`"
    return suggest_names(name.label, known)


def _is_model(page: Page, prefix: str) -> bool:
    return f"{prefix}{METADATA_DIRECTORY}" in page.prefixes or manifests.is_model(
        info.key[len(prefix) :] for info in page.objects
    )


def versions(bucket: ObjectStore, name: ModelName) -> list[Model]:
    """Return the published versions of a name that can be read, the oldest first. UsageError: none can be read."""
    found: dict[str, Model] = {}
    damaged: UsageError | None = None
    for label in _version_labels(bucket, name):
        try:
            if model := read_model(bucket, name.at(label)):
                found[label] = model
        except UsageError as error:
            log.warning("%s", error)
            damaged = error
    if damaged and not found:
        raise damaged
    return _by_age(found.values())


def versions_without_manifest(bucket: ObjectStore, name: ModelName) -> list[Model]:
    """Return the versions of a name that have no manifest, the oldest first."""
    found: dict[str, Model] = {}
    for version in _version_labels(bucket, name):
        there = name.at(version)
        page = next(bucket.list(there.prefix))
        if f"{there.prefix}{METADATA_DIRECTORY}" not in page.prefixes and (model := _listed(bucket, there)):
            found[version] = model
    return _by_age(found.values())


def all_versions(bucket: ObjectStore, name: ModelName) -> list[Model]:
    """Return the versions of a name with a manifest and without, the oldest first."""
    found = [*versions_without_manifest(bucket, name), *versions(bucket, name)]
    return _by_age({model.name.version: model for model in found}.values())


def _by_age(models: Iterable[Model]) -> list[Model]:
    """Return versions of one name, the oldest first."""
    by_version = {str(model.name.version): model for model in models}
    order = oldest_first((model.manifest.created.timestamp(), version) for version, model in by_version.items())
    return [by_version[version] for version in order]


def nearest_directory(bucket: ObjectStore, place: Address) -> str:
    """Return the directories whose names are most like one that does not exist, as text for an error."""
    above, slash, name = place.prefix.rstrip("/").rpartition("/")
    return suggest_names(name, _labels(bucket, f"{above}{slash}"))


def published_under(bucket: ObjectStore, name: ModelName) -> list[Model]:
    """Return what is published under a name, with each version and without one, as far as it can be read."""
    found = []
    for version in (None, *_version_labels(bucket, name)):
        with suppress(UsageError):
            if model := read_model(bucket, name.at(version)):
                found.append(model)
    return found


def _version_labels(bucket: ObjectStore, name: ModelName) -> Iterator[str]:
    for label in _labels(bucket, name.library, f"{name.name}@"):
        parts = split_label(label)
        if parts and parts[0] == name.name and parts[1]:
            yield parts[1]


def list_models(bucket: ObjectStore, library: Address) -> tuple[list[Model], list[UnreadableModel]]:
    """Return every model and version of a library, by name; and those that cannot be read.

    Directories that are not models, such as those of organisations, are listed too, one level deep.
    """
    found: list[Model] = []
    damaged: list[UnreadableModel] = []
    places = list(_places(bucket, library.prefix))
    with ThreadPoolExecutor(_WORKERS) as pool:
        while places:
            looks = list(pool.map(lambda place: _inspect_directory(bucket, library, *place), places))
            found += [look for look in looks if isinstance(look, Model)]
            wrong = [look for look in looks if isinstance(look, UnreadableModel)]
            if wrong and len(wrong) == len(looks) and all(isinstance(one.error, UnavailableError) for one in wrong):
                raise wrong[0].error  # the server fails, not the models
            damaged += wrong
            is_first = all(prefix == library.prefix for prefix, _ in places)
            places = [place for look in looks if isinstance(look, list) for place in look] if is_first else []
    return sorted(found, key=lambda model: safetensors.natural_sort_key(str(model.name))), damaged


def _labels(bucket: ObjectStore, library: str, start: str = "") -> Iterator[str]:
    """Yield the names of directories in a library that begin with `start`."""
    for page in bucket.list(f"{library}{start}"):
        for prefix in page.prefixes:
            yield prefix[len(library) :].rstrip("/")


def _places(bucket: ObjectStore, library: str) -> Iterator[tuple[str, str]]:
    return ((library, label) for label in _labels(bucket, library) if split_label(label))


def _inspect_directory(
    bucket: ObjectStore, library: Address, prefix: str, label: str
) -> Model | UnreadableModel | list[tuple[str, str]] | None:
    """Return the model in a directory, or why it cannot be read; if it is not a model, the directories in it."""
    parts = split_label(label)
    assert parts is not None
    name = ModelName(library.scheme, library.bucket, prefix, *parts)
    try:
        if model := read_model(bucket, name):
            return model
        pages = list(bucket.list(name.prefix))
        if manifests.is_model(info.key[len(name.prefix) :] for page in pages for info in page.objects):
            return _listed(bucket, name)
    except ObsfsError as error:
        return UnreadableModel(name, error)
    labels = (below[len(name.prefix) :].rstrip("/") for page in pages for below in page.prefixes)
    return [(name.prefix, inner) for inner in labels if split_label(inner)]


def _listed(bucket: ObjectStore, name: ModelName) -> Model | None:
    """Return a model without a manifest, from the bucket's listing."""
    found = list(bucket.walk(name.prefix))
    infos = [info for info in found if is_safe_path(info.key[len(name.prefix) :])]
    if not infos or any(info.key == f"{name.prefix}{LEASE}" for info in found):
        return None  # it is being published, or its publisher was killed: some files may be missing
    files = tuple(File(path=info.key[len(name.prefix) :], size=info.size, etag=info.etag) for info in infos)
    newest = datetime.fromtimestamp(int(max(info.mtime for info in infos)), UTC)
    about = _model_info(bucket, {info.key[len(name.prefix) :]: info for info in infos})
    return Model(name, Manifest(name=name.name, version=name.version, created=newest, model=about, files=files))


def _model_info(bucket: ObjectStore, infos: dict[str, ObjectInfo]) -> ModelInfo:
    """Return facts about a model, from its configuration and the headers of its weights."""
    try:
        return manifests.inspect_model({path: (info.size, _reading(bucket, info)) for path, info in infos.items()})
    except (NotFoundError, VersionChangedError):
        return ModelInfo()


def _reading(bucket: ObjectStore, info: ObjectInfo) -> safetensors.Read:
    """Return what reads bytes of an object. Its start is fetched at once: most headers need no more."""
    version = bucket.version(info)
    start: list[bytes] = []

    def read(offset: int, size: int) -> bytes:
        if offset + size > _HEADER:
            return bucket.read_range(version, offset, offset + size)
        if not start:
            start.append(bucket.read_range(version, 0, min(_HEADER, info.size)))
        return start[0][offset : offset + size]

    return read
