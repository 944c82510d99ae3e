"""Merge an adapter into its base model: PEFT merges, transformers writes the result."""

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
"""Files that a model of more than text needs besides its tokenizer."""
_LORA = re.compile(r"\.lora_(embedding_)?[AB]\b")
_ROOM = 1.3
"""The memory for merging, as a multiple of the weights: the largest weight twice, and a few activations."""


class Quantizer(NamedTuple):
    """A quantized format to write.

    Args:
        needs: The modules that it needs.
        config: The class of transformers that configures it; None if llm-compressor writes it.
        options: The options of that class.
        is_calibrated: Whether it needs calibration data.
        is_for_gpu: Whether writing it needs a GPU.
    """

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
    """The result of a merge.

    Args:
        output: Where the model is: a directory or a URL.
        base: The name of the base model.
        largest: The largest difference between its logits and those of base plus adapter.
        mean: The mean difference.
        kept: The modules that were not quantised when the others were.
    """

    output: str
    base: str
    largest: float
    mean: float
    kept: tuple[str, ...] = ()


def base_of(adapter: BaseModel, given: str | None) -> str:
    """Return the base of an adapter: the given one, or the one in its configuration. Raises UsageError."""
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
    """Open an adapter and its base by directory, URL or name in the library."""
    with ExitStack() as stack:
        opened = stack.enter_context(open_model(adapter, settings))
        place = obsfs.on_mount(opened.path) if opened.mountpoint else None
        # By default, reach the base as the adapter is reached.
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
    """Merge an adapter into its base, and write the result in bfloat16 shards with the adapter's tokenizer.

    Args:
        adapter: The adapter: a directory, a URL, or a name in the library.
        output: Where the result goes: a directory or a URL.
        base: The base model; by default the one that the adapter names.
        quantize: The format to quantize the result to: one of :data:`QUANTIZERS`.
        calibrate: Calibration data for awq and gptq, as ``obsfs train`` takes it. (Without it, transformers takes C4
            from the hub for gptq.)
        dequantize: Merge into the dequantized 4-bit base, the weights that QLoRA trained against, instead of the
            published base.
        settings: Settings of obsfs.

    Raises:
        ObsfsError: The adapter, the base or the output cannot be used, or they do not fit.
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
        silence_progress_bars()  # imports transformers; the checks above must not wait for that
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
        # Never merge or run it while it is quantised: bitsandbytes may repack weights in use, which then give garbage.
        # Weights that were just loaded are unchanged.
        with _told(f"the base {base} is quantised, and cannot be merged into"):
            model = model.dequantize().to(torch.bfloat16)
    tokenizer = _tokenizer(adapter, base)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    with _told(f"{adapter} does not fit {base}"):
        tuned = PeftModel.from_pretrained(model, str(adapter))
        if hasattr(tuned, "merge_and_unload"):
            # PEFT silently drops weights that the base has no module for.
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
    """Report on one line that libraries cannot use some files: they raise anything."""
    import torch

    try:
        yield
    except (ObsfsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UsageError(what, visible(first_line(error), 400)) from None


def _device(model: Path) -> str:
    """Return the GPU if the whole model fits there, else the CPU."""
    import torch

    weights = sum(path.stat().st_size for path in model.iterdir() if path.suffix in _WEIGHTS)
    return "cuda" if torch.cuda.is_available() and weights * _ROOM < available_memory()[0] else "cpu"


def _tokenizer(adapter: Path, base: Path) -> Any:
    return load_tokenizer(adapter if (adapter / "tokenizer_config.json").exists() else base)


def calibration(place: str, tokenizer: Any, settings: dict[str, Any]) -> list[str]:
    """Return the first 128 records of data as the model would read them. Raises UsageError."""
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
    """Quantise a model in place. Returns the modules that stay unquantised, besides the usual ones."""
    import torch
    import transformers

    # Free the merged model: the free memory of the GPU decides where the next one is loaded.
    gc.collect()
    torch.cuda.empty_cache()
    chosen = QUANTIZERS[name]
    options = dict(chosen.options)
    kept: list[str] = []
    if name == "bnb-4bit":
        empty = empty_model(directory)
        skipped = bitsandbytes_cpu.never_quantised(empty)
        kept = [one for one in skipped if empty.get_submodule(one) is not empty.get_output_embeddings()]
        # transformers skips the head by default only if no other modules are named.
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
    """Quantise a model in place by AWQ (arXiv 2306.00978). llm-compressor moves layer by layer to the GPU."""
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
