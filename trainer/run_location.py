"""The location in a bucket where a run publishes, and the checkpoints that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError

import obsfs
from obsfs.plugin import UnavailableError, UsageError, first_line, visible

_MANIFEST = ".obsfs/manifest.json"
STEP = re.compile(r"checkpoint-(\d+)")
_BUCKETS = ("obs", "s3")
_SCHEMES = {*_BUCKETS, "hf", "ms", "gs", "oss", "az", "file", "http", "https"}
"""Schemes that mean a URL even with a slash missing; taken as a path, it would become a local directory."""


class RunLocation(NamedTuple):
    """The location where a run publishes. Its methods raise UnavailableError if the bucket refuses a request.

    Args:
        url: ``obs://BUCKET/NAME``.
        settings: Settings of obsfs for the bucket.
    """

    url: str
    settings: dict[str, Any]

    def version(self, step: int) -> str:
        """Return the URL of the checkpoint of a step."""
        return f"{self.url}@checkpoint-{step}"

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints there, in order."""
        found = []
        with self._files("read") as (fs, path), suppress(FileNotFoundError):
            parent, _, name = path.rpartition("/")
            for entry in fs.ls(parent, detail=False):
                label, at, version = entry.rstrip("/").rpartition("/")[2].partition("@")
                step = STEP.fullmatch(version)
                if at and label == name and step and fs.exists(f"{entry}/{_MANIFEST}"):
                    found.append(int(step[1]))
        return sorted(found)

    def is_taken(self) -> bool:
        """Return whether anything is stored there."""
        with self._files("read") as (fs, path):
            # Some servers leave an empty directory behind, and list it as an empty object.
            found = fs.find(path, detail=True).items()
            return any(name != path or one["size"] for name, one in found) or bool(self.steps())

    def is_published(self) -> bool:
        """Return whether something complete is published there."""
        with self._files("read") as (fs, path):
            return bool(fs.exists(f"{path}/{_MANIFEST}"))

    def check(self) -> None:
        """Check that the location can be written, by writing a small object and deleting it."""
        with self._files("written") as (fs, path):
            fs.pipe_file(f"{path}/.obsfs/probe", b"")
            fs.rm_file(f"{path}/.obsfs/probe")

    def remove(self, step: int) -> None:
        """Delete a checkpoint, its manifest first, so that no half of it counts as a checkpoint."""
        with self._files("written") as (fs, path):
            place = f"{path}@checkpoint-{step}"
            fs.rm_file(f"{place}/{_MANIFEST}")
            fs.invalidate_cache()
            for entry in fs.find(place):
                fs.rm_file(entry)

    @contextmanager
    def _files(self, doing: str) -> Iterator[tuple[Any, str]]:
        """Give the file system of the bucket, with no cached listing, and the path of the location in it."""
        try:
            fs = obsfs.OBSFileSystem(**self.settings)
            fs.invalidate_cache()
            yield fs, self.url.partition("://")[2]
        except (OSError, ValueError, BotoCoreError) as error:
            reason = first_line(error)
            raise UnavailableError(
                f"{self.url} cannot be {doing} ({reason})", "see the README on endpoints and keys"
            ) from None


def check_output(output: str) -> None:
    """Raise UsageError for a URL that is no location in a bucket. Does not look into a bucket."""
    scheme, colon, rest = output.partition(":")
    is_url = rest.startswith("//")
    if not colon or not (is_url or (scheme.lower() in _SCHEMES and not Path(output).exists())):
        return
    if scheme not in _BUCKETS or not is_url:
        raise UsageError(
            f"output: {visible(output)} is no place that can be written", "give a directory, or obs://BUCKET/NAME"
        )
    if "/" not in rest.strip("/"):
        raise UsageError(f"output: {visible(output)} is a bucket", f"name a place in it: {output.rstrip('/')}/NAME")


def run_location(output: str, settings: dict[str, Any]) -> RunLocation | None:
    """Return the location in a bucket for an output that is a URL or a path on a mount; None for a local directory.

    Raises:
        UsageError: The output cannot be written.
    """
    check_output(output)
    if "://" in output:
        return RunLocation(output.rstrip("/"), settings)
    try:
        found = obsfs.on_mount(Path(output).expanduser())
    except OSError as error:
        raise UsageError(f"{output} cannot be written ({error.strerror})", "choose another output") from None
    if found is None:
        return None
    check_output(found.url)
    return RunLocation(found.url, {**found.settings, **settings})
