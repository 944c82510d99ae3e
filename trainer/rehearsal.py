"""A rehearsal before the weights are loaded: one step of the run, with its own settings, on a model of one small layer.

TRL, PEFT, transformers and accelerate look at many values late: when a trainer is made, at the first step, at the first
evaluation or save. A list of such values would be out of date with their next release. So the run is tried: the real
trainer, optimiser, scheduler, loss, quantisation, evaluation and checkpoint, with a few made-up records. What fails is
told by the key whose default value does not fail.
"""

from __future__ import annotations

import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, TrainerCallback

from obsfs.errors import ObsfsError, UsageError, first_line
from obsfs.text import visible
from trainer import room
from trainer.config import Parts, TrainConfig
from trainer.setup import load_model, make_trainer, trusts

_WIDTH, _HEADS = 64, 4
"""Of the stand-in. Heads of 16 are the smallest that flex attention takes (torch/nn/attention/flex_attention.py)."""
_MOST_RANK = 32
"""Ranks above the width would be refused by the ways to begin that decompose a weight (pissa, olora)."""
_BATCH = 4
_RECORDS = 8
_WORDS = "The quick brown fox jumps over the lazy dog"
_OF_THE_MODEL = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
"""Options of LoraConfig that name parts of the real model: :func:`trainer.base.plan_adapter` looks at those."""
_KEYS = ("attn_implementation", "dtype", "test_split_size", "eval_data")
"""Keys of our own that can be at fault."""


def rehearse(config: TrainConfig, base: Path, tokenizer: Any) -> None:
    """Try a run on a stand-in for its model.

    Args:
        config: The run.
        base: The directory of its model, of which only the configuration is read.
        tokenizer: The run's tokenizer, as TRL will change it.

    Raises:
        UsageError: It fails; the key at fault is named where one can be found.
    """
    with tempfile.TemporaryDirectory(prefix="obsfs-rehearsal-") as place:
        scene = _Scene(Path(place), config, base, tokenizer)
        error = scene.play(config)
        if error is None:
            return
        remedy = "change it; rehearse: false skips this trial on a small model"
        is_alone = config.parts(Path(place)).arguments.world_size == 1
        for name in _suspects(config, str(error)) if is_alone else ():
            other = _without(config, name)
            try:
                found = scene.play(other)
            except ObsfsError:
                continue
            if found is None:
                value = config.options.get(name, getattr(config, name, None))
                shown = f"{name}: {visible(repr(value), 80)} does not work here"
                raise UsageError(f"{shown} ({_reason(error)})", remedy) from error
        raise UsageError(f"a run with these settings fails ({_reason(error)})", remedy) from error


def _reason(error: BaseException) -> str:
    return visible(first_line(error), 400).rstrip(". ")


def _suspects(config: TrainConfig, said: str) -> list[str]:
    """The keys that can be at fault for an error: first those whose value or name it quotes."""

    def is_quoted(value: Any) -> bool:
        return isinstance(value, str) and bool(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said))

    def rank(name: str) -> tuple[bool, bool, bool]:
        is_marked = re.search(rf"`[\w.]*\b{re.escape(name)}`", said) is not None  # as the libraries write keys
        value = config.options.get(name, getattr(config, name, None))
        return not is_marked, not is_quoted(value), not is_quoted(name)

    names = [
        *(name for name in config.options if name not in config.settings),
        *(n for n in _KEYS if getattr(config, n)),
    ]
    return sorted(names, key=rank)


def _without(config: TrainConfig, name: str) -> TrainConfig:
    if name in config.options:
        return replace(config, options={key: value for key, value in config.options.items() if key != name})
    return replace(config, **{name: getattr(TrainConfig(), name)})


