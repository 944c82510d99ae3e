"""Adapters into their bases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import obsfs
from obsfs import ObsfsError
from obsfs.errors import UsageError
from tests.conftest import Store
from tests.trainer.test_train import logits_of
from trainer.base import load_tokenizer
from trainer.merge import calibration, merge


def load(directory: Path | str, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options)


@pytest.fixture
def adapter(run: Callable[..., Any], rows: Path, bucket: Store) -> str:
    """A QLoRA adapter in the bucket."""
    url: str = run(data=str(rows), method="qlora", max_steps=8, output=f"{bucket}/adapters/a").output
    return url


@pytest.mark.slow
def test_a_merged_model_is_base_and_adapter(adapter: str, bucket: Store, tiny: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    done = merge(adapter, str(tmp_path / "merged"))
    assert done.base == f"{bucket}/models/tiny@v1"
    assert done.largest < 0.1
    local = obsfs.snapshot_download(adapter, local_dir=tmp_path / "adapter")
    expected = logits_of(PeftModel.from_pretrained(load(tiny), local))
    merged = load(tmp_path / "merged")
    assert torch.allclose(logits_of(merged), expected, atol=0.1)
    assert not torch.allclose(logits_of(load(tiny)), expected, atol=0.1)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert "tokenizer.json" in {path.name for path in (tmp_path / "merged").iterdir()}
    # Into the bucket, and onto what 4 bits leave of the base.
    assert merge(adapter, f"{bucket}/models/merged@v1", dequantize=True).output == f"{bucket}/models/merged@v1"
    other = load(obsfs.snapshot_download(f"{bucket}/models/merged@v1", local_dir=tmp_path / "other"))
    assert other.config.to_dict().get("quantization_config") is None
    assert logits_of(other).isfinite().all()


@pytest.mark.slow
def test_a_merged_model_can_be_quantised(adapter: str, tmp_path: Path) -> None:
    merge(adapter, str(tmp_path / "four"), quantize="bnb-4bit")
    model = load(tmp_path / "four")
    assert model.is_loaded_in_4bit
    assert logits_of(model).isfinite().all()


def test_what_gptq_reads_is_what_the_model_would(tiny: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    chats = [{"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": "said"}]}
             for n in range(200)]  # fmt: skip
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
    expected = [tokenizer.apply_chat_template(chat["messages"], tokenize=False) for chat in chats[:128]]
    assert calibration(str(tmp_path / "chats.jsonl"), tokenizer, {}) == expected
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "add", "input": "1 2", "output": "3"}]))
    (text,) = calibration(str(tmp_path / "alpaca.json"), tokenizer, {})
    assert text.index("add") < text.index("1 2") < text.index("3")
    (tmp_path / "plain.jsonl").write_text('{"text": "as it is"}\n')
    assert calibration(str(tmp_path / "plain.jsonl"), tokenizer, {}) == ["as it is"]
    with pytest.raises(UsageError, match="there is no data"):
        calibration(str(tmp_path / "none.jsonl"), tokenizer, {})


@pytest.mark.slow
def test_what_cannot_be_merged_is_told_and_leaves_nothing(
    adapter: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from obsfs.demo.model import make_model

    here = set(tmp_path.iterdir())

    def refused(message: str, *places: str, **given: Any) -> None:
        with pytest.raises(ObsfsError, match=message) as caught:
            merge(*places, **given)
        assert "\n" not in str(caught.value)
        assert set(tmp_path.iterdir()) == here

    refused(f"{tiny} is no adapter", str(tiny), str(tmp_path / "x"))
    refused("choose one of", adapter, str(tmp_path / "x"), quantize="q4")
    refused("--quantize fp8 needs a GPU", adapter, str(tmp_path / "x"), quantize="fp8")
    refused("gptqmodel", adapter, str(tmp_path / "x"), quantize="gptq")
    refused("llmcompressor", adapter, str(tmp_path / "x"), quantize="awq")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: name)
        refused("something to read", adapter, str(tmp_path / "x"), quantize="awq")
    refused("--calibrate", adapter, str(tmp_path / "x"), quantize="bnb-4bit", calibrate="data.jsonl")
    refused("there is no directory", adapter, str(tmp_path / "x"), base="org/name")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "wide").mkdir()
    make_model(tmp_path / "wide", hidden_size=128, layers=2, vocabulary=1024)
    here = set(tmp_path.iterdir())
    refused("is there already", adapter, str(tmp_path / "full"))
    refused("is there already", adapter, adapter)
    refused("the base .* cannot be loaded", adapter, str(tmp_path / "x"), base=str(tmp_path / "full"))
    refused("does not fit", adapter, str(tmp_path / "x"), base=str(tmp_path / "wide"))
