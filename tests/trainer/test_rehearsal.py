"""What the libraries would refuse late is refused before the weights are loaded, by the key at fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obsfs import ObsfsError
from tests.trainer.conftest import QUICK
from trainer.base import load_tokenizer
from trainer.config import load_config
from trainer.rehearsal import rehearse

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
        ({"attn_implementation": "wave"}, "attn_implementation", "sdpa"),
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
        {"init_lora_weights": "olora", "lora_r": 128, "rank_pattern": {"q_proj": 3}, "layers_to_transform": [1]},
        {"model_init_kwargs": {"rope_theta": 5e5, "use_sliding_window": False}, "neftune_noise_alpha": 5},
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
def test_a_rehearsal_says_nothing_itself_and_blames_no_full_disk(
    tried: Callable[..., str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tried(report_to="tensorboard", packing=True) == ""
    assert capfd.readouterr() == ("", "")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.rehearsal.make_trainer", full)
    assert tried() == ""
