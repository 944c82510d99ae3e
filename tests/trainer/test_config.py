"""Keys: ours, TRL's, PEFT's; where they go, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs import ObsfsError
from trainer.config import TrainConfig, load_config, parse_overrides, read_yaml

RUN = {"model": "m", "data": "d.jsonl", "output": "o"}


def test_the_names_of_trl_and_peft_are_taken(tmp_path: Path) -> None:
    text = """
        model_name_or_path: m
        dataset_name: [a.jsonl, b.jsonl]
        output: o
        learning_rate: 2e-4
        per_device_train_batch_size: 3
        lora_r: 4
        lora_alpha: 12
        target_modules: [q_proj, v_proj]
        rank_pattern: {q_proj: 8}
        init_lora_weights: pissa
        use_bnb_nested_quant: false
        bnb_4bit_quant_type: fp4
        packing: true
        connections: 8
    """
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(read_yaml(tmp_path / "run.yaml"), {"learning_rate": 1e-3})
    assert (config.model, config.data, config.settings) == ("m", ["a.jsonl", "b.jsonl"], {"connections": 8})
    config.options.pop("connections")
    parts = config.parts(tmp_path)
    arguments = parts.arguments
    assert (arguments.learning_rate, arguments.per_device_train_batch_size, arguments.packing) == (1e-3, 3, True)
    assert (parts.lora.r, parts.lora.lora_alpha, parts.lora.target_modules) == (4, 12, {"q_proj", "v_proj"})
    assert (parts.lora.rank_pattern, parts.lora.init_lora_weights) == ({"q_proj": 8}, "pissa")
    bits = parts.quantization
    assert (bits.load_in_4bit, bits.bnb_4bit_quant_type, bits.bnb_4bit_use_double_quant) == (True, "fp4", False)


def test_methods_are_what_they_say(tmp_path: Path) -> None:
    import torch

    qlora = load_config(RUN).parts(tmp_path)
    assert qlora.quantization.bnb_4bit_quant_type == "nf4"
    assert qlora.quantization.bnb_4bit_use_double_quant
    assert qlora.quantization.bnb_4bit_compute_dtype == torch.bfloat16
    assert qlora.lora.target_modules == "all-linear"
    assert load_config({**RUN, "method": "lora"}).parts(tmp_path).quantization is None
    assert load_config({**RUN, "method": "dora"}).parts(tmp_path).lora.use_dora
    full = load_config({**RUN, "method": "full"})
    assert (full.parts(tmp_path).lora, full.base_dtype) == (None, "float32")
    assert not load_config({**RUN, "load_in_4bit": False}).is_quantized
    simpo = load_config({**RUN, "task": "simpo"}).parts(tmp_path)
    assert (simpo.trainer.__name__, simpo.arguments.loss_type, simpo.arguments.cpo_alpha) == ("CPOTrainer", "simpo", 0)
    dpo = load_config({**RUN, "task": "dpo", "loss_type": "ipo", "beta": "0.2"}).parts(tmp_path)
    assert (dpo.arguments.loss_type, dpo.arguments.beta) == (["ipo"], 0.2)


def test_a_dataclass_is_a_run() -> None:
    @dataclass
    class Mine:
        model: str = "m"
        data: str = "d"
        output: str = "o"
        options: dict[str, object] = field(default_factory=lambda: {"lora_r": 2})

    assert load_config(Mine()).options == {"r": 2}  # type: ignore[arg-type]
    assert load_config(TrainConfig("m", ["d"], "o", options={"r": 1}), {"r": 3}).options == {"r": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learnin_rate": 1}, "unknown key 'learnin_rate': the nearest known one is 'learning_rate'"),
        ({"lora_rr": 1}, "the nearest known one is 'lora_r'"),
        ({"qqqqqqqqqqq": 1}, "unknown key 'qqqqqqqqqqq'"),
        ({"task": "sfd"}, "task: 'sfd' is not known: choose one of sft, dpo"),
        ({"method": "lorra"}, "choose one of qlora"),
        ({"model": ""}, "the run has no model"),
        ({"data": []}, "the run has no data"),
        ({"output": None}, "the run has no output"),
        ({"streaming": True}, "max_steps"),
        ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
        ({"lr_scheduler_type": "wavy"}, "wavy"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "BitsAndBytesConfig"),
        ({"method": "full", "lora_r": 8}, "r does not go with method full"),
        ({"bias": "some", "layers_pattern": "x"}, "LoraConfig"),
        ({"connections": "many"}, "connections"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(given: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ObsfsError) as caught:
        load_config({**RUN, **given}).parts(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "line 1"), ("- x", "no configuration"), ("\x00", "no YAML")])
def test_what_is_no_yaml_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ObsfsError, match=message):
        read_yaml(tmp_path / "run.yaml")
    with pytest.raises(ObsfsError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_overrides_are_read_as_yaml() -> None:
    text = "--a 1 --b-c=x=y --d --e q v --f [1,2] --g null --h 1e-4 --i no --j 0x"
    expected = {
        "a": 1,
        "b_c": "x=y",
        "d": True,
        "e": ["q", "v"],
        "f": [1, 2],
        "g": None,
        "h": 1e-4,
        "i": "no",
        "j": "0x",
    }
    assert parse_overrides(text.split()) == expected
    with pytest.raises(ObsfsError, match="write --key value"):
        parse_overrides(["stray"])


@given(st.lists(st.one_of(st.text(max_size=8), st.text("-=[]{}&*!|>'%@`: \t\na1", max_size=8)), max_size=6))
def test_no_words_are_a_mistake_of_ours(words: list[str]) -> None:
    try:
        parse_overrides(words)
    except ObsfsError as error:
        assert "\n" not in str(error)
