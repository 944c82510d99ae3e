"""The configuration of a run: a few keys of our own, and every key of TRL's configs, LoraConfig and BitsAndBytesConfig.

TrlParser converts the values, in :func:`_arguments`. It does not read the YAML and the command line, because it cannot
keep what is promised here: it needs TRL imported (10 s before a mistyped key is reported), prints argparse's usage on
several lines, names no nearest key, takes the last of two equal keys in silence, and reads YAML 1.1, where ``no`` is
false and ``1e-4`` is text.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from obsfs.plugin import (
    BUCKET_SETTINGS,
    CACHE_SETTINGS,
    GivenValue,
    ObsfsError,
    Settings,
    UsageError,
    first_line,
    knobs,
    visible,
)
from trainer import config_keys, optional_packages
from trainer.other_trainers import refuse_other_trainers


class Task(NamedTuple):
    """How TRL trains a task: the module of its config and trainer, the prefix of their names, and fixed options."""

    module: str
    name: str
    preset: Mapping[str, Any] = {}

    def load(self) -> tuple[Any, Any]:
        """Return the config class and the trainer class. Imports TRL."""
        module = importlib.import_module(self.module)
        return getattr(module, f"{self.name}Config"), getattr(module, f"{self.name}Trainer")


_KEEP = {"remove_unused_columns": False}
"""These trainers need it; without it they set it themselves and warn."""
TASKS = {
    "sft": Task("trl", "SFT"),
    "dpo": Task("trl", "DPO"),
    "kto": Task("trl", "KTO"),
    "orpo": Task("trl.experimental.orpo", "ORPO", _KEEP),
    "cpo": Task("trl.experimental.cpo", "CPO", _KEEP),
    "simpo": Task("trl.experimental.cpo", "CPO", {**_KEEP, "loss_type": "simpo", "cpo_alpha": 0.0}),
}
METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "lora": {},
    "dora": {"use_dora": True},
    "full": {},
}
"""The options that each method stands for."""
_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
"""All linear layers, which QLoRA's authors found to matter (arXiv 2305.14314, section 4); rank and alpha as in TRL's
ModelConfig. No dropout: with dropout, PEFT refuses the experts of a mixture-of-experts model."""
_LORA_RATE = 10.0
"""TRL's default learning rates are for full training; its own examples use ten times as much for LoRA."""

_ALIASES = {
    "model_name_or_path": "model",
    "dataset": "data",
    "dataset_name": "data",
    "dataset_streaming": "streaming",
    "dataset_train_split": "split",
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task_type",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
}
"""TRL's names for keys that have another name here, in PEFT, or in transformers."""
_SETTINGS = (*BUCKET_SETTINGS, *CACHE_SETTINGS, "library", "connections", "cache_size", "retry_timeout")
"""Settings of obsfs: how to reach the bucket, and where to cache blocks."""
_CHOICES = {
    "dtype": Literal["float32", "bfloat16", "float16", "auto"] | None,
    "bnb_4bit_quant_type": Literal["nf4", "fp4"],
}
"""Text values that the libraries accept unchecked, and fail on later."""
_BEGIN_WITH_DATA = ("eva", "corda", "lora_ga")
"""Initializations that need a pass over the data; without it PEFT silently starts as any adapter (PEFT, tuners/lora:
initialize_lora_eva_weights, preprocess_corda, preprocess_loraga)."""
_NOT_FOR_USERS = {"base_model_name_or_path", "auto_mapping", "peft_type", "inference_mode", "peft_version", "kwargs"}


