"""A tiny Qwen2 with a tokenizer trained on the spot, and data that it can learn."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Store

ROWS = [{"instruction": f"name {i}", "input": "", "output": f"it is module {i}"} for i in range(8)] * 4
CHOICES = [{"instruction": one["instruction"], "chosen": one["output"], "rejected": "return None"} for one in ROWS]
JUDGED = [{**one, "output": one["output"] if i % 2 else "return", "label": bool(i % 2)} for i, one in enumerate(ROWS)]
QUICK = {
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "gradient_checkpointing": False,
    "report_to": "none",
    "max_length": 64,
    "save_strategy": "no",
    "rehearse": False,
}
"""What every run of the tests is told: small steps that are told one by one. The tests of the rehearsal have it."""


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from obsfs.demo.model import make_model

    directory = tmp_path_factory.mktemp("model") / "tiny"
    directory.mkdir()
    make_model(directory, hidden_size=64, layers=2, vocabulary=1024, max_shard_size="300KB")
    return directory


@pytest.fixture
def model(tiny: Path, bucket: Store) -> str:
    """The tiny model in a bucket, published as ``models/tiny@v1``."""
    import obsfs

    return obsfs.push(tiny, f"{bucket}/models/tiny@v1")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "alpaca.jsonl", ROWS)


@pytest.fixture
def obsfs_command(obsfs: Callable[..., Any]) -> Callable[..., Any]:
    """The command, by a name that leaves ``obsfs`` to the package."""
    return obsfs


class Losses:
    """What a run logged, by step."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        found = self.found = dict[int, float]()

        class Callback(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
                if "loss" in logs:
                    found[state.global_step] = logs["loss"]

        self.callback = Callback()


@pytest.fixture
def run(model: str, tmp_path: Path) -> Callable[..., Any]:
    """Train the tiny model as a program does, in this process."""
    from trainer import train

    def start(**given: Any) -> Any:
        own = {name: given.pop(name) for name in ("callbacks", "only_check") if name in given}
        return train({"model": model, "output": str(tmp_path / "out"), **QUICK, **given}, **own)

    return start


@pytest.fixture
def repacked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """bitsandbytes as on a processor with AVX512-BF16, whatever this one is: the shapes of the weights it repacks.

    Its kernel for repacked weights is written in what every processor has.
    """
    import copy

    from bitsandbytes import functional
    from bitsandbytes.nn import modules

    found: list[tuple[int, ...]] = []
    pack, unpack = functional._convert_weight_packed_for_cpu, functional._convert_weight_packed_for_cpu_inverse

    def packed(weight: Any, state: Any) -> Any:
        found.append(tuple(state.shape))
        return pack(weight, state)

    def multiplied(inputs: Any, weight: Any, out: Any = None, state: Any = None) -> Any:
        plain = functional.dequantize_4bit(*unpack(weight.data, copy.deepcopy(state)))
        return (inputs @ plain.to(inputs.dtype).t()).detach()

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", packed)
    monkeypatch.setattr(functional, "gemv_4bit", multiplied)
    return found


_AS_ELSEWHERE = """
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            module.has_avx512bf16 = lambda: True
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def other_processor(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python that is started has bitsandbytes as on a processor with AVX512-BF16, from its import on."""
    directory = tmp_path_factory.mktemp("site")
    (directory / "sitecustomize.py").write_text(_AS_ELSEWHERE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")])))
