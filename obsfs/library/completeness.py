"""Whether a model is complete, by its small files and the headers of its weights. No weights are read. Pure.

Checked are: the header of each safetensors file, and whether its tensors fill the file; whether other weights are empty
or truncated; whether configurations are JSON; and whether the shards exist that an index, or the name of another shard,
names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from obsfs.access import safetensors
from obsfs.errors import UsageError
from obsfs.library.manifest import ADAPTER, CONFIG, WEIGHTS

_OBJECTS = {
    *(CONFIG, ADAPTER, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "preprocessor_config.json", "processor_config.json", "model_index.json"),
}
"""Files that transformers, PEFT and diffusers read as one JSON object."""
_INDEX = re.compile(r"(?P<whole>[^/]*)\.index(\.[^./]+)?\.json")
"""``model.safetensors.index.json`` and, of diffusers, ``model.safetensors.index.fp16.json``."""
_JOINED = ("model.", "pytorch_model.", "diffusion_pytorch_model.")
"""How the names of transformers' and diffusers' weights in one file begin."""
_SHARD = re.compile(r"(?P<start>.*)(?P<number>\d{5})-of-(?P<total>\d{5})(?P<end>\.[^/]*)")
_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a pointer of Git LFS begins: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""
_ZIP, _ZIP_END, _ZIP_TAIL = b"PK\x03\x04", b"PK\x05\x06", 22 + 65_535
"""torch.save writes zip archives, which end in a directory of their entries (PKWARE's APPNOTE.TXT, 4.3.16)."""
MAX_JSON = 64 << 20
"""Most bytes of a JSON file that is read. The largest tokenizers have 30 MiB."""

Read = Callable[[int, int], bytes]
"""Returns bytes of a file: (offset, size). Raises ObsfsError."""


class Problem(NamedTuple):
    """What is wrong with a file: the rest of a sentence that begins with its path."""

    path: str
    reason: str


class Inspection(NamedTuple):
    """Result of :func:`inspect_files`.

    `headers` has the header of each valid safetensors file, by its path: ``{name: {dtype, shape, data_offsets}}``.
    """

    problems: list[Problem]
    headers: dict[str, dict[str, Any]]


def inspect_files(
    files: Mapping[str, tuple[int, Read]], *, max_json: int = MAX_JSON, every_loader: bool = True
) -> Inspection:
    """Check whether a model is complete.

    Args:
        files: Size in bytes of each file, and what reads it, by their paths.
        max_json: Larger JSON files (bytes) are not read.
        every_loader: Whether every loader must be able to load it, or only transformers and diffusers. Those read no
            index of a file that lies there whole (transformers 5.24, ``_get_resolved_checkpoint_files``). vLLM and
            SGLang do, and take no weights but those of its shards (vLLM 0.9, ``filter_duplicate_safetensors_files``).

    Raises:
        ObsfsError: A file cannot be read.
    """
    problems: list[Problem] = []
    headers: dict[str, dict[str, Any]] = {}
    indexes: dict[str, Any] = {}
    for path in sorted(files):
        size, read = files[path]
        name = path.rpartition("/")[2]
        is_index = _INDEX.fullmatch(name) is not None
        try:
            if path.endswith(WEIGHTS):
                _check_start(size, read)
            if path.endswith(safetensors.SUFFIX):
                headers[path] = safetensors.checked_header(size, read)
            elif (name in _OBJECTS or is_index) and size <= max_json:
                found = _object(read(0, size))
                if is_index:
                    indexes[path] = found
        except ValueError as error:
            problems.append(Problem(path, str(error)))
    for path, index in indexes.items():
        problems += _index_faults(path, index, files, headers, every_loader=every_loader)
    return Inspection(problems + list(_series_faults(files, indexes)), headers)


def require_complete(found: Inspection, where: str, remedy: str) -> None:
    """Raise UsageError, which names the first wrong file, if a model is not complete.

    Args:
        found: Its inspection.
        where: Its directory or URL, for the error.
        remedy: What to do, for the error.
    """
    for path, reason in found.problems[:1]:
        others = len(found.problems) - 1
        more = f" (and {others} more {'file' if others == 1 else 'files'})" if others else ""
        raise UsageError(f"{where.rstrip('/')}/{path} {reason}{more}", remedy)


def _check_start(size: int, read: Read) -> None:
    """Raise ValueError for weights that are empty, a Git LFS pointer, or a truncated zip archive."""
    if not size:
        raise ValueError("is empty")
    start = read(0, min(size, len(_POINTER)))
    if start == _POINTER:
        raise ValueError("is a pointer of Git LFS, not the file: git lfs pull fetches it")
    tail = min(size, _ZIP_TAIL)
    if start.startswith(_ZIP) and _ZIP_END not in read(size - tail, tail):
        raise ValueError("is cut off: the directory at its end is missing")


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data.decode())
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})" if data.strip() else "is empty") from None
    except RecursionError:
        raise ValueError("is not JSON (it is nested too deep)") from None
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")
    return found


def _index_faults(
    path: str,
    index: Mapping[str, Any],
    files: Mapping[str, object],
    headers: Mapping[str, Mapping[str, Any]],
    *,
    every_loader: bool,
) -> Iterator[Problem]:
    """Yield what is wrong with an index of shards that loaders read, and with its shards."""
    directory, slash, name = path.rpartition("/")
    below = f"{directory}{slash}"
    match = _INDEX.fullmatch(name)
    assert match is not None
    joined = match["whole"]
    beside = {other for other in files if other.rpartition("/")[0] == directory}
    is_second = not joined.endswith(safetensors.SUFFIX) and any(one.endswith(safetensors.SUFFIX) for one in beside)
    is_joined = f"{below}{joined}" in beside
    if is_second or (is_joined and not every_loader):
        return  # nobody reads it: loaders take safetensors where they find them
    stale = f" (remove {name} if {joined} has all weights: some loaders read both)" if is_joined else ""
    shards = index.get("weight_map")
    if not shards or not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        yield Problem(path, f"names no shards (weight_map){stale}")
        return
    if joined.startswith(_JOINED) and not isinstance(index.get("metadata"), dict):
        yield Problem(path, f"has no metadata, which transformers and diffusers read{stale}")
    for shard in sorted(set(shards.values())):
        if f"{below}{shard}" not in files:
            yield Problem(f"{below}{shard}", f"is missing, and {name} names it{stale}")
    for tensor, shard in shards.items():
        if tensor not in headers.get(f"{below}{shard}", {tensor: None}):
            yield Problem(f"{below}{shard}", f"has no tensor {tensor!r}, where {name} says it is{stale}")
            return


def _series_faults(files: Mapping[str, object], indexes: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """Yield shards that are missing, by the names of others, if there is no index."""
    series: dict[tuple[str, str, str], set[int]] = {}
    for path in files:
        if path.endswith(WEIGHTS) and (match := _SHARD.fullmatch(path)):
            series.setdefault((match["start"], match["total"], match["end"]), set()).add(int(match["number"]))
    directories = {path.rpartition("/")[0] for path in indexes}
    for (start, total, end), numbers in series.items():
        if start.rpartition("/")[0] in directories:
            continue
        first = 0 if 0 in numbers else 1
        for number in range(first, first + int(total)):
            if number not in numbers:
                yield Problem(
                    f"{start}{number:05}-of-{total}{end}", f"is missing, and others of {int(total)} are there"
                )