@dataclass
class TrainConfig:
    """The configuration of one run.

    Args:
        model: The base model: a directory (on a mount or not), ``obs://BUCKET/NAME[@VERSION]``, or a name in the
            library.
        data: Training data: files, directories, URLs, names from :data:`trainer.data.BUILTIN`, or data sets on the
            hub.
        output: Where the result goes: a directory, or ``obs://BUCKET/NAME``.
        task: What to train: a key of :data:`TASKS`.
        method: How to train: a key of :data:`METHODS`.
        eval_data: Evaluation data, given as `data` is.
        ignore_columns: Columns of the data to leave out.
        test_split_size: The share of `data` to evaluate with instead of `eval_data`, between 0 and 1.
        split: The split of a data set on the hub.
        streaming: Read the data while training, without converting all of it first. Needs ``max_steps``.
        dtype: The type of the weights, as torch names it; by default float32 for full training, else bfloat16.
        attn_implementation: How transformers computes attention.
        resume: Continue from the newest complete checkpoint of `output`.
        check_memory: Refuse a run that surely needs more memory than is free.
        rehearse: Try one step with these settings on a small model first.
        options: All other keys: those of TRL's config, LoraConfig and BitsAndBytesConfig, and settings of obsfs.
    """

    model: str = ""
    data: list[str] = field(default_factory=list)
    output: str = ""
    task: str = "sft"
    method: str = "qlora"
    eval_data: list[str] = field(default_factory=list)
    ignore_columns: list[str] = field(default_factory=list)
    test_split_size: float | None = None
    split: str = "train"
    streaming: bool = False
    dtype: str | None = None
    attn_implementation: str | None = None
    resume: bool = False
    check_memory: bool = True
    rehearse: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of obsfs that the run gives."""
        return {name: value for name, value in self.options.items() if name in _SETTINGS}

    @property
    def is_quantized(self) -> bool:
        """Whether the base is loaded in 4 or 8 bits."""
        options = self._options()
        return bool(options.get("load_in_4bit") or options.get("load_in_8bit"))

    @property
    def base_dtype(self) -> str:
        """The type of the loaded weights, and of the computation: full training keeps its weights in float32."""
        return self.dtype or ("float32" if self.method == "full" else "bfloat16")

    def _options(self) -> dict[str, Any]:
        return {**METHODS[self.method], **self.options}

    def parts(self, output_dir: Path) -> Parts:
        """Return the configs that TRL, PEFT and transformers take. Imports all three.

        Args:
            output_dir: The directory that TRL writes checkpoints to.

        Raises:
            UsageError: A key or its value is wrong; the message names the key.
        """
        from peft import LoraConfig
        from transformers import BitsAndBytesConfig

        config, trainer = TASKS[self.task].load()
        options = self._options()
        known = {
            config: _fields(config),
            LoraConfig: _fields(LoraConfig) - _NOT_FOR_USERS,
            BitsAndBytesConfig: set(inspect.signature(BitsAndBytesConfig).parameters) - _NOT_FOR_USERS,
        }
        own = _fields(TrainConfig) - {"options"} | set(_SETTINGS) | set(_ALIASES)
        everything = set().union(own, *known.values())
        if unknown := [name for name in options if name not in everything]:
            raise _unknown(unknown, everything)
        chosen = {kind: {k: v for k, v in options.items() if k in names} for kind, names in known.items()}
        arguments = _arguments(config, {**self._defaults(), **chosen[config], "output_dir": str(output_dir)})
        if self.method == "full":
            for name in [*chosen[LoraConfig], *(n for n, v in chosen[BitsAndBytesConfig].items() if v)]:
                given = " or ".join([name, *(alias for alias, meant in _ALIASES.items() if meant == name)])
                raise UsageError(
                    f"{given} does not go with method full", "leave it out, or choose method lora, dora or qlora"
                )
            return Parts(trainer, arguments, None, None)
        lora = lora_config(**chosen[LoraConfig])
        computed = "bfloat16" if self.base_dtype == "auto" else self.base_dtype
        bits = {"bnb_4bit_compute_dtype": computed, **chosen[BitsAndBytesConfig]} if self.is_quantized else None
        return Parts(trainer, arguments, lora, _made(BitsAndBytesConfig, bits) if bits else None)

    def _defaults(self) -> dict[str, Any]:
        import torch

        defaults: dict[str, Any] = {"disable_tqdm": True, "report_to": _trackers(), **TASKS[self.task].preset}
        if not torch.cuda.is_available():
            is_bf16 = self.base_dtype == "bfloat16" and not self.options.get("fp16")
            defaults |= {"use_cpu": True, "bf16": is_bf16, "dataloader_pin_memory": False}
        if self.method != "full":
            config, _ = TASKS[self.task].load()
            rate: Any = {one.name: one.default for one in dataclasses.fields(config)}["learning_rate"]
            defaults["learning_rate"] = rate * _LORA_RATE
            # Of an adapter every parameter is used; DDP would look for the others after each step.
            defaults["ddp_find_unused_parameters"] = False
        return defaults


class Parts(NamedTuple):
    """TRL's trainer class and its arguments; PEFT's and transformers' configs, None where a run needs none."""

    trainer: Any
    arguments: Any
    lora: Any
    quantization: Any


