"""The one place that lends bytes of a data file, and looks at the blocks' state words before and after.

Other processes evict blocks at any moment, without asking. So bytes are right only if every block's state word, in the
map file, is the same before and after they were taken: the word at which this process verified the block. All ways to
take bytes go through :class:`Lender`: a read into memory, a splice by descriptor, the kernel reading by itself, a
second name of the file, and another process that looks at the word on its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from obsfs.blocks import BLOCK, block_count
from obsfs.cache.data_file import DataFile
from obsfs.cache.faults import DiskFaults
from obsfs.cache.layout import PRESENT, STATE_AT, checksum, entry_at
from obsfs.cache.map_file import MapFile
from obsfs.cache.trust import TrustTable, chunks

log = logging.getLogger(__name__)


class Lent(Enum):
    """What became of bytes that were to be taken."""

    TAKEN = "taken"
    """They were taken, and are right."""
    ABSENT = "absent"
    """Nothing was taken: a block is not in the file, or not verified."""
    SPOILED = "spoiled"
    """Something was taken, and must be thrown away: a block was evicted meanwhile, or the file is shorter."""


class StateWordRef(NamedTuple):
    """What another process needs to check a block that it has taken from the data file: `word` must be at `offset`.

    `fd` is a descriptor of the map file, without our locks, which the caller closes; `offset` is in bytes; `word` has
    64 bits, and changes when the block is evicted.
    """

    fd: int
    offset: int
    word: int


class Lender:
    """Lends verified bytes of one object. Safe to use from many threads.

    Args:
        name: Of the object, for the log.
        size: Bytes of the object.
    """

    def __init__(self, name: str, size: int, map_file: MapFile, data: DataFile, faults: DiskFaults) -> None:
        self.size = size
        self.blocks = block_count(size)
        self._name = name
        self._map = map_file
        self._data = data
        self._faults = faults
        self._trusted = TrustTable(self.blocks)
        self._was_sealed = False

    # what is right

    def is_trusted(self, block: int) -> bool:
        """Return whether a block is in the file, and was verified by this process or sealed."""
        return 0 != self._trusted[block] == self._map.word(block) and not self._data.is_lost

    def are_verified(self, blocks: range) -> bool:
        """Return whether all these blocks are in the file, verified, and not lost by the disk."""
        trusted = self._trusted
        if len(blocks) == 1:
            return 0 != trusted[blocks.start] == self._map.word(blocks.start) and not self._data.check_lost()
        for chunk in chunks(blocks):
            words = trusted.words(chunk)
            if words is None or 0 in words or words != self._map.words(chunk):
                return False
        return not self._data.check_lost()

    def are_present(self, blocks: range) -> bool:
        """Return whether the map says that all these blocks are in the file, verified or not."""
        return all(word & PRESENT for chunk in chunks(blocks) for word in self._map.words(chunk))

    def block_size(self, block: int) -> int:
        """Return the bytes of a block: BLOCK, or fewer for the last."""
        return min(BLOCK, self.size - block * BLOCK)

    @property
    def trusted(self) -> TrustTable:
        """The table now. Take it before the bytes: after the file was replaced, it is another one."""
        return self._trusted

    def distrust_all(self) -> None:
        """Forget what was verified: the file is another one, or somebody touched it."""
        self._trusted = TrustTable(self.blocks)
        self._was_sealed = False

    # lending

    def lend(self, offset: int, size: int, take: Callable[[int, int, int], bool]) -> Lent:
        """Have bytes taken from the data file, and tell whether they are right.

        Args:
            offset: Of the first byte.
            size: Bytes.
            take: Called with the descriptor, offset and size, if all blocks are verified. Says whether the file had
                all these bytes. If not, the blocks are absent from then on, and are fetched again.

        Returns:
            TAKEN if the bytes may be used.
        """
        blocks = range(offset // BLOCK, block_count(offset + size))
        if not self.are_verified(blocks):
            return Lent.ABSENT
        is_all = take(self._data.fd, offset, size)
        if not self.are_verified(blocks):
            return Lent.SPOILED
        if not is_all:
            self.mark_lost(blocks)
            return Lent.SPOILED
        return Lent.TAKEN

    def read(self, offset: int, size: int) -> bytes | None:
        """Return bytes ``[offset, offset + size)``, or None if a block of them is not in the file, or not verified."""
        data = b""

        def take(fd: int, offset: int, size: int) -> bool:
            nonlocal data
            data = self._data.read(offset, size)
            return len(data) == size

        return data if self.lend(offset, size, take) is Lent.TAKEN else None

    def readinto(self, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the bytes from `offset` on; False if a block of them is not in the file or not verified.

        Then `buffer` holds anything.
        """

        def take(fd: int, offset: int, size: int) -> bool:
            return self._data.readinto(offset, buffer) == size

        return self.lend(offset, len(buffer), take) is Lent.TAKEN

    def state_word_ref(self, block: int) -> StateWordRef | None:
        """Return what another process needs to check a block that it takes from the file.

        None if the block is not verified, or no longer in the cache.
        """
        word = self._trusted[block]
        if not word or self._data.check_lost():
            return None
        try:
            fd = self._map.open_again(os.O_RDONLY)
        except OSError:
            return None
        return StateWordRef(fd, entry_at(block) + STATE_AT, word) if fd >= 0 else None

    def lend_to_kernel(self, *, is_reopen: bool) -> bool:
        """Note that the kernel reads the file by itself from now on; False if it is not fit for that.

        The caller holds the passthrough lock: the check after it is the last one, as no block goes while it is held.

        Args:
            is_reopen: The kernel reads it already, for a process that may have died. Then every block was verified,
                and only those that were found damaged since are absent.
        """
        blocks = range(self.blocks)
        if not (self.are_present(blocks) if is_reopen else self.are_verified(blocks)) or not self._is_untouched():
            return False
        try:
            self._map.note_handed_to_kernel()
        except OSError:
            return False
        return True

    def link(self, path: Path) -> bool:
        """Give the data file a second name, if every block is verified.

        The caller holds the lock of the directory: no block goes while it is held, nor afterwards.

        Returns:
            Whether it has that name.

        Raises:
            OSError: The name cannot be given.
        """
        if not self.are_verified(range(self.blocks)):
            return False
        was_sealed = self.is_sealed()
        os.link(self._map.path.with_suffix(".data"), path)
        if was_sealed and (seal := self._data.current_seal()):
            # The link has changed the inode's ctime, and nothing else.
            self._write_seal(seal)
        return True

    # verifying

    def read_verified(self, block: int) -> bytes | None:
        """Return a block that is in the file if it matches its checksum. One that does not is absent afterwards."""
        word = self._map.present_word(block)
        if not word or self._data.is_lost:
            return None
        trusted = self._trusted
        data = self._data.read(block * BLOCK, self.block_size(block))
        if not self.matches_checksum(block, data):
            self.drop_damaged(block, word)
            return None
        trusted[block] = word
        return data

    def matches_checksum(self, block: int, data: bytes | memoryview) -> bool:
        """Return whether `data` are the bytes of a block, by its checksum."""
        return len(data) == self.block_size(block) and checksum(data) == self._map.checksum(block)

    def drop_damaged(self, block: int, word: int) -> bool:
        """Mark a block absent that did not match its checksum when its state word was `word`.

        False if it was evicted while it was read, so that nothing is known of it.
        """
        if not self._map.drop_word(block, word):
            return False
        self._faults.count_corrupt_block()
        log.warning("block %d of %s is damaged in the cache: it will be fetched again", block, self._name)
        return True

    def mark_lost(self, blocks: range) -> None:
        """Mark verified blocks absent whose bytes the file does not have: it was truncated, or the disk fails."""
        lost = {block: word for block in blocks if (word := self._trusted[block])}
        if lost:
            log.warning("bytes of %s are gone from its cache file: they will be fetched again", self._name)
        for block, word in lost.items():
            self._trusted[block] = 0
            self._map.drop_word(block, word)

    # the seal

    def is_sealed(self) -> bool:
        """Return whether the file carries a seal, and was not touched since."""
        seal = self._map.seal
        return any(seal) and seal == self._data.current_seal()

    def trust_seal(self) -> None:
        """Trust every block in the file, if it is sealed."""
        self._was_sealed = self.is_sealed()
        if self._was_sealed:
            for block in self._map.stored_blocks():
                self._trusted[block.number] = block.word

    def seal(self) -> None:
        """Seal the file, if every block is still verified. Call it after a sync. Raises OSError."""
        seal = self._data.current_seal()
        if seal is not None and self.are_verified(range(self.blocks)):
            self._write_seal(seal)

    def _write_seal(self, seal: tuple[int, int, int, int]) -> None:
        self._map.write_seal(seal)
        self._was_sealed = True

    def break_seal(self) -> None:
        """Note that this process has changed the file itself."""
        self._was_sealed = False

    def _is_untouched(self) -> bool:
        """Return whether nobody has changed a sealed file, by its inode. Else nothing of it is trusted any more."""
        if not self._was_sealed or self.is_sealed():
            return True
        log.warning("somebody has touched the cache file of %s: it is verified again", self._name)
        self.distrust_all()
        return False
