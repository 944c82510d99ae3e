"""Estimate the memory of a run: the same for ``train --guide``, ``train --check`` and the run itself."""

from __future__ import annotations

from typing import Any, NamedTuple

from trainer.base_model import ModelStats, available_memory, estimate_memory
from trainer.config import TrainConfig

_MARGIN = 1.25
"""The estimate is accurate to about a third, so only a run that needs clearly too much is refused."""
_LENGTH = 1024
"""Tokens per record if the run sets no limit: TRL's default."""


class MemoryEstimate(NamedTuple):
    """An estimate, and what there is.

    Args:
        needed: The bytes that the run needs.
        free: The bytes that are free now.
        device_name: The device that has them: a GPU, or this machine.
    """

    needed: int
    free: int
    device_name: str

    @property
    def is_too_much(self) -> bool:
        """Whether the run needs so much that it is refused."""
        return self.needed > self.free * _MARGIN


def estimate_run_memory(config: TrainConfig, arguments: Any, stats: ModelStats, trainable: int) -> MemoryEstimate:
    """Estimate the memory that a run needs.

    Args:
        config: The run.
        arguments: TRL's arguments of the run.
        stats: The size of its model.
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
