"""Adapters into their base models."""

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
from trainer.base_model import load_tokenizer
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
def test_a_merged_model_can_be_quantised(adapter: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    done = merge(adapter, str(tmp_path / "four"), quantize="bnb-4bit")
    # 2 key-value heads of 8: 16 rows, which processors with AVX512-BF16 cannot repack.
    assert {name.rpartition(".")[2] for name in done.kept} == {"k_proj", "v_proj"}
    plain = load(tmp_path / "four")
    assert plain.is_loaded_in_4bit
    expected = logits_of(plain)
    assert expected.isfinite().all()
    # The same on the other kind of processor, where all that is left in 4 bits is repacked.
    repacked = request.getfixturevalue("repacked")
    there = logits_of(load(tmp_path / "four"))
    assert len(repacked) == 10
    assert (there - expected).abs().max() < 0.1


@pytest.mark.slow
def test_weights_that_are_repacked_in_use_are_never_merged(
    adapter: str, tiny: Path, tmp_path: Path, repacked: list[tuple[int, ...]]
) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    done = merge(adapter, str(tmp_path / "merged"), dequantize=True)
    assert done.largest < 0.1
    # A base that is quantised on the disk, too, is merged as it was loaded.
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    four = load(tiny, quantization_config=options)
    four.save_pretrained(tmp_path / "four")
    load_tokenizer(tiny).save_pretrained(tmp_path / "four")
    done = merge(adapter, str(tmp_path / "onto-four"), base=str(tmp_path / "four"))
    assert done.largest < 0.1
    assert not repacked
    both = [logits_of(load(tmp_path / name)) for name in ("merged", "onto-four")]
    assert all(one.isfinite().all() for one in both)
    wanted = logits_of(load(tiny))
    assert (both[1] - wanted).abs().mean() < 0.5  # garbage is far off


def test_a_model_that_cannot_be_served_here_is_refused(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    from trainer import bitsandbytes_cpu

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    load(tiny, quantization_config=options).save_pretrained(tmp_path / "four")
    monkeypatch.setattr(bitsandbytes_cpu, "_has_gpu", lambda: False)
    monkeypatch.setattr(bitsandbytes_cpu, "_has_avx512_bf16", lambda: True)
    bitsandbytes_cpu.refuse_unservable(tiny)
    with pytest.raises(UsageError, match=r"k_proj of .* has 16 x 64 weights of 4 bits.*AVX512-BF16"):
        bitsandbytes_cpu.refuse_unservable(tmp_path / "four")
    monkeypatch.setattr(bitsandbytes_cpu, "_has_avx512_bf16", lambda: False)
    bitsandbytes_cpu.refuse_unservable(tmp_path / "four")


@pytest.mark.slow
def test_a_model_of_vision_and_language_that_was_trained_is_merged(
    run: Callable[..., Any], tiny: Path, rows: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    both = tmp_path / "both"
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 1100,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "patch_size": 14}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=1001, video_token_id=1002)
    Qwen2VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(both)
    load_tokenizer(tiny).save_pretrained(both)
    (both / "preprocessor_config.json").write_text("{}")
    run(model=str(both), data=str(rows), method="lora", max_steps=1, output=str(tmp_path / "adapter"))
    done = merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert done.largest < 0.1
    merged = AutoConfig.from_pretrained(tmp_path / "merged")
    assert merged.architectures == ["Qwen2VLForConditionalGeneration"]
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()
    _, found = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


@pytest.mark.slow
def test_an_adapter_that_fits_only_in_part_is_refused(tiny: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from obsfs.demo.model import make_model

    adapter, flat = tmp_path / "adapter", tmp_path / "flat"
    get_peft_model(load(tiny), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(adapter)
    flat.mkdir()
    make_model(flat, hidden_size=64, layers=1, vocabulary=1024)
    weights = adapter / "adapter_model.safetensors"
    whole = load_file(weights)

    def refused(message: str, base: Path) -> None:
        with pytest.raises(ObsfsError, match=message) as caught:
            merge(str(adapter), str(tmp_path / "out"), base=str(base))
        assert "\n" not in str(caught.value)

    refused("does not fit .*: 2 of its weights have no counterpart, the first is .*layers.1", flat)
    save_file(dict(list(whole.items())[:-1]), weights)
    refused("does not fit .*: 1 of its weights have no counterpart", tiny)
    weights.write_bytes(b"\xff" * 100)
    refused("does not fit", tiny)
    weights.unlink()
    refused("does not fit", tiny)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(load(tiny), prompt).save_pretrained(adapter)
    refused("an adapter of type PROMPT_TUNING, which cannot be merged", tiny)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BertForMaskedLM", "LlamaForSequenceClassification"])
def test_a_model_that_does_not_go_on_with_a_text_is_named(name: str, tmp_path: Path) -> None:
    import transformers

    from trainer.base_model import model_class, refuse_other_kinds

    config = getattr(transformers, name).config_class(architectures=[name])
    config.save_pretrained(tmp_path)
    for look in (model_class, refuse_other_kinds):
        with pytest.raises(ObsfsError, match=f"{tmp_path} is a {name}, which cannot be trained, merged or served here"):
            look(tmp_path)
    for other in ("GPT2LMHeadModel", "Qwen2VLForConditionalGeneration", "MixtralForCausalLM", "OPTForCausalLM"):
        getattr(transformers, other).config_class(architectures=[other]).save_pretrained(tmp_path)
        assert model_class(tmp_path).__name__ == other
        refuse_other_kinds(tmp_path)


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
    refused(
        "cannot be loaded by transformers: Unrecognized model",
        adapter,
        str(tmp_path / "x"),
        base=str(tmp_path / "full"),
    )
    refused("does not fit", adapter, str(tmp_path / "x"), base=str(tmp_path / "wide"))
