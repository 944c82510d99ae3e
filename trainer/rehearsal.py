"""Rehearse a run before the weights are loaded: one step with its settings, on a stand-in model of one small layer.

TRL, PEFT, transformers and accelerate check many values late: when a trainer is made, at the first step, evaluation or
save. A list of such values would be outdated by their next release. So the rehearsal uses the real trainer, optimiser,
scheduler, loss, quantisation, evaluation and checkpoint, with a few made-up records. If it fails, it names the key
whose default value does not fail.

It refuses a run only if the same run with default settings passes. In doubt the run continues, and fails later if it
must. Runs of several processes are not rehearsed (:func:`can_rehearse`).
"""

from __future__ import annotations

import copy
import gc
import logging
import random
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from obsfs.plugin import UsageError, first_line, visible
from trainer import disk_space
from trainer.config import Parts, TrainConfig
from trainer.temporary import temporary_directory
from trainer.trl_setup import load_model, make_trainer, trusts

_WIDTH, _HEADS = 64, 4
"""Hidden size and attention heads of the stand-in."""
_MOST_RANK = 32
"""Initializations that decompose a weight (pissa, olora) refuse ranks above the width."""
_BATCH, _RECORDS = 4, 8
_TOKENS = 256
"""Enough tokens for a made-up record; :mod:`trainer.data` checks the length of real ones."""
_PROMPT, _GOOD, _BAD = "The quick brown", " fox jumps", " dog"
_OF_THE_MODEL = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
"""Options of LoraConfig that name parts of the real model: :func:`trainer.base_model.plan_adapter` checks those."""
_NOT_FOR_OTHERS = {
    "attn_implementation",
    "gguf_file",
    "key_mapping",
    "max_memory",
    "subfolder",
    "tp_plan",
    "tp_size",
    "variant",
}
"""Arguments of ``from_pretrained`` that make sense only for the real model, its files or its size."""
_KEYS = ("dtype", "test_split_size", "eval_data")
"""Our own keys that can be at fault."""


def can_rehearse(arguments: Any) -> bool:
    """Return whether a run has one process and one device, given TRL's arguments.

    Several processes would have to agree on what failed, or they would deadlock. DeepSpeed keeps its first
    configuration for the whole process. A model spread over several GPUs differs from one that fits on the first.
    """
    return arguments.world_size == 1 and arguments.n_gpu <= 1 and not arguments.deepspeed_plugin


def rehearse(config: TrainConfig, base: Path, tokenizer: Any) -> None:
    """Try one step of a run on a stand-in for its model.

    Args:
        config: The run.
        base: The directory of its model; only the configuration is read.
        tokenizer: The tokenizer of the run, with TRL's changes.

    Raises:
        UsageError: It fails. The message names the key at fault if one is found.
    """
    with _without_traces():
        try:
            with temporary_directory("obsfs-rehearsal-") as place:
                fault = _find_fault(_Rehearsal(place, config, base, tokenizer), config)
        except OSError:  # the stand-in cannot be written
            return
    if fault:
        raise UsageError(fault, "change it; rehearse: false skips this trial on a small model")


def _find_fault(scene: _Rehearsal, config: TrainConfig) -> str:
    """Return what is wrong with a run, in words; an empty text if nothing is, or in doubt."""
    error = scene.play(config)
    if error is None or scene.play(_plain(config)) is not None:
        return ""
    reason = visible(first_line(error), 400).rstrip(". ")
    for name in _suspects(config, str(error)):
        if scene.play(_without(config, name)) is None:
            value = config.options.get(name, getattr(config, name, None))
            return f"{name}: {visible(repr(value), 80)} does not work here ({reason})"
    return f"a run with these settings fails ({reason})"


def _suspects(config: TrainConfig, said: str) -> list[str]:
    """Return the keys that may have caused an error, those whose name or value it quotes first."""

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


def _without(config: TrainConfig, *names: str) -> TrainConfig:
    """Return the run with some keys set to their defaults."""
    usual = TrainConfig()
    own = {name: getattr(usual, name) for name in names if name not in config.options}
    return replace(config, options={key: value for key, value in config.options.items() if key not in names}, **own)


def _plain(config: TrainConfig) -> TrainConfig:
    """Return the run with the same task and method, and defaults for all other keys."""
    return _without(config, *config.options, *(name for name in _KEYS if name not in config.options))


