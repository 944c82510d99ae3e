"""Find data: in files, directories, a bucket, or on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import obsfs
from obsfs.plugin import UsageError, first_line, visible
from trainer.data.reading import CSV_SUFFIXES, JSON_SUFFIXES, bare

BUILTIN = {
    "alpaca-en": "yahma/alpaca-cleaned",
    "alpaca-zh": "shibing624/alpaca-zh",
    "capybara": "trl-lib/Capybara",
    "ultrafeedback": "trl-lib/ultrafeedback_binarized",
    "kto-mix": "trl-lib/kto-mix-14k",
}
"""Short names of common data sets: ``LIBRARY/datasets/NAME`` in the bucket if that exists, else this one on the hub."""

_TEXT = "text"
_BUILDERS = {**dict.fromkeys((*JSON_SUFFIXES, *CSV_SUFFIXES), _TEXT), ".parquet": "parquet"}
_SHOWN = 5


class DataSource(NamedTuple):
    """Where data is, and how to read it.

    Args:
        builder: The first argument of ``datasets.load_dataset``; for text files a mark that reading.py reads them.
        files: The files, if the data is in files.
        options: Further arguments of ``datasets.load_dataset``.
        unread: A note for users on files of a directory that are not read.
    """

    builder: str
    files: Sequence[str]
    options: dict[str, Any]
    unread: str = ""

    @property
    def is_text(self) -> bool:
        """Return whether reading.py reads the files."""
        return bool(self.files) and self.builder == _TEXT


def check_name(place: str) -> None:
    """Raise UsageError for a name that cannot be data. Does not look into a bucket or on the hub."""
    if "://" not in place and place not in BUILTIN:
        find(place, {})


def find(place: str, settings: dict[str, Any]) -> DataSource:
    """Find the data that a name, a path or a URL means.

    Raises:
        UsageError: There is nothing, or nothing that can be read as data.
    """
    if place in BUILTIN:
        library = obsfs.Settings.load(**settings).library
        for suffix in ("", *_BUILDERS) if library else ():
            if found := _in_bucket(f"{str(library).rstrip('/')}/datasets/{place}{suffix}", settings):
                return found
        return DataSource(BUILTIN[place], (), {})
    if "://" in place:
        if found := _in_bucket(place, settings):
            return found
        raise UsageError(f"there is no data at {place}", "see what is there with `obsfs mount`, or push it")
    path = Path(place).expanduser()
    if path.exists():
        files = [str(one) for one in sorted(path.rglob("*")) if one.is_file()] if path.is_dir() else [str(path)]
        return _builder(place, files, {})
    if path.suffix in _BUILDERS or place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise UsageError(
            f"there is no data at {place}", "give a file, a directory, obs://BUCKET/FILE, or a name of the hub"
        )
    return DataSource(place, (), {})


def _in_bucket(url: str, settings: dict[str, Any]) -> DataSource | None:
    fs = obsfs.OBSFileSystem(**settings)
    try:
        if not fs.exists(url):
            return None
        files = [f"obs://{one}" for one in fs.find(url)] if fs.isdir(url) else [url]
    except (OSError, obsfs.ObsfsError) as error:
        raise UsageError(
            f"data {url} cannot be read ({first_line(error)})", "see the README on endpoints and keys"
        ) from None
    return _builder(url, files, {"storage_options": settings} if settings else {})


def _builder(place: str, files: list[str], options: dict[str, Any]) -> DataSource:
    files = [file for file in files if "/.obsfs/" not in file]
    for suffix, builder in _BUILDERS.items():
        if chosen := [file for file in files if bare(file).endswith(suffix)]:
            others = [file for file in files if bare(file).endswith(tuple(_BUILDERS)) and file not in chosen]
            unread = ""
            if others:
                names = ", ".join(file.rpartition("/")[2] for file in others[:_SHOWN])
                more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
                unread = visible(f"{place}: only *{suffix} is read, not {names}{more}")
            if builder != _TEXT:
                options = {"data_files": chosen, **options}
            return DataSource(builder, chosen, options, unread)
    raise UsageError(f"{place} has no data that can be read", f"it takes {', '.join(_BUILDERS)}")