def lora_config(**given: Any) -> Any:
    """Return PEFT's LoraConfig with our defaults, changed by `given`. Raises UsageError."""
    from peft import LoraConfig

    return _made(LoraConfig, {**_LORA, "task_type": "CAUSAL_LM", **given})


def load_config(
    source: Mapping[str, Any] | TrainConfig | None, overrides: Mapping[str, Any] | None = None
) -> TrainConfig:
    """Make the configuration of a run, and check it as far as is possible without importing a large package.

    Args:
        source: A mapping of keys, a dataclass, or a configuration to change.
        overrides: Keys that replace those of `source`. A setting of obsfs may be an
            :class:`obsfs.plugin.GivenValue`: errors then say where it was given.

    Raises:
        UsageError: A key is unknown or given twice, or a value is wrong.
    """
    if isinstance(source, TrainConfig):
        given = {**{k: v for k, v in vars(source).items() if k != "options"}, **source.options}
    elif dataclasses.is_dataclass(source) and not isinstance(source, type):
        given = dataclasses.asdict(source)
    else:
        given = dict(source or {})
    nested = given.pop("options", None) or {}
    spelled = {**_named([*given.items(), *nested.items()]), **_named((overrides or {}).items())}
    places = dict[str, str]()
    for name, (spelling, value) in spelled.items():
        if isinstance(value, GivenValue):
            places[name], spelled[name] = value.place, (spelling, value.value)
    known = known_keys(str(spelled.get("task", ("", "sft"))[1]))
    for name, (spelling, value) in spelled.items():
        if value is config_keys.BARE and name in {**(known or {}), **dict.fromkeys(_SETTINGS)}:
            is_flag = name in _SETTINGS and knobs()[name].type is bool
            hint = str if name in _SETTINGS and not is_flag else (known or {}).get(name, Any)
            spelled[name] = spelling, config_keys.checked(name, value, hint, spelling)
    if known is not None:
        _refuse_unknown([name for name, _ in spelled.values()], known)
    merged = {
        name: config_keys.checked(name, value, (known or {}).get(name, Any), spelling)
        for name, (spelling, value) in spelled.items()
        if value is not None or name not in _fields(TrainConfig)
    }
    own = {name: merged.pop(name) for name in _fields(TrainConfig) if name in merged}
    config = TrainConfig(**own, options=merged)
    _check(config)
    Settings.load(**{name: GivenValue(places.get(name, f"{name}="), value) for name, value in config.settings.items()})
    return config


def _named(given: Iterable[tuple[Any, Any]]) -> dict[str, tuple[str, Any]]:
    """Map our names to the user's spelling and value. Raises UsageError for a key that is given twice."""
    found: dict[str, tuple[str, Any]] = {}
    for key, value in given:
        spelling = str(key)
        name = _ALIASES.get(spelling, spelling)
        if name in found:
            other = found[name][0]
            both = f"{other} is" if other == spelling else f"{other} and {spelling} mean the same: it is"
            raise UsageError(f"{both} given twice", "leave one out")
        found[name] = spelling, value
    return found


