"""Names of models: ``obs://BUCKET/LIBRARY/NAME[@VERSION]``. Pure.

The model ``NAME@VERSION`` is in the directory ``NAME@VERSION/`` and never changes once it is published. ``NAME`` is in
``NAME/`` and is replaced in place by the next push. obsfs keeps its own files of a model in ``.obsfs/`` there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch

from obsfs.access.safetensors import natural_sort_key
from obsfs.errors import UsageError
from obsfs.store.address import SCHEMES, Address, check_text, is_valid_name, parse_address

METADATA_DIRECTORY = ".obsfs/"
"""Directory of obsfs's own files, in the directory of a model."""
MANIFEST = f"{METADATA_DIRECTORY}manifest.json"
LEASE = f"{METADATA_DIRECTORY}claim.json"
"""The lease of a publisher: see :mod:`obsfs.library.lease`."""

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_NEAREST = 3


@dataclass(frozen=True)
class ModelName:
    """The place of a model. `library` is the prefix that it is in: empty, or ending in ``/``."""

    scheme: str
    bucket: str
    library: str
    name: str
    version: str | None = None

    @property
    def label(self) -> str:
        """``NAME`` or ``NAME@VERSION``: the name of its directory."""
        return f"{self.name}@{self.version}" if self.version else self.name

    @property
    def prefix(self) -> str:
        """The prefix of the keys of its files."""
        return f"{self.library}{self.label}/"

    @property
    def address(self) -> Address:
        """Its directory, as an address."""
        return Address(self.scheme, self.bucket, self.prefix)

    @property
    def manifest_key(self) -> str:
        """Key of its manifest."""
        return f"{self.prefix}{MANIFEST}"

    def at(self, version: str | None) -> ModelName:
        """Return the same name with another version."""
        return replace(self, version=version)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.library}{self.label}"


def parse_model(text: str, library: str | None = None) -> ModelName:
    """Return the model that a text names.

    Args:
        text: Its URL, or its name alone if there is a `library`.
        library: ``obs://BUCKET/PREFIX``.

    Raises:
        UsageError: It does not name a model.
    """
    check_text(text)
    if "://" not in text:
        if "@" in text.rpartition("/")[0]:
            raise UsageError(f"{text!r} names no model: a version has no '/'", "write NAME@VERSION, as in Qwen2-7B@v1")
        if not library:
            raise UsageError(
                f"{text!r} is no model of a bucket", "write obs://BUCKET/NAME, or set OBSFS_LIBRARY=obs://BUCKET/PREFIX"
            )
        try:
            text = f"{str(parse_address(library)).rstrip('/')}/{text}"
        except UsageError as error:
            raise UsageError(f"the library (--library, OBSFS_LIBRARY): {error.message}", error.remedy) from None
    address = parse_address(text)
    parent, _, label = address.prefix.rstrip("/").rpartition("/")
    model = split_label(label)
    if model is None:
        raise UsageError(
            f"{text!r} names no model",
            "write obs://BUCKET/NAME or obs://BUCKET/NAME@VERSION (letters, digits, dots, hyphens in a version)",
        )
    return ModelName(address.scheme, address.bucket, f"{parent}/" if parent else "", *model)


def is_url(text: str) -> bool:
    """Return whether a text is an address in a bucket, by its scheme."""
    return text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def split_label(label: str) -> tuple[str, str | None] | None:
    """Return name and version of a directory's name; None if a model cannot have it."""
    name, at, version = label.partition("@")
    if not is_valid_name(name) or f"{name}/" == METADATA_DIRECTORY or (at and not _VERSION.fullmatch(version)):
        return None
    return name, version or None


def is_safe_path(path: str) -> bool:
    """Return whether a file of a model may have this relative path: it stays inside and is not one of obsfs's own."""
    return all(map(is_valid_name, path.split("/"))) and not f"{path}/".startswith(METADATA_DIRECTORY)


def matches_patterns(path: str, allow: Sequence[str], ignore: Sequence[str]) -> bool:
    """Return whether a path matches one of `allow` (if there are any) and none of `ignore`.

    As in huggingface_hub, patterns are fnmatch's, and one that ends in ``/`` means everything below.
    """
    patterns = [[f"{pattern}*" if pattern.endswith("/") else pattern for pattern in some] for some in (allow, ignore)]
    allowed, ignored = patterns
    if allowed and not any(fnmatch(path, pattern) for pattern in allowed):
        return False
    return not any(fnmatch(path, pattern) for pattern in ignored)


def oldest_first(versions: Iterable[tuple[float, str]]) -> list[str]:
    """Return versions, given with their times (seconds), the oldest first; ``v2`` before ``v10`` of the same time."""
    return [version for _, version in sorted(versions, key=lambda one: (one[0], natural_sort_key(one[1])))]


def suggest_names(name: str, known: Iterable[str]) -> str:
    """Return the known names that are most like `name`, as text for an error."""
    found = sorted(set(known), key=natural_sort_key)
    if not found:
        return "there is none yet"
    if close := difflib.get_close_matches(name, found, _NEAREST, 0.4):
        return f"there is {', '.join(close)}"
    others = len(found) - 1
    return f"there is {found[-1]}, and {others} other{'s' * (others > 1)}" if others else f"there is only {found[0]}"
