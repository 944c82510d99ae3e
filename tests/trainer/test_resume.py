"""Runs that are killed, torn checkpoints, other machines, and several processes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import obsfs
from tests.conftest import Store, contents, stop_group
from tests.trainer.conftest import QUICK, ROWS, Losses, write_lines
from trainer import checkpoints, run_record
from trainer.run_location import RunLocation

RUN = {**QUICK, "method": "qlora", "max_steps": 12, "save_strategy": "steps", "save_steps": 2}
_SECONDS = 120


def start(directory: Path, *words: str, launcher: tuple[str, ...] = (), **given: Any) -> subprocess.Popen[str]:
    """A run in a process group of its own, by its YAML."""
    config = directory / "run.yaml"
    config.write_text(json.dumps({**RUN, **given}))
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "trainer", str(config), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=_SECONDS)
    assert process.returncode == 0, out
    return out


def checkpoint_place(url: str) -> Path:
    """Where a run to a bucket keeps its checkpoints on this machine."""
    (found,) = (Path(os.environ["XDG_STATE_HOME"]) / "obsfs" / "runs").glob(f"{url.rpartition('/')[2]}-*")
    return found


def history(checkpoint: Path) -> dict[int, float]:
    log = json.loads((checkpoint / "trainer_state.json").read_bytes())["log_history"]
    return {one["step"]: one["loss"] for one in log if "loss" in one}


@pytest.mark.slow
def test_killed_and_resumed_it_is_as_if_nothing_had_happened(
    run: Callable[..., Any], model: str, rows: Path, bucket: Store, tmp_path: Path
) -> None:
    undisturbed = Losses()
    run(**{**RUN, "data": str(rows), "callbacks": [undisturbed.callback]})
    place = RunLocation(f"{bucket}/adapters/killed", {})
    given: dict[str, Any] = {"model": model, "data": str(rows), "output": place.url}
    for seed in (1, 2):
        process = start(tmp_path, "--resume", **given)
        try:
            before = len(place.steps())
            deadline = time.monotonic() + _SECONDS
            while len(place.steps()) <= before and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.05)
            time.sleep(random.Random(seed).uniform(0, 0.3))
        finally:
            stop_group(process)
    reached = place.steps()
    assert reached
    for step in reached:  # whole, whatever was under way
        obsfs.snapshot_download(place.version(step), local_dir=tmp_path / f"whole-{step}")
    out = finish(start(tmp_path, "--resume", **given))
    assert f"going on from checkpoint-{max(reached)}" in out or max(reached) < 12
    last = obsfs.snapshot_download(place.version(12), local_dir=tmp_path / "last")
    found = history(Path(last))
    assert found.keys() == undisturbed.found.keys() == set(range(1, 13))
    assert found == pytest.approx(undisturbed.found, abs=2e-3)
    assert place.is_taken()


@pytest.mark.slow
def test_another_machine_goes_on_from_the_bucket(
    run: Callable[..., Any], rows: Path, bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{bucket}/adapters/moved"
    run(**{**RUN, "data": str(rows), "max_steps": 4, "output": url})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    outcome = run(**{**RUN, "data": str(rows), "max_steps": 6, "output": url, "resume": True})
    assert (outcome.resumed_from, outcome.steps) == (4, 6)
    assert outcome.published == [f"{url}@checkpoint-6", url]


@pytest.mark.slow
def test_a_torn_checkpoint_is_none(run: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(**{**RUN, "data": str(rows), "max_steps": 6})
    assert checkpoints.local_steps(out) == [2, 4, 6]
    weights = out / "checkpoint-6" / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    (out / "checkpoint-8").mkdir()  # begun, and no more
    (out / "checkpoint-8" / "adapter_model.safetensors").write_bytes(b"half")
    assert checkpoints.local_steps(out) == [2, 4]
    outcome = run(**{**RUN, "data": str(rows), "max_steps": 6, "resume": True})
    assert (outcome.resumed_from, outcome.steps) == (4, 6)
    assert checkpoints.local_steps(out) == [2, 4, 6]


@pytest.mark.slow
def test_a_run_goes_on_only_from_what_it_was_made_with(
    run: Callable[..., Any], rows: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    given = {**RUN, "method": "lora", "data": str(rows), "lora_r": 4, "max_steps": 2, "model": str(tiny)}
    run(**given)
    other, same = tmp_path / "other", tmp_path / "same"
    for copy in (other, same):
        shutil.copytree(tiny, copy)
    for shard in other.glob("*.safetensors"):  # the same shapes, names and sizes
        save_file({name: one + torch.ones_like(one) for name, one in load_file(shard).items()}, shard, {"format": "pt"})
    given |= {"max_steps": 4, "resume": True}
    for changed, message in (
        ({"model": str(other)}, f"checkpoint-2 is of the base {tiny}, and the model is {other}"),
        ({"method": "qlora"}, "checkpoint-2 was made with method lora, not qlora"),
        ({"lora_r": 8}, "checkpoint-2 was made with rank (lora_r) 4, not 8"),
        ({"target_modules": ["q_proj", "v_proj"]}, "up_proj, v_proj, not q_proj, v_proj"),
    ):
        with pytest.raises(obsfs.ObsfsError) as caught:
            run(**{**given, **changed})
        assert message in str(caught.value)
        assert "choose another output" in str(caught.value)
    capsys.readouterr()
    fewer = write_lines(tmp_path / "fewer.jsonl", ROWS[:12])
    outcome = run(**{**given, "model": str(same), "data": str(fewer), "learning_rate": 1e-3})
    assert (outcome.resumed_from, outcome.steps) == (2, 4)
    told = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("since checkpoint-2"))
    assert f"data {rows} then, {fewer} now" in told
    assert "records 32 then, 12 now" in told
    assert "learning_rate 0.005 then, 0.001 now (the optimiser's state has 0.005" in told
    # What an older version has made says nothing; what a later one has made, nobody here can read.
    checkpoint = tmp_path / "out" / "checkpoint-4"
    made_with = json.loads((checkpoint / run_record.NAME).read_bytes())
    (checkpoint / run_record.NAME).unlink()
    checkpoints.seal(checkpoint)
    assert run(**{**given, "max_steps": 6}).steps == 6
    assert "checkpoint-4 does not say what it was made with" in capsys.readouterr().err
    checkpoint = tmp_path / "out" / "checkpoint-6"
    (checkpoint / run_record.NAME).write_text(json.dumps({**made_with, "version": 2}))
    checkpoints.seal(checkpoint)
    with pytest.raises(obsfs.ObsfsError, match="by a later version of obsfs"):
        run(**{**given, "max_steps": 8})


@pytest.mark.slow
def test_the_best_of_a_run_stays_its_result(
    run: Callable[..., Any], rows: Path, bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {
        "eval_data": str(rows), "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True,  # the first is the best so
    }  # fmt: skip
    url = f"{bucket}/adapters/best"
    given = {**RUN, "method": "lora", "data": str(rows), "max_steps": 6, "save_total_limit": 2, "output": url, **best}
    outcome = run(**given)
    assert outcome.reason == ""

    def result(name: str) -> bytes:
        place = obsfs.snapshot_download(url, local_dir=tmp_path / name)
        return Path(place, "adapter_model.safetensors").read_bytes()

    first = result("first")
    last = obsfs.snapshot_download(f"{url}@checkpoint-6", local_dir=tmp_path / "last")
    assert Path(last, "adapter_model.safetensors").read_bytes() != first
    again = run(**given, resume=True)
    assert (again.steps, again.resumed_from) == (6, 6)
    assert again.reason.startswith("the run had come to its end at step 6")
    assert result("again") == first
    # Elsewhere neither the result nor the best checkpoint is on the disk, and the run may also go on.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    run(**given, resume=True)
    assert result("elsewhere") == first
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "third"))
    further = run(**{**given, "max_steps": 8}, resume=True)
    assert (further.resumed_from, further.steps) == (6, 8)
    assert result("further") == first
    assert checkpoints.local_steps(checkpoint_place(url)) == [2, 8]
    # Without the best checkpoint there is nothing to give.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "fourth"))
    RunLocation(url, {}).remove(2)
    with pytest.raises(obsfs.ObsfsError, match="the best checkpoint of the run, checkpoint-2, is gone"):
        run(**{**given, "max_steps": 10}, resume=True)


def test_what_cannot_change_is_refused_and_what_can_is_said(tiny: Path, tmp_path: Path) -> None:
    from trainer import base_model
    from trainer.config import load_config

    def noted(**given: Any) -> run_record.RunRecord:
        config = load_config({"model": str(tiny), "data": "d", "output": "o", "method": "lora", **given})
        parts = config.parts(tmp_path)
        return run_record.take(
            config, parts, base_model.BaseModel(tiny, str(tiny)), base_model.plan_adapter(tiny, parts.lora)
        )

    then = noted()
    then.write(tmp_path)
    assert run_record.read(tmp_path) == then
    for changed, message in (
        ({"lora_alpha": 8}, "lora_alpha 32, not 8"),
        ({"method": "dora"}, "method lora, not dora"),
        ({"rank_pattern": {"q_proj": 2}}, "the adapter's parameters"),
        ({"task": "dpo"}, "task sft, not dpo"),
        ({"optim": "sgd"}, "optim adamw_torch, not sgd"),
        ({"init_lora_weights": "olora"}, "init_lora_weights True, not olora"),
        ({"load_in_8bit": True}, "base in 4 or 8 bits False, not True"),
    ):
        with pytest.raises(obsfs.ObsfsError, match=re.escape(message)):
            run_record.refuse_other("checkpoint-2", then, noted(**changed))
    now = noted(optim="adamw_torch", per_device_train_batch_size=3, seed=7, data=["d", "e"])
    run_record.refuse_other("checkpoint-2", then, now)
    told = run_record.changes(then, now)
    for text in ("data d then, d, e now", "per_device_train_batch_size 8 then, 3 now", "seed 42 then, 7 now"):
        assert text in told
    assert run_record.changes(then, noted()) == ""
    (tmp_path / run_record.NAME).write_text("{")
    assert run_record.read(tmp_path) is None


def test_a_seal_can_be_renewed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    checkpoints.seal(tmp_path)
    (tmp_path / "b").write_bytes(b"abcdef" * 99)
    checkpoints.seal(tmp_path)
    assert checkpoints.is_whole(tmp_path)
    (tmp_path / "b").write_bytes(b"")
    assert not checkpoints.is_whole(tmp_path)


def test_a_file_of_the_same_size_with_other_bytes_breaks_a_seal(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(20 << 20))
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b").write_bytes(b"abc")
    for name, where in (("a", 0), ("a", (20 << 20) - 1), ("below/b", 1)):
        checkpoints.seal(tmp_path)
        assert checkpoints.is_whole(tmp_path)
        with (tmp_path / name).open("r+b") as file:
            file.seek(where)
            file.write(b"x")
        assert not checkpoints.is_whole(tmp_path)
    for seal in ("[]", '["a"]', '{"a": null}', "3"):
        (tmp_path / "obsfs-whole.json").write_text(seal)
        assert not checkpoints.is_whole(tmp_path)
    # As versions before wrote it.
    (tmp_path / "obsfs-sums.json").unlink()
    (tmp_path / "obsfs-whole.json").write_text(json.dumps({"a": 20 << 20}))
    assert checkpoints.is_whole(tmp_path)


@pytest.mark.parametrize("name", ["README.md", "checkpoint-7/x", "model-00001-of-00002.safetensors", "tokenizer.model"])
def test_what_somebody_else_has_made_is_not_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: m")
    checkpoints.refuse_others(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(obsfs.ObsfsError, match=r"no run of obsfs train has written.*choose another output"):
        checkpoints.refuse_others(tmp_path)
    (tmp_path / "train.yaml").write_text("model: m\ndata: [d]\noutput: o\n")  # all that versions before left early
    checkpoints.refuse_others(tmp_path)


def test_a_model_is_known_by_its_weights(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    assert run_record.digest_model(copy) == run_record.digest_model(tiny)
    shard = max(copy.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: size // 2] + bytes(size - size // 2))
    assert run_record.digest_model(copy) != run_record.digest_model(tiny)


@pytest.mark.slow
def test_resuming_nothing_is_beginning(run: Callable[..., Any], rows: Path) -> None:
    outcome = run(data=str(rows), max_steps=1, resume=True)
    assert (outcome.resumed_from, outcome.steps) == (0, 1)


@pytest.mark.slow
def test_what_no_checkpoint_belongs_to_is_not_replaced(
    run: Callable[..., Any], model: str, rows: Path, bucket: Store, tmp_path: Path
) -> None:
    before = contents(Path(obsfs.snapshot_download(model, local_dir=tmp_path / "before")))
    bucket.put("models/plain/config.json", b"{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.yaml").write_text("# mine\nmodel: m\ndata: d\noutput: o\n")
    (tmp_path / "run" / "config.json").write_text("{}")
    for output in (model.partition("@")[0], f"{bucket}/models/plain", str(tmp_path / "run")):
        bucket.put("models/tiny/config.json", b"{}")
        with pytest.raises(obsfs.ObsfsError, match="no checkpoint to go on from, and something else"):
            run(data=str(rows), max_steps=1, resume=True, output=output)
    assert contents(Path(obsfs.snapshot_download(model, local_dir=tmp_path / "after"))) == before
    (tmp_path / "run" / "config.json").unlink()
    run(data=str(rows), max_steps=1, resume=True, output=str(tmp_path / "run"))
    assert (tmp_path / "run" / "train.yaml.before").read_text().startswith("# mine")


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_no_mount(model: str, rows: Path, bucket: Store, tmp_path: Path) -> None:
    process = start(tmp_path, model=model, data=str(rows), output=f"{bucket}/a", max_steps=100000, save_steps=50000)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 1/"):
            break
    pid = process.pid
    os.kill(pid, signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(60) == 130
    assert rest.splitlines()[-1] == "obsfs: interrupted"
    assert "Traceback" not in rest
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if f"{bucket}" in line]


@pytest.mark.slow
def test_two_processes_train_one_adapter(model: str, rows: Path, bucket: Store, tmp_path: Path) -> None:
    url = f"{bucket}/adapters/two"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    given: dict[str, Any] = {
        "model": model,
        "data": str(rows),
        "output": url,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
    }
    out = finish(start(tmp_path, launcher=launcher, ddp_backend="gloo", **given))
    assert out.count("step 4/4") == 1  # one of them speaks
    assert "Warning" not in out
    refused, _ = start(tmp_path, launcher=launcher, ddp_backend="gloo", **given).communicate(timeout=_SECONDS)
    assert refused.count("obsfs: there is a run at") == 1
    assert "internal error" not in refused
    state = json.loads(
        Path(
            obsfs.snapshot_download(f"{url}@checkpoint-4", local_dir=tmp_path / "c"), "trainer_state.json"
        ).read_bytes()
    )
    assert state["global_step"] == 4
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in (tmp_path / "c").iterdir()}
    again = finish(start(tmp_path, "--resume", launcher=launcher, ddp_backend="gloo", **{**given, "max_steps": 6}))
    assert "going on from checkpoint-4" in again
    adapter = contents(Path(obsfs.snapshot_download(url, local_dir=tmp_path / "adapter")))
    assert "adapter_model.safetensors" in adapter


@pytest.mark.slow
def test_a_bucket_that_is_gone_costs_no_step(
    run: Callable[..., Any], rows: Path, bucket: Store, tiny: Path, tmp_path: Path
) -> None:
    from tests.faulty import FaultyLink

    with FaultyLink(bucket.server.port) as link:
        from transformers import TrainerCallback

        class Breaks(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                link.refusing = True
                link.break_all()

        with pytest.raises(obsfs.ObsfsError):
            run(
                **{**RUN, "model": str(tiny), "data": str(rows), "max_steps": 4, "output": f"{bucket}/gone"},
                endpoint_url=link.endpoint,
                retry_timeout="2s",
                output_dir=str(tmp_path / "staging"),
                callbacks=[Breaks()],
            )
        assert checkpoints.local_steps(tmp_path / "staging") == [2, 4]
        link.refusing = False
        outcome = run(
            **{**RUN, "model": str(tiny), "data": str(rows), "max_steps": 4, "output": f"{bucket}/gone"},
            endpoint_url=link.endpoint,
            output_dir=str(tmp_path / "staging"),
            resume=True,
        )
        assert (outcome.resumed_from, outcome.steps) == (4, 4)
        assert outcome.published == [f"{bucket}/gone@checkpoint-4", f"{bucket}/gone"]
        assert obsfs.resolve(f"{bucket}/gone") == f"{bucket}/gone"
