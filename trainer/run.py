"""A run, from its configuration to the published adapter: the order of its steps."""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from obsfs.plugin import UsageError, first_line, human, spinner, state_dir, tell
from trainer import base_model, data, disk_space, run_record
from trainer.config import TASKS, Parts, TrainConfig, load_config
from trainer.memory_estimate import MemoryEstimate, estimate_run_memory
from trainer.quiet import silence_libraries, silence_progress_bars
from trainer.run_data import RunData
from trainer.run_location import run_location
from trainer.trl_setup import is_sharded, load_model, make_trainer, trusts

if TYPE_CHECKING:
    from trainer.checkpoints import Publisher
    from trainer.progress import Timeline

_SECRET = {"hub_token", "push_to_hub_token"}


@dataclass(frozen=True)
class TrainResult:
    """The result of a run, or of a check.

    Args:
        output: Where the result is: a directory or a URL.
        steps: The step at which the run ended.
        resumed_from: The step that it resumed from; 0 if it started from the beginning.
        metrics: TRL's metrics of the last log entry. For a check: the size of model and data, and the memory that
            training needs and that is free, in bytes.
        seconds: The time of each part, in seconds.
        published: The URLs that it published, in order.
        reason: Why no step was left to do; empty otherwise.
        notes: Notes on the data, a line each.
    """

    output: str
    steps: int
    resumed_from: int
    metrics: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    published: list[str] = field(default_factory=list)
    reason: str = ""
    notes: list[str] = field(default_factory=list)


def train(
    config: Mapping[str, Any] | TrainConfig,
    *,
    as_json: bool = False,
    only_check: bool = False,
    started: float | None = None,
    callbacks: Sequence[Any] = (),
    **overrides: Any,
) -> TrainResult:
    """Train, and publish the result. Under ``torchrun`` or ``accelerate launch`` each process calls this.

    An interrupted run continues with ``resume=True``.

    Args:
        config: The run: a mapping of keys, or a :class:`trainer.TrainConfig`.
        as_json: Print an object per log entry.
        only_check: Stop before the first step.
        started: When the command started, in seconds since the epoch; by default now.
        callbacks: Callbacks of transformers.
        overrides: Keys that replace those of `config`.

    Raises:
        ObsfsError: The run is not possible as configured.
        ImportError: The extra ``train`` is not installed.
    """
    chosen = load_config(config, overrides)
    run_location(chosen.output, chosen.settings)  # reports a dead mount before the slow imports
    base_model.check_name(chosen.model, chosen.settings)
    for place in (*chosen.data, *chosen.eval_data):
        data.check_name(place)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ExitStack() as waiting, ThreadPoolExecutor(1, "trainer-import") as pool:
        show = waiting.enter_context(spinner("mounting, importing", quiet=as_json or not _is_first()))
        with base_model.open_model(chosen.model, chosen.settings) as base:
            base_model.require_weights(base.path)
            # Report a missing model first. Then load the weights while Python imports for ten seconds.
            importing = pool.submit(_import, chosen)
            # A check reads only the headers.
            stop = base_model.prefetch(base) if _is_first_here() and not only_check else threading.Event()
            try:
                importing.result()
                show("checking, loading")
                run = _Run(chosen, base, as_json, started, callbacks)
                with disk_space.explain_full_disk(run.output_dir, Path(tempfile.gettempdir())):
                    return run.run(stop, only_check, show, waiting.close)
            except RuntimeError as error:
                if _is_of_another(error):
                    raise UsageError("another process of this run has ended", "it has said why") from None
                raise
            finally:
                stop.set()


def _import(config: TrainConfig) -> None:
    silence_libraries()
    if config.is_quantized:
        import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    TASKS[config.task].load()
    silence_progress_bars()


