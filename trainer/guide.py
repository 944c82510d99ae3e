"""``obsfs train --guide``: a few questions, and the YAML of a run that fits this machine."""

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
from obsfs.commands.output import ask, columns, confirm, count, human, tell
from obsfs.fuse import mounts
from obsfs.settings import knobs
from trainer import base as bases
from trainer import data
from trainer.config import METHODS, TASKS, lora_config
from trainer.quiet import hush, hush_bars

_LENGTH = 1024
_BITS = {"qlora": 4}
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
    """Directories on this user's mounts that have a configuration, one or two levels deep.

    Not on those that end with a program which has made them.

    Each mount is searched by a process of its own, and one that takes longer than 5 seconds is left out: nobody who
    waits for a mount can be made to stop.
    """
    there = [one for one in mounts.find() if one.state == "mounted" and not one.status.get("ends_with_program")]
    roots = [one.entry.mountpoint for one in there]
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
    """How many bytes of the weights are not on this machine yet: those of a mount that are not cached."""
    missing = 0
    for path in directory.glob("*.safetensors"):
        with suppress(OSError):
            missing += path.stat().st_size - int(os.getxattr(path, "user.obsfs.cached_bytes"))
    return missing


def guide(given: dict[str, Any]) -> tuple[Path, bool]:
    """Ask, write the YAML with the keys that were given, and return where it is and whether to start.

    Raises ObsfsError, and click.Abort.
    """
    settings = {name: value for name, value in given.items() if name in knobs()}
    models = found_models()
    for number, path in enumerate(models, 1):
        tell(f"  {number}  {path}")
    answer = ask("Model (a number from above, a directory, or obs://BUCKET/NAME)" if models else "Model", type=str)
    model = models[int(answer) - 1] if answer.isdigit() and 0 < int(answer) <= len(models) else answer
    run: dict[str, Any] = {"model": model}
    with bases.open_base(model, settings) as base:
        hush()
        hush_bars()  # imports transformers, for which nobody should wait before the first question
        facts = bases.check_whole(base.path)
        tell(
            f"  {count(facts.parameters)} parameters, {human(facts.size)}, "
            f"of which {human(missing_bytes(base.path))} have to be fetched"
        )
        has_template = bool(bases.load_tokenizer(base.path).chat_template)
        adapter = bases.adapter_parameters(base.path, lora_config())
    tell(*(f"  {name:6} {text}" for name, text in _ABOUT.items()))
    run["task"] = ask("Task", type=click.Choice(list(TASKS)), default="sft")
    run["data"] = _ask_data(run["task"], has_template, settings)
    there, where = bases.memory_available()
    rows = [
        (name, human(needed), "fits" if needed < there else "too much")
        for name, needed in estimates(facts, run["task"], adapter).items()
    ]
    tell(*columns(["method", ">memory", f"of {human(there)} on {where}"], rows))
    fitting = [name for name, _, verdict in rows if verdict == "fits"]
    best = "lora" if "lora" in fitting else "qlora"
    run["method"] = ask("Method", type=click.Choice(list(METHODS)), default=best)
    run["num_train_epochs"] = ask("Passes over the data", type=click.FloatRange(0, min_open=True), default=1.0)
    library = obsfs.Settings.load(**settings).library
    name = f"{Path(model.rstrip('/')).name.partition('@')[0]}-{run['task']}"
    default = f"{library.rstrip('/')}/adapters/{name}" if library else f"runs/{name}"
    run["output"] = ask("Where the adapter goes (a directory, or obs://BUCKET/NAME)", default=default)
    run |= {"max_length": _LENGTH, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
    run |= {"save_steps": 100, "save_total_limit": 2, **given}
    written = Path(ask("Write this run to", default="train.yaml"))
    if written.exists():
        confirm(f"{written} is there: replace it?", abort=True)
    text = yaml.safe_dump(run, sort_keys=False, allow_unicode=True)
    written.write_text(text, encoding="utf-8")
    tell("", *text.splitlines())
    return written, confirm("Start now?", default=False)


def _ask_data(task: str, has_template: bool, settings: dict[str, Any]) -> str:
    """A place that can be read, asked for until one is given."""
    while True:
        place: str = ask(f"Data (a file, a directory, a URL, a data set of the hub, or {', '.join(data.BUILTIN)})")
        try:
            found = data.load([place], task, split="train", streaming=True, chat=has_template, settings=settings)
        except obsfs.ObsfsError as error:
            tell(f"  {error}")
        else:
            tell(f"  the first record: {data.shown(next(iter(found)))}")
            return place


def estimates(facts: bases.Facts, task: str, adapter: int) -> dict[str, int]:
    """Bytes of memory that each method needs at the sizes that the guide proposes, with an adapter of so many
    parameters."""
    found = {}
    for method in METHODS:
        is_full = method == "full"
        found[method] = bases.estimate_memory(
            facts,
            task=task,
            method=method,
            bits=_BITS.get(method),
            dtype="float32" if is_full else "bfloat16",
            trainable=facts.parameters if is_full else adapter,
            batch=1,
            length=_LENGTH,
            checkpointing=True,
        )
    return found
