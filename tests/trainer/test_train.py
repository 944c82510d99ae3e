"""Every method and task, trained for real on a tiny model that lies in a real bucket."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import obsfs
from obsfs import ObsfsError
from tests.conftest import Mounter, Store
from tests.trainer.conftest import CHOICES, JUDGED, QUICK, ROWS, Losses, write_lines
from trainer import base_model
from trainer.run_location import RunLocation

Train = Callable[..., Any]
_DATA: dict[str, Any] = {"sft": ROWS, "kto": JUDGED}


def logits_of(model: Any) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        return model(torch.arange(32)[None] + 5).logits.float()


def watcher(look: Callable[[Any], None]) -> Any:
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            look(model)

    return Watcher()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method"),
    [
        ("sft", "qlora"),
        ("sft", "lora"),
        ("sft", "dora"),
        ("sft", "full"),
        ("dpo", "qlora"),
        ("dpo", "full"),
        ("kto", "lora"),
        ("orpo", "qlora"),
        ("cpo", "dora"),
        ("simpo", "qlora"),
    ],
)
def test_every_method_and_task_learns(
    task: str, method: str, run: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "data.jsonl", _DATA.get(task, CHOICES))
    losses = Losses()
    given = {"task": task, "method": method, "max_steps": 12, "callbacks": [losses.callback]}
    outcome = run(data=str(path), rehearse=True, **given)
    told = list(losses.found.values())
    assert outcome.steps == len(told) == 12
    assert sum(told[-3:]) < sum(told[:3]) * 0.95, told
    shown = [line for line in capsys.readouterr().err.splitlines() if " tokens/s " in line]
    assert shown[0].startswith("step 1/12  loss ")
    assert shown[-1].startswith("step 12/12  loss ")
    out = Path(outcome.output)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert {name, "tokenizer.json", "README.md", "train.yaml"} <= {one.name for one in out.iterdir()}
    assert outcome.seconds["to first step"] > outcome.seconds["load"] > outcome.seconds.get("quantise", 0)
    assert ("quantise" in outcome.seconds) is (method == "qlora")


@pytest.mark.slow
def test_the_base_of_qlora_is_really_4_bit(run: Train, rows: Path) -> None:
    import bitsandbytes
    import torch

    seen: dict[str, Any] = {}

    def look(model: Any) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
        seen["count"] = len(layers)
        seen["dtypes"] = {layer.weight.dtype for layer in layers}
        seen["bytes"] = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
        seen["numbers"] = sum(layer.in_features * layer.out_features for layer in layers)
        seen["state"] = layers[0].weight.quant_state

    run(data=str(rows), method="qlora", max_steps=1, callbacks=[watcher(look)])
    assert (seen["count"], seen["dtypes"]) == (14, {torch.uint8})
    assert seen["bytes"] == seen["numbers"] / 2
    assert (seen["state"].quant_type, seen["state"].nested) == ("nf4", True)


@pytest.mark.slow
def test_an_adapter_in_the_bucket_is_the_one_that_was_trained(
    run: Train, bucket: Store, tiny: Path, rows: Path, tmp_path: Path, obsfs_command: Callable[..., Any]
) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    seen: list[Any] = []
    url = f"{bucket}/adapters/run-1"
    outcome = run(
        data=str(rows),
        method="lora",
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        output=url,
        hub_token="hf_planted_secret",
        callbacks=[watcher(lambda model: seen.append(logits_of(model)))],
    )
    assert outcome.output == url
    assert outcome.published == [*(f"{url}@checkpoint-{step}" for step in (2, 4, 6, 8)), url]
    versions = {one["version"] for one in obsfs_command("models", f"{bucket}/adapters", "--json").json["models"]}
    assert versions == {None, "checkpoint-6", "checkpoint-8"}
    assert obsfs_command("verify", f"{url}@checkpoint-8").code == 0
    adapter = Path(obsfs.snapshot_download(url, local_dir=tmp_path / "pulled"))
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    again = logits_of(PeftModel.from_pretrained(base, adapter))
    assert torch.allclose(again, seen[0], atol=2e-2)
    assert not torch.allclose(
        again, logits_of(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)), atol=0.2
    )
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == f"{bucket}/models/tiny@v1"
    card = (adapter / "README.md").read_text()
    assert f"`{bucket}/models/tiny@v1`" in card
    assert f"\nobsfs chat {bucket}/models/tiny@v1 --adapter {url}\n" in card
    assert load_file(adapter / "adapter_model.safetensors")
    checkpoint = Path(obsfs.snapshot_download(f"{url}@checkpoint-8", local_dir=tmp_path / "checkpoint"))
    assert f" --adapter {url}@checkpoint-8\n" in (checkpoint / "README.md").read_text()
    for place in (adapter, checkpoint):
        names = {path.name for path in place.rglob("*")}
        assert {"tokenizer.json", "train.yaml", "README.md"} <= names
        assert "training_args.bin" not in names
        assert not any(b"hf_planted_secret" in path.read_bytes() for path in place.rglob("*") if path.is_file())
    with pytest.raises(ObsfsError, match="--resume goes on"):
        run(data=str(rows), method="lora", max_steps=8, output=url)


@pytest.mark.slow
def test_a_path_on_a_mount_is_a_place_in_the_bucket(
    bucket: Store, mount: Mounter, model: str, rows: Path, run: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    mounted = mount(bucket)
    assert not (mounted / "adapters").exists()
    outcome = run(
        model=str(mounted / "models" / "tiny@v1"), data=str(rows), max_steps=2, output=str(mounted / "adapters" / "a")
    )
    assert outcome.output == f"{bucket}/adapters/a"
    told = f"{mounted}/adapters/a lies on a mount: the result is published as {bucket}/adapters/a"
    assert capsys.readouterr().err.splitlines()[0] == told
    assert (mounted / "adapters" / "a" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_evaluation_and_streaming(run: Train, rows: Path, tmp_path: Path) -> None:
    losses = Losses()
    outcome = run(
        data=str(rows), test_split_size=0.25, eval_strategy="steps", eval_steps=2, max_steps=2, method="lora",
        callbacks=[losses.callback],
    )  # fmt: skip
    assert outcome.steps == 2
    outcome = run(data=[str(rows)], streaming=True, max_steps=2, method="lora", output=str(tmp_path / "streamed"))
    assert outcome.steps == 2


@pytest.mark.slow
def test_an_evaluation_changes_nothing_of_what_is_learned(
    run: Train, rows: Path, tmp_path: Path, repacked: list[tuple[int, ...]]
) -> None:
    found = []
    for name, given in (("plain", {}), ("judged", {"eval_data": str(rows), "eval_strategy": "steps", "eval_steps": 1})):
        losses = Losses()
        run(
            data=str(rows), method="qlora", max_steps=3, callbacks=[losses.callback], output=str(tmp_path / name),
            **given,
        )  # fmt: skip
        found.append(losses.found)
    assert not repacked
    assert found[0] == found[1]


@pytest.mark.slow
def test_what_cannot_be_run_is_told_before_it_starts(
    run: Train, bucket: Store, tiny: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from trainer import memory_estimate

    def refused(message: str, **given: Any) -> None:
        with pytest.raises(ObsfsError) as caught:
            run(**{"data": str(rows), "max_steps": 1, **given})
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("there is tiny@v1", model=f"{bucket}/models/tinny")
    refused("no directory", model="Qwen/Qwen2-7B")
    refused(f"the nearest is {tiny}", model=str(tiny.with_name("tinyy")))
    refused("config.json is missing", model=str(tmp_path))
    cut = tmp_path / "cut"
    shutil.copytree(tiny, cut)
    shard = sorted(cut.glob("*.safetensors"))[-1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    refused(f"{shard} is cut off", model=str(cut))
    shard.unlink()
    refused(f"{shard} is missing", model=str(cut))
    shard.write_bytes(whole)
    (cut / "chat_template.jinja").unlink()
    refused("has no chat template", model=str(cut), data=str(write_lines(tmp_path / "m.jsonl", [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    ])))  # fmt: skip
    (cut / "tokenizer.json").write_text("{")
    refused("tokenizer.json is not JSON", model=str(cut))
    (cut / "tokenizer.json").unlink()
    refused(f"{cut} has no tokenizer", model=str(cut))
    shutil.copyfile(tiny / "tokenizer.json", cut / "tokenizer.json")
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    refused("and the model knows 100", model=str(cut))
    refused("is in no format for task dpo", task="dpo")
    refused("there is no data", data="./none.jsonl")
    refused("is a version", output=f"{bucket}/adapters/a@v1")
    dead = "http://127.0.0.1:1"
    refused("cannot be read", model=str(tiny), output=f"{bucket}/a", endpoint_url=dead)
    (tmp_path / "file").write_text("")
    refused("cannot be written", output=str(tmp_path / "file" / "below"))
    refused("q_projj", target_modules=["q_projj"], output=str(tmp_path / "o"))
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: (1 << 20, "this machine"))
    refused("MiB of memory, and this machine has 1.0 MiB free")
    assert run(data=str(rows), max_steps=1, check_memory=False, output=str(tmp_path / "tried")).steps == 1


@pytest.mark.slow
def test_a_check_trains_nothing(run: Train, rows: Path, bucket: Store) -> None:
    outcome = run(only_check=True, data=str(rows), output=f"{bucket}/adapters/a")
    assert (outcome.steps, outcome.published) == (0, [])
    assert outcome.metrics["records"] == len(rows.read_text().splitlines())
    assert 0 < outcome.metrics["memory"] < outcome.metrics["memory_free"]
    assert "Contents" not in bucket.client.list_objects_v2(Bucket=bucket.name, Prefix="adapters/a")
    # The server keeps the directory that was written to on trial.
    assert not RunLocation(f"{bucket}/adapters/a", {}).is_taken()
    bucket.put("adapters/b", b"somebody's")
    assert RunLocation(f"{bucket}/adapters/b", {}).is_taken()


class _Clock:
    """Goes on by itself only as far as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now


