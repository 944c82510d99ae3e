"""The manifest of a model: its files, with their sizes and hashes. Pure.

It is ``.obsfs/manifest.json`` in the model's directory, and is written last: a model with a manifest is published.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from obsfs.access import safetensors
from obsfs.errors import UsageError
from obsfs.library.names import is_safe_path
from obsfs.store.bounds import MAX_SIZE

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_SMALL = 1 << 20
_MAX_TEXT = 200
"""Characters of what a configuration calls an architecture or a dtype."""
WEIGHTS = (safetensors.SUFFIX, ".gguf", ".bin", ".pt", ".pth", ".onnx")
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64", "F8_E4M3": "float8"}


class File(Struct, frozen=True, kw_only=True):
    """One file: its path in the model, size in bytes, the ETag of its object, the SHA-256 of its bytes (hex).

    `sha256` is empty for a model without a manifest, of which only the bucket's listing is known.

    Raises:
        ValueError: The path leads out of the model.
    """

    path: str
    size: Annotated[int, Meta(ge=0, le=MAX_SIZE)]
    etag: str
    sha256: Annotated[str, Meta(pattern=r"\A([0-9a-f]{64})?\Z")] = ""
    version_id: str = ""

    def __post_init__(self) -> None:
        if not is_safe_path(self.path):
            raise ValueError(f"{self.path!r} is no path inside a model")


class ModelInfo(Struct, frozen=True, kw_only=True):
    """Facts about a model, from its configuration and the headers of its weights."""

    architecture: str = ""
    parameters: Annotated[int, Meta(ge=0, le=safetensors.MAX_PARAMETERS)] = 0
    dtype: str = ""


class Manifest(Struct, frozen=True, kw_only=True):
    """A model as it was published: its files, its author, its time (UTC), its source and revision."""

    format: Literal["obsfs-manifest-1"] = "obsfs-manifest-1"
    name: str
    version: str | None = None
    created: Annotated[datetime, Meta(tz=True)]
    author: str = ""
    source: str = ""
    """Origin: the name of a directory, or a hub's repository (``hf:org/name``)."""
    revision: str = ""
    """Commit of the source, if it has one."""
    model: ModelInfo = ModelInfo()
    files: Annotated[tuple[File, ...], Meta(min_length=1)]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def content(self) -> str:
        """SHA-256 (hex) of all paths, sizes and hashes. It does not depend on who published the model, or when."""
        lines = sorted(f"{file.path}\0{file.size}\0{file.sha256 or file.etag}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_json(self) -> bytes:
        """Return the manifest as JSON, indented for people."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


_ANOTHER = "use another version, or push one"
_DECODER = msgspec.json.Decoder(Manifest)
"""Made once: msgspec inspects a Struct on first use, and threads that do so at the same time crash the process
(SIGSEGV; msgspec 0.22)."""


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Return the manifest in a JSON document.

    Args:
        data: The document.
        where: Its place, for errors.

    Raises:
        UsageError: It is not a manifest.
    """
    try:
        manifest = _DECODER.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = str(error).replace("`", "")
        raise UsageError(f"the manifest {where} cannot be read ({reason})", _ANOTHER) from None
    paths = [file.path for file in manifest.files]
    if len(set(paths)) < len(paths):
        raise UsageError(f"the manifest {where} cannot be read (it names a file twice)", _ANOTHER)
    return manifest


def now() -> datetime:
    """Return the present time as manifests write it: UTC, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


def is_model(paths: Iterator[str]) -> bool:
    """Return whether files with these names are a model or an adapter."""
    return any(path in (CONFIG, ADAPTER) or path.endswith(WEIGHTS) for path in paths)


def inspect_model(files: Mapping[str, tuple[int, safetensors.Read]]) -> ModelInfo:
    """Return facts about a model.

    Args:
        files: Size in bytes of each file, and what reads it, by their paths.
    """

    def small(path: str) -> bytes | None:
        size, read = files.get(path, (_SMALL + 1, None))
        return read(0, size) if read and size <= _SMALL else None

    headers = {}
    for path, (size, read) in files.items():
        if path.endswith(safetensors.SUFFIX) and size >= safetensors.MIN_BYTES:
            found = safetensors.header(size, read)
            headers[path] = found[1] if found else {}
    return summarize(small(CONFIG), small(ADAPTER), headers)


def summarize(config: bytes | None, adapter: bytes | None, headers: Mapping[str, Mapping[str, Any]]) -> ModelInfo:
    """Return facts from ``config.json``, ``adapter_config.json`` and the headers of the weights, by their paths."""
    settings, tuned = _object(config), _object(adapter)
    architectures = settings.get("architectures")
    if tuned:
        architecture = f"{tuned.get('peft_type', 'adapter')} for {tuned.get('base_model_name_or_path', '?')}"
    elif isinstance(architectures, list) and architectures:
        architecture = str(architectures[0])
    else:
        architecture = str(settings.get("model_type", ""))
    total, dtypes = 0, dict[str, int]()
    for header in headers.values():
        count, found = safetensors.parameters(header)
        total += count
        for dtype, numbers in found.items():
            dtypes[dtype] = dtypes.get(dtype, 0) + numbers
    most = max(dtypes, key=lambda dtype: dtypes[dtype], default="")
    dtype = _DTYPES.get(most, most.lower())
    parameters = min(total, safetensors.MAX_PARAMETERS)
    return ModelInfo(architecture=architecture[:_MAX_TEXT], parameters=parameters, dtype=dtype[:_MAX_TEXT])


def _object(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
