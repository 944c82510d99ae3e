"""Show the progress of a run to people or programs, and measure where its time goes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from obsfs.plugin import human, tell, tell_json
from trainer.base_model import BaseModel

_LOOK_SECONDS = 0.2
LINE_SECONDS = 10.0
"""Seconds between two lines of progress if stderr is no terminal."""


class Timeline:
    """The seconds that each part of a run took since the command began. Some parts overlap."""

    def __init__(self, started: float | None = None) -> None:
        self._started = time.time() if started is None else started
        self.parts: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time spent in the block to `name`."""
        began = time.time()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.time() - began

    @contextmanager
    def quantising(self) -> Iterator[None]:
        """Add the time that bitsandbytes spends in the block to ``quantise``.

        It quantises weight by weight while transformers loads them, and transformers has no hook for it.
        """
        from bitsandbytes import functional

        originals = {name: getattr(functional, name) for name in ("quantize_4bit", "int8_vectorwise_quant")}
        try:
            for name, quantise in originals.items():
                setattr(functional, name, self.part("quantise")(quantise))
            yield
        finally:
            for name, quantise in originals.items():
                setattr(functional, name, quantise)

    def mark(self, name: str) -> None:
        """Record the time since the command began as `name`."""
        self.parts.setdefault(name, time.time() - self._started)

    def rounded(self) -> dict[str, float]:
        """Return the parts in seconds, rounded to hundredths."""
        return {name: round(seconds, 2) for name, seconds in self.parts.items()}

    def watch_fetch(self, base: BaseModel, until: threading.Event) -> None:
        """Add the time in which the mount downloads data to ``fetch``, until the event is set."""

        def watch() -> None:
            before = base.mount_status().get("bytes_fetched", 0)
            while not until.wait(_LOOK_SECONDS):
                now = base.mount_status().get("bytes_fetched", 0)
                if now > before:
                    self.parts["fetch"] = self.parts.get("fetch", 0.0) + _LOOK_SECONDS
                before = now

        if base.mountpoint is not None:
            threading.Thread(target=watch, name="trainer-watch", daemon=True).start()


def say(text: str) -> None:
    """Print a line to stderr."""
    tell(text, err=True)


class Progress(TrainerCallback):
    """Show a progress bar on a terminal, lines elsewhere, or with `as_json` an object per log entry.

    Lines come for the first and the last step, for each evaluation, and every :data:`LINE_SECONDS` in between.
    """

    def __init__(
        self, base: BaseModel, timeline: Timeline, *, as_json: bool, on_first_step: Callable[[], None]
    ) -> None:
        self._base, self._timeline, self._as_json = base, timeline, as_json
        self._on_first_step = on_first_step
        self._bar: Any = None
        self._tokens: Any = 0
        self._figures: dict[str, Any] = {}
        self._is_read = True
        self._logged_at = 0
        """The step of the newest log entry, which the losses belong to."""
        self._told: tuple[float, int, int] | None = None
        """The time, the step and the tokens so far when the last line was printed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        """See :class:`transformers.TrainerCallback`."""
        self._began = time.time()
        self._last = (self._began, 0)
        self._processes = args.world_size
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        if sys.stderr.isatty() and not self._as_json:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, TextColumn("{task.description}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See :class:`transformers.TrainerCallback`."""
        if "to first step" not in self._timeline.parts:
            self._timeline.parts["first step"] = time.time() - self._began
            self._timeline.mark("to first step")
            self._on_first_step()
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)
        elif not control.should_log:  # the log entry of this step follows, with its loss
            self._tell_if_due(state)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See :class:`transformers.TrainerCallback`."""
        if not self._bar:
            self._tell_if_due(state, "evaluating  ")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        """See :class:`transformers.TrainerCallback`."""
        figures: dict[str, Any] = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        now, tokens = time.time(), int(self._tokens) * self._processes
        began, before = self._last
        if tokens > before:
            figures["tokens_per_second"] = round((tokens - before) / max(now - began, 1e-6), 1)
            self._last = (now, tokens)
        if self._as_json:
            figures |= self._resources()
            told = {"step": state.global_step, "of": state.max_steps, **figures}
            self._show(lambda: tell_json(told, indent=None))
        elif self._bar:
            self._bar.update(self._task, description=line({**figures, **self._resources()}))
        elif "train_runtime" not in figures:
            self._figures |= {name: figures[name] for name in _LOSSES if figures.get(name) is not None}
            self._logged_at = state.global_step
            if "eval_loss" in figures:
                self._tell(state)
            else:
                self._tell_if_due(state)

    def _resources(self) -> dict[str, Any]:
        """Return the memory in use, and the counters of the model's mount."""
        found: dict[str, Any] = {"memory_bytes": memory_used()}
        if mount := self._base.mount_status():
            found |= {"mount_bytes_fetched": mount["bytes_fetched"], "mount_hit_ratio": mount["hit_ratio"]}
        return found

    def _tell_if_due(self, state: Any, doing: str = "") -> None:
        if not self._as_json and (self._told is None or time.time() - self._told[0] >= LINE_SECONDS):
            self._tell(state, doing)

    def _tell(self, state: Any, doing: str = "") -> None:
        """Print the step, the newest losses, and the speed since the last line."""
        now, tokens = time.time(), int(self._tokens) * self._processes
        began, _, before = self._told or (self._began, 0, 0)
        figures = {**self._figures, **self._resources()}
        if tokens > before:
            figures["tokens_per_second"] = (tokens - before) / max(now - began, 1e-6)
        self._told = now, state.global_step, tokens
        is_older = self._figures and self._logged_at != state.global_step
        of = f"  (loss of step {self._logged_at})" if is_older else ""
        self._show(lambda: say(f"step {state.global_step}/{state.max_steps}  {doing}{line(figures)}{of}"))

    def _show(self, show: Callable[[], None]) -> None:
        """Print until that fails: a run must survive a closed pipe or terminal."""
        if self._is_read:
            try:
                show()
            except OSError:
                self._is_read = False

    def _count(self, model: Any, unnamed: tuple[Any, ...], given: dict[str, Any]) -> None:
        """Count the tokens of each training batch: not all of TRL's trainers report them."""
        mask, tokens = given.get("attention_mask"), unnamed[0] if unnamed else given.get("input_ids")
        if torch.is_grad_enabled() and tokens is not None:
            self._tokens += tokens.numel() if mask is None else mask.sum()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See :class:`transformers.TrainerCallback`."""
        if not self._bar and not self._as_json and (self._told is None or self._told[1] != state.global_step):
            self._tell(state)
        self.close()

    def close(self) -> None:
        """Stop the progress bar."""
        if self._bar:
            self._bar.stop()
            self._bar = None


_LOSSES = ("loss", "eval_loss", "train_loss")


def line(figures: dict[str, Any]) -> str:
    """Format the figures of a log entry for people."""
    parts = []
    for name in _LOSSES:
        if figures.get(name) is not None:
            parts.append(f"{name} {figures[name]:.4f}")
    if figures.get("tokens_per_second"):
        parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"memory {human(figures['memory_bytes'])}")
    if (fetched := figures.get("mount_bytes_fetched")) is not None:
        ratio = figures["mount_hit_ratio"]
        parts.append(f"fetched {human(fetched)}" + ("" if ratio is None else f", {ratio:.0%} from the cache"))
    return "  ".join(parts)


def memory_used() -> int:
    """Return the bytes in use: the peak on the GPU if there is one, else the current size of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)