def known_keys(task: str) -> dict[str, Any] | None:
    """Return every key that a run of a task takes, with its type; None if the libraries' sources cannot be read.

    It parses the installed sources, and imports no large package.
    """
    if task not in TASKS:
        task = "sft"
    trl = config_keys.dataclass_keys(TASKS[task].module, f"{TASKS[task].name}Config")
    peft = config_keys.dataclass_keys("peft", "LoraConfig")
    bits = config_keys.signature_keys("transformers", "BitsAndBytesConfig")
    if trl is None or peft is None or bits is None:
        return None
    own = {name: hint for name, hint in config_keys.own_keys(TrainConfig).items() if name != "options"}
    others = {name: hint for name, hint in {**bits, **peft}.items() if name not in _NOT_FOR_USERS}
    return {**others, **trl, **own, **_CHOICES, **dict.fromkeys(_SETTINGS, Any)}


def refuse_unknown(overrides: Mapping[str, Any], flags: Iterable[str]) -> None:
    """Raise UsageError, with the nearest key or flag, for an unknown option of the command line."""
    if (known := known_keys(str(overrides.get("task", "sft")))) is not None:
        _refuse_unknown(list(overrides), {**known, **dict.fromkeys(flags)})


def _refuse_unknown(given: Sequence[str], known: Mapping[str, Any]) -> None:
    if unknown := [name for name in given if name not in known and name not in _ALIASES]:
        refuse_other_trainers(given, unknown)
        raise _unknown(unknown, {*known, *_ALIASES})


def _check(config: TrainConfig) -> None:
    for name, choices in (("task", TASKS), ("method", METHODS)):
        value = getattr(config, name)
        if value not in choices:
            raise UsageError(f"{name}: {value!r} is not known", f"choose one of {', '.join(choices)}")
    for name, kind in (
        ("model", "a directory, or obs://BUCKET/NAME"),
        ("data", "a file, a directory, obs://BUCKET/FILE, or the name of a data set"),
        ("output", "a directory, or obs://BUCKET/NAME"),
    ):
        if not getattr(config, name):
            also = "; output_dir is only where checkpoints lie before they are published"
            remedy = f"give one with `{name}: ...` or --{name}: {kind}"
            raise UsageError(
                f"the run has no {name}",
                remedy + (also if name == "output" and "output_dir" in config.options else ""),
            )
    if config.test_split_size and (config.streaming or config.eval_data):
        reason = "streamed data has no known length" if config.streaming else "eval_data is given"
        raise UsageError(f"test_split_size takes no effect: {reason}", "leave it out, or evaluate with it alone")
    if config.streaming and not int(config.options.get("max_steps") or 0) > 0:
        raise UsageError("data that is streamed has no known length", "say how long to train with max_steps")
    if config.options.get("resume_from_checkpoint") is not None:
        raise UsageError(
            "resume_from_checkpoint has no effect here", "resume: true goes on from the newest whole checkpoint"
        )
    if (begin := config.options.get("init_lora_weights")) in _BEGIN_WITH_DATA:
        raise UsageError(
            f"init_lora_weights: {begin} takes a pass over the data before training, which PEFT leaves to programs",
            "choose another, for example pissa or olora",
        )
    optional_packages.check({**METHODS[config.method], **config.options}, config.attn_implementation)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys of a YAML file. Raises UsageError, with the line, if it is not a mapping in YAML."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})", "obsfs train --guide writes one") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = "cannot be used" if isinstance(error, yaml.constructor.ConstructorError) else "is no YAML"
        raise UsageError(f"{path}{where} {what}", getattr(error, "problem", None) or str(error)) from None
    except RecursionError:
        raise UsageError(f"{path} cannot be used", "its values are nested too deeply") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no configuration", "write KEY: VALUE lines")
    if isinstance(nested := found.get("options"), dict):
        found = {**found, "options": _placed(nested, f"{path}: ", ": ")}
    return _placed(found, f"{path}: ", ": ")


