"""A record of what a checkpoint was made with. A run that resumes compares it with its own settings.

It is the file ``obsfs-run.json``, version 1, in each checkpoint (covered by its seal) and in the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from obsfs.plugin import UsageError, visible

if TYPE_CHECKING:
    from trainer.base_model import AdapterPlan, BaseModel
    from trainer.config import Parts, TrainConfig

NAME = "obsfs-run.json"
VERSION = 1
_SAMPLES = 8
_SAMPLE_BYTES = 4096
_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "max_length",
    "packing",
    "warmup_steps",
    "seed",
    "loss_type",
    "beta",
)
"""Arguments that may change when a run resumes; the user is told of each change."""
_KEPT = {"learning_rate", "weight_decay"}
"""Arguments that torch saves in the optimiser's state, and restores from it."""


@dataclass(frozen=True)
class RunRecord:
    """The settings, base model and data of a run.

    Args:
        version: The version of this format.
        base: The name of the base model.
        base_digest: A hash of the base model's weights, independent of where they are.
        fixed: Settings that must not change when the run resumes, by the names that users know.
        free: Settings that may change.
        data: Where the data is, and what it is.
        ended_at: Only in a result: the step at which the run ended.
    """

    version: int = VERSION
    base: str = ""
    base_digest: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    ended_at: int | None = None

    def write(self, directory: Path) -> None:
        """Write the record into the directory of a checkpoint or a result."""
        path = directory / NAME
        new = path.with_suffix(".new")
        new.write_text(json.dumps(msgspec.to_builtins(self), indent=1))
        new.replace(path)


def read(directory: Path) -> RunRecord | None:
    """Return the record of a checkpoint or a result; None if it has none that can be read.

    Raises:
        UsageError: A later version of obsfs wrote it.
    """
    try:
        found = json.loads((directory / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    version = found.get("version") if isinstance(found, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise UsageError(
            f"{directory.name} was made by a later version of obsfs (its notes have version {version})",
            "install that one, or choose another output",
        )
    try:
        return msgspec.convert(found, RunRecord)
    except msgspec.ValidationError:
        return None


def take(config: TrainConfig, parts: Parts, base: BaseModel, plan: AdapterPlan | None) -> RunRecord:
    """Make the record of a run; :func:`data_of` adds what its data is."""
    arguments = parts.arguments
    fixed: dict[str, Any] = {"task": config.task, "method": config.method, "base in 4 or 8 bits": config.is_quantized}
    fixed["optim"] = _plain(arguments.optim).removesuffix(
        "_fused"
    )  # the same, and the default of some versions of torch
    lora = parts.lora
    if lora is not None and plan is not None:
        fixed |= {"rank (lora_r)": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": list(plan.modules)}
        fixed |= {"use_dora": lora.use_dora, "use_rslora": lora.use_rslora}
        # Some initializations change the base, so an adapter must resume with the one that it started with.
        fixed |= {"init_lora_weights": lora.init_lora_weights, "the adapter's parameters": plan.digest}
    free = {name: _plain(getattr(arguments, name, None)) for name in _ARGUMENTS}
    free = {name: value for name, value in free.items() if value is not None}
    free["dtype"] = config.base_dtype
    places = {"data": config.data, "eval_data": config.eval_data, "split": config.split}
    return RunRecord(base=base.name, base_digest=digest_model(base.path), fixed=fixed, free=free, data=places)


def data_of(records: Any) -> dict[str, Any]:
    """Return the number of records, and a hash of the first, the last, and some in between.

    Streamed data has no length; it is known by its location alone, and this returns nothing.
    """
    try:
        count = len(records)
    except TypeError:
        return {}
    chosen = sorted({index * (count - 1) // _SAMPLES for index in range(_SAMPLES + 1)}) if count else []
    told = json.dumps([records[index] for index in chosen], sort_keys=True, default=str)
    return {"records": count, "their digest": hashlib.sha256(told.encode()).hexdigest()[:16]}


def digest_model(path: Path) -> str:
    """Return a hash that identifies the weights of a model, wherever they are stored.

    It covers the size, the header and some samples of each file. Training changes nearly every byte, so samples are
    enough, and reading 140 GB from a bucket to compare them would take too long.
    """
    digest = hashlib.sha256()
    for shard in sorted(path.glob("*.safetensors")):
        size = shard.stat().st_size
        digest.update(f"{shard.name} {size} ".encode())
        with shard.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, 64 << 20)))
            for index in range(_SAMPLES):
                file.seek(8 + header + (size - 8 - header) * index // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def refuse_other(checkpoint: str, then: RunRecord, now: RunRecord) -> None:
    """Raise UsageError, with both values, if a run cannot resume from a checkpoint that was made with `then`."""
    remedy = "go on with what it was made with, or choose another output"
    if then.base_digest != now.base_digest:
        both = f"{then.base}, and the model is {now.base}"
        if then.base == now.base:
            both = f"{then.base}, whose weights have changed since"
        raise UsageError(f"{checkpoint} is of the base {visible(both)}", remedy)
    for name, value in now.fixed.items():
        if name in then.fixed and then.fixed[name] != value:
            raise UsageError(
                f"{checkpoint} was made with {name} {_shown(then.fixed[name])}, not {_shown(value)}", remedy
            )


def changes(then: RunRecord, now: RunRecord) -> str:
    """Return what has changed otherwise, with both values, as text for users; empty if nothing has."""
    told = []
    for old, new in ((then.data, now.data), (then.free, now.free)):
        for name, value in new.items():
            if name in old and old[name] != value:
                stays = (
                    f" (the optimiser's state has {_shown(old[name])}, and goes on with it)" if name in _KEPT else ""
                )
                told.append(f"{name} {_shown(old[name])} then, {_shown(value)} now{stays}")
    return "; ".join(told)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return visible(json.dumps(value), 200)
    return visible(", ".join(map(str, value)) if isinstance(value, list | tuple) else value, 200)
