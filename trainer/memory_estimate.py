"""How much memory a run takes: one answer for ``train --guide``, ``train --check`` and the run itself."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.base_model import ModelStats, available_memory, estimate_memory
from trainer.config import TrainConfig

_MARGIN = 1.25
"""The estimate is good to within a third: only what is clearly too much is refused."""
_LENGTH = 1024
"""Tokens of a record, where a run sets no bound (TRL's usual one)."""


class MemoryEstimate(NamedTuple):
    """The bytes that a run needs by estimate, those that are free now, and where: a GPU, or this machine."""

    needed: int
    free: int
    device_name: str

    @property
    def is_too_much(self) -> bool:
        """Whether the run is refused for it."""
        return self.needed > self.free * _MARGIN


def estimate_run_memory(config: TrainConfig, arguments: Any, stats: ModelStats, trainable: int) -> MemoryEstimate:
    """Estimate what a run needs.

    Args:
        config: The run.
        arguments: TRL's, of the run.
        stats: What the files of its model say.
        trainable: How many parameters are trained.
    """
    bits = (8 if config.options.get("load_in_8bit") else 4) if config.is_quantized else None
    needed = estimate_memory(
        stats,
        task=config.task,
        method=config.method,
        bits=bits,
        dtype=config.base_dtype,
        trainable=trainable,
        batch=arguments.per_device_train_batch_size,
        length=getattr(arguments, "max_length", None) or _LENGTH,
        checkpointing=arguments.gradient_checkpointing,
        loss=getattr(arguments, "loss_type", None),
    )
    return MemoryEstimate(needed, *available_memory())