def _is_of_another(error: RuntimeError) -> bool:
    """Return whether gloo or NCCL raised the error because another process of the run is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error)


def _is_first_here() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


class _Run:
    def __init__(
        self,
        config: TrainConfig,
        base: base_model.BaseModel,
        as_json: bool,
        started: float | None,
        callbacks: Sequence[Any],
    ) -> None:
        from trainer.progress import Timeline

        self._config, self._base, self._as_json, self._callbacks = config, base, as_json, callbacks
        self._timeline: Timeline = Timeline(started)
        self._timeline.mark("import and mount")
        self._place = run_location(config.output, config.settings)
        self._notes = run_record.RunRecord(base=base.name)  # the first process takes more
        if self._place and "@" in self._place.url.rpartition("/")[2]:
            raise UsageError(
                f"{config.output} is a version", "name the output without one: its checkpoints become its versions"
            )
        self.output_dir = self._find_output_dir()
        self._parts: Parts = config.parts(self.output_dir)
        self._is_main = self._parts.arguments.process_index == 0
        if self._place and "://" not in config.output and self._is_main:
            # Output to a directory stays local; this one appears in the bucket, where others see it.
            tell(f"{config.output} lies on a mount: the result is published as {self._place.url}", err=True)
        if not as_json:
            # Show people the first step. (All processes must agree: a log entry gathers the loss of each.)
            self._parts.arguments.logging_first_step = config.options.get("logging_first_step", True)
        self._data = RunData(config, self._parts.arguments, base.name, is_main=self._is_main)

    def run(
        self, stop: threading.Event, only_check: bool, show: Callable[[str], None], on_ready: Callable[[], None]
    ) -> TrainResult:
        from trainer import checkpoints
        from trainer.progress import say

        arguments = self._parts.arguments
        first_step = threading.Event()
        self._timeline.watch_fetch(self._base, first_step)
        with self._timeline.part("check"):
            stats = base_model.check_files(self._base.path)
            base_model.model_class(self._base.path, trust_remote_code=trusts(arguments))
            tokenizer = base_model.load_tokenizer(self._base.path, trust_remote_code=trusts(arguments))
            target = data.Target(data.tokenizer_for(tokenizer, arguments), self._base.name, stats.vocabulary)
            base_model.check_tokenizer(target.tokenizer, self._base, stats)
            lora = self._parts.lora
            trainable, plan = stats.parameters, None
            if lora is not None:
                plan = base_model.plan_adapter(self._base.path, lora, trust_remote_code=trusts(arguments))
                trainable = plan.parameters
            memory = self._check_memory(stats, trainable)
            if (short := disk_space.check(self.output_dir, arguments, trainable)) and self._is_main:
                say(short)
            if self._is_main:
                self._notes = run_record.take(self._config, self._parts, self._base, plan)
            checkpoint = self._prepare_output()
        if checkpoint and checkpoints.is_finished(checkpoint, arguments) and not only_check:
            return self._publish_finished(checkpoint)
        if self._config.rehearse:
            show("trying one step on a small model")
            with self._timeline.part("rehearsal"):
                self._rehearse(target.tokenizer)
            show("checking, loading")
        with self._timeline.part("data"), arguments.main_process_first(desc="data"):
            found = self._data.read(target)
            report = self._data.check(found, target)
        if self._is_main:
            self._note_data(found[0].records, checkpoint)
        if only_check:
            on_ready()
            checked: dict[str, float] = {
                "parameters": stats.parameters,
                "bytes": stats.size,
                "trainable": trainable,
                "memory": memory.needed,
                "memory_free": memory.free,
                **self._data.figures,
            }
            if report.total is not None:
                checked["records"] = report.total
            return TrainResult(self._config.output, 0, 0, checked, self._timeline.rounded(), notes=self._data.notes)
        # Tokenise all data while the weights are loaded.
        with ThreadPoolExecutor(1, "trainer-load") as pool:
            loading = pool.submit(self._load_model)
            with self._timeline.part("data"), arguments.main_process_first(desc="data"):
                train_data, eval_data = self._data.prepare(found, target)
            model = loading.result()
        stop.set()
        with self._timeline.part("prepare"):
            trainer = self._make_trainer(model, tokenizer, train_data, eval_data)
            self._data.count_dropped(train_data, trainer.train_dataset)
        on_ready()
        return self._train(trainer, checkpoint, first_step)

    def _find_output_dir(self) -> Path:
        given = self._config.options.get("output_dir")
        if given:
            return Path(str(given)).expanduser()
        if self._place is None:
            return Path(self._config.output).expanduser()
        name = self._place.url.rpartition("/")[2]
        return state_dir() / "runs" / f"{name}-{hashlib.sha256(self._place.url.encode()).hexdigest()[:8]}"

    def _check_memory(self, stats: base_model.ModelStats, trainable: int) -> MemoryEstimate:
        """Return the memory that training needs. Raises UsageError if that is surely too much."""
        config, arguments = self._config, self._parts.arguments
        memory = estimate_run_memory(config, arguments, stats, trainable)
        if config.check_memory and not is_sharded(arguments) and memory.is_too_much:
            raise UsageError(
                f"training needs about {human(memory.needed)} of memory, and {memory.device_name} has "
                f"{human(memory.free)} free",
                "method qlora, or a smaller per_device_train_batch_size or max_length, needs less; "
                "check_memory: false tries all the same",
            )
        return memory

    def _prepare_output(self) -> Path | None:
        """Check that the output can be written, and return the checkpoint to resume from, if any."""
        from trainer import checkpoints

        arguments = self._parts.arguments
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            probe = self.output_dir / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UsageError(
                f"{self.output_dir} cannot be written ({error.strerror})", "choose another output"
            ) from None
        with arguments.main_process_first(desc="output"):
            if self._is_main:
                checkpoints.refuse_others(self.output_dir)
            if self._config.resume:
                if self._place and self._is_main:
                    self._place.check()
                checkpoint = checkpoints.newest(self.output_dir, self._place)
                if checkpoint and self._is_main:
                    self._compare(checkpoint)
                if not checkpoint and self._is_main and self._is_taken():
                    raise UsageError(
                        f"{self._config.output} has no checkpoint to go on from, and something else that would be lost",
                        "choose another output, or delete it",
                    )
                return checkpoint
            if self._is_main:
                if self._is_taken():
                    raise UsageError(
                        f"there is a run at {self._config.output} already",
                        "--resume goes on with it, or choose another output",
                    )
                if checkpoints.local_steps(self.output_dir):
                    raise UsageError(
                        f"{self.output_dir} has checkpoints of a run to {self._config.output}",
                        "--resume goes on with it; or delete them, or choose another output",
                    )
                if self._place:
                    self._place.check()
                checkpoints.newest(self.output_dir, None)
        return None

    def _is_taken(self) -> bool:
        from trainer import checkpoints

        return self._place.is_taken() if self._place else checkpoints.has_result(self.output_dir)

    def _compare(self, checkpoint: Path) -> None:
        """Refuse a checkpoint made with other fixed settings, and download the best checkpoint if it is needed."""
        from trainer import checkpoints
        from trainer.progress import say

        then = run_record.read(checkpoint)
        if then is None:
            say(f"{checkpoint.name} does not say what it was made with: its base, method and modules are not compared")
        else:
            run_record.refuse_other(checkpoint.name, then, self._notes)
        if self._parts.arguments.load_best_model_at_end and not self._has_result(checkpoint):
            checkpoints.bring_best(checkpoint, self._place)

    def _note_data(self, train_data: Any, checkpoint: Path | None) -> None:
        """Record what the data is, and report what changed since the checkpoint was made."""
        from trainer.progress import say

        self._notes = replace(self._notes, data={**self._notes.data, **run_record.data_of(train_data)})
        then = run_record.read(checkpoint) if checkpoint else None
        if checkpoint and then and (changed := run_record.changes(then, self._notes)):
            say(f"since {checkpoint.name} the run has changed: {changed}")

    def _rehearse(self, tokenizer: Any) -> None:
        from trainer.rehearsal import can_rehearse, rehearse

        if name := self._config.attn_implementation:
            base_model.check_attention(self._base.path, name, trust_remote_code=trusts(self._parts.arguments))
        if can_rehearse(self._parts.arguments):
            rehearse(self._config, self._base.path, tokenizer)

    def _load_model(self) -> Any:
        config, trusted = self._config, trusts(self._parts.arguments)
        with self._timeline.part("load"), self._timeline.quantising() if config.is_quantized else nullcontext():
            kind = base_model.model_class(self._base.path, trust_remote_code=trusted)
            return load_model(self._base.path, kind, config, self._parts)

    def _train(self, trainer: Any, checkpoint: Path | None, began: threading.Event) -> TrainResult:
        import torch
        from transformers import PrinterCallback

        from trainer import checkpoints
        from trainer.progress import Progress, say

        publisher = self._make_publisher(checkpoint)
        progress = Progress(self._base, self._timeline, as_json=self._as_json, on_first_step=began.set)
        trainer.remove_callback(PrinterCallback)
        for callback in self._callbacks:
            trainer.add_callback(callback)
        trainer.add_callback(checkpoints.Checkpointing(self.output_dir, self._notes, publisher))
        if self._is_main:
            trainer.add_callback(progress)
            checkpoints.write_run(self.output_dir, self._to_yaml())
            if not (self.output_dir / run_record.NAME).exists():  # marks the directory as ours for the next run
                self._notes.write(self.output_dir)
            if checkpoint and not self._as_json:
                say(f"going on from {checkpoint.name}")
        try:
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except torch.OutOfMemoryError:
            raise UsageError(
                "there is not enough memory on the GPU",
                "try a smaller per_device_train_batch_size or max_length, or method qlora; --resume goes on",
            ) from None
        finally:
            progress.close()
        trainer.save_model(str(self.output_dir))
        if self._is_main:
            trainer.create_model_card(
                model_name=Path(self._config.output.rpartition("@")[0] or self._config.output).name
            )
            checkpoints.describe(
                self.output_dir, self._base.name, self._place.url if self._place else str(self.output_dir)
            )
            replace(self._notes, ended_at=trainer.state.global_step).write(self.output_dir)
        metrics = {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
        outcome = self._publish(publisher, trainer.state.global_step, checkpoint, metrics)
        trainer.accelerator.wait_for_everyone()
        if outcome.steps <= outcome.resumed_from:
            last = f"the last step is {trainer.state.max_steps}, and the run is at {outcome.steps}"
            return replace(outcome, reason=f"{last}: a larger max_steps or num_train_epochs goes on")
        return outcome

    def _make_publisher(self, checkpoint: Path | None) -> Publisher | None:
        """Return the publisher, in the main process only. It starts with a checkpoint that the bucket lacks."""
        from trainer.checkpoints import Publisher, step_of

        if not self._is_main or self._place is None:
            return None
        keep = self._parts.arguments.save_total_limit
        publisher = Publisher(self._place, self.output_dir, self._base.name, keep)
        if checkpoint and step_of(checkpoint) not in self._place.steps():
            publisher.put(checkpoint, step_of(checkpoint))
        return publisher

    def _publish(
        self, publisher: Publisher | None, steps: int, checkpoint: Path | None, metrics: dict[str, float]
    ) -> TrainResult:
        from trainer.checkpoints import step_of

        if publisher is not None:
            publisher.put(self.output_dir, None)
            with self._timeline.part("publish"):
                publisher.finish()
        return TrainResult(
            self._place.url if self._place else str(self.output_dir),
            steps,
            step_of(checkpoint) if checkpoint else 0,
            {**metrics, **self._data.figures},
            self._timeline.rounded(),
            publisher.published if publisher else [],
            notes=self._data.notes,
        )

    def _publish_finished(self, checkpoint: Path) -> TrainResult:
        """Publish the result of a run that had ended already, from its last or best checkpoint.

        transformers would take one step more. An existing result is kept.
        """
        from trainer import checkpoints

        step = checkpoints.step_of(checkpoint)
        if self._is_main and not self._has_result(checkpoint):
            is_best = self._parts.arguments.load_best_model_at_end
            source = (checkpoints.bring_best(checkpoint, self._place) if is_best else None) or checkpoint
            checkpoints.copy_result(source, self.output_dir)
            url = self._place.url if self._place else str(self.output_dir)
            checkpoints.describe(self.output_dir, self._base.name, url)
            replace(self._notes, ended_at=step).write(self.output_dir)
        publisher = self._make_publisher(checkpoint)
        outcome = self._publish(publisher, step, checkpoint, {})
        reason = f"the run had come to its end at step {step}: a larger max_steps or num_train_epochs goes on"
        return replace(outcome, reason=reason)

    def _has_result(self, checkpoint: Path) -> bool:
        """Return whether the output has the result of the run that ended with a checkpoint."""
        from trainer import checkpoints

        found = run_record.read(self.output_dir)
        has_weights = any(self.output_dir.glob("*.safetensors"))
        return has_weights and found is not None and found.ended_at == checkpoints.step_of(checkpoint)

    def _make_trainer(self, model: Any, tokenizer: Any, train_data: Any, eval_data: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return make_trainer(self._parts, model, tokenizer, train_data, eval_data)
        except (ValueError, TemplateError) as error:
            # TRL and PEFT refuse, for example, a record that the template does not accept, or unknown modules.
            raise UsageError(f"{self._config.task} cannot be set up", first_line(error)) from None

    def _to_yaml(self) -> str:
        usual = vars(TrainConfig())
        given = {name: value for name, value in vars(self._config).items() if value != usual[name]}
        given = {name: value for name, value in given.items() if name not in ("options", "resume")}
        given |= {name: value for name, value in self._config.options.items() if name not in _SECRET}
        return str(yaml.safe_dump(given, sort_keys=False, allow_unicode=True))
