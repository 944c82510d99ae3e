"""Keys: ours, TRL's, PEFT's; where they go, and what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs import ObsfsError
from trainer.config import TrainConfig, load_config, parse_overrides, read_yaml, refuse_unknown
from trainer.config_keys import BARE

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
    dpo = load_config({**RUN, "task": "dpo", "loss_type": "ipo", "beta": 0.2}).parts(tmp_path)
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
        ({"streaming": True, "max_steps": 1, "test_split_size": 0.1}, "test_split_size takes no effect: streamed data"),
        ({"eval_data": "e", "test_split_size": 0.1}, "test_split_size takes no effect: eval_data is given"),
        ({"accelerator_config": "/none.json"}, "there is no file /none.json"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is of the wrong type: give a number"),
        ({"lr_scheduler_type": "wavy"}, "wavy"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "BitsAndBytesConfig"),
        ({"method": "full", "lora_r": 8}, "r does not go with method full"),
        ({"layers_pattern": "x"}, "LoraConfig"),
        ({"connections": "many"}, "connections"),
        ({"aa": 1, "learnin_rate": 2}, "unknown keys: 'aa' (the nearest known one is 'data'), 'learnin_rate'"),
        ({"lora_r": "8"}, "lora_r: '8' is of the wrong type: give a whole number, without quotes (lora_r: 8)"),
        ({"r": True}, "r: True is of the wrong type"),
        ({"max_steps": 2.5}, "max_steps: 2.5 is of the wrong type: give a whole number"),
        ({"packing": "yes"}, "packing: 'yes' is of the wrong type: give true or false"),
        ({"resume": "no"}, "resume: 'no' is of the wrong type"),
        ({"data": {"path": "x"}}, "data: {'path': 'x'} is of the wrong type"),
        ({"target_modules": ["q_proj", 1]}, "target_modules"),
        ({"per_device_train_batch_size": None}, "per_device_train_batch_size: None is of the wrong type"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 is out of range"),
        ({"gradient_accumulation_steps": -1}, "give a number that is at least 1"),
        ({"test_split_size": 1.5}, "test_split_size: 1.5 is out of range: give a number that is between 0 and 1"),
        ({"test_split_size": 1}, "test_split_size"),
        ({"max_steps": -5}, "give a number that is at least 1, or -1"),
        ({"max_steps": 0}, "max_steps: 0 is out of range"),
        ({"num_train_epochs": 0}, "num_train_epochs: 0"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not a number that can be used"),
        ({"model_init_kwargs": {"a": [float("inf")]}}, "model_init_kwargs: inf"),
        ({"lora_r": -4}, "lora_r: -4 is out of range"),
        ({"save_steps": 0}, "save_steps: 0"),
        ({"optim": "adam_torch"}, "optim: 'adam_torch' is not known: the nearest is 'adamw_torch'"),
        ({"lr_scheduler_type": "cosin"}, "the nearest is 'cosine'"),
        ({"eval_strategy": "step"}, "choose one of no, steps, epoch"),
        ({"bias": "some"}, "bias: 'some' is not known: choose one of none, all, lora_only"),
        ({"dtype": "bf16"}, "dtype: 'bf16' is not known"),
        ({"report_to": ["wandbb"]}, "report_to: 'wandbb' is not known: the nearest is 'wandb'"),
        ({"resume_from_checkpoint": "c"}, "resume_from_checkpoint has no effect here: resume: true"),
        ({"init_lora_weights": "eva"}, "init_lora_weights: eva takes a pass over the data"),
        ({"lora_r": 4, "r": 8}, "lora_r and r mean the same: it is given twice"),
        ({"learning_rate": 1, "options": {"learning_rate": 2}}, "learning_rate is given twice"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(given: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ObsfsError) as caught:
        load_config({**RUN, **given}).parts(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_keys_take_is_what_the_libraries_say() -> None:
    import dataclasses
    import inspect

    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from trainer import config_keys
    from trainer.config import TASKS

    for task in TASKS.values():
        config, _ = task.load()
        read = config_keys.dataclass_keys(task.module, f"{task.name}Config")
        assert read is not None
        assert read.keys() == {one.name for one in dataclasses.fields(config) if one.init}
        usual = {one.name: one.default for one in dataclasses.fields(config) if one.default is not dataclasses.MISSING}
        for name, default in usual.items():
            if default is not None and name not in config_keys.BOUNDS:
                config_keys.checked(name, default, read[name], name)
        assert read["learning_rate"] is float
        assert read["per_device_train_batch_size"] is int
    lora = config_keys.dataclass_keys("peft", "LoraConfig")
    assert lora is not None
    assert lora.keys() == {one.name for one in dataclasses.fields(LoraConfig) if one.init}
    bits = config_keys.signature_keys("transformers", "BitsAndBytesConfig")
    assert bits is not None
    assert bits.keys() == inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}
    assert config_keys.dataclass_keys("no_such_package", "SFTConfig") is None
    assert config_keys.dataclass_keys("trl", "NoSuchConfig") is None


def test_values_are_taken_as_programs_and_yaml_write_them() -> None:
    from transformers.training_args import OptimizerNames

    given = {"data": Path("/d"), "target_modules": {"v", "q"}, "lora_r": 8.0, "learning_rate": 1, "run_name": 2024,
             "optim": OptimizerNames.SGD, "task": "dpo", "loss_type": "ipo", "max_length": None}  # fmt: skip
    config = load_config({**RUN, **given})
    assert config.data == ["/d"]
    assert config.options == {"target_modules": ["q", "v"], "r": 8, "learning_rate": 1.0, "run_name": "2024",
                              "optim": "sgd", "loss_type": ["ipo"], "max_length": None}  # fmt: skip


def test_a_mistyped_key_is_told_before_anything_large_is_imported() -> None:
    code = (
        "import sys\nfrom obsfs import ObsfsError\nfrom trainer.config import load_config\n"
        "try: load_config({'model': 'm', 'data': 'd', 'output': 'o', 'learnin_rate': 1})\n"
        "except ObsfsError as error: print(error)\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets', 'bitsandbytes'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, imported = done.stdout.splitlines()
    assert "'learning_rate'" in told
    assert imported == "[]"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("base_model: m\ndatasets: [{path: x, type: alpaca}]\nadapter: qlora\nmicro_batch_size: 2\nstrict: false",
         ["axolotl", "base_model is model here", "datasets is data here", "adapter is method here",
          "micro_batch_size is per_device_train_batch_size here", "leave out strict"]),
        ("model_name_or_path: m\nstage: sft\ndataset: d\ntemplate: qwen\nfinetuning_type: lora\ncutoff_len: 9\n"
         "output_dir: o\nmystery: 1",
         ["LLaMA-Factory", "stage is task here", "cutoff_len is max_length here", "output_dir is output here",
          "leave out mystery"]),
        ("model: m\ndataset: d\ntrain_type: lora\nsplit_dataset_ratio: 0.1\noutput: o",
         ["ms-swift", "train_type is method here", "split_dataset_ratio is test_split_size here"]),
        ("model_name_or_path: m\ndataset_name: d\nuse_peft: true\noutput_dir: o",
         ["TRL", "use_peft is method: lora here", "output_dir is output here"]),
    ],
)  # fmt: skip
def test_files_of_other_trainers_are_known(text: str, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ObsfsError) as caught:
        load_config(read_yaml(tmp_path / "run.yaml"))
    for words in told:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_other_trainers_keys_are_here_exists_here() -> None:
    from trainer.config import _ALIASES, known_keys
    from trainer.other_trainers import _TOOLS

    known = {*_ALIASES, *(name for task in ("sft", "dpo", "simpo") for name in known_keys(task) or ())}
    for names in _TOOLS.values():
        assert not known & names.keys()  # they would never be unknown
        for here in filter(None, names.values()):
            first = here.replace(" and ", ", ").split(",")[0].split(":")[0]
            assert first in known, here


@pytest.mark.parametrize(
    ("given", "package"),
    [
        ({"report_to": "swanlab"}, "swanlab"),
        ({"report_to": ["tensorboard", "comet_ml"]}, "comet-ml"),
        ({"use_liger_kernel": True}, "liger-kernel"),
        ({"optim": "galore_adamw"}, "galore-torch"),
        ({"optim": "schedule_free_sgd"}, "schedulefree"),
        ({"optim": "adamw_torch_8bit"}, "torchao"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed"),
        ({"attn_implementation": "flash_attention_2"}, "flash-attn"),
        ({"model_init_kwargs": {"use_kernels": True}}, "kernels"),
    ],
)
def test_a_package_that_only_an_option_needs_is_named(
    given: dict[str, object], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = importlib.util.find_spec
    optional = {"swanlab", "comet_ml", "liger_kernel", "galore_torch", "schedulefree", "torchao", "deepspeed",
                "flash_attn", "kernels"}  # fmt: skip
    monkeypatch.setattr("trainer.optional_packages.find_spec", lambda name: None if name in optional else there(name))
    with pytest.raises(ObsfsError, match=f"needs the package {package}: pip install {package}$"):
        load_config({**RUN, **given})
    monkeypatch.setattr("trainer.optional_packages.find_spec", lambda name: there("json"))
    load_config({**RUN, **given})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("lora_r: 8\nseed: 1\nlora_r: 4", 3),
        ("model_init_kwargs:\n  a: 1\n  a: 2", 3),
        ("a: [{b: 1, c: 2, b: 3}]", 1),
        ("a: {b: 1, 'b': 2}", 1),
    ],
)
def test_a_key_that_is_given_twice_is_refused(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ObsfsError, match=f"line {line} cannot be used: the key '.*' is given twice"):
        read_yaml(tmp_path / "run.yaml")
    with pytest.raises(ObsfsError, match="--lora_r is given twice"):
        parse_overrides(["--lora_r", "8", "--lora_r=4"])
    (tmp_path / "run.yaml").write_text("a: &x {k: 1}\nb:\n  <<: *x\n  k: 2\n")
    assert read_yaml(tmp_path / "run.yaml")["b"] == {"k": 2}


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
        "d": BARE,
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora_r", "--lora_r has no value: give a whole number"),
        ("--lora_alpha --resume", "--lora_alpha has no value: give a whole number"),
        ("--warmup-steps --packing", "--warmup_steps has no value: give a number"),
        ("--run_name --fast", "--run_name has no value: give text; one that begins with -- as --run_name=VALUE"),
        ("--eval_data", "--eval_data has no value: give text or a list"),
        ("--region --resume", "--region has no value: give text"),
        ("--cache_size", "--cache_size has no value"),
        ("--LORA_DROPOUT 0.1", "unknown key 'LORA_DROPOUT': the nearest known one is 'lora_dropout'"),
    ],
)
def test_a_flag_without_a_value_is_told_so(words: str, said: str) -> None:
    with pytest.raises(ObsfsError) as caught:
        load_config(RUN, parse_overrides(words.split()))
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(("mistyped", "meant"), [("chekc", "check"), ("gude", "guide"), ("jsn", "json")])
def test_a_mistyped_flag_is_told_by_the_nearest(mistyped: str, meant: str) -> None:
    with pytest.raises(ObsfsError) as caught:
        refuse_unknown({mistyped: BARE, "lora_r": 8}, ["check", "guide", "json"])
    assert str(caught.value) == f"unknown key {mistyped!r}: the nearest known one is {meant!r}"
    refuse_unknown({"lora_r": 8, "resume": BARE}, ["check", "guide", "json"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora_r 8 run.yaml", "run.yaml comes too late: write obsfs train run.yaml --KEY VALUE"),
        ("--resume run.yaml", "run.yaml comes too late"),
        ("run.yaml --guide", "--guide writes a configuration, and run.yaml is one"),
        ("--guide --learnin_rate 1", "the nearest known one is 'learning_rate'"),
        ("run.yaml --output s3:/bucket/run", "no place that can be written"),
    ],
)
def test_words_in_the_wrong_place_are_told(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obsfs_command: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: .\ndata: d.jsonl\noutput: o\n")
    done = obsfs_command("train", *words.split())
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert said in done.err


def test_a_flag_without_a_value_is_true_where_that_can_be() -> None:
    config = load_config(RUN, parse_overrides(["--packing", "--resume", "--no-sign-request", "--run_name=--fast"]))
    assert config.resume is True
    assert config.options == {"packing": True, "no_sign_request": True, "run_name": "--fast"}


@given(st.lists(st.one_of(st.text(max_size=8), st.text("-=[]{}&*!|>'%@`: \t\na1", max_size=8)), max_size=6))
def test_no_words_are_a_mistake_of_ours(words: list[str]) -> None:
    try:
        parse_overrides(words)
    except ObsfsError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("cache_size: 3x", "cache_size: 3x: '3x' is not a size"),
        ("connections: [1, 2]", "connections: [1, 2]: it must be a whole number"),
        ("metadata: 1\nretry_timeout: -5", "unknown key 'metadata'"),
        ("retry_timeout: -5s", "retry_timeout: -5s: '-5s' is not a time"),
        ("cache_dir: ''", "cache_dir is empty: give it a value, or leave it out"),
        ("library: models", "library: models: write obs://BUCKET"),
        ("options:\n  profile: 7", "profile: 7: it must be text"),
    ],
)
def test_a_setting_of_a_file_is_named_as_the_key_there(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a {run}.yaml"
    path.write_text(f"model: m\ndata: d.jsonl\noutput: o\n{line}\n")
    with pytest.raises(ObsfsError) as caught:
        load_config(read_yaml(path))
    assert str(caught.value).startswith(said if "unknown" in said else f"{path}: {said}")


def test_a_setting_that_no_file_has_is_named_as_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d.jsonl\noutput: o\ncache_size: 3x\n")
    for words, said in (
        (["--cache_size", "4x"], "--cache_size 4x: "),
        (["--cache-size="], "--cache_size is empty"),
        (["--connections", "no", "--cache_size", "1GiB"], "--connections no: it must be a whole number"),
    ):
        with pytest.raises(ObsfsError) as caught:
            load_config(read_yaml(path), parse_overrides(words))
        assert str(caught.value).startswith(said)
    with pytest.raises(ObsfsError, match=r"^cache_size=5x: "):
        load_config(RUN, {"cache_size": "5x"})
    settings = load_config(read_yaml(path), parse_overrides(["--cache-size", "1GiB", "--region", "1e3"])).settings
    assert settings == {"cache_size": "1GiB", "region": "1e3"}


def test_values_nested_without_end_are_refused_and_as_a_flag_are_text(tmp_path: Path) -> None:
    deep = "[" * 3000 + "]" * 3000
    (tmp_path / "run.yaml").write_text(f"a: {deep}\n")
    with pytest.raises(ObsfsError, match="its values are nested too deeply"):
        read_yaml(tmp_path / "run.yaml")
    assert parse_overrides(["--a", deep]) == {"a": deep}


@pytest.mark.parametrize("second", ["run.yaml", "x", "2e-4"])
def test_a_second_configuration_is_told(second: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from trainer.commands import train

    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: m\n")
    with pytest.raises(ObsfsError, match=f"^{second} follows the configuration run.yaml: give one"):
        CliRunner().invoke(train, ["run.yaml", second, "--max_steps", "1"], catch_exceptions=False)
