"""The keys that TRL, PEFT and transformers take, and their types, parsed from the installed source files.

Importing those packages takes over ten seconds, and a mistyped key should be reported at once.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple

import msgspec

from obsfs.plugin import UsageError, visible

Hints = Mapping[str, Any]
"""Keys with their types; ``typing.Any`` accepts any value."""


class Bound(NamedTuple):
    """The range of a number, including its ends unless `is_open`, and special values outside it."""

    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False
    also: tuple[float, ...] = ()

    def holds(self, number: float) -> bool:
        """Return whether a number is in the range."""
        if number in self.also:
            return True
        return self.low < number < self.high if self.is_open else self.low <= number <= self.high

    def __str__(self) -> str:
        if self.high == math.inf:
            text = f"{'more than' if self.is_open else 'at least'} {self.low:g}"
        else:
            text = f"between {self.low:g} and {self.high:g}"
        return text + "".join(f", or {one:g}" for one in self.also)


_COUNT, _SHARE, _NOT_NEGATIVE, _POSITIVE = Bound(1), Bound(0, 1), Bound(0), Bound(0, is_open=True)
BOUNDS = {
    "test_split_size": Bound(0, 1, is_open=True),
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "max_steps": Bound(1, also=(-1,)),
    "num_train_epochs": _POSITIVE,
    "learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "warmup_ratio": _SHARE,
    "label_smoothing": _SHARE,
    "label_smoothing_factor": _SHARE,
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _NOT_NEGATIVE,
    "eval_delay": _NOT_NEGATIVE,
    "save_total_limit": _NOT_NEGATIVE,
    "seed": _NOT_NEGATIVE,
    "data_seed": _NOT_NEGATIVE,
    "max_length": _COUNT,
    "max_completion_length": _COUNT,
    "dataset_num_proc": _COUNT,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "beta": _NOT_NEGATIVE,
    "r": _COUNT,
    "lora_alpha": _POSITIVE,
    "lora_dropout": Bound(0, 0.99),
}
"""Ranges that transformers, TRL and PEFT check late or never: a batch of 0 divides by zero at the first step."""


BARE: Any = object()
"""The value of an option without a value: it means true where that is possible."""

_SIMPLE: Mapping[str, Any] = {"int": int, "float": float, "str": str, "bool": bool, "dict": dict, "Dict": dict,
                              "list": list, "List": list, "None": None}  # fmt: skip


@cache
def dataclass_keys(package: str, name: str) -> Hints | None:
    """Return the keys of a dataclass of an installed package; None if its source cannot be parsed."""
    found = _find(package, name)
    return dict(_fields(*found)) if found else None


@cache
def signature_keys(package: str, name: str) -> Hints | None:
    """Return the arguments of a class's ``__init__``, with types from annotations or defaults."""
    found = _find(package, name)
    if found is None:
        return None
    module, node = found
    made = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if made is None:
        return None
    arguments = [*made.args.args[1:], *made.args.kwonlyargs]
    defaults = [*made.args.defaults, *made.args.kw_defaults]
    keys: dict[str, Any] = {}
    for argument, default in zip(arguments[::-1], defaults[::-1], strict=False):
        hint: Any = _hint(argument.annotation, module) if argument.annotation else Any
        if hint is Any and isinstance(default, ast.Constant) and default.value is not None:
            hint = type(default.value)
        keys[argument.arg] = hint
    return keys


