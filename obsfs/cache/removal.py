"""Taking blocks and files out of the cache, so that nobody who reads them is disturbed.

The caller holds the lock of the directory.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from obsfs import private
from obsfs.blocks import BLOCK
from obsfs.cache.layout import (
    ENTRY,
    HANDED_TO_KERNEL_AT,
    IN_USE_LOCK,
    PASSTHROUGH_LOCK,
    STATE_AT,
    TAKEOVER_LOCK,
    WORD,
    StoredBlock,
    entry_at,
    is_linked,
    read_blocks,
    stored_blocks,
)
from obsfs.cache.syscalls import lock_range, punch_hole


def evict_blocks(path: Path, victims: list[StoredBlock]) -> int:
    """Evict blocks of one object, or its files if the kernel had them, or if no other block is left and nobody uses it.

    Args:
        path: Its map file.
        victims: The blocks.

    Returns:
        The bytes freed; 0 if the file is in passthrough now, has another name, or cannot be opened.
    """
    try:
        map_fd = private.open_file(path, os.O_RDWR)
    except OSError:
        return 0
    try:
        if is_linked(path):
            return 0
        # Created if somebody has removed it: the map must not stay because of that.
        data_fd = private.open_file(path.with_suffix(".data"))
        try:
            # While this is locked, no process hands the file to the kernel for the first time.
            is_free = lock_range(data_fd, PASSTHROUGH_LOCK, 1, fcntl.F_WRLCK)
            only_whole = any(os.pread(map_fd, 1, HANDED_TO_KERNEL_AT))
            present = list(read_blocks(path))
            is_alone = len(present) == len(victims) and _is_unused(map_fd, data_fd)
            # Processes that have it open go on reading it; what they write to it goes with it.
            if is_alone or (only_whole and is_free):
                unlink(path)
                return sum(block.size for block in present)
            return sum(_punch(map_fd, data_fd, block) for block in victims) if is_free and not only_whole else 0
        finally:
            os.close(data_fd)
    except OSError:
        return 0
    finally:
        os.close(map_fd)


def _punch(map_fd: int, data_fd: int, block: StoredBlock) -> int:
    entry = entry_at(block.number)
    state_at = entry + STATE_AT
    if not lock_range(map_fd, entry, ENTRY, fcntl.F_WRLCK):
        return 0
    if os.pread(map_fd, 8, state_at) != WORD.pack(block.word):
        return 0
    os.pwrite(map_fd, WORD.pack(block.word + 1), state_at)
    punch_block(data_fd, block.number)
    return block.size


def unlink(path: Path) -> None:
    """Remove a map file and the data file beside it."""
    path.unlink(missing_ok=True)
    path.with_suffix(".data").unlink(missing_ok=True)


def remove_empty(path: Path) -> None:
    """Remove a map file without blocks, and its data file, unless somebody has it open. Raises OSError."""
    map_fd = private.open_file(path, os.O_RDWR)
    try:
        data_fd = private.open_file(path.with_suffix(".data"))
        try:
            if _is_unused(map_fd, data_fd) and next(stored_blocks(map_fd, path), None) is None:
                unlink(path)
        finally:
            os.close(data_fd)
    finally:
        os.close(map_fd)


def _is_unused(map_fd: int, data_fd: int) -> bool:
    """Return whether nobody has the object open. Then nobody can open it before these descriptors are closed."""
    return lock_range(map_fd, TAKEOVER_LOCK, 1, fcntl.F_WRLCK) and lock_range(data_fd, IN_USE_LOCK, 1, fcntl.F_WRLCK)


def punch_block(data_fd: int, block: int) -> None:
    """Give the disk the room of a block back. The map must say that it is absent. Raises OSError."""
    # Whole pages, also at the end of the file: a partial page would be zeroed in place, under a reply in a pipe.
    punch_hole(data_fd, block * BLOCK, BLOCK)
