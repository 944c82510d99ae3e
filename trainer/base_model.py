"""The model that a run starts from: where it is, whether it is complete, and how much memory its training needs."""

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
"""A text to try a tokenizer and a model with."""
_OTHER_KINDS = (
    "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForMaskedLM",
    "ForImageClassification",
)  # fmt: skip
_TRUST = "trust_remote_code"
"""The argument of transformers that its errors name, and the key of a run."""
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True)
class BaseModel:
    """A model in a directory.

    Args:
        path: The directory.
        name: The name to show and record: its URL if it has one.
        mountpoint: The mountpoint of the obsfs mount that it lies on, if any.
    """

    path: Path
    name: str
    mountpoint: Path | None = None

    def mount_status(self) -> dict[str, Any]:
        """Return the status of the mount; empty without a mount, or if it does not answer."""
        if self.mountpoint is not None:
            with suppress(OSError, obsfs.ObsfsError):
                return obsfs.status(self.mountpoint)
        return {}


def check_name(text: str, settings: dict[str, Any]) -> None:
    """Raise UsageError for a name that cannot be a model. Does not look into a bucket."""
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
    """Open a model by its directory, its URL, or its name in the library. A model in a bucket is mounted meanwhile.

    Args:
        text: The directory, URL or name.
        settings: Settings of obsfs for the mount.

    Raises:
        ObsfsError: There is no such model.
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
        # Look through the mount: its process does the work, while an S3 client here would delay the imports.
        if not (mount.path / label).is_dir():
            url = obsfs.resolve(url, **settings)
            label = url.rpartition("/")[2]
        yield BaseModel(mount.path / label, url, mount.path)


def prefetch(base: BaseModel) -> threading.Event:
    """Start to read the weights in the background while Python imports. Setting the returned event stops it."""
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
    """The size of a model, from its files.

    Args:
        parameters: The number of parameters of all tensors.
        embedding: How many of them are in embeddings and the head, which are never quantised.
        size: The size of the weight files, in bytes.
        layers: The number of hidden layers.
        hidden: The width of a hidden layer.
        vocabulary: The number of tokens that the model knows; 0 if its configuration does not say.
    """

    parameters: int
    embedding: int
    size: int
    layers: int
    hidden: int
    vocabulary: int


def require_weights(path: Path) -> None:
    """Raise UsageError for a directory without a configuration or weights. Imports no large package."""
    _json(path / "config.json")
    if not any(path.glob("*.safetensors")):
        raise _no_weights(path)


def _no_weights(path: Path) -> UsageError:
    return UsageError(f"{path} has no weights", "training reads *.safetensors: save the model with transformers")


def check_files(path: Path) -> ModelStats:
    """Check configuration, index and every header. Raises UsageError, which names a missing or truncated file."""
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
    """Load the model's tokenizer, and give it a padding token if it has none.

    Raises:
        UsageError: It cannot be loaded, or knows no tokens: transformers makes an empty tokenizer for a model without
            tokenizer files.
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
    """Raise UsageError if the model has no row for a token that every run gives it."""
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
    """Return the bytes that training needs at its peak, to within about a third.

    The sum of:

    * the weights as they are stored, twice if a reference copy of the whole model is needed;
    * for each of the `trainable` parameters a gradient and Adam's two moments (float32);
    * the activations of `batch` sequences, or pairs of sequences, of `length` tokens. With `checkpointing` these are
      one input per layer and one complete layer: about 34 values of 2 bytes per token and unit of width (Korthikanti
      et al., arXiv 2205.05198, section 4.1);
    * the logits and their gradient in float32, except for SFT's default `loss`, which TRL computes in pieces.

    Measured (H100, 1.5 billion parameters, sequences of 240 tokens): QLoRA with a batch of 8 took 1.96 GB (estimate
    1.73), LoRA with a batch of 4 took 3.71 (3.48), full training with a batch of 4 took 25.7 (24.8).
    """
    width = _DTYPES.get(dtype, 2)
    if bits:
        # The quantised weights, their scales (half a bit with double quantisation), and the embeddings, not quantised.
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
    """Return the class of transformers to load a model with: the same for training, checks and merging.

    It is the class that the model's configuration names, so that a vision-language model stays one; or
    AutoModelForCausalLM for a model with its own code.

    Raises:
        UsageError: The model cannot be loaded, or does not generate text.
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
    """Raise UsageError for a model that surely does not generate text, judged by names. Imports no large package."""
    try:
        config = json.loads((path / "config.json").read_bytes())
        (name,) = config["architectures"]
        is_other = bool(config.get("is_encoder_decoder")) or name.endswith(_OTHER_KINDS)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # loading it will report what is wrong with it
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
    """Return options of ``from_pretrained`` that refuse a model's own code: else transformers asks on the terminal."""
    return {"trust_remote_code": False, **options}


