"""What the libraries would refuse late is refused before the weights are loaded, by the key at fault."""

from __future__ import annotations

import gc
import logging
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from obsfs import ObsfsError
from tests.trainer.conftest import QUICK
from trainer.base_model import load_tokenizer
from trainer.config import load_config
from trainer.rehearsal import can_rehearse, rehearse

_EVAL = {"eval_data": "e.jsonl", "eval_strategy": "steps", "eval_steps": 1}
_BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def tried(tiny: Path) -> Callable[..., str]:
    """Rehearse a run of the tiny model. Returns what is said, empty where nothing is wrong."""
    tokenizer = load_tokenizer(tiny)

    def start(**given: Any) -> str:
        run = {"model": str(tiny), "data": "d.jsonl", "output": "o", "method": "lora", "max_steps": 9, **QUICK}
        try:
            rehearse(load_config({**run, **given}), tiny, tokenizer)
        except ObsfsError as error:
            assert "\n" not in str(error)
            return str(error)
        return ""

    return start


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "key", "reason"),
    [
        ({"loss_type": "bogus"}, "loss_type", "nll"),
        ({"task": "dpo", "loss_type": ["sigmoid", "bogus"], "loss_weights": [1, 1]}, "", "bogus"),
        ({"task": "kto", "loss_type": "bogus"}, "loss_type", ""),
        ({"task": "cpo", "loss_type": "bogus"}, "loss_type", "simpo"),
        ({"optim_args": "betas"}, "optim_args", ""),
        ({"optim": "adamw_torch_xla"}, "optim", "torch_xla"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type", "min_lr"),
        ({"lr_scheduler_kwargs": {"wave": 1}}, "lr_scheduler_kwargs", "wave"),
        ({"report_to": ["none", "tensorboard"]}, "report_to", "none is not supported"),
        ({"packing": True, "packing_strategy": "wave"}, "packing_strategy", "bfd"),
        ({"fsdp": "full_shard"}, "fsdp", "distributed"),
        ({"model_init_kwargs": {"wave": 1}}, "model_init_kwargs", "wave"),
        ({"method": "qlora", "init_lora_weights": "pissa"}, "init_lora_weights", "quantize"),
        ({"eval_strategy": "steps"}, "eval_strategy", "eval_dataset"),
        ({**_EVAL, **_BEST, "metric_for_best_model": "wave"}, "metric_for_best_model", "wave"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"wave": 1}},
         "gradient_checkpointing_kwargs", "wave"),
    ],
)  # fmt: skip
def test_what_fails_late_is_told_early_by_its_key(
    given: dict[str, Any], key: str, reason: str, tried: Callable[..., str]
) -> None:
    said = tried(**given)
    assert reason in said
    if key:
        assert said.startswith(f"{key}: {given[key]!r} does not work here (")
        assert said.endswith("change it; rehearse: false skips this trial on a small model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        {"method": "qlora", "lora_r": 63, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"method": "full", "optim": "adafactor", "streaming": True, "packing": True},
        {**_EVAL, **_BEST},
        {"task": "dpo", "loss_type": ["sigmoid", "sft"], "precompute_ref_log_probs": True, "test_split_size": 0.5},
        {"task": "kto", "streaming": True},
        {"assistant_only_loss": True, "optim_target_modules": ["c_attn"]},
        {"init_lora_weights": "olora", "lora_r": 128, "rank_pattern": {"q_proj": 3}, "layers_to_transform": [1],
         "target_modules": ["q_proj"]},
        {"model_init_kwargs": {"use_sliding_window": False, "device_map": {"model.layers.1": "cpu", "": "cpu"},
                               "max_memory": {"cpu": "1KB"}}, "neftune_noise_alpha": 5},
        {"task": "dpo", "max_length": 2},
        {"packing": True, "dataloader_drop_last": True, "torch_compile": True},
        {"dataloader_num_workers": 3, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
        {"dtype": "auto", "method": "qlora", "lr_scheduler_type": "warmup_stable_decay",
         "lr_scheduler_kwargs": {"num_decay_steps": 3, "min_lr_ratio": 0.1}},
    ],
)  # fmt: skip
def test_what_works_is_not_refused(given: dict[str, Any], tried: Callable[..., str], tiny: Path) -> None:
    here = set(tiny.iterdir())
    assert tried(**given) == ""
    assert set(tiny.iterdir()) == here
    assert not Path("o").exists()


@pytest.mark.slow
def test_the_hub_is_asked_before_the_weights_are_loaded(
    tried: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        def __init__(self, token: str | None) -> None:
            self.token = token

        def whoami(self) -> None:
            if self.token != "hf_good":
                raise ConnectionError("who are you?")

    monkeypatch.setattr("trainer.rehearsal.HfApi", Hub)
    assert "push_to_hub: True does not work here (who are you?)" in tried(push_to_hub=True, hub_token="hf_bad")
    assert tried(push_to_hub=True, hub_token="hf_good") == ""


@pytest.mark.slow
def test_in_doubt_the_run_goes_on(tried: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = {"loss_type": "bogus"}
    assert tried(**wrong)
    # Not even a run without settings can be tried: that is none of their faults.
    monkeypatch.setattr("trainer.rehearsal.LlamaConfig", lambda **given: LlamaConfig(**{**given, "vocab_size": 1}))
    assert tried(**wrong) == ""
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert tried(**wrong) == ""


@pytest.mark.slow
def test_a_rehearsal_leaves_no_trace(
    tried: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    streams, drawn = (sys.stdout, sys.stderr, logging.root.manager.disable), []
    for is_rehearsed in (False, True):
        torch.manual_seed(7), random.seed(7), numpy.random.seed(7)
        if is_rehearsed:
            assert tried(**_EVAL, **_BEST) == ""
        drawn.append((torch.rand(1).item(), random.random(), numpy.random.random()))
    assert drawn[0] == drawn[1]
    assert not [one for one in gc.get_objects() if type(one) is LlamaForCausalLM]
    monkeypatch.setattr("trainer.rehearsal.make_trainer", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tried()
    assert not list(tmp_path.iterdir())
    assert (sys.stdout, sys.stderr, logging.root.manager.disable) == streams


@pytest.mark.parametrize(("processes", "devices", "plugin"), [(2, 1, None), (1, 4, None), (1, 0, object())])
def test_several_processes_or_devices_are_not_rehearsed(processes: int, devices: int, plugin: object) -> None:
    assert can_rehearse(SimpleNamespace(world_size=1, n_gpu=0, deepspeed_plugin=None))
    assert not can_rehearse(SimpleNamespace(world_size=processes, n_gpu=devices, deepspeed_plugin=plugin))


@pytest.mark.slow
def test_a_rehearsal_says_nothing_itself_and_blames_no_full_disk(
    tried: Callable[..., str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tried(report_to="tensorboard", packing=True) == ""
    assert capfd.readouterr() == ("", "")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.rehearsal.make_trainer", full)
    assert tried() == ""
