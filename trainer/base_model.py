"""The model that a run starts from: where it is, whether it is whole, and how much memory training it takes."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import obsfs
from obsfs.plugin import UsageError, first_line, visible

_CHUNK = 8 << 20
PROBE = "The quick brown fox jumps over the lazy dog. 敏捷的棕色狐狸跳过了懒狗。"
"""What a tokenizer and a model are tried with."""
_OTHER_KINDS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForMaskedLM",
    "ForImageClassification",
)  # fmt: skip
_TRUST = "trust_remote_code"
"""The key, and the argument of transformers, that its errors name."""
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True)
class BaseModel:
    """A model in a directory. `name` is what others know it by (its URL, if it has one); `mountpoint` that of the
    obsfs mount that it lies on, if any."""

    path: Path
    name: str
    mountpoint: Path | None = None

    def mount_status(self) -> dict[str, Any]:
        """What the mount says of itself; empty without one, or when it does not answer."""
        if self.mountpoint is not None:
            with suppress(OSError, obsfs.ObsfsError):
                return obsfs.status(self.mountpoint)
        return {}


def check_name(text: str, settings: dict[str, Any]) -> None:
    """Raises UsageError for what can be no model, without looking into a bucket."""
    path = Path(text).expanduser()
    if "://" in text or path.is_dir():
        return
    if text.startswith((".", "/", "~")) or not obsfs.Settings.load(**settings).library:
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, others, 1)
        if path.exists():
            raise UsageError(f"{text} is no directory", "give the one that has the model's config.json")
        raise UsageError(
            f"there is no directory {text}",
            f"the nearest is {path.with_name(close[0])}"
            if close
            else "give a directory or obs://BUCKET/NAME; `obsfs import hf:ORG/NAME` makes one",
        )


@contextmanager
def open_model(text: str, settings: dict[str, Any]) -> Iterator[BaseModel]:
    """A model by its directory, its URL, or its name in the library. What is in a bucket is mounted for the time.

    Raises ObsfsError when there is none.
    """
    check_name(text, settings)
    path = Path(text).expanduser()
    if "://" not in text and path.is_dir():
        place = obsfs.on_mount(path)
        yield BaseModel(path.resolve(), *((place.url, place.mountpoint) if place else (text, None)))
        return
    url = text.rstrip("/") if "://" in text else f"{obsfs.Settings.load(**settings).library}/{text}"
    parent, _, label = url.rpartition("/")
    with obsfs.mount(parent, **settings) as mount:
        # Looking through the mount is done by its process; an S3 client of our own would hold up the imports.
        if not (mount.path / label).is_dir():
            url = obsfs.resolve(url, **settings)
            label = url.rpartition("/")[2]
        yield BaseModel(mount.path / label, url, mount.path)


def prefetch(base: BaseModel) -> threading.Event:
    """Begin to read the weights, so that they arrive while Python imports. The event, when set, stops it."""
    stop = threading.Event()

    def read() -> None:
        buffer = bytearray(_CHUNK)
        with suppress(OSError):
            (base.path / "config.json").read_bytes()
            for path in sorted(base.path.glob("*.safetensors")):
                with path.open("rb", buffering=0) as file:
                    while not stop.is_set() and file.readinto(buffer):
                        pass

    if base.mountpoint is not None:
        threading.Thread(target=read, name="trainer-prefetch", daemon=True).start()
    return stop


@dataclass(frozen=True)
class ModelStats:
    """What the files of a model say: `parameters` of all tensors, `embedding` of those that are never quantised;
    `size` in bytes; layers, width and vocabulary."""

    parameters: int
    embedding: int
    size: int
    layers: int
    hidden: int
    vocabulary: int


def require_weights(path: Path) -> None:
    """Raise UsageError for a directory without a configuration or weights. It is quick, and imports nothing large."""
    _json(path / "config.json")
    if not any(path.glob("*.safetensors")):
        raise _no_weights(path)


def _no_weights(path: Path) -> UsageError:
    return UsageError(f"{path} has no weights", "training reads *.safetensors: save the model with transformers")


def check_files(path: Path) -> ModelStats:
    """Look at configuration, index and every header. Raises UsageError, naming the file that is missing or cut off."""
    config = _json(path / "config.json")
    headers = obsfs.check_model(path)
    names, index = sorted(headers), path / "model.safetensors.index.json"
    if index.exists() and "model.safetensors" not in headers:
        names = sorted(headers.keys() & set(_json(index).get("weight_map", {}).values()))
    if not names:
        raise _no_weights(path)
    parameters = embedding = size = 0
    for name in names:
        size += (path / name).stat().st_size
        for key, tensor in headers[name].items():
            count = math.prod(tensor["shape"])
            parameters += count
            embedding += count if "embed" in key or "lm_head" in key else 0
    config = {**config, **config.get("text_config", {})}
    return ModelStats(
        parameters,
        embedding,
        size,
        int(config.get("num_hidden_layers", 0)),
        int(config.get("hidden_size", 0)),
        int(config.get("vocab_size", 0)),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} is missing", f"{path.parent} is no model of transformers") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error})", "the file is damaged: obsfs verify tells") from None
    return found if isinstance(found, dict) else {}


def load_tokenizer(path: Path, **options: Any) -> Any:
    """The model's tokenizer, with a token to pad with.

    Raises UsageError, also for one that knows no words: transformers makes such of a model without tokenizer files.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_untrusting(options))
    except (OSError, ValueError, KeyError) as error:
        _refuse_own_code(path, error)
        reason = first_line(error)
        raise UsageError(
            f"the tokenizer of {path} cannot be loaded ({reason})", "the model needs its tokenizer files"
        ) from None
    if not tokenizer.encode(PROBE, add_special_tokens=False):
        raise UsageError(f"{path} has no tokenizer", "the model needs its tokenizer files")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: Any, base: BaseModel, stats: ModelStats) -> None:
    """See that a model has a row for each token that every run gives it. Raises UsageError."""
    if not stats.vocabulary:
        return
    for name in ("pad_token", "eos_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None and stats.vocabulary <= token < len(tokenizer):
            raise UsageError(
                f"the {name} {getattr(tokenizer, name)!r} of {base.name} is token {token}, and the model knows "
                f"{stats.vocabulary}",
                f"name another with {name}: TOKEN, or resize the model (resize_token_embeddings) and save it",
            )
    largest = max(tokenizer.encode(PROBE))
    if largest >= stats.vocabulary:
        raise UsageError(
            f"the tokenizer of {base.name} has a token {largest}, and the model knows {stats.vocabulary}",
            "it is the tokenizer of another model: push or pull the model again",
        )


def estimate_memory(
    stats: ModelStats,
    *,
    task: str,
    method: str,
    bits: int | None,
    dtype: str,
    trainable: int,
    batch: int,
    length: int,
    checkpointing: bool,
    loss: object = None,
) -> int:
    """Bytes that training needs at its peak, to within a third or so.

    Weights as they are kept, twice where a whole model is compared with itself; for each of `trainable` parameters a
    gradient and Adam's two moments (float32); the activations of `batch` sequences, or pairs of them, of `length`
    tokens (with checkpointing one input per layer and one layer whole, about 34 values of 2 bytes per token and unit
    of width: Korthikanti et al., arXiv 2205.05198, section 4.1); and logits with their gradient in float32, but for
    the `loss` that is SFT's default: TRL makes those in pieces.

    Measured beside it (H100, 1.5 billion parameters, sequences of 240 tokens): QLoRA with a batch of 8 took 1.96 GB
    where this says 1.73, LoRA with 4 took 3.71 (3.48), full training with 4 took 25.7 (24.8).
    """
    width = _DTYPES.get(dtype, 2)
    if bits:
        # The quantised weights, their scales (half a bit with double quantisation), and what is left as it is.
        weights = (stats.parameters - stats.embedding) * (bits + 0.5) / 8 + stats.embedding * width
    else:
        weights = stats.parameters * width
    training = trainable * (12 if method == "full" else 16)
    token = stats.hidden * (2 * stats.layers + 34 if checkpointing else 34 * stats.layers)
    if task != "sft" or loss in ("nll", "dft"):
        token += 8 * stats.vocabulary
    sequences = batch * (1 if task in ("sft", "kto") else 2)
    copies = 2 if method == "full" and task in ("dpo", "kto") else 1
    return int(weights * copies + training + sequences * length * token)


def model_class(path: Path, **options: Any) -> Any:
    """Return the class of transformers that a model is loaded with, by training, checks and merging alike.

    It is what the model's configuration names, so that a model of vision and language is taken as what it is; or
    AutoModelForCausalLM, for one that brings its own code.

    Raises UsageError, also for a model that does not go on with a text: all that is done with models here is for those.
    """
    import transformers

    config = _configuration(path, **options)
    for name in config.architectures or []:
        if kind := getattr(transformers, name, None):
            if config.is_encoder_decoder or not kind.can_generate():
                raise _other_kind(path, name)
            return kind
    return transformers.AutoModelForCausalLM


def refuse_other_kinds(path: Path) -> None:
    """Raise UsageError for a model that surely does not go on with a text. Imports nothing large: it knows by names."""
    try:
        config = json.loads((path / "config.json").read_bytes())
        (name,) = config["architectures"]
        is_other = bool(config.get("is_encoder_decoder")) or name.endswith(_OTHER_KINDS)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # whoever loads it will say what is wrong with it
    if is_other:
        raise _other_kind(path, name)


def _other_kind(path: Path, name: str) -> UsageError:
    return UsageError(
        f"{path} is a {visible(name)}, which cannot be trained, merged or served here",
        "what goes on with a text is a ...ForCausalLM, or one of vision and language",
    )


def _configuration(path: Path, **options: Any) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(path, **_untrusting(options))
    except (OSError, ValueError, KeyError, ImportError) as error:
        _refuse_own_code(path, error)
        raise UsageError(f"{path} cannot be loaded by transformers", first_line(error)) from None


def _untrusting(options: dict[str, Any]) -> dict[str, Any]:
    """Options of ``from_pretrained``. Without a word on a model's own code transformers asks on the terminal."""
    return {"trust_remote_code": False, **options}


def _refuse_own_code(path: Path, error: Exception) -> None:
    """Raise UsageError where a model was not loaded because it brings code of its own, which nobody allowed to run."""
    if _TRUST not in str(error):
        return
    files = ", ".join(sorted(one.name for one in path.glob("*.py"))) or "named in its configuration"
    raise UsageError(
        f"{path} needs Python code of its own ({visible(files, 200)}), which is not run unless you allow it",
        f"read that code, since it can do whatever you may do; then {_TRUST}: true in the run allows it for training",
    ) from None


def empty_model(path: Path, **options: Any) -> Any:
    """Make a model without weights: every module and shape, on the meta device. Raises UsageError."""
    import torch
    import transformers

    kind, config = model_class(path, **options), _configuration(path, **options)
    with torch.device("meta"):
        if kind is transformers.AutoModelForCausalLM:
            return kind.from_config(config, **options)
        return kind(config)


def check_attention(path: Path, name: str, **options: Any) -> None:
    """See that a model can compute its attention in a way, told by its name. Raises UsageError."""
    try:
        empty_model(path, attn_implementation=name, **options)
    except (ValueError, ImportError) as error:
        reason = visible(first_line(error), 400)
        raise UsageError(
            f"attn_implementation: {visible(name)} does not work with {path} ({reason})", "choose another"
        ) from None


class AdapterPlan(NamedTuple):
    """What PEFT makes for a model: how many parameters, on which modules (the ends of their names), and a digest of the
    name and shape of each, by which two adapters are known to have the same parameters."""

    parameters: int
    modules: tuple[str, ...]
    digest: str


def plan_adapter(path: Path, lora: Any, **options: Any) -> AdapterPlan:
    """Find out what PEFT makes for a model, on one without weights.

    Raises UsageError when a name that it is given means nothing in the model, or nothing is made at all.
    """
    import torch
    from peft import get_peft_model

    lora = copy.copy(lora)
    lora.init_lora_weights = True  # others, such as pissa, begin with the weights
    model = empty_model(path, **options)
    _check_modules(model, lora)
    with torch.device("meta"):
        try:
            model = get_peft_model(model, lora, low_cpu_mem_usage=True)
            if lora.layer_replication:  # some models have a list with an entry per layer, which PEFT leaves as it is
                model(input_ids=torch.zeros(1, 2, dtype=torch.long))
        except Exception as error:  # whatever PEFT says of a name, a pattern or a number
            raise UsageError("the adapter cannot be made", visible(first_line(error), 400)) from None
    trained = {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    digest = hashlib.sha256(repr(sorted(trained.items())).encode()).hexdigest()[:16]
    return AdapterPlan(sum(map(math.prod, trained.values())), tuple(sorted(modules)), digest)


def adapter_parameters(path: Path, lora: Any, **options: Any) -> int:
    """Return how many parameters PEFT makes for a model. Raises UsageError as :func:`plan_adapter`."""
    return plan_adapter(path, lora, **options).parameters


def _check_modules(model: Any, lora: Any) -> None:
    """See that each name in an adapter's configuration means something: PEFT is content when one of several does."""
    modules = {name: module for name, module in model.named_modules() if name}
    leaves = sorted({name.rpartition(".")[2] for name, one in modules.items() if not list(one.children())})
    leaves = [name for name in leaves if not name.isdigit()]
    for option in ("target_modules", "exclude_modules", "modules_to_save"):
        given = getattr(lora, option, None)
        for wanted in sorted(given) if isinstance(given, list | tuple | set) else ():
            if not any(name == wanted or name.endswith(f".{wanted}") for name in modules):
                raise _names_nothing(option, wanted, leaves)
    for option in ("rank_pattern", "alpha_pattern"):
        for wanted in getattr(lora, option, None) or ():
            try:
                is_there = any(re.fullmatch(rf"(.*\.)?({wanted})", name) for name in modules)
            except re.error:
                is_there = False
            if not is_there:
                raise _names_nothing(option, str(wanted), leaves)
    parameters = [name for name, _ in model.named_parameters()]
    for wanted in getattr(lora, "target_parameters", None) or ():
        if not any(name == wanted or name.endswith(f".{wanted}") for name in parameters):
            ends = sorted({".".join(name.split(".")[-2:]) for name in parameters})
            raise _names_nothing("target_parameters", wanted, ends)
    tokens = getattr(lora, "trainable_token_indices", None) or []
    rows = model.get_input_embeddings().num_embeddings
    for index in tokens if isinstance(tokens, list) else [one for some in tokens.values() for one in some]:
        if not 0 <= index < rows:
            raise UsageError(f"trainable_token_indices: there is no token {index}", f"the model knows {rows}")
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    given = getattr(lora, "layers_to_transform", None)
    for index in [given] if isinstance(given, int) else given or ():
        if layers is not None and not 0 <= index < layers:
            raise UsageError(f"layers_to_transform: there is no layer {index}", f"the model has {layers}, from 0 on")


def _names_nothing(option: str, wanted: str, names: list[str]) -> UsageError:
    close = difflib.get_close_matches(wanted.rpartition(".")[2], names, 1)
    nearest = f"the nearest is {close[0]!r}; " if close else ""
    return UsageError(f"{option}: nothing in the model is called {wanted!r}", f"{nearest}it has {', '.join(names)}")


def available_memory() -> tuple[int, str]:
    """Bytes that can be had, and of what: the GPU's, or the machine's."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]), torch.cuda.get_device_name()
    return int(psutil.virtual_memory().available), "this machine"
