"""An adapter into its base: PEFT merges, transformers writes."""

from __future__ import annotations

import gc
import json
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import obsfs
from obsfs.plugin import ObsfsError, UsageError, first_line, visible
from trainer import bitsandbytes_cpu
from trainer.base_model import (
    PROBE,
    BaseModel,
    available_memory,
    empty_model,
    load_tokenizer,
    model_class,
    open_model,
)
from trainer.data import load
from trainer.quiet import silence_libraries, silence_progress_bars
from trainer.run_location import run_location
from trainer.temporary import temporary_directory

ADAPTER = "adapter_config.json"
_SHARD = "4GB"
_SAMPLES = 128
_SAMPLE_TOKENS = 2048
_WEIGHTS = (".safetensors", ".bin")
_PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
)
"""What a model of more than text needs beside its tokenizer."""
_LORA = re.compile(r"\.lora_(embedding_)?[AB]\b")
_ROOM = 1.3
"""What merging takes, in times of the weights: the largest of them twice, and a few activations."""


class Quantizer(NamedTuple):
    """A format to write: the modules that it needs, what configures it (a class of transformers; None where
    llm-compressor writes it), the options of that, whether it matters what the model reads meanwhile, and whether only
    a GPU writes it."""

    needs: tuple[str, ...]
    config: str | None
    options: dict[str, Any]
    is_calibrated: bool = False
    is_for_gpu: bool = False


QUANTIZERS = {
    "bnb-4bit": Quantizer(
        ("bitsandbytes",),
        "BitsAndBytesConfig",
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        },
    ),
    "bnb-8bit": Quantizer(("bitsandbytes",), "BitsAndBytesConfig", {"load_in_8bit": True}),
    "fp8": Quantizer(("accelerate",), "FineGrainedFP8Config", {}, is_for_gpu=True),
    "gptq": Quantizer(("gptqmodel", "optimum"), "GPTQConfig", {"bits": 4, "dataset": "c4"}, is_calibrated=True),
    "awq": Quantizer(
        ("llmcompressor",),
        None,
        {"scheme": "W4A16_ASYM", "targets": ["Linear"], "ignore": ["lm_head"]},
        is_calibrated=True,
        is_for_gpu=True,
    ),
}


class Merged(NamedTuple):
    """What was written, the largest and mean difference of its logits from those of base plus adapter, and the modules
    that were left as they are when the others were quantised."""

    output: str
    base: str
    largest: float
    mean: float
    kept: tuple[str, ...] = ()


def base_of(adapter: BaseModel, given: str | None) -> str:
    """The base of an adapter: as given, or as its configuration says. Raises UsageError when it is no adapter."""
    try:
        config = json.loads((adapter.path / ADAPTER).read_bytes())
    except (OSError, ValueError):
        raise UsageError(f"{adapter.name} is no adapter", f"it has no {ADAPTER} that can be read") from None
    found = given or config.get("base_model_name_or_path")
    if not found:
        raise UsageError(f"the adapter {adapter.name} does not say what its base is", "give it with --base")
    return str(found)


@contextmanager
def open_adapter(adapter: str, base: str | None, settings: dict[str, Any]) -> Iterator[tuple[BaseModel, BaseModel]]:
    """An adapter and its base, by directory, URL or name in the library."""
    with ExitStack() as stack:
        opened = stack.enter_context(open_model(adapter, settings))
        place = obsfs.on_mount(opened.path) if opened.mountpoint else None
        # The base is where the adapter is, if nobody says otherwise.
        reached = {**(place.settings if place else {}), **settings}
        yield opened, stack.enter_context(open_model(base_of(opened, base), reached))


