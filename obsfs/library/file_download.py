"""One file on its way from the bucket, or the block cache, into a directory."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from obsfs.blocks import BLOCK, block_count, runs
from obsfs.errors import UnavailableError
from obsfs.fetch.engine import Engine
from obsfs.fetch.reader import Reader
from obsfs.library.manifest import File
from obsfs.library.model_directory import PIECE, ModelDirectory
from obsfs.library.transfer import Advance, OrderedHash, WorkerPool
from obsfs.store.checksums import Checksum
from obsfs.store.types import ObjectVersion

_of_thread = threading.local()


class FileDownload:
    """One file on its way: several threads read and write its pieces at the same time, and hash them in order.

    Args:
        file: What the manifest says of it.
        version: The object version to read.
        engine: Reads it, through the block cache.
        local: The directory that gets it.
        pool: Runs its tasks.
        vouching: Returns the checksum that the bucket has of the object; called if the manifest has none.
        identical_version: A cached object version that is said to have the same bytes.
        is_linked: Link the block cache's file instead of writing a copy.
    """

    def __init__(
        self,
        file: File,
        version: ObjectVersion,
        engine: Engine,
        local: ModelDirectory,
        pool: WorkerPool,
        *,
        vouching: Callable[[], Checksum | None],
        identical_version: ObjectVersion | None,
        is_linked: bool,
    ) -> None:
        self._vouching = vouching
        self._identical_version = identical_version
        self._copyable_blocks = frozenset(engine.cache.present_blocks(identical_version) if identical_version else ())
        self._pool = pool
        self._is_linked = is_linked
        self._file = file
        self._version = version
        self._engine = engine
        self._local = local
        self.pieces = max(1, -(-file.size // PIECE))
        self._left = self.pieces
        self._guard = threading.Lock()
        self._opened: tuple[Reader, int, int] | None = None
        self._checksum: Checksum | None = None
        self._digest: OrderedHash | None = None

    def _blocks(self, index: int) -> range:
        first = index * (PIECE // BLOCK)
        return range(first, min(first + PIECE // BLOCK, block_count(self._file.size)))

    def expect(self, index: int) -> None:
        """Prefetch a piece that is needed soon."""
        _, _, start = self._open()
        if index * PIECE >= start:
            wanted = [block for block in self._blocks(index) if block not in self._copyable_blocks]
            self._engine.prefetch([(block, self._version, block) for block in wanted])

    def task(self, index: int, advance: Advance) -> Callable[[], None]:
        """Return the task for one piece. The task that does the last one also gives the file its name."""

        def work() -> None:
            reader, target, start = self._open()
            offset = index * PIECE
            size = min(PIECE, self._file.size - offset)
            data = _piece_buffer()[:size]
            if offset + size <= start:
                os.preadv(target, [data], offset)
            else:
                self._bring(reader, index, data)
                if not self._is_linked:
                    _write(target, data, offset)
            if self._digest:
                self._digest.update(index, data)
            advance(size)
            with self._guard:
                self._left -= 1
                is_last = not self._left
            if is_last:
                self._finish()

        return work

    def _bring(self, reader: Reader, index: int, data: memoryview) -> None:
        """Fill `data` with a piece: from the identical version, as far as it is cached, else from the bucket."""
        missing = []
        for block in self._blocks(index):
            had = (
                self._engine.peek(self._identical_version, block)
                if self._identical_version and block in self._copyable_blocks
                else None
            )
            if had is None:
                missing.append(block)
            else:
                start = block * BLOCK - index * PIECE
                data[start : start + len(had)] = had
        self._engine.fill(self._version, missing)
        for run in runs(missing):
            offset, stop = run.start * BLOCK, min(run.stop * BLOCK, self._file.size)
            part = data[offset - index * PIECE : stop - index * PIECE]
            if not reader.cached.readinto(offset, part):
                part[:] = reader.read(offset, len(part))

    def _open(self) -> tuple[Reader, int, int]:
        with self._guard:
            if self._opened is None:
                self._checksum = Checksum("sha256", self._file.sha256) if self._file.sha256 else self._vouching()
                self._digest = OrderedHash(self._pool, self._checksum.hasher()) if self._checksum else None
                reader = self._engine.open(self._version)
                self._opened = (reader, -1, 0) if self._is_linked else (reader, *self._local.begin(self._file))
            return self._opened

    def _finish(self) -> None:
        file = self._file
        if self._digest and self._checksum and self._digest.hexdigest() != self._checksum.hexdigest:
            self._local.drop(file)
            self._engine.cache.drop(self._version)
            if self._identical_version:
                self._engine.cache.drop(self._identical_version)
            raise UnavailableError(
                f"{file.path} is not what its {'manifest' if file.sha256 else self._checksum.algorithm} says",
                "pull again; if that does not help, the bucket has other bytes",
            )
        reader, *_ = self._open()
        if self._identical_version:
            # Only now is it verified that the bytes are the same.
            self._engine.copy_identical(self._version, self._copyable_blocks, self._identical_version)
        if self._is_linked and not self._local.link(file, reader.cached):
            self._copy(reader)
        self._local.accept(file)
        self.close()

    def _copy(self, reader: Reader) -> None:
        """Read the file again and write it: a part of it has left the cache, or links are not possible."""
        digest = self._checksum.hasher() if self._checksum else hashlib.sha256()
        target, _ = self._local.begin(self._file)
        try:
            for offset in range(0, self._file.size, PIECE):
                data = reader.read(offset, min(PIECE, self._file.size - offset))
                _write(target, data, offset)
                digest.update(data)
        finally:
            os.close(target)
        if self._checksum and digest.hexdigest() != self._checksum.hexdigest:
            raise UnavailableError(f"{self._file.path} changed while it was copied", "pull again")

    def close(self) -> None:
        """Close what was opened, whether the file is complete or not."""
        with self._guard:
            opened, self._opened = self._opened, None
        if opened:
            reader, target, _ = opened
            if target >= 0:
                os.close(target)
            self._engine.release(reader)


def pieces_of(downloads: Sequence[FileDownload]) -> Iterator[tuple[FileDownload, int]]:
    return ((download, index) for download in downloads for index in range(download.pieces))


def _piece_buffer() -> memoryview:
    """Return this thread's buffer: fresh memory for each piece would cost more than reading and hashing it."""
    if not hasattr(_of_thread, "buffer"):
        _of_thread.buffer = memoryview(bytearray(PIECE))
    buffer: memoryview = _of_thread.buffer
    return buffer


def _write(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
