"""Make what TRL needs: a model with its weights, and a trainer. A run and its rehearsal use the same functions."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from trainer import bitsandbytes_cpu
from trainer.base_model import empty_model
from trainer.config import Parts, TrainConfig


def load_model(path: Path, kind: Any, config: TrainConfig, parts: Parts, init: dict[str, Any] | None = None) -> Any:
    """Load a model as a run asks for it.

    Args:
        path: The directory of the model.
        kind: The class of transformers to load it with.
        config: The run.
        parts: The configs that TRL, PEFT and transformers take.
        init: Keyword arguments of ``from_pretrained``; those of the run's ``model_init_kwargs`` by default.
    """
    from trl.trainer.utils import create_model_from_path

    init = (parts.arguments.model_init_kwargs or {}) if init is None else init
    options: dict[str, Any] = {"dtype": config.base_dtype, **init}
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if parts.quantization is not None:
        options["quantization_config"] = _without_head(parts.quantization, path, trusts(parts.arguments))
    if parts.arguments.world_size > 1:
        options["device_map"] = None
    if trusts(parts.arguments):
        options["trust_remote_code"] = True
    return bitsandbytes_cpu.keep_as_loaded(create_model_from_path(str(path), kind, **options))


def _without_head(quantization: Any, path: Path, is_trusted: bool) -> Any:
    """Return a quantization that leaves the head of a model as it is, as TRL's losses need it.

    transformers does that by default, but not if the user names other modules to leave out.
    """
    if not quantization.llm_int8_skip_modules:
        return quantization
    model = empty_model(path, trust_remote_code=is_trusted)
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    quantization = copy.copy(quantization)
    quantization.llm_int8_skip_modules = list(dict.fromkeys([*quantization.llm_int8_skip_modules, *names]))
    return quantization


def make_trainer(parts: Parts, model: Any, tokenizer: Any, train_data: Any, eval_data: Any) -> Any:
    """Make TRL's trainer for a run. Raises whatever TRL, PEFT, transformers and accelerate raise."""
    trainer = parts.trainer(
        model=model,
        args=parts.arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        peft_config=parts.lora,
    )
    if parts.lora is not None and not is_sharded(parts.arguments):
        # TRL makes the adapter of a quantised base bfloat16, but PEFT makes it float32 on resume. Make it float32 from
        # the start, so that a resumed run equals an uninterrupted one. (Sharding needs one type for all parameters.)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def is_sharded(arguments: Any) -> bool:
    """Return whether FSDP or DeepSpeed shards the model (accelerate sets a variable for it)."""
    given = arguments.fsdp or arguments.deepspeed_plugin or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return bool(given) and arguments.world_size > 1


def trusts(arguments: Any) -> bool:
    """Return whether the user allowed the model's own code."""
    return bool(getattr(arguments, "trust_remote_code", False))
