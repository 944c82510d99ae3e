"""Where in a bucket a run publishes, and which of its checkpoints are there."""

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
"""What is meant as a URL also where a slash is missing: such a directory would be made here, and nothing published."""


class RunLocation(NamedTuple):
    """Where a run publishes: ``obs://BUCKET/NAME``, and how the bucket is reached.

    Its methods raise UnavailableError for what the bucket refuses.
    """

    url: str
    settings: dict[str, Any]

    def version(self, step: int) -> str:
        """The URL of a checkpoint."""
        return f"{self.url}@checkpoint-{step}"

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are whole there, in order."""
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
        """Whether something lies there already."""
        with self._files("read") as (fs, path):
            # An empty directory, as some servers leave them and show as an empty object, is nothing.
            found = fs.find(path, detail=True).items()
            return any(name != path or one["size"] for name, one in found) or bool(self.steps())

    def is_published(self) -> bool:
        """Whether something whole lies there."""
        with self._files("read") as (fs, path):
            return bool(fs.exists(f"{path}/{_MANIFEST}"))

    def check(self) -> None:
        """Write something, and take it away."""
        with self._files("written") as (fs, path):
            fs.pipe_file(f"{path}/.obsfs/probe", b"")
            fs.rm_file(f"{path}/.obsfs/probe")

    def remove(self, step: int) -> None:
        """Take a checkpoint away: first its manifest, so that nobody takes half of it for a checkpoint."""
        with self._files("written") as (fs, path):
            place = f"{path}@checkpoint-{step}"
            fs.rm_file(f"{place}/{_MANIFEST}")
            fs.invalidate_cache()
            for entry in fs.find(place):
                fs.rm_file(entry)

    @contextmanager
    def _files(self, doing: str) -> Iterator[tuple[Any, str]]:
        """The file system of the bucket, as it is now, and the path of the place in it."""
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
    """Raise UsageError for what is meant as a URL and is no place in a bucket, without looking into one."""
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
    """The place in a bucket that an output means: by URL, or as a path on a mount; None for a local directory.

    Raises UsageError.
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