def merge(
    adapter: str,
    output: str,
    *,
    base: str | None = None,
    quantize: str | None = None,
    calibrate: str | None = None,
    dequantize: bool = False,
    settings: dict[str, Any] | None = None,
) -> Merged:
    """Write base plus adapter to `output`, a directory or a URL: bfloat16, in shards, with the adapter's tokenizer.

    The base is the unquantised one; with `dequantize` it is what 4 bits leave of it, which is what a QLoRA adapter
    was trained on. `quantize` is one of :data:`QUANTIZERS`; for awq and gptq, `calibrate` is data as ``obsfs train``
    takes it (without it, transformers takes C4 from the hub for gptq). Raises ObsfsError.
    """
    _check_quantizer(quantize, calibrate)
    settings = settings or {}
    place = run_location(output, settings)
    target = Path(output).expanduser()
    if place is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{output} is there already", "choose another directory")
    if place is not None and place.is_published():
        raise UsageError(f"{output} is there already", "choose another name or version")
    with ExitStack() as stack:
        tuned, found = stack.enter_context(open_adapter(adapter, base, settings))
        silence_libraries()
        silence_progress_bars()  # imports transformers, for which no refusal above should wait
        home = None if place else target.absolute().parent
        if home is not None:
            home.mkdir(parents=True, exist_ok=True)
        # Beside the output, so that renaming is enough. The machine's name is in it: only that machine may clean up.
        work = stack.enter_context(temporary_directory(f".obsfs-merge-{platform.node()}-", home)) / "model"
        samples = calibration(calibrate, _tokenizer(tuned.path, found.path), settings) if calibrate else None
        largest, mean = _merge(tuned.path, found.path, work, dequantize)
        kept = _quantize(work, quantize, samples) if quantize is not None else []
        if place is not None:
            obsfs.push(work, place.url, source=f"{found.name} + {tuned.name}", **place.settings)
            obsfs.refresh(place.url)
        else:
            work.replace(target)
        return Merged(place.url if place else output, found.name, largest, mean, tuple(kept))