def test_without_a_terminal_a_line_comes_now_and_then(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from trainer import progress
    from trainer.base_model import BaseModel

    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    arguments, model = TrainingArguments("unused", use_cpu=True), torch.nn.Linear(2, 2)

    def steps(
        number: int, *, seconds: float, log_every: int, judge_every: int = 1000, as_json: bool = False
    ) -> list[str]:
        state, control = TrainerState(max_steps=number), TrainerControl()
        shown = progress.Progress(
            BaseModel(tiny, "m"), progress.Timeline(1000.0), as_json=as_json, on_first_step=lambda: None
        )
        shown.on_train_begin(arguments, state, control, model=model)
        for step in range(1, number + 1):
            clock.now += seconds
            state.global_step = step
            control.should_log = step == 1 or step % log_every == 0
            shown.on_step_end(arguments, state, control)
            if control.should_log:
                shown.on_log(arguments, state, control, {"loss": 100.0 - step})
            if step % judge_every == 0:
                shown.on_log(arguments, state, control, {"eval_loss": 7.0})
        shown.on_train_end(arguments, state, control)
        told = capsys.readouterr()
        assert bool(told.out) is as_json
        return told.err.splitlines()

    def numbers(lines: list[str]) -> list[int]:
        return [int(line.removeprefix("step ").partition("/")[0]) for line in lines]

    quick = steps(100, seconds=1, log_every=1)  # a log per second: every tenth is told, and the first and the last
    assert numbers(quick) == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert quick[1].startswith("step 11/100  loss 89.0000")
    assert numbers(steps(5, seconds=1, log_every=1)) == [1, 5]
    judged = steps(9, seconds=0.1, log_every=1, judge_every=4)  # what an evaluation found is told at once
    assert numbers(judged) == [1, 4, 8, 9]
    assert "eval_loss 7.0000" in judged[1]
    slow = steps(5, seconds=60, log_every=10)  # ten minutes to the next log: every step is told
    assert numbers(slow) == [1, 2, 3, 4, 5]
    assert slow[3].startswith("step 4/5  loss 99.0000")  # the newest that is known
    assert slow[3].endswith("(loss of step 1)")
    assert "(loss of" not in slow[0] + quick[1]
    assert steps(5, seconds=60, log_every=1, as_json=True) == []


@pytest.mark.parametrize("as_json", [False, True])
def test_a_run_goes_on_when_nobody_reads_on(tiny: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from trainer import progress
    from trainer.base_model import BaseModel

    reader, writer = os.pipe()
    os.close(reader)
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    arguments, state, control = TrainingArguments("unused", use_cpu=True), TrainerState(max_steps=3), TrainerControl()
    shown = progress.Progress(
        BaseModel(tiny, "m"), progress.Timeline(1000.0), as_json=as_json, on_first_step=lambda: None
    )
    ended = False
    with suppress(BrokenPipeError), os.fdopen(writer, "w") as broken:  # closing it fails with what was not written
        monkeypatch.setattr("sys.stdout" if as_json else "sys.stderr", broken)
        shown.on_train_begin(arguments, state, control, model=torch.nn.Linear(2, 2))
        for step in range(1, 4):
            clock.now += 60
            state.global_step = step
            shown.on_step_end(arguments, state, control)
            shown.on_log(arguments, state, control, {"loss": 1.0})
        shown.on_train_end(arguments, state, control)
        ended = True
    assert ended


@pytest.mark.slow
def test_the_data_is_looked_at_before_the_weights_are_loaded(
    run: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.run import _Run

    long = {"instruction": "word " * 80, "input": "", "output": "ok"}
    path = write_lines(tmp_path / "a.jsonl", [long, *ROWS[:3], long])
    outcome = run(data=str(path), method="lora", max_steps=2)
    assert outcome.metrics["records_cut"] == outcome.metrics["records_dropped"] == 2
    told = capsys.readouterr().err
    for text in (
        "records checked: all 5, ",
        "the loss covers the answers only",
        "2 of 5 records checked are longer than max_length 64",
        f"have no answer left within max_length 64 and are dropped (record 1 of {path})",
        "2 of 5 records are dropped",
    ):
        assert text in told
    assert told.index("records checked") < told.index("step 1/2")
    checked = run(data=str(path), only_check=True, output=str(tmp_path / "other"))
    assert (checked.metrics["records_without_answer"], len(checked.notes)) == (2, 3)

    def refuse(self: Any) -> None:
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(_Run, "_load_model", refuse)
    for rows in ([long], [{"messages": [{"role": "narrator", "content": "x"}]}]):
        with pytest.raises(ObsfsError, match=r"max_length 64|record 1 of"):
            run(data=str(write_lines(tmp_path / "b.jsonl", rows)), output=str(tmp_path / "third"))


@pytest.mark.slow
def test_only_the_answers_of_conversations_are_learned(run: Train, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "weight": 0}]
    rows = [{"messages": [*turns, turns[0], {"role": "assistant", "content": "hey"}]}] * 4
    seen: list[Any] = []

    def look(model: Any) -> None:
        def keep(module: Any, args: Any, given: Any) -> None:
            seen.append((given["input_ids"][0].tolist(), given["labels"][0].tolist()))

        model.register_forward_pre_hook(keep, with_kwargs=True)

    from transformers import TrainerCallback

    class Start(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            look(model)

    path = write_lines(tmp_path / "a.jsonl", rows)
    run(data=str(path), method="lora", max_steps=1, assistant_only_loss=True, callbacks=[Start()])
    (ids, labels), *_ = seen
    found = [one for one in labels if one != -100]
    assert 0 < len(found) < len(ids) / 3
    assert found == ids[-len(found) :]


@pytest.mark.slow
def test_what_people_and_machines_see(
    model: str, rows: Path, tmp_path: Path, obsfs_command: Callable[..., Any], other_processor: None
) -> None:
    quick = {**QUICK, "rehearse": True}
    words = [word for name, value in quick.items() for word in (f"--{name}", str(value).lower())]
    common = ["train", "--model", model, "--data", rows, "--max_steps", 4, *words]
    shown = obsfs_command(*common, "--output", tmp_path / "a", timeout=120)
    assert shown.code == 0, shown.err
    assert shown.out.strip() == str(tmp_path / "a")
    for text in ("step 1/4  loss ", "step 4/4  loss ", "tokens/s", "memory ", "fetched ", "first step after"):
        assert text in shown.err
    for chatter in ("Warning", "Failed to load", "kernels-community"):
        assert chatter not in shown.err
    lines = obsfs_command(*common, "--output", tmp_path / "b", "--json", timeout=120)
    told = [json.loads(line) for line in lines.out.splitlines()]
    assert [one["step"] for one in told[:4]] == [1, 2, 3, 4]
    assert all(one["tokens_per_second"] > 0 for one in told[:4])
    assert told[-1]["output"] == str(tmp_path / "b")
    assert {"load", "data", "first step", "to first step"} <= told[-1]["seconds"].keys()
    checked = obsfs_command(*common, "--output", tmp_path / "c", "--check")
    assert checked.code == 0
    for text in ("parameters", "records", "memory  about ", "all is well"):
        assert text in checked.out
    assert obsfs_command("train").code == 2
    wrong = obsfs_command("train", "--model", model, "--data", rows, "--output", "x", "--learnin_rate", "1")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "'learning_rate'" in wrong.err


_TRIED = """
import json, sys, obsfs, trainer
try:
    trainer.train(json.loads(sys.argv[1]))
except obsfs.ObsfsError as error:
    print(error)
print(sorted({"torch", "transformers", "trl"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{bucket}/models/tinny", "there is no model {bucket}/models/tinny: "),
        ("{bucket}/models/half", "config.json is missing: "),
        ("{here}/no/such", "there is no directory {here}/no/such: "),
        ("{here}/bare", "{here}/bare has no weights: "),
        ("{here}/file", "{here}/file is no directory: "),
    ],
)
def test_a_model_that_is_not_there_is_told_before_anything_large_is_imported(
    name: str, said: str, bucket: Store, rows: Path, tmp_path: Path
) -> None:
    bucket.put("models/half/model.safetensors", b"")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "file").touch()
    places = {"bucket": str(bucket), "here": str(tmp_path)}
    given = {"model": name.format(**places), "data": str(rows), "output": str(tmp_path / "out")}
    command = [sys.executable, "-c", _TRIED, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    told, imported = done.stdout.splitlines()
    assert said.format(**places) in told, done.stderr
    assert imported == "[]"


def test_a_model_with_code_of_its_own_is_refused_by_the_key_that_allows_it(tiny: Path, tmp_path: Path) -> None:
    own, ran = tmp_path / "own", tmp_path / "ran"
    shutil.copytree(tiny, own)
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "configuration_own.py").write_text(
        f"from transformers import Qwen2Config\nopen({str(ran)!r}, 'w')\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
    )
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(ObsfsError) as caught:
            base_model.model_class(own, **options)
        assert str(caught.value).startswith(f"{own} needs Python code of its own (configuration_own.py), which is not")
        assert "trust_remote_code: true" in str(caught.value)
        assert not ran.exists()
    assert base_model.model_class(own, trust_remote_code=True).__name__ == "Qwen2ForCausalLM"
    assert ran.exists()


def test_an_output_on_a_mount_that_died_is_told_before_anything_large_is_imported(
    bucket: Store, mount: Mounter, tiny: Path, rows: Path
) -> None:
    mounted = mount(bucket)
    server = obsfs.status(mounted)["pid"]
    mount.process(mounted).kill()  # the supervisor, which would start another
    os.kill(server, signal.SIGKILL)
    given = {"model": str(tiny), "data": str(rows), "output": str(mounted / "out")}
    command = [sys.executable, "-c", _TRIED, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    told, imported = done.stdout.splitlines()
    assert str(mounted) in told
    assert imported == "[]"
