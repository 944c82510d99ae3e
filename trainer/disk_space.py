"""Disk space: check before a run that its output fits, and report a full disk on one line."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from obsfs.plugin import ObsfsError, UsageError, human

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEXT = re.compile(
    r"no space left|disk quota|os error (28|122)\b|errno (28|122)\b|inline_container|PytorchStreamWriter", re.I
)
"""How libraries report a full disk: safetensors by the error number, pyarrow by number and text, torch only by the name
of its source file or class."""


def free(place: Path) -> int:
    """Return the free bytes of the disk that holds, or will hold, a path."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def check(output_dir: Path, arguments: Any, trainable: int) -> str:
    """Check that the result (float32) and the checkpoints (with Adam's two moments) of a run fit on the disk.

    Args:
        output_dir: The directory they are written to.
        arguments: TRL's arguments of the run.
        trainable: How many parameters are trained.

    Returns:
        A warning for the user if not all checkpoints fit, else an empty text.

    Raises:
        UsageError: Not even the result and one checkpoint fit.
    """
    result = 4 * trainable
    has_moments = "adam" in str(getattr(arguments.optim, "value", arguments.optim)) and not arguments.save_only_model
    checkpoint = result * (3 if has_moments and "8bit" not in str(arguments.optim) else 1)
    saves = 0 if str(getattr(arguments.save_strategy, "value", arguments.save_strategy)) == "no" else 1
    available = free(output_dir)
    least = result + saves * checkpoint
    if least > available:
        raise UsageError(
            f"the disk of {output_dir} has {human(available)} free, and the result and a checkpoint need "
            f"{human(least)}",
            "free some, or choose another output",
        )
    if saves and arguments.max_steps > 0 and arguments.save_steps >= 1:
        saves = max(1, math.ceil(arguments.max_steps / arguments.save_steps))
    if saves and arguments.save_total_limit:
        saves = min(saves, arguments.save_total_limit + 1)  # the next one is written before the oldest is removed
    if (most := result + saves * checkpoint) > available:
        return (
            f"the disk of {output_dir} has {human(available)} free, and {saves} checkpoints need {human(most)}: "
            "save_total_limit keeps fewer"
        )
    return ""


@contextmanager
def explain_full_disk(*places: Path) -> Iterator[None]:
    """Turn the error of a full disk into a UsageError that names the disk.

    It is the disk of the file if the error names one, else the one of `places` with the least space.
    """
    try:
        yield
    except ObsfsError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        named = getattr(error, "filename", None)
        place = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else min(places, key=free)
        raise UsageError(
            f"the disk of {place} is full ({human(free(place))} free)",
            "free some, or choose another output; --resume goes on from the last whole checkpoint",
        ) from None


def is_full(error: BaseException | None) -> bool:
    """Return whether an exception, or one of its causes, says that a disk is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (isinstance(error, OSError) and error.errno in _FULL) or _TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
