"""``obsfs train --guide``: ask a few questions, and write the YAML file of a run that fits this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import yaml

import obsfs
from obsfs.plugin import ask, columns, confirm, count, find_mounts, human, knobs, tell, terminal_width
from trainer import base_model, data
from trainer.config import METHODS, TASKS, load_config
from trainer.memory_estimate import MemoryEstimate, estimate_run_memory
from trainer.quiet import silence_libraries, silence_progress_bars
from trainer.trl_setup import trusts

_SIZES = {"max_length": 1024, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
"""Proposed for every run."""
_ABOUT = {
    "sft": "show it what to say",
    "dpo": "show it which of two answers is better",
    "kto": "show it answers that are good or bad",
    "orpo": "sft and preference in one, without a reference",
    "cpo": "preference without a reference",
    "simpo": "preference by average likelihood, without a reference",
}


_SEARCH = """
import glob, os, sys
root = glob.escape(sys.argv[1])
for pattern in ("*/config.json", "*/*/config.json"):
    for path in sorted(glob.glob(os.path.join(root, pattern))):
        os.write(1, os.fsencode(os.path.dirname(path)) + bytes(1))
"""
_SEARCH_SECONDS = 5.0


def found_models() -> list[str]:
    """Return the directories on this user's mounts that have a configuration, one or two levels deep.

    Mounts that end with the program that made them are left out. A process of its own searches each mount, for at most
    5 seconds: a thread that waits for a dead mount could not be stopped.
    """
    usable = [one for one in find_mounts() if one.state == "mounted" and not one.status.get("ends_with_program")]
    roots = [one.entry.mountpoint for one in usable]
    searches = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SEARCH, root],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        for root in roots
    ]
    deadline = time.monotonic() + _SEARCH_SECONDS
    found = []
    for search in searches:
        try:
            said, _ = search.communicate(timeout=max(0.1, deadline - time.monotonic()))
            found += [os.fsdecode(one) for one in said.split(b"\0") if one]
        except subprocess.TimeoutExpired:
            search.kill()
            if search.stdout:
                search.stdout.close()
    return found


def missing_bytes(directory: Path) -> int:
    """Return how many bytes of the weights are not on this machine yet: those on a mount that are not cached."""
    missing = 0
    for path in directory.glob("*.safetensors"):
        with suppress(OSError):
            missing += path.stat().st_size - int(os.getxattr(path, "user.obsfs.cached_bytes"))
    return missing


def guide(given: dict[str, Any]) -> tuple[Path, bool]:
    """Ask the questions, and write the YAML file.

    Args:
        given: Keys that the user gave already; they go to the file, too.

    Returns:
        The file, and whether to start the run now.

    Raises:
        ObsfsError: The model cannot be opened or used.
        click.Abort: The user gave up.
    """
    settings = {name: value for name, value in given.items() if name in knobs()}
    models = found_models()
    for number, path in enumerate(models, 1):
        tell(f"  {number}  {path}")
    answer = ask("Model (a number from above, a directory, or obs://BUCKET/NAME)" if models else "Model", type=str)
    model = models[int(answer) - 1] if answer.isdigit() and 0 < int(answer) <= len(models) else answer
    run: dict[str, Any] = {"model": model}
    with base_model.open_model(model, settings) as base:
        silence_libraries()
        silence_progress_bars()  # imports transformers; the first question must not wait for that
        stats = base_model.check_files(base.path)
        tell(
            f"  {count(stats.parameters)} parameters, {human(stats.size)}, "
            f"of which {human(missing_bytes(base.path))} have to be fetched"
        )
        has_template = bool(base_model.load_tokenizer(base.path).chat_template)
        tell(*(f"  {name:6} {text}" for name, text in _ABOUT.items()))
        run["task"] = ask("Task", type=click.Choice(list(TASKS)), default="sft")
        run["data"] = _ask_data(run["task"], has_template, settings)
        best = _tell_memory(estimates({**_SIZES, **run, **given}, base.path, stats))
    run["method"] = ask("Method", type=click.Choice(list(METHODS)), default=best)
    run["num_train_epochs"] = ask("Passes over the data", type=click.FloatRange(0, min_open=True), default=1.0)
    library = obsfs.Settings.load(**settings).library
    name = f"{Path(model.rstrip('/')).name.partition('@')[0]}-{run['task']}"
    default = f"{library.rstrip('/')}/adapters/{name}" if library else f"runs/{name}"
    run["output"] = ask("Where the adapter goes (a directory, or obs://BUCKET/NAME)", default=default)
    run |= {**_SIZES, "save_steps": 100, "save_total_limit": 2, **given}
    written = Path(ask("Write this run to", default="train.yaml"))
    if written.exists():
        confirm(f"{written} is there: replace it?", abort=True)
    text = yaml.safe_dump(run, sort_keys=False, allow_unicode=True)
    written.write_text(text, encoding="utf-8")
    tell("", *text.splitlines())
    return written, confirm("Start now?", default=False)


def _ask_data(task: str, has_template: bool, settings: dict[str, Any]) -> str:
    """Ask for data until the answer can be read, and return it."""
    while True:
        place: str = ask(f"Data (a file, a directory, a URL, a data set of the hub, or {', '.join(data.BUILTIN)})")
        try:
            found = data.load([place], task, split="train", streaming=True, chat=has_template, settings=settings)
        except obsfs.ObsfsError as error:
            tell(f"  {error}")
        else:
            tell(f"  the first record: {data.shown(next(iter(found)))}")
            return place


def _tell_memory(found: dict[str, MemoryEstimate | str]) -> str:
    """Show the memory that each method needs, and return the method to propose."""
    rows, fitting = [], []
    known = [memory for memory in found.values() if isinstance(memory, MemoryEstimate)]
    for name, memory in found.items():
        if isinstance(memory, str):
            rows.append((name, "", memory))
            continue
        rows.append((name, human(memory.needed), "too much" if memory.is_too_much else "fits"))
        if not memory.is_too_much:
            fitting.append(name)
    free = f"of {human(known[0].free)} on {known[0].device_name}" if known else ""
    tell(*columns(["method", ">memory", free], rows, terminal_width()))
    return "lora" if "lora" in fitting else "qlora"


def estimates(run: dict[str, Any], model: Path, stats: base_model.ModelStats) -> dict[str, MemoryEstimate | str]:
    """Return the memory that a run needs with each method, as the run itself estimates it, or why a method fails.

    Args:
        run: The keys that are known.
        model: The directory of its model.
        stats: The size of its model.
    """
    found: dict[str, MemoryEstimate | str] = {}
    for method in METHODS:
        try:
            config = load_config({"output": "asked", **run, "method": method})
            parts = config.parts(Path("asked"))
            trainable = stats.parameters
            if parts.lora is not None:
                trainable = base_model.adapter_parameters(model, parts.lora, trust_remote_code=trusts(parts.arguments))
            found[method] = estimate_run_memory(config, parts.arguments, stats, trainable)
        except obsfs.ObsfsError as error:
            found[method] = str(error)
    return found
