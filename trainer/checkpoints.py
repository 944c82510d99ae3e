"""Checkpoints that are complete or do not exist, on disk and in the bucket.

transformers writes a checkpoint file by file. A checkpoint is complete once it has its seal: a list of its files and
their sizes, written last. In the bucket, a checkpoint of ``obs://BUCKET/NAME`` is the version ``NAME@checkpoint-STEP``.
``obsfs.push`` publishes it, also completely or not at all. The result at the end is ``NAME`` itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import queue
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

import obsfs
from obsfs.plugin import UsageError, visible
from trainer import run_record
from trainer.run_location import STEP, RunLocation

_SEAL = "obsfs-whole.json"
_SUMS = "obsfs-sums.json"
_SUMMED_BYTES = 8 << 20
"""Bytes to hash at the start and at the end of each file: all of an adapter, and a small part of a model."""
_OUTBOX = ".outbox"
_STATE = {_SEAL, _SUMS, "trainer_state.json", run_record.NAME}
_QUICK_START = re.compile(r"(?<=\n## Quick start\n).*?(?=\n## )", re.DOTALL)
_WRITTEN = (
    "checkpoint-*", "*.safetensors", "pytorch_model*.bin", "config.json", "adapter_config.json", "README.md",
    "tokenizer*", "chat_template.jinja",
)  # fmt: skip
_NOT_PUBLISHED = {"training_args.bin", "train.yaml.before", _SEAL, _SUMS}
"""The pickled arguments contain paths and tokens of this machine, and resuming does not need them."""


def refuse_others(output_dir: Path) -> None:
    """Raise UsageError for a directory with files that a run would overwrite and that no run of this package wrote.

    Training overwrites README.md and the tokenizer, and removes incomplete checkpoints. A user's project, a model, or
    the output of another trainer would be lost.
    """
    if is_ours(output_dir):
        return
    found = sorted(path.name for pattern in _WRITTEN for path in output_dir.glob(pattern))
    if found:
        some = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise UsageError(
            f"{output_dir} has files that no run of obsfs train has written: {visible(some)}",
            "choose another output: a run would overwrite them",
        )


def is_ours(output_dir: Path) -> bool:
    """Return whether a run of this package wrote to a directory, even if it was interrupted early."""
    if (output_dir / run_record.NAME).exists() or any(output_dir.glob(f"checkpoint-*/{_SEAL}")):
        return True
    try:  # earlier versions wrote the record only at the end
        found = yaml.safe_load((output_dir / "train.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(found, dict) and {"model", "data", "output"} <= found.keys()


def write_run(output_dir: Path, text: str) -> None:
    """Write the YAML of a run beside its result. A different file there is renamed, not lost."""
    path = output_dir / "train.yaml"
    if path.exists() and path.read_bytes() != text.encode():
        path.replace(output_dir / "train.yaml.before")
    path.write_text(text, encoding="utf-8")


def has_result(output_dir: Path) -> bool:
    """Return whether a directory has the result of a run: an adapter or a whole model."""
    return any((output_dir / name).exists() for name in ("adapter_config.json", "config.json"))


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete, after its bytes are on disk."""
    sizes, sums = {}, {}
    for path in _files(checkpoint):
        if path.name in (_SEAL, _SUMS):  # earlier ones, which these replace
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(checkpoint).as_posix()
        sizes[name], sums[name] = path.stat().st_size, _sum(path)
    # The hashes go to a file of their own: earlier versions read the seal.
    for name, found in ((_SUMS, sums), (_SEAL, sizes)):
        new = checkpoint / f"{name}.new"
        with new.open("w") as file:
            json.dump(found, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(checkpoint / name)


def _sum(path: Path) -> str:
    """Return the SHA-256 of the start and the end of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_SUMMED_BYTES))
        file.seek(max(file.tell(), path.stat().st_size - _SUMMED_BYTES))
        digest.update(file.read())
    return digest.hexdigest()


def is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a seal that matches: sizes, and starts and ends of all files."""
    try:
        sizes = json.loads((checkpoint / _SEAL).read_bytes())
        if any((checkpoint / name).stat().st_size != size for name, size in sizes.items()):
            return False
        sums = json.loads((checkpoint / _SUMS).read_bytes()) if (checkpoint / _SUMS).exists() else {}
        return all(_sum(checkpoint / name) == told for name, told in sums.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _files(directory: Path, pattern: str = "**/*") -> Iterator[Path]:
    return (path for path in sorted(directory.glob(pattern)) if path.is_file())


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint."""
    return int(checkpoint.name.partition("-")[2])


def is_finished(checkpoint: Path, arguments: Any) -> bool:
    """Return whether the run ended at this checkpoint, and it has the whole result (not sharded among processes)."""
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    if arguments.max_steps > 0:
        is_last = state["global_step"] >= arguments.max_steps
    else:
        is_last = state["global_step"] >= state["max_steps"] and arguments.num_train_epochs <= state["num_train_epochs"]
    return is_last and any(checkpoint.glob("*.safetensors"))


def copy_result(checkpoint: Path, output_dir: Path) -> None:
    """Copy a checkpoint without the files for resuming into the directory of the result."""
    for path in checkpoint.iterdir():
        if path.is_file() and path.suffix not in (".pt", ".pth") and path.name not in _STATE:
            shutil.copyfile(path, output_dir / path.name)


def local_steps(output_dir: Path) -> list[int]:
    """Return the steps of the complete checkpoints on disk, in order."""
    found = (path for path in output_dir.glob("checkpoint-*") if STEP.fullmatch(path.name) and is_whole(path))
    return sorted(step_of(path) for path in found)


class Publisher:
    """Publishes directories in the background, in order.

    It works on hard links, because training may delete the originals. If one fails, it still tries the later ones;
    :meth:`finish` raises the error of the newest.
    """

    def __init__(self, place: RunLocation, output_dir: Path, source: str, keep: int | None) -> None:
        self.place, self._source, self._keep = place, source, keep
        self._outbox = output_dir / _OUTBOX
        shutil.rmtree(self._outbox, ignore_errors=True)
        self._queue: queue.Queue[tuple[Path, int | None, int | None] | None] = queue.Queue()
        self._error: BaseException | None = None
        self.published: list[str] = []
        self._thread = threading.Thread(target=self._work, name="trainer-publish", daemon=True)
        self._thread.start()

    def put(self, directory: Path, step: int | None, best: int | None = None) -> None:
        """Queue a directory: the checkpoint of a step, or (None) the result. `best` is a step never to delete."""
        linked = self._outbox / (directory.name if step is not None else "result")
        # The directory of the result also has the checkpoints, and the outbox, which changes meanwhile.
        for path in _files(directory, "**/*" if step is not None else "*"):
            name = path.relative_to(directory)
            if name.name not in _NOT_PUBLISHED:
                (linked / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(path, linked / name)
        self._queue.put((linked, step, best))

    def finish(self) -> None:
        """Wait until everything is published. Raises the error of the newest directory, if it failed."""
        self._queue.put(None)
        self._thread.join()
        shutil.rmtree(self._outbox, ignore_errors=True)
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            directory, step, best = job
            try:
                url = self.place.url if step is None else self.place.version(step)
                obsfs.push(directory, url, any_files=True, source=self._source, **self.place.settings)
                obsfs.refresh(url)
                self.published.append(url)
                self._error = None
                if step is not None:
                    self._prune(best)
            except Exception as error:
                self._error = error
            shutil.rmtree(directory, ignore_errors=True)

    def _prune(self, best: int | None) -> None:
        if self._keep and self._keep > 0:
            for step in self.place.steps()[: -self._keep]:
                if step != best:
                    self.place.remove(step)


class Checkpointing(TrainerCallback):
    """Seals each checkpoint when every process has written its part, and hands it to a publisher."""

    def __init__(self, output_dir: Path, made_with: run_record.RunRecord, publisher: Publisher | None) -> None:
        self._output_dir, self._made_with, self._publisher = output_dir, made_with, publisher

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """See :class:`transformers.TrainerCallback`."""
        from accelerate import PartialState

        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = self._output_dir / f"checkpoint-{state.global_step}"
            for name in ("README.md", "train.yaml"):  # the card by TRL goes before the one by PEFT
                if (self._output_dir / name).exists():
                    shutil.copyfile(self._output_dir / name, checkpoint / name)
            place = self._publisher.place.version(state.global_step) if self._publisher else str(checkpoint)
            describe(checkpoint, self._made_with.base, place)
            self._made_with.write(checkpoint)
            seal(checkpoint)
            if self._publisher is not None:
                best = STEP.search(state.best_model_checkpoint or "")
                self._publisher.put(checkpoint, state.global_step, int(best[1]) if best else None)


def describe(directory: Path, base: str, url: str) -> None:
    """Say in an adapter and its card where the base is for everyone, not where it was mounted here, and how to try the
    result, which will be at `url` (or is in this directory)."""
    path = directory / "adapter_config.json"
    how = f"obsfs chat {url}"
    if path.exists():
        config = {**json.loads(path.read_bytes()), "base_model_name_or_path": base}
        path.write_text(json.dumps(config, indent=2, sort_keys=True))
        how = f"obsfs chat {base} --adapter {url}"
    card = directory / "README.md"
    if card.exists():
        # TRL's card knows only models of the hub.
        text = card.read_text(encoding="utf-8").replace("[None](https://huggingface.co/None)", f"`{base}`")
        card.write_text(_QUICK_START.sub(lambda _: f"\n```sh\n{how}\n```\n", text), encoding="utf-8")


def newest(output_dir: Path, place: RunLocation | None) -> Path | None:
    """Return the newest complete checkpoint, downloaded from the bucket if necessary; None if there is none.

    It removes incomplete checkpoints on disk, because transformers would fail on them.
    """
    here = local_steps(output_dir)
    for path in output_dir.glob("checkpoint-*"):
        if STEP.fullmatch(path.name) and not is_whole(path):
            shutil.rmtree(path)
    published = place.steps() if place else []
    step = max([*here, *published], default=None)
    if step is None:
        return None
    target = output_dir / f"checkpoint-{step}"
    if step not in here and place is not None:
        _bring(place, step, target)
    _relocate_best(target)
    return target


def _bring(place: RunLocation, step: int, target: Path) -> None:
    obsfs.snapshot_download(place.version(step), local_dir=target, **place.settings)
    shutil.rmtree(target / ".obsfs", ignore_errors=True)
    seal(target)


def _relocate_best(checkpoint: Path) -> None:
    """Correct the path of the run's best checkpoint in a checkpoint that another machine wrote.

    transformers forgets a best checkpoint that it does not find.
    """
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_bytes())
    step = best_step(checkpoint)
    if step is None:
        return
    here = str(checkpoint.with_name(f"checkpoint-{step}"))
    if state["best_model_checkpoint"] != here:
        path.write_text(json.dumps({**state, "best_model_checkpoint": here}, indent=2, sort_keys=True))
        seal(checkpoint)


def best_step(checkpoint: Path) -> int | None:
    """Return the step of the run's best checkpoint, as recorded in one of its checkpoints; None if none was chosen."""
    state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    found = STEP.search(state.get("best_model_checkpoint") or "")
    return int(found[1]) if found else None


def bring_best(checkpoint: Path, place: RunLocation | None) -> Path | None:
    """Return the best checkpoint of a checkpoint's run, downloaded if necessary; None if none was chosen yet.

    Raises:
        UsageError: It is gone.
    """
    step = best_step(checkpoint)
    if step is None:
        return None
    best = checkpoint.with_name(f"checkpoint-{step}")
    if not is_whole(best):
        if place is None or step not in place.steps():
            raise UsageError(
                f"the best checkpoint of the run, {best.name}, is gone",
                "load_best_model_at_end: false goes on without it",
            )
        shutil.rmtree(best, ignore_errors=True)
        _bring(place, step, best)
    return best
