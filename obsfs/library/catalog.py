"""Which models a library has, and what a name stands for.

A directory with a manifest is a model, and so is one without that has a configuration or weights in it: of that, the
bucket's own listing is all that is known.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from obsfs.access import safetensors
from obsfs.errors import ForbiddenError, NotFoundError, ObsfsError, UnavailableError, UsageError, VersionChangedError
from obsfs.library import manifest as manifests
from obsfs.library.manifest import About, File, Manifest
from obsfs.library.names import CLAIM, MANIFEST, OWN, ModelName, by_age, is_safe_path, nearest, split_label
from obsfs.store.address import Address
from obsfs.store.s3.client import Bucket
from obsfs.store.types import ObjectInfo, ObjectVersion, Page

log = logging.getLogger(__name__)

_WORKERS = 32
_HEADER = 64 << 10
_LOOKS = 8
"""Directories that are looked into for the names of models, when one is not there."""


@dataclass(frozen=True)
class Model:
    """A model as it is in the bucket. `etag` is that of its manifest; empty when it has none."""

    name: ModelName
    manifest: Manifest
    etag: str = ""

    def version_of(self, file: File, endpoint: str) -> ObjectVersion:
        """The object version that a file of it must be."""
        key = f"{self.name.prefix}{file.path}"
        return ObjectVersion(endpoint, self.name.bucket, key, file.etag, file.size, file.version_id)


class Damaged(NamedTuple):
    """A model that cannot be shown, and why."""

    name: ModelName
    error: ObsfsError


def read(bucket: Bucket, name: ModelName) -> Model | None:
    """The model of exactly this name and version, if it has a manifest. Raises UsageError for one that is damaged."""
    try:
        content = bucket.get(name.manifest_key)
    except NotFoundError:
        return None
    return Model(name, manifests.parse_manifest(content.data, f"{name}/{MANIFEST}"), content.etag)


def resolve(bucket: Bucket, name: ModelName) -> Model:
    """What a name stands for: ``NAME`` is what lies there, or else the newest of its versions.

    One that was published comes before those without a manifest. Raises NotFoundError, with the nearest names that
    there are, and UsageError for a file, with the model that it is in.
    """
    found = read(bucket, name) or _listed(bucket, name)
    if found is None and name.version is None:
        found = next(iter(reversed(versions(bucket, name) or unpublished(bucket, name))), None)
    if found is not None:
        return found
    _refuse_file(bucket, name)
    raise NotFoundError(f"there is no model {name}", _near(bucket, name))


def _refuse_file(bucket: Bucket, name: ModelName) -> None:
    """Raise UsageError when an object has just this name, with what to give instead."""
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


def _near(bucket: Bucket, name: ModelName) -> str:
    """The models whose names are most like one that is not there, as text for an error."""
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
    return nearest(name.label, known)


def _is_model(page: Page, prefix: str) -> bool:
    return f"{prefix}{OWN}" in page.prefixes or manifests.is_model(info.key[len(prefix) :] for info in page.objects)


def versions(bucket: Bucket, name: ModelName) -> list[Model]:
    """All published versions of a name that can be read, the oldest first. Raises UsageError when none can."""
    found: dict[str, Model] = {}
    damaged: UsageError | None = None
    for label in _version_labels(bucket, name):
        try:
            if model := read(bucket, name.at(label)):
                found[label] = model
        except UsageError as error:
            log.warning("%s", error)
            damaged = error
    if damaged and not found:
        raise damaged
    order = by_age((model.manifest.created.timestamp(), version) for version, model in found.items())
    return [found[version] for version in order]


def unpublished(bucket: Bucket, name: ModelName) -> list[Model]:
    """The versions of a name that lie there without a manifest, the oldest first."""
    found: dict[str, Model] = {}
    for version in _version_labels(bucket, name):
        there = name.at(version)
        page = next(bucket.list(there.prefix))
        if f"{there.prefix}{OWN}" not in page.prefixes and (model := _listed(bucket, there)):
            found[version] = model
    order = by_age((model.manifest.created.timestamp(), version) for version, model in found.items())
    return [found[version] for version in order]


def all_versions(bucket: Bucket, name: ModelName) -> list[Model]:
    """The versions of a name with a manifest and without, the oldest first."""
    found = {model.name.version or "": model for model in [*unpublished(bucket, name), *versions(bucket, name)]}
    order = by_age((model.manifest.created.timestamp(), version) for version, model in found.items())
    return [found[version] for version in order]


def nearest_directory(bucket: Bucket, place: Address) -> str:
    """The directories most like one that is not there, as text for an error."""
    above, slash, name = place.prefix.rstrip("/").rpartition("/")
    return nearest(name, _labels(bucket, f"{above}{slash}"))


def relatives(bucket: Bucket, name: ModelName) -> list[Model]:
    """What is published under a name, at all versions and without, as far as it can be read."""
    found = []
    for version in (None, *_version_labels(bucket, name)):
        with suppress(UsageError):
            if model := read(bucket, name.at(version)):
                found.append(model)
    return found


def _version_labels(bucket: Bucket, name: ModelName) -> Iterator[str]:
    for label in _labels(bucket, name.library, f"{name.name}@"):
        parts = split_label(label)
        if parts and parts[0] == name.name and parts[1]:
            yield parts[1]


def models(bucket: Bucket, library: Address) -> tuple[list[Model], list[Damaged]]:
    """Every model and version of a library, by name; and those that cannot be shown.

    Directories that are no models (those of an organisation, say) are looked into, one level deep.
    """
    found: list[Model] = []
    damaged: list[Damaged] = []
    places = list(_places(bucket, library.prefix))
    with ThreadPoolExecutor(_WORKERS) as pool:
        while places:
            looks = list(pool.map(lambda place: _look(bucket, library, *place), places))
            found += [look for look in looks if isinstance(look, Model)]
            wrong = [look for look in looks if isinstance(look, Damaged)]
            if wrong and len(wrong) == len(looks) and all(isinstance(one.error, UnavailableError) for one in wrong):
                raise wrong[0].error  # it is the server that is damaged
            damaged += wrong
            is_first = all(prefix == library.prefix for prefix, _ in places)
            places = [place for look in looks if isinstance(look, list) for place in look] if is_first else []
    return sorted(found, key=lambda model: safetensors.natural_sort_key(str(model.name))), damaged


def _labels(bucket: Bucket, library: str, start: str = "") -> Iterator[str]:
    """The names of directories in a library that begin with `start`."""
    for page in bucket.list(f"{library}{start}"):
        for prefix in page.prefixes:
            yield prefix[len(library) :].rstrip("/")


def _places(bucket: Bucket, library: str) -> Iterator[tuple[str, str]]:
    return ((library, label) for label in _labels(bucket, library) if split_label(label))


def _look(bucket: Bucket, library: Address, prefix: str, label: str) -> Model | Damaged | list[tuple[str, str]] | None:
    """The model there; or what is wrong with it; or the directories in what is no model."""
    parts = split_label(label)
    assert parts is not None
    name = ModelName(library.scheme, library.bucket, prefix, *parts)
    try:
        if model := read(bucket, name):
            return model
        pages = list(bucket.list(name.prefix))
        if manifests.is_model(info.key[len(name.prefix) :] for page in pages for info in page.objects):
            return _listed(bucket, name)
    except ObsfsError as error:
        return Damaged(name, error)
    labels = (below[len(name.prefix) :].rstrip("/") for page in pages for below in page.prefixes)
    return [(name.prefix, inner) for inner in labels if split_label(inner)]


def _listed(bucket: Bucket, name: ModelName) -> Model | None:
    """A model without a manifest, from the bucket's listing."""
    found = list(bucket.walk(name.prefix))
    infos = [info for info in found if is_safe_path(info.key[len(name.prefix) :])]
    if not infos or any(info.key == f"{name.prefix}{CLAIM}" for info in found):
        return None  # of one that is being published, or whose publisher was killed, some files may be there
    files = tuple(File(path=info.key[len(name.prefix) :], size=info.size, etag=info.etag) for info in infos)
    newest = datetime.fromtimestamp(int(max(info.mtime for info in infos)), UTC)
    about = _about(bucket, {info.key[len(name.prefix) :]: info for info in infos})
    return Model(name, Manifest(name=name.name, version=name.version, created=newest, model=about, files=files))


def _about(bucket: Bucket, infos: dict[str, ObjectInfo]) -> About:
    """What a model is, read from its configuration and the headers of its weights."""
    try:
        return manifests.look({path: (info.size, _reading(bucket, info)) for path, info in infos.items()})
    except (NotFoundError, VersionChangedError):
        return About()


def _reading(bucket: Bucket, info: ObjectInfo) -> safetensors.Read:
    """Bytes of an object; its start is fetched in one go, as most headers need no more."""
    version = bucket.version(info)
    start: list[bytes] = []

    def read(offset: int, size: int) -> bytes:
        if offset + size > _HEADER:
            return bucket.read_range(version, offset, offset + size)
        if not start:
            start.append(bucket.read_range(version, 0, min(_HEADER, info.size)))
        return start[0][offset : offset + size]

    return read