class _Rehearsal:
    """A stand-in model in a directory, to try runs on."""

    def __init__(self, place: Path, config: TrainConfig, base: Path, tokenizer: Any) -> None:
        self._place, self._tokenizer = place, tokenizer
        self._config = _configuration(base, trusts(config.parts(place).arguments))
        self._model = place / "model"
        LlamaForCausalLM(_small(tokenizer)).save_pretrained(self._model)

    def play(self, config: TrainConfig) -> Exception | None:
        """Return the error that a run fails with; None if it passes."""
        try:
            parts = config.parts(self._place / "out")
            _shorten(parts.arguments)
            self._step(config, parts)
        except (torch.OutOfMemoryError, MemoryError):
            return None  # not because of its settings
        except Exception as error:  # libraries raise anything for a value that they refuse
            return None if disk_space.is_full(error) else error
        return None

    def _step(self, config: TrainConfig, parts: Parts) -> None:
        from transformers.integrations import get_reporting_integration_callbacks

        arguments = parts.arguments
        if arguments.push_to_hub:
            _ask_hub(arguments.hub_token)
            arguments.push_to_hub = False
        get_reporting_integration_callbacks(arguments.report_to)
        arguments.report_to = []  # a rehearsal is not reported to trackers
        # trainer.base_model.check_attention tries the attention on the real model; compiling it takes long.
        config = replace(config, attn_implementation=None)
        model = load_model(self._model, LlamaForCausalLM, config, parts, self._init(parts))
        records = _records(config.task, self._tokenizer)
        if config.streaming:
            records = records.to_iterable_dataset()
        eval_data = records if config.eval_data or config.test_split_size else None
        tokenizer = copy.deepcopy(self._tokenizer)
        trainer = make_trainer(parts._replace(lora=_fitting(parts.lora)), model, tokenizer, records, eval_data)
        trainer.add_callback(_OneStep())
        trainer.train()

    def _init(self, parts: Parts) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` that apply to the stand-in, too."""
        given = parts.arguments.model_init_kwargs or {}
        if self._config is None or trusts(parts.arguments):  # the model's own code may take any argument
            return {name: value for name, value in given.items() if name == "dtype"}
        return {
            name: value
            for name, value in given.items()
            if name == "dtype"
            or not (hasattr(self._config, name) or name in _NOT_FOR_OTHERS or isinstance(value, dict))
        }


class _OneStep(TrainerCallback):
    """Ends the run after its first step, with the evaluation and the checkpoint that it would make later."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See :class:`transformers.TrainerCallback`."""
        control.should_training_stop = control.should_log = True
        control.should_evaluate = args.eval_strategy != "no"
        control.should_save = args.save_strategy != "no"


def _ask_hub(token: str | None) -> None:
    """Check that the hub accepts the token to push with. Raises what huggingface_hub raises."""
    try:
        HfApi(token=token).whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise


def _configuration(base: Path, is_trusted: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(base, trust_remote_code=is_trusted)
    except Exception:  # it needs the model's own code; check_files has checked the rest
        return None


def _small(tokenizer: Any) -> LlamaConfig:
    rows = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))  # some tokenizers have gaps
    return LlamaConfig(
        vocab_size=rows, hidden_size=_WIDTH, intermediate_size=_WIDTH, num_hidden_layers=1,
        num_attention_heads=_HEADS, num_key_value_heads=_HEADS, max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip


def _shorten(arguments: Any) -> None:
    """Remove from a run what takes long, what others would see, and what depends on the number of records."""
    arguments.per_device_train_batch_size = min(arguments.per_device_train_batch_size, _BATCH)
    arguments.per_device_eval_batch_size = min(arguments.per_device_eval_batch_size, _BATCH)
    arguments.gradient_accumulation_steps = 1
    arguments.disable_tqdm = True
    arguments.dataloader_drop_last = False  # packing makes one record of all
    arguments.dataloader_num_workers, arguments.dataloader_prefetch_factor = 0, None
    arguments.dataloader_persistent_workers = False
    arguments.torch_compile, arguments.torch_compile_backend, arguments.torch_compile_mode = False, None, None
    if arguments.optim_target_modules:
        arguments.optim_target_modules = ["q_proj"]
    for name in ("max_length", "max_prompt_length", "max_completion_length"):
        if getattr(arguments, name, None) is not None:
            setattr(arguments, name, _TOKENS)
    if hasattr(arguments, "assistant_only_loss"):
        arguments.assistant_only_loss = False  # the labels say it already, as in the run
    if hasattr(arguments, "dataset_num_proc"):
        arguments.dataset_num_proc = None


def _fitting(lora: Any) -> Any:
    """Return an adapter's configuration without the options that name parts of the real model."""
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
    """Return a few records for a task."""
    from datasets import Dataset

    if task == "sft":
        ids = tokenizer(_PROMPT + _GOOD)["input_ids"]
        return Dataset.from_list([{"input_ids": ids, "labels": ids}] * _RECORDS)
    if task != "kto":
        return Dataset.from_list([{"prompt": _PROMPT, "chosen": _GOOD, "rejected": _BAD}] * _RECORDS)
    judged = [{"prompt": _PROMPT, "completion": text, "label": text == _GOOD} for text in (_GOOD, _BAD)]
    return Dataset.from_list(judged * (_RECORDS // 2))


@contextmanager
def _without_traces() -> Iterator[None]:
    """Suppress all output of libraries, and afterwards restore the random states and free the memory."""
    before, state, state_of_numpy = logging.root.manager.disable, random.getstate(), numpy.random.get_state()
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
            torch.random.fork_rng(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        random.setstate(state)
        numpy.random.set_state(state_of_numpy)
        gc.collect()  # a trainer is part of a reference cycle
