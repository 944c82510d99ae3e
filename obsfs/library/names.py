"""How a model is named: ``obs://BUCKET/LIBRARY/NAME[@VERSION]``. Pure.

The model ``NAME@VERSION`` lies in the directory ``NAME@VERSION/``, and never changes once it is published; ``NAME``
lies in ``NAME/``, and is replaced in place when it is pushed again. What obsfs itself keeps of a model lies in
``.obsfs/`` in its directory.
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
"""The directory, in that of a model, for what is not the model's."""
MANIFEST = f"{METADATA_DIRECTORY}manifest.json"
LEASE = f"{METADATA_DIRECTORY}claim.json"
"""What a publisher holds while the files of a model appear."""

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_NEAREST = 3


@dataclass(frozen=True)
class ModelName:
    """Where a model is. `library` is the prefix that it lies in: empty, or ending in ``/``."""

    scheme: str
    bucket: str
    library: str
    name: str
    version: str | None = None

    @property
    def label(self) -> str:
        """``NAME`` or ``NAME@VERSION``, as its directory is called."""
        return f"{self.name}@{self.version}" if self.version else self.name

    @property
    def prefix(self) -> str:
        """What the keys of its files begin with."""
        return f"{self.library}{self.label}/"

    @property
    def address(self) -> Address:
        """The place in the bucket."""
        return Address(self.scheme, self.bucket, self.prefix)

    @property
    def manifest_key(self) -> str:
        """Where its manifest is."""
        return f"{self.prefix}{MANIFEST}"

    def at(self, version: str | None) -> ModelName:
        """The same name with another version."""
        return replace(self, version=version)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.library}{self.label}"


def parse_model(text: str, library: str | None = None) -> ModelName:
    """A model's URL, or its name alone when there is a `library` (``obs://BUCKET/PREFIX``). Raises UsageError."""
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
    """Whether this is an address in a bucket, by its scheme."""
    return text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def split_label(label: str) -> tuple[str, str | None] | None:
    """Name and version of a directory's name; None when it is no model's."""
    name, at, version = label.partition("@")
    if not is_valid_name(name) or f"{name}/" == METADATA_DIRECTORY or (at and not _VERSION.fullmatch(version)):
        return None
    return name, version or None


def is_safe_path(path: str) -> bool:
    """Whether a file of a model may be called so, relative to its directory: it stays inside, and is not obsfs's."""
    return all(map(is_valid_name, path.split("/"))) and not f"{path}/".startswith(METADATA_DIRECTORY)


def matches_patterns(path: str, allow: Sequence[str], ignore: Sequence[str]) -> bool:
    """As in huggingface_hub: patterns of fnmatch; one that ends in ``/`` means everything below."""
    patterns = [[f"{pattern}*" if pattern.endswith("/") else pattern for pattern in some] for some in (allow, ignore)]
    allowed, ignored = patterns
    if allowed and not any(fnmatch(path, pattern) for pattern in allowed):
        return False
    return not any(fnmatch(path, pattern) for pattern in ignored)


def oldest_first(versions: Iterable[tuple[float, str]]) -> list[str]:
    """Versions, each with when it was made, the oldest first; of two at the same time, ``v2`` before ``v10``."""
    return [version for _, version in sorted(versions, key=lambda one: (one[0], natural_sort_key(one[1])))]


def suggest_names(name: str, known: Iterable[str]) -> str:
    """The known names most like `name`, as text for an error."""
    found = sorted(set(known), key=natural_sort_key)
    if not found:
        return "there is none yet"
    if close := difflib.get_close_matches(name, found, _NEAREST, 0.4):
        return f"there is {', '.join(close)}"
    others = len(found) - 1
    return f"there is {found[-1]}, and {others} other{'s' * (others > 1)}" if others else f"there is only {found[0]}"
