"""The questions before a run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import obsfs as package
from obsfs import ObsfsError
from tests.conftest import Mounter, Store
from tests.trainer.conftest import CHOICES, ROWS, write_lines
from trainer import base_model
from trainer.commands import train
from trainer.config import METHODS, load_config, lora_config
from trainer.guide import estimates, found_models, missing_bytes
from trainer.memory_estimate import MemoryEstimate, estimate_run_memory
from trainer.run import train as run

_RUN = {"model": "m", "data": "d.jsonl", "output": "o"}


def ask(*answers: object, words: tuple[str, ...] = ()) -> Any:
    text = "".join(f"{answer}\n" for answer in answers)
    return CliRunner().invoke(train, ["--guide", *words], input=text, catch_exceptions=False)


@pytest.mark.slow
def test_the_guide_finds_the_model_and_writes_a_run_that_works(
    bucket: Store,
    mount: Mounter,
    model: str,
    tmp_path: Path,
    obsfs: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mounted = mount(bucket)
    place = mounted / "models" / "tiny@v1"
    assert str(place) in found_models()
    # Mounts of other tests come and go beside this one.
    monkeypatch.setattr("trainer.guide.found_models", lambda: ["/elsewhere", str(place)])
    assert missing_bytes(place) == sum(path.stat().st_size for path in place.glob("*.safetensors"))
    data = write_lines(tmp_path / "pref.jsonl", CHOICES)
    written = tmp_path / "run.yaml"
    done = ask(2, "dpo", "./none.jsonl", data, "lora", 1, tmp_path / "out", written, "n")
    assert done.exit_code == 0, done.output
    for text in ("parameters", "have to be fetched", "there is no data at ./none.jsonl", "the first record", "fits"):
        assert text in done.output
    run = yaml.safe_load(written.read_text())
    assert (run["model"], run["task"], run["method"], run["data"]) == (str(place), "dpo", "lora", str(data))
    assert obsfs("train", written, "--max_steps", 1, "--report_to", "none", timeout=120).code == 0
    made = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert made["base_model_name_or_path"] == f"{bucket}/models/tiny@v1"
    # What is there is not replaced without being asked.
    again = ask(2, "dpo", data, "lora", 1, tmp_path / "out", written, "n")
    assert again.exit_code == 1


def test_a_mount_of_another_program_is_not_offered(bucket: Store) -> None:
    bucket.put("models/a/config.json", b"{}")
    with package.mount(f"{bucket}/models") as temporary:
        assert (temporary.path / "a" / "config.json").is_file()
        assert str(temporary.path / "a") not in found_models()


def test_a_mount_that_hangs_hides_no_model_of_another(bucket: Store, mount: Mounter, tiny: Path) -> None:
    bucket.put("models/a/config.json", b"{}")
    bucket.put("other/b/config.json", b"{}")
    well, hung = mount(f"{bucket}/models"), mount(f"{bucket}/other")
    server = package.status(hung)["pid"]
    os.kill(server, signal.SIGSTOP)
    try:
        found = found_models()
    finally:
        os.kill(server, signal.SIGCONT)
    assert str(well / "a") in found
    assert str(hung / "b") not in found


@pytest.mark.slow
def test_the_guide_starts_the_run(tiny: Path, rows: Path, tmp_path: Path) -> None:
    written, out = tmp_path / "run.yaml", tmp_path / "out"
    done = ask(tiny, "sft", rows, "qlora", 0.1, out, written, "y")
    assert done.exit_code == 0, done.output
    assert (out / "adapter_model.safetensors").exists()


_ADAPTER = 18_464_768
"""Of rank 16 on every linear layer of Qwen2.5-1.5B: 28 layers of 16 x (2 x 3072 + 2 x 1792 + 3 x 10496)."""


def test_an_adapter_is_counted_without_weights(tmp_path: Path) -> None:
    from transformers import Qwen2Config

    Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path)
    assert base_model.adapter_parameters(tmp_path, lora_config()) == _ADAPTER
    assert base_model.adapter_parameters(tmp_path, lora_config(r=32, init_lora_weights="pissa")) == 2 * _ADAPTER
    with pytest.raises(ObsfsError, match="no_such_module"):
        base_model.adapter_parameters(tmp_path, lora_config(target_modules=["no_such_module"]))
    with pytest.raises(ObsfsError, match="positive"):
        base_model.adapter_parameters(tmp_path, lora_config(r=-4))


def test_a_name_that_means_nothing_in_the_model_is_told(tiny: Path) -> None:
    for given, message in (
        ({"target_modules": ["q_proj", "vproj"]}, "nothing in the model is called 'vproj': the nearest is 'v_proj'"),
        ({"target_modules": ["q_proj", "self_attn.k_prj"]}, "the nearest is 'k_proj'"),
        ({"exclude_modules": ["lmhead"]}, "exclude_modules: nothing in the model is called 'lmhead'"),
        ({"modules_to_save": ["embed_token"]}, "the nearest is 'embed_tokens'"),
        ({"rank_pattern": {"o_proj": 4, "qproj": 8}}, "rank_pattern: nothing in the model is called 'qproj'"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}, "there is no layer 2: the model has 2"),
        ({"trainable_token_indices": [3, 1024]}, "there is no token 1024: the model knows 1024"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "there is no token -1"),
        ({"target_modules": "("}, "the adapter cannot be made: "),
        ({"rank_pattern": {"q_proj": "a"}}, "the adapter cannot be made: "),
        ({"runtime_config": {"a": 1}}, "the adapter cannot be made: "),
        ({"layer_replication": [[0, 2], [0, 2]]}, "the adapter cannot be made: "),
    ):  # fmt: skip
        with pytest.raises(ObsfsError) as caught:
            base_model.plan_adapter(tiny, lora_config(**given))
        assert message in str(caught.value)
    plan = base_model.plan_adapter(
        tiny, lora_config(target_modules=["self_attn.q_proj", "v_proj"], modules_to_save=["lm_head"])
    )
    assert plan.modules == ("q_proj", "v_proj")


def test_memory_grows_with_what_is_trained() -> None:
    seven = base_model.ModelStats(7_600_000_000, 1_090_000_000, 15_200_000_000, 28, 3584, 152_064)

    def needed(task: str, method: str) -> int:
        config = load_config({**_RUN, "task": task, "method": method, "per_device_train_batch_size": 1})
        trainable = seven.parameters if method == "full" else 40_370_176
        return estimate_run_memory(config, config.parts(Path("o")).arguments, seven, trainable).needed

    found = {method: needed("sft", method) for method in METHODS}
    assert found["qlora"] < found["lora"] == found["dora"] < found["full"]
    assert 6 << 30 < found["qlora"] < 14 << 30  # what a 7B model takes in practice, with long vocabularies
    assert 14 << 30 < found["lora"] < 24 << 30
    assert found["full"] > 100 << 30
    assert needed("dpo", "full") > found["full"]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"task": "dpo", "per_device_train_batch_size": 8},
        {"max_length": 4096, "gradient_checkpointing": False},
        {"lora_r": 63, "target_modules": ["q_proj"], "loss_type": "nll"},
    ],
)
def test_the_guide_and_the_run_give_one_answer(given: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "d.jsonl", CHOICES if "task" in given else ROWS)
    keys = {"model": str(tiny), "data": str(data), "rehearse": False, "report_to": "none", **given}
    found = estimates(keys, tiny, base_model.check_files(tiny))
    for method in ("lora", "qlora"):
        checked = run({**keys, "method": method, "output": str(tmp_path / method)}, only_check=True)
        memory = found[method]
        assert not isinstance(memory, str)
        assert checked.metrics["memory"] == memory.needed
    if "lora_r" in given:
        assert "does not go with method full" in str(found["full"])


def test_the_guide_takes_for_too_much_what_a_run_refuses() -> None:
    for needed, is_too_much in ((100, False), (125, False), (126, True)):
        assert MemoryEstimate(needed, 100, "a GPU").is_too_much is is_too_much


@pytest.mark.parametrize(
    ("task", "method", "batch", "length", "measured"),
    [
        ("sft", "qlora", 8, 243, 1_957_000_192),
        ("sft", "lora", 4, 242, 3_706_510_336),
        ("sft", "full", 4, 242, 25_746_200_064),
        ("dpo", "qlora", 4, 40, 1_582_350_848),
    ],
)
def test_memory_is_estimated_near_what_a_gpu_took(
    task: str, method: str, batch: int, length: int, measured: int
) -> None:
    stats = base_model.ModelStats(1_543_714_304, 233_373_696, 3_087_624_530, 28, 1536, 151_936)
    estimate = base_model.estimate_memory(
        stats,
        task=task,
        method=method,
        bits=4 if method == "qlora" else None,
        dtype="float32" if method == "full" else "bfloat16",
        trainable=stats.parameters if method == "full" else _ADAPTER,
        batch=batch,
        length=length,
        checkpointing=True,
    )
    assert 2 / 3 < estimate / measured < 4 / 3  # torch.cuda.max_memory_allocated, on an H100


def test_the_memory_of_a_machine_is_known() -> None:
    free, where = base_model.available_memory()
    assert free > 0
    assert where


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ObsfsError, match="is missing"):
        ask(tmp_path)
