"""Disks without room: told before a run, or in one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obsfs import ObsfsError
from trainer import disk_space


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], check=True, timeout=10)
    yield place
    subprocess.run(["umount", "-l", place], check=True, timeout=10)


def arguments(**given: Any) -> Any:
    usual = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 10, "max_steps": 40}
    return SimpleNamespace(**{**usual, "save_total_limit": None, "save_only_model": False, **given})


def test_what_has_no_room_is_told_before(small: Path) -> None:
    # A parameter takes 4 bytes in the result, and 12 in a checkpoint: itself and Adam's two moments.
    assert disk_space.check(small / "run", arguments(), 1000) == ""
    short = disk_space.check(small / "run", arguments(), 10_000)
    assert "4 checkpoints need 507.8 KiB" in short
    assert disk_space.check(small / "run", arguments(save_total_limit=1, save_only_model=True), 10_000) == ""
    assert "3 checkpoints" in disk_space.check(small / "run", arguments(save_total_limit=2), 10_000)
    with pytest.raises(
        ObsfsError, match=r"small/run has 256.0 KiB free, and the result and a checkpoint need 312.5 KiB"
    ):
        disk_space.check(small / "run", arguments(), 20_000)
    assert disk_space.check(small / "run", arguments(save_strategy="no"), 20_000) == ""


def _fill(place: Path) -> None:
    (place / "file").write_bytes(bytes(1 << 20))


def _save_by_torch(place: Path) -> None:
    import torch

    torch.save(torch.zeros(1 << 18), place / "optimizer.pt")


def _save_by_safetensors(place: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1 << 18)}, place / "model.safetensors")


def _save_by_arrow(place: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"a": ["x" * 1000] * 2000}).save_to_disk(str(place / "data"))


@pytest.mark.parametrize("write", [_fill, _save_by_torch, _save_by_safetensors, _save_by_arrow])
def test_a_full_disk_is_one_line_whoever_writes(write: Any, small: Path) -> None:
    told = pytest.raises(ObsfsError, match=r"the disk of .*/small.* is full .*: free some")
    with told as caught, disk_space.explain_full_disk(small, Path("/")):
        write(small)
    assert "\n" not in str(caught.value)


def test_other_faults_stay_what_they_are() -> None:
    for error in (OSError(errno.EIO, os.strerror(errno.EIO)), RuntimeError("shape mismatch"), KeyError("a")):
        with pytest.raises(type(error)), disk_space.explain_full_disk(Path("/")):
            raise error


@pytest.mark.slow
def test_a_checkpoint_without_room_ends_the_run_in_one_line(small: Path, tiny: Path, rows: Path) -> None:
    words = ["--method", "lora", "--max_steps", "4", "--save_steps", "1", "--lora_r", "1", "--report_to", "none",
             "--max_length", "64", "--per_device_train_batch_size", "1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "obsfs", "train", "--model", tiny, "--data", rows, "--output", small / "run", *words],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "is full" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