def _merge(adapter: Path, base: Path, directory: Path, dequantize: bool) -> tuple[float, float]:
    import torch
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"device_map": _device(base)}
    if dequantize:
        options = {"quantization_config": BitsAndBytesConfig(**QUANTIZERS["bnb-4bit"].options)}
    kind = model_class(base)
    with _told(f"the base {base} cannot be loaded"):
        model = kind.from_pretrained(base, dtype=torch.bfloat16, **options)
    if getattr(model, "hf_quantizer", None) is not None:
        # Never merged, nor even tried, while it is quantised: bitsandbytes may repack the weights in use, and then they
        # give garbage. What was just loaded is as it is on the disk.
        with _told(f"the base {base} is quantised, and cannot be merged into"):
            model = model.dequantize().to(torch.bfloat16)
    tokenizer = _tokenizer(adapter, base)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    with _told(f"{adapter} does not fit {base}"):
        tuned = PeftModel.from_pretrained(model, str(adapter))
        if hasattr(tuned, "merge_and_unload"):
            # PEFT leaves out what the base has no place for, without a word.
            loaded = tuned.load_adapter(str(adapter), "default")
            names = [name for name in (*loaded.unexpected_keys, *loaded.missing_keys) if _LORA.search(name)]
            if names:
                raise ValueError(f"{len(names)} of its weights have no counterpart, the first is {names[0]}")
    if not hasattr(tuned, "merge_and_unload"):
        kind_of = tuned.peft_config["default"].peft_type
        raise UsageError(
            f"{adapter} is an adapter of type {kind_of.value}, which cannot be merged", "LoRA adapters can"
        )
    probe = tokenizer(PROBE, return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        expected = tuned.eval()(probe).logits.float()
        merged = tuned.merge_and_unload()
        difference = (merged(probe).logits.float() - expected).abs()
    merged.save_pretrained(directory, max_shard_size=_SHARD)
    tokenizer.save_pretrained(directory)
    for name in _PROCESSOR:
        if (base / name).exists() and not (directory / name).exists():
            shutil.copyfile(base / name, directory / name)
    return float(difference.max()), float(difference.mean())


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Tell in one line what libraries say of files that they cannot use: they raise whatever comes."""
    import torch

    try:
        yield
    except (ObsfsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UsageError(what, visible(first_line(error), 400)) from None


def _device(model: Path) -> str:
    """The GPU, when all of the model has room there."""
    import torch

    weights = sum(path.stat().st_size for path in model.iterdir() if path.suffix in _WEIGHTS)
    return "cuda" if torch.cuda.is_available() and weights * _ROOM < available_memory()[0] else "cpu"


def _tokenizer(adapter: Path, base: Path) -> Any:
    return load_tokenizer(adapter if (adapter / "tokenizer_config.json").exists() else base)


def calibration(place: str, tokenizer: Any, settings: dict[str, Any]) -> list[str]:
    """The first 128 records of data, as the model would read them. Raises UsageError."""
    from trl import maybe_apply_chat_template

    records = load([place], "sft", split="train", streaming=True, chat=bool(tokenizer.chat_template), settings=settings)
    rendered = (maybe_apply_chat_template(record, tokenizer) for record in records.take(_SAMPLES))
    return [one.get("text") or one["prompt"] + one["completion"] for one in rendered]


def _check_quantizer(name: str | None, calibrate: str | None) -> None:
    from importlib.util import find_spec

    if calibrate is not None and not (name in QUANTIZERS and QUANTIZERS[name].is_calibrated):
        raise UsageError("--calibrate", "it is for --quantize gptq and awq")
    if name is None:
        return
    if name not in QUANTIZERS:
        raise UsageError(f"--quantize {name}", f"choose one of {', '.join(QUANTIZERS)}")
    missing = [module for module in QUANTIZERS[name].needs if find_spec(module) is None]
    if missing:
        raise UsageError(f"--quantize {name} needs {' and '.join(missing)}", f"pip install {' '.join(missing)}")
    if QUANTIZERS[name].config is None and calibrate is None:
        raise UsageError(f"--quantize {name} needs something to read", "give it with --calibrate, as train's --data")
    if QUANTIZERS[name].is_for_gpu:
        import torch

        if not torch.accelerator.is_available():
            raise UsageError(f"--quantize {name} needs a GPU", "bnb-4bit and bnb-8bit do not")


def _quantize(directory: Path, name: str, samples: list[str] | None) -> list[str]:
    """Quantise a model in place. Returns the modules that are left as they are, beside the usual ones."""
    import torch
    import transformers

    # What was merged is garbage by now, and what is free on the GPU will be asked.
    gc.collect()
    torch.cuda.empty_cache()
    chosen = QUANTIZERS[name]
    options = dict(chosen.options)
    kept: list[str] = []
    if name == "bnb-4bit":
        empty = empty_model(directory)
        skipped = bitsandbytes_cpu.never_quantised(empty)
        kept = [one for one in skipped if empty.get_submodule(one) is not empty.get_output_embeddings()]
        # transformers leaves the head as it is only where nobody names others.
        options["llm_int8_skip_modules"] = skipped if kept else None
    load_model = partial(model_class(directory).from_pretrained, directory, dtype=torch.bfloat16)
    try:
        if chosen.config is None:
            model = load_model()
            _compress(model, load_tokenizer(directory), samples or [], options)
        else:
            if chosen.is_calibrated:
                options["tokenizer"] = load_tokenizer(directory)
                options["dataset"] = samples or options["dataset"]
            config = getattr(transformers, chosen.config)(**options)
            model = load_model(quantization_config=config, device_map=_device(directory))
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError(f"it cannot be quantised to {name} here", first_line(error)) from None
    quantised = directory.with_name("quantised")  # in the same temporary directory, which the caller removes
    model.save_pretrained(quantised, max_shard_size=_SHARD)
    for old in (*directory.glob("*.safetensors"), *directory.glob("*.index.json")):
        old.unlink()
    for path in quantised.iterdir():
        path.replace(directory / path.name)
    return kept


def _compress(model: Any, tokenizer: Any, samples: list[str], options: dict[str, Any]) -> None:
    """AWQ (arXiv 2306.00978) by llm-compressor, in place. It moves one layer after the other to the GPU."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from loguru import logger

    for name in ("llmcompressor", "compressed_tensors"):
        logger.disable(name)
    tokens = [dict(tokenizer(text, truncation=True, max_length=_SAMPLE_TOKENS)) for text in samples]
    oneshot(
        model=model,
        dataset=Dataset.from_list(tokens),
        recipe=[AWQModifier(), QuantizationModifier(**options)],
        num_calibration_samples=len(tokens),
        max_seq_length=_SAMPLE_TOKENS,
    )
