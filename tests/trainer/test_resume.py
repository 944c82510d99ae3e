"""Runs that are killed, torn checkpoints, other machines, and several processes."""

from __future__ import annotations

import json
import os
import random
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
from tests.trainer.conftest import QUICK, Losses
from trainer import checkpoints
from trainer.place import Place

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


def history(checkpoint: Path) -> dict[int, float]:
    log = json.loads((checkpoint / "trainer_state.json").read_bytes())["log_history"]
    return {one["step"]: one["loss"] for one in log if "loss" in one}


@pytest.mark.slow
def test_killed_and_resumed_it_is_as_if_nothing_had_happened(
    run: Callable[..., Any], model: str, rows: Path, bucket: Store, tmp_path: Path
) -> None:
    undisturbed = Losses()
    run(**{**RUN, "data": str(rows), "callbacks": [undisturbed.callback]})
    place = Place(f"{bucket}/adapters/killed", {})
    given = {"model": model, "data": str(rows), "output": place.url}
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
def test_resuming_nothing_is_beginning(run: Callable[..., Any], rows: Path) -> None:
    outcome = run(data=str(rows), max_steps=1, resume=True)
    assert (outcome.resumed_from, outcome.steps) == (0, 1)


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_no_mount(model: str, rows: Path, bucket: Store, tmp_path: Path) -> None:
    process = start(tmp_path, model=model, data=str(rows), output=f"{bucket}/a", max_steps=100000, save_steps=50000)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
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
    given = {"model": model, "data": str(rows), "output": url, "max_steps": 4, "per_device_train_batch_size": 2}
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
