"""Room on disks: what a run will write, told before it starts, and one line when a disk is full all the same."""

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
"""What libraries raise as text: safetensors the number, pyarrow both, and torch, which keeps no number of what it could
not write, the name of its source file or class."""


def free(place: Path) -> int:
    """Return the bytes that can be written to the disk that a path will be on."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def check(output_dir: Path, arguments: Any, trainable: int) -> str:
    """See that what a run writes has room: the result, float32, and checkpoints, with Adam's two moments.

    Args:
        output_dir: Where they are written.
        arguments: TRL's, of the run.
        trainable: How many parameters are trained.

    Returns:
        What to say to the user; empty where all of it has room.

    Raises:
        UsageError: Not even the result and one checkpoint have.
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
        saves = min(saves, arguments.save_total_limit + 1)  # the next is written before the oldest goes
    if (most := result + saves * checkpoint) > available:
        return (
            f"the disk of {output_dir} has {human(available)} free, and {saves} checkpoints need {human(most)}: "
            "save_total_limit keeps fewer"
        )
    return ""


@contextmanager
def explain_full_disk(*places: Path) -> Iterator[None]:
    """Raise UsageError, in one line, when a disk is full: the one of the file if that is known, else of `places`."""
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
    """Whether an exception, or what led to it, is a disk without room."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (isinstance(error, OSError) and error.errno in _FULL) or _TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