@cache
def dictionary_keys(module: str, name: str) -> tuple[str, ...]:
    """Return the keys of the dictionary `name` in a module of an installed package; empty if there is none."""
    tree = _parse(module)
    for node in tree[0].body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if names == [name]:
                return tuple(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    return ()


@cache
def _parse(module: str) -> tuple[ast.Module, bool] | None:
    """Return the syntax tree of a module, and whether it is a package. Does not import its parents."""
    top, *below = module.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    place = Path(spec.submodule_search_locations[0]).joinpath(*below)
    for path, is_package in ((place / "__init__.py", True), (place.with_name(f"{place.name}.py"), False)):
        try:
            return ast.parse(path.read_bytes()), is_package
        except (OSError, SyntaxError, ValueError):
            continue
    return None


@cache
def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """Return the module and definition of a class, following the imports of a module."""
    found = _parse(module)
    if found is None:
        return None
    tree, is_package = found
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    for source, original in _imported(tree, name):
        level = source.level - is_package
        parent = module.split(".")
        base = parent[: len(parent) - level] if source.level else []
        target = ".".join([*base, *(source.module.split(".") if source.module else [])])
        if target and target != module and (defined := _find(target, original)):
            return defined
    return None


def _imported(tree: ast.Module, name: str) -> Iterator[tuple[ast.ImportFrom, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    yield node, alias.name


def _fields(module: str, node: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for base in node.bases:
        if isinstance(base, ast.Name) and (found := _find(module, base.id)):
            yield from _fields(*found)
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            made = {word.arg: word.value for word in one.value.keywords} if isinstance(one.value, ast.Call) else {}
            init = made.get("init")
            is_left_out = isinstance(init, ast.Constant) and init.value is False
            if "ClassVar" not in ast.unparse(one.annotation) and not is_left_out:
                yield one.target.id, _hint(one.annotation, module)


def _hint(node: ast.expr, module: str) -> Any:
    """Return the type of an annotation; Any if it is too complex."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _hint(ast.parse(node.value, mode="eval").body, module)
        return None if node.value is None else Any
    if isinstance(node, ast.Name):
        return _SIMPLE[node.id] if node.id in _SIMPLE else _choices(module, node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([_hint(node.left, module), _hint(node.right, module)])
    if not isinstance(node, ast.Subscript):
        return Any
    of = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if of == "Literal":
        values = [one.value for one in inner if isinstance(one, ast.Constant)]
        # "pissa_niter_[number of iters]" is a pattern, not a value.
        is_exact = len(values) == len(inner) and all(isinstance(one, str) and "[" not in one for one in values)
        return Literal[tuple(values)] if is_exact else Any
    if of in ("Optional", "Union"):
        return _union([_hint(one, module) for one in inner] + ([None] if of == "Optional" else []))
    if of in ("list", "List"):
        member = _hint(inner[0], module)
        return list if member is Any else list[member]  # type: ignore[valid-type]
    return dict if of in ("dict", "Dict") else Any


def _union(members: list[Any]) -> Any:
    if Any in members:
        return Any
    if any(typing.get_origin(one) is Literal for one in members):
        # `SchedulerType | str`: the text is one of the values.
        members = [one for one in members if one is not str]
    return typing.Union[tuple(members)]  # noqa: UP007


@cache
def _choices(module: str, name: str) -> Any:
    """Return the values of an enumeration of text; Any for other classes."""
    found = _find(module, name)
    if found is None or not any("Enum" in ast.unparse(base) for base in found[1].bases):
        return Any
    values = [
        one.value.value for one in found[1].body if isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant)
    ]
    return Literal[tuple(values)] if values and all(isinstance(one, str) for one in values) else Any


def checked(name: str, value: Any, hint: Any, spelling: str) -> Any:
    """Check a value, and convert it where that is safe: 2.0 to 2, a number to text, one value to a list.

    Args:
        name: The key, for its range in :data:`BOUNDS`.
        value: The value from YAML or a program.
        hint: Its type; Any accepts everything.
        spelling: How the user wrote the key.

    Raises:
        UsageError: It has another type, is not finite, is out of its range, or is missing.
    """
    if value is BARE:
        if hint is not Any and bool not in _options(hint):
            dashes = f"; one that begins with -- as --{spelling}=VALUE" if str in _options(hint) else ""
            raise UsageError(f"--{spelling} has no value", f"give {_words(hint)}{dashes}")
        return True
    value = _plain(value)
    for number in _numbers(value):
        if not math.isfinite(number):
            raise UsageError(f"{spelling}: {number} is not a number that can be used", f"give {_words(hint)}")
    bound = BOUNDS.get(name)
    if hint is not Any:
        value = _converted(spelling, value, hint)
    if bound and isinstance(value, int | float) and not isinstance(value, bool) and not bound.holds(value):
        raise UsageError(f"{spelling}: {value} is out of range", f"give a number that is {bound}")
    return value


def _converted(name: str, value: Any, hint: Any) -> Any:
    options = _options(hint)
    if isinstance(value, float) and value.is_integer() and int in options and float not in options:
        value = int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and str in options and not {int, float} & set(options):
        value = str(value)
    if isinstance(value, str) and str not in options and any(_origin(one) is list for one in options):
        value = [value]
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        pass
    given = visible(repr(value), 80)
    choices = [one for option in options if _origin(option) is Literal for one in typing.get_args(option)]
    if choices and isinstance(value, str):
        close = difflib.get_close_matches(value, choices, 1)
        nearest = f"the nearest is {close[0]!r}; " if close else ""
        raise UsageError(f"{name}: {given} is not known", f"{nearest}choose one of {', '.join(choices)}")
    remedy = f"give {_words(hint)}"
    if isinstance(value, str) and {int, float, bool} & set(options):
        remedy += f", without quotes ({name}: {value})" if _reads_as(value, options) else ""
    raise UsageError(f"{name}: {given} is of the wrong type", remedy)


def _reads_as(text: str, options: Iterable[Any]) -> bool:
    if bool in options and text in ("true", "false"):
        return True
    try:
        return bool({int, float} & set(options)) and math.isfinite(float(text))
    except ValueError:
        return False


def _plain(value: Any) -> Any:
    """Return the value that YAML would give for a value from a program."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        value = sorted(value)
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _numbers(one)
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if _origin(hint) in (typing.Union, UnionType) else (hint,)


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null",
          None: "null", list: "a list", dict: "a mapping"}  # fmt: skip


def _words(hint: Any) -> str:
    """Describe a type for people."""
    told: list[str] = []
    for option in _options(hint):
        if _origin(option) is Literal:
            told.append(f"one of {', '.join(map(str, typing.get_args(option)))}")
        else:
            if option == list[str] and "text" not in told:
                told.append("text")  # one stands for a list of one
            told.append(_WORDS.get(_origin(option), "another value"))
    return " or ".join(dict.fromkeys(word for word in told if word != "null")) or "null"


def own_keys(kind: type) -> dict[str, Any]:
    """Return the keys of one of our dataclasses, with their types."""
    hints = typing.get_type_hints(kind)
    return {one.name: hints[one.name] for one in dataclasses.fields(kind)}
