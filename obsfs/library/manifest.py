"""The manifest of a model: which files it has, and what each must be. Pure.

It lies beside the files, as ``.obsfs/manifest.json``, and is written last: a model is published when it has one.
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

    `sha256` is empty for a model without a manifest, of which only the bucket's listing is known. Raises ValueError for
    a path that leads out of the model.
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
    """What a model is, as its configuration and the headers of its weights tell."""

    architecture: str = ""
    parameters: Annotated[int, Meta(ge=0, le=safetensors.MAX_PARAMETERS)] = 0
    dtype: str = ""


class Manifest(Struct, frozen=True, kw_only=True):
    """A model as it was published: its files, who made it, when (UTC), and from which revision of what."""

    format: Literal["obsfs-manifest-1"] = "obsfs-manifest-1"
    name: str
    version: str | None = None
    created: Annotated[datetime, Meta(tz=True)]
    author: str = ""
    source: str = ""
    """Where it came from: a directory's name, or a hub's repository (``hf:org/name``)."""
    revision: str = ""
    """The commit of the source, where it has one."""
    model: ModelInfo = ModelInfo()
    files: Annotated[tuple[File, ...], Meta(min_length=1)]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def content(self) -> str:
        """The SHA-256 (hex) of what the model consists of, whoever published it and whenever."""
        lines = sorted(f"{file.path}\0{file.size}\0{file.sha256 or file.etag}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_json(self) -> bytes:
        """For a person to read, too."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n"


_ANOTHER = "use another version, or push one"
_DECODER = msgspec.json.Decoder(Manifest)
"""Made once: msgspec learns a Struct's types when they are first asked for, and threads that ask for them at the same
time crash the process (SIGSEGV; msgspec 0.22)."""


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Raises UsageError, naming `where`, for what is no manifest."""
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
    """The time, as manifests have it."""
    return datetime.now(UTC).replace(microsecond=0)


def is_model(paths: Iterator[str]) -> bool:
    """Whether files with these names make a model or an adapter."""
    return any(path in (CONFIG, ADAPTER) or path.endswith(WEIGHTS) for path in paths)


def inspect_model(files: Mapping[str, tuple[int, safetensors.Read]]) -> ModelInfo:
    """What a model is, of files by their paths: the size of each in bytes, and what gives its bytes."""

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
    """What a model is, from its ``config.json``, its ``adapter_config.json`` and the headers of its weights files."""
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