def _placed(given: Mapping[str, Any], before: str, after: str) -> dict[str, Any]:
    """Mark each setting of obsfs with where it was given: its name between two texts."""
    return {
        name: GivenValue(f"{before}{name}{after}", one) if name in _SETTINGS else one for name, one in given.items()
    }


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Read ``--key value``, ``--key=value``, ``--list a b`` and ``--flag`` (BARE), with values as in YAML."""
    found: dict[str, Any] = {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise UsageError(f"{word!r} is no option", "write --key value")
        name, is_joined, value = word[2:].partition("=")
        if name.replace("-", "_") in found:
            raise UsageError(f"--{name} is given twice", f"leave one out; a list is --{name} A B")
        values = [value] if is_joined else []
        while not is_joined and words and not words[0].startswith("--"):
            values.append(words.pop(0))
        key = name.replace("-", "_")
        # A setting of obsfs is read from text, as that of any other verb.
        parsed = values if key in _SETTINGS else [_value(value) for value in values]
        found[key] = config_keys.BARE if not parsed else parsed[0] if len(parsed) == 1 else parsed
    return _placed(found, "--", " ")


class _Loader(yaml.SafeLoader):
    """A loader for the scalars of YAML 1.2: `no` is text, and 1e-4 is a number."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    """Construct a mapping, and refuse a key that is given twice: YAML forbids it, but PyYAML takes the last."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                problem = f"the key {key.value!r} is given twice (line {seen[key.value]} has it, too)"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = key.start_mark.line + 1
    loader.flatten_mapping(node)
    found: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return found


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _value(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        return text


def _fields(kind: type) -> set[str]:
    return {one.name for one in dataclasses.fields(kind) if one.init}


def _unknown(names: Sequence[str], known: Iterable[str]) -> ObsfsError:
    """Return the error for unknown keys, with the nearest known key for each."""
    told, everything = [], sorted(known)
    for name in names:
        close = " or ".join(map(repr, difflib.get_close_matches(name.lower(), everything, 2)))
        told.append((visible(name, 80), f"the nearest known one is {close}" if close else ""))
    if len(told) == 1:
        ((name, nearest),) = told
        return UsageError(f"unknown key {name!r}", nearest or "see `obsfs train --help`")
    shown = ", ".join(f"{name!r}" + (f" ({nearest})" if nearest else "") for name, nearest in told)
    return UsageError("unknown keys", shown)


def _arguments(kind: Any, given: Mapping[str, Any]) -> Any:
    """Return a config of TRL, with values converted as TRL's own command line converts them."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise UsageError(message.removeprefix("argument --"), f"see the fields of TRL's {kind.__name__}")

    hints = get_type_hints(kind)
    listed = {
        name: [value] if _is_list(hints[name]) and isinstance(value, str) else value for name, value in given.items()
    }
    parser = Parser((kind,))
    try:
        parser.set_defaults_with_config(**listed)
        return parser.parse_args_into_dataclasses(args=[])[0]
    except ObsfsError:
        raise
    except Exception as error:  # the config's own checks may raise anything, even for a missing file
        raise UsageError(f"{kind.__name__}: {_told(error)}", "change that key") from None


def _told(error: Exception) -> str:
    missing = error.filename if isinstance(error, FileNotFoundError) else None
    return f"there is no file {missing}" if missing else first_line(error)


def _is_list(hint: Any) -> bool:
    choices = [one for one in (get_args(hint) if get_origin(hint) is not list else (hint,)) if one is not type(None)]
    return bool(choices) and all(get_origin(one) is list for one in choices)


def _made(kind: Any, given: Mapping[str, Any]) -> Any:
    try:
        return kind(**given)
    except Exception as error:  # as above
        raise UsageError(f"{kind.__name__}: {_told(error)}", "change that key") from None


def _trackers() -> list[str]:
    found = importlib.util.find_spec("tensorboard")
    return ["tensorboard"] if found else ["none"]