def _refuse_own_code(path: Path, error: Exception) -> None:
    """Raise UsageError if a model failed to load because it needs its own code, which the user has not allowed."""
    if _TRUST not in str(error):
        return
    files = ", ".join(sorted(one.name for one in path.glob("*.py"))) or "named in its configuration"
    raise UsageError(
        f"{path} needs Python code of its own ({visible(files, 200)}), which is not run unless you allow it",
        f"read that code, since it can do whatever you may do; then {_TRUST}: true in the run allows it for training",
    ) from None


def empty_model(path: Path, **options: Any) -> Any:
    """Return a model without weights: every module and shape, on the meta device. Raises UsageError."""
    import torch
    import transformers

    kind, config = model_class(path, **options), _configuration(path, **options)
    with torch.device("meta"):
        if kind is transformers.AutoModelForCausalLM:
            return kind.from_config(config, **options)
        return kind(config)


def check_attention(path: Path, name: str, **options: Any) -> None:
    """Raise UsageError if a model cannot use an implementation of attention, given by its name."""
    try:
        empty_model(path, attn_implementation=name, **options)
    except (ValueError, ImportError) as error:
        reason = visible(first_line(error), 400)
        raise UsageError(
            f"attn_implementation: {visible(name)} does not work with {path} ({reason})", "choose another"
        ) from None


class AdapterPlan(NamedTuple):
    """The adapter that PEFT makes for a model.

    Args:
        parameters: How many parameters it trains.
        modules: The last parts of the names of the modules that it adapts.
        digest: A hash of the names and shapes of its parameters, equal for adapters with the same parameters.
    """

    parameters: int
    modules: tuple[str, ...]
    digest: str


def plan_adapter(path: Path, lora: Any, **options: Any) -> AdapterPlan:
    """Let PEFT make an adapter on a model without weights, to see what it will train.

    Raises:
        UsageError: A name in the adapter's configuration matches nothing in the model, or PEFT refuses it.
    """
    import torch
    from peft import get_peft_model

    lora = copy.copy(lora)
    lora.init_lora_weights = True  # others, such as pissa, need the weights
    model = empty_model(path, **options)
    _check_modules(model, lora)
    with torch.device("meta"):
        try:
            model = get_peft_model(model, lora, low_cpu_mem_usage=True)
            if (
                lora.layer_replication
            ):  # fails where a model has a list with an entry per layer, which PEFT does not extend
                model(input_ids=torch.zeros(1, 2, dtype=torch.long))
        except Exception as error:  # PEFT raises anything for a wrong name, pattern or number
            raise UsageError("the adapter cannot be made", visible(first_line(error), 400)) from None
    trained = {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}
    modules = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    digest = hashlib.sha256(repr(sorted(trained.items())).encode()).hexdigest()[:16]
    return AdapterPlan(sum(map(math.prod, trained.values())), tuple(sorted(modules)), digest)


def adapter_parameters(path: Path, lora: Any, **options: Any) -> int:
    """Return how many parameters PEFT makes for a model. Raises UsageError as :func:`plan_adapter`."""
    return plan_adapter(path, lora, **options).parameters


def _check_modules(model: Any, lora: Any) -> None:
    """Check that each name in an adapter's configuration matches: PEFT accepts a list of which one name does."""
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
    """Return the free memory in bytes, and the name of the device: the GPU if there is one, else this machine."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0]), torch.cuda.get_device_name()
    return int(psutil.virtual_memory().available), "this machine"