class _Scene:
    """A directory with the stand-in, in which runs are tried."""

    def __init__(self, place: Path, config: TrainConfig, base: Path, tokenizer: Any) -> None:
        self._place, self._tokenizer = place, tokenizer
        self._config = _configuration(base, trusts(config.parts(place).arguments))
        self._model = place / "model"
        with _silence():
            LlamaForCausalLM(_small(len(tokenizer))).save_pretrained(self._model)

    def play(self, config: TrainConfig) -> Exception | None:
        """Return what a run fails with; None where it does not."""
        parts = config.parts(self._place / "out")
        _shorten(parts.arguments)
        try:
            with _silence():
                self._step(config, parts)
        except (torch.OutOfMemoryError, MemoryError):
            return None  # not for its settings
        except Exception as error:  # whatever a library says of a value that it does not take
            return None if room.is_full(error) else error
        return None

    def _step(self, config: TrainConfig, parts: Parts) -> None:
        from transformers.integrations import get_reporting_integration_callbacks

        arguments = parts.arguments
        if arguments.push_to_hub:
            HfApi(token=arguments.hub_token).whoami()
            arguments.push_to_hub = False
        get_reporting_integration_callbacks(arguments.report_to)
        arguments.report_to = []  # nobody is told of a rehearsal
        given = arguments.model_init_kwargs or {}
        # What the real model's configuration takes is none of the stand-in's.
        init = {name: value for name, value in given.items() if name == "dtype" or not hasattr(self._config, name)}
        model = load_model(self._model, LlamaForCausalLM, config, parts, init)
        records = _records(config.task, self._tokenizer)
        has_eval = bool(config.eval_data or config.test_split_size)
        eval_data = records if has_eval else None
        if config.streaming:
            records = records.to_iterable_dataset()
            eval_data = records if has_eval else None
        tokenizer = copy.deepcopy(self._tokenizer)
        trainer = make_trainer(parts._replace(lora=_fitting(parts.lora)), model, tokenizer, records, eval_data)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_OneStep())
        trainer.train()


class _OneStep(TrainerCallback):
    """Ends the run after its first step, with the evaluation and the checkpoint that would come in time."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See :class:`transformers.TrainerCallback`."""
        control.should_training_stop = control.should_log = True
        control.should_evaluate = args.eval_strategy != "no"
        # Several processes have no directory in common.
        control.should_save = args.save_strategy != "no" and args.world_size == 1


def _configuration(base: Path, is_trusted: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=is_trusted)
    except Exception:  # one that brings its own code; check_whole has looked at the rest
        return None


def _small(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=_WIDTH, intermediate_size=_WIDTH, num_hidden_layers=1,
        num_attention_heads=_HEADS, num_key_value_heads=_HEADS, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip


def _shorten(arguments: Any) -> None:
    """Leave out of a run what takes long, and what others would see."""
    arguments.per_device_train_batch_size = min(arguments.per_device_train_batch_size, _BATCH)
    arguments.per_device_eval_batch_size = min(arguments.per_device_eval_batch_size, _BATCH)
    arguments.gradient_accumulation_steps = 1
    arguments.disable_tqdm = True
    if hasattr(arguments, "assistant_only_loss"):
        arguments.assistant_only_loss = False  # the labels say it, as in the run
    if arguments.optim_target_modules:
        arguments.optim_target_modules = ["q_proj"]
    if hasattr(arguments, "dataset_num_proc"):
        arguments.dataset_num_proc = None
    if arguments.dataloader_num_workers:
        arguments.dataloader_num_workers, arguments.dataloader_prefetch_factor = 0, None
        arguments.dataloader_persistent_workers = False
    if arguments.world_size > 1:
        arguments.load_best_model_at_end = False


def _fitting(lora: Any) -> Any:
    """An adapter's configuration without what names parts of the real model."""
    if lora is None:
        return None
    lora = copy.copy(lora)
    lora.target_modules = "all-linear"
    lora.rank_pattern, lora.alpha_pattern = {}, {}
    for name in _OF_THE_MODEL:
        setattr(lora, name, None)
    if lora.r > _MOST_RANK:
        lora.r = _MOST_RANK - lora.r % 2
    return lora


def _records(task: str, tokenizer: Any) -> Any:
    """A few records, as a task takes them."""
    from datasets import Dataset

    if task == "sft":
        ids = tokenizer(_WORDS)["input_ids"]
        return Dataset.from_list([{"input_ids": ids, "labels": ids}] * _RECORDS)
    pair = {"prompt": _WORDS, "chosen": f" {_WORDS}", "rejected": " dog"}
    if task != "kto":
        return Dataset.from_list([pair] * _RECORDS)
    judged = [
        {"prompt": _WORDS, "completion": pair[side], "label": side == "chosen"} for side in ("chosen", "rejected")
    ]
    return Dataset.from_list(judged * (_RECORDS // 2))


@contextmanager
def _silence() -> Iterator[None]:
    """Keep from users what libraries say: the run itself will say it again."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
