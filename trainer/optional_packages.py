"""Check for packages that only some options need, before anything is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from obsfs.plugin import UsageError, remedy
from trainer import config_keys

_OPTIMISERS = {
    "galore_": "galore-torch",
    "lomo": "lomo-optim",
    "adalomo": "lomo-optim",
    "grokadamw": "grokadamw",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "schedule_free_": "schedulefree",
    "apollo_": "apollo-torch",
    "stable_adamw": "torch-optimi",
    "adamw_anyprecision": "torchdistx",
}
"""The package for each prefix of an optimizer's name, as in transformers' trainer_optimizer.py."""
_MODULES = {
    "comet-ml": "comet_ml",
    "azureml-core": "azureml",
    "flytekit": "flytekit",
    "liger-kernel": "liger_kernel",
    "flash-attn": "flash_attn",
    "galore-torch": "galore_torch",
    "lomo-optim": "lomo_optim",
    "apollo-torch": "apollo_torch",
    "torch-optimi": "optimi",
}
"""The module of a distribution, if its name differs."""
_TRACKERS = {"comet_ml": "comet-ml", "azure_ml": "azureml-core", "flyte": "flytekit"}
_INTEGRATIONS = ("transformers.integrations.integration_utils", "INTEGRATION_TO_CALLBACK")
_NO_PACKAGE = {"kubeflow"}


def check(options: Mapping[str, Any], attention: str | None) -> None:
    """Raise UsageError, with the command that installs it, for an option whose package is missing."""
    for name, value in _trackers(options):
        if (known := config_keys.dictionary_keys(*_INTEGRATIONS)) and value not in known:
            close = difflib.get_close_matches(value, known, 1)
            nearest = f"the nearest is {close[0]!r}; " if close else ""
            raise UsageError(f"{name}: {value!r} is not known", f"{nearest}choose one of {', '.join(known)}")
    for what, distribution in _wanted(options, attention):
        if not _is_installed(distribution):
            command = remedy("train") if distribution in ("bitsandbytes", "tensorboard") else None
            raise UsageError(f"{what} needs the package {distribution}", command or f"pip install {distribution}")


def _trackers(options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    given = options.get("report_to")
    for one in given if isinstance(given, list | tuple) else [given]:
        if isinstance(one, str) and one not in ("all", "none"):
            yield "report_to", one


def _wanted(options: Mapping[str, Any], attention: str | None) -> Iterator[tuple[str, str]]:
    """Yield each option that needs a package, and the distribution that has it."""
    for name, tracker in _trackers(options):
        if tracker not in _NO_PACKAGE:
            yield f"{name}: {tracker}", _TRACKERS.get(tracker, tracker)
    optimiser = str(getattr(options.get("optim"), "value", options.get("optim") or ""))
    for begin, distribution in _OPTIMISERS.items():
        if optimiser.startswith(begin):
            yield f"optim: {optimiser}", distribution
    is_of_bits = any(word in optimiser for word in ("bnb", "_8bit", "paged_", "lion", "ademamix"))
    if is_of_bits and not optimiser.startswith(("galore_", "adamw_torch")):
        yield f"optim: {optimiser}", "bitsandbytes"
    if options.get("use_liger_kernel"):
        yield "use_liger_kernel", "liger-kernel"
    if options.get("deepspeed"):
        yield "deepspeed", "deepspeed"
    if options.get("load_in_4bit") or options.get("load_in_8bit"):
        yield "a base in 4 or 8 bits", "bitsandbytes"
    if options.get("init_lora_weights") == "loftq":
        yield "init_lora_weights: loftq", "scipy"
    nested = options.get("model_init_kwargs")
    nested = nested if isinstance(nested, Mapping) else {}
    attention = attention or nested.get("attn_implementation")
    # transformers can also take flash attention from the package `kernels`.
    if attention == "flash_attention_2" and not _is_installed("kernels"):
        yield "attn_implementation: flash_attention_2", "flash-attn"
    if attention == "flash_attention_3" and not _is_installed("kernels") and not _is_installed("flash_attn_interface"):
        yield "attn_implementation: flash_attention_3", "kernels"
    if nested.get("use_kernels") or (attention and "/" in attention):
        yield "the kernels of the hub", "kernels"


def _is_installed(distribution: str) -> bool:
    try:
        return find_spec(_MODULES.get(distribution, distribution)) is not None
    except (ImportError, ValueError):
        return False
