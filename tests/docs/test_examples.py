"""Each program of ``docs/examples/`` runs, and prints what it is to print."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from tests.conftest import Store
from tests.docs.pages import DOCS

_EXAMPLES = DOCS / "examples"


def run(name: str, *arguments: object, cwd: Path) -> str:
    """What the program prints, run as its first lines say."""
    command = [sys.executable, str(_EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def models(tiny: Path, bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A bucket with the tiny model, and data."""
    import torch
    from safetensors.torch import save_file

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    bucket.server.upload(tiny, bucket.name, "Qwen2-7B/")
    chat = [{"role": "user", "content": "name"}, {"role": "assistant", "content": "it is a module"}]
    bucket.put("data/chat.jsonl", (json.dumps({"messages": chat}) + "\n").encode() * 4)
    pandas.DataFrame({"text": list("abcdefghij")}).to_parquet(tmp_path / "train.parquet")
    bucket.put("data/train.parquet", (tmp_path / "train.parquet").read_bytes())
    save_file({f"sample.{n}": torch.full((8,), float(n)) for n in range(6)}, tmp_path / "samples.safetensors")
    bucket.put("data/samples.safetensors", (tmp_path / "samples.safetensors").read_bytes())
    return bucket


def test_each_example_has_a_test_and_a_place_on_the_page() -> None:
    tests = Path(__file__).read_text()
    page = (DOCS / "python.md").read_text()
    for path in _EXAMPLES.glob("*.py"):
        assert f'run("{path.name}"' in tests
        assert f"<!-- example: {path.name} -->" in page


@pytest.mark.slow
def test_load(models: Store, tmp_path: Path) -> None:
    prompt = "The import statement"
    assert run("load.py", f"{models}/Qwen2-7B", prompt, cwd=tmp_path).startswith(prompt)
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


@pytest.mark.slow
def test_train(models: Store, tmp_path: Path) -> None:
    output = f"{models}/adapters/run-1"
    assert run("train.py", f"{models}/Qwen2-7B", f"{models}/data/chat.jsonl", output, cwd=tmp_path).strip() == output
    listed = models.client.list_objects_v2(Bucket=models.name, Prefix="adapters/run-1")["Contents"]
    assert [one["Key"] for one in listed if one["Key"].endswith("adapter_model.safetensors")]


@pytest.mark.slow
def test_dataloader(models: Store, tmp_path: Path) -> None:
    printed = run("dataloader.py", f"{models}/data", cwd=tmp_path)
    assert printed.startswith("tensors 6\nrows 10\nfetched ")
    assert int(printed.split()[-2]) > 0


def test_push_and_pull(models: Store, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tuned")
    url = f"{models}/tuned@v1"
    printed = run("push_pull.py", "tuned", url, "copy", cwd=tmp_path).splitlines()
    assert printed[0] == url
    assert tmp_path / printed[1] == tmp_path / "copy"
    assert (tmp_path / "copy" / "config.json").read_bytes() == (tiny / "config.json").read_bytes()
    shard = next((tmp_path / "tuned").glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    command = [sys.executable, str(_EXAMPLES / "push_pull.py"), "tuned", f"{models}/tuned@v2", "other"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert re.fullmatch(r"push_pull: .*cut off.*\n", done.stderr)


def test_with_fsspec(models: Store, tmp_path: Path) -> None:
    printed = run("with_fsspec.py", models, cwd=tmp_path).splitlines()
    assert printed[:2] == ["models 1", "architecture Qwen2ForCausalLM"]
    assert printed[3:] == ["written by fsspec", "rows 10"]
