"""Train models straight from a bucket or a mounted path: a thin plugin on obsfs's public interface.

TRL, PEFT, transformers, accelerate, bitsandbytes and datasets do the training. This package adds the configuration,
connects the parts, and shows progress.

>>> import trainer
>>> run = {"model": "obs://models/Qwen2-7B", "data": "alpaca-zh", "output": "obs://models/adapters/zh-1"}
>>> trainer.train(run, learning_rate=1e-4)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.run import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]

_HOMES = {
    "TrainConfig": ("trainer.config", "TrainConfig"),
    "TrainResult": ("trainer.run", "TrainResult"),
    "Outcome": ("trainer.run", "TrainResult"),  # the earlier name, kept for one version
    "train": ("trainer.run", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    import importlib

    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
