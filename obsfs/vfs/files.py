"""Open files: which reader serves them, and whether the kernel reads them by itself (passthrough).

The kernel keeps an inode in one mode while it is open, so a file that is open in one mode is opened in the same. What
the kernel is told is recorded first, and a request that comes again to a successor counts once.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from obsfs.access.loaders import LoadTracker
from obsfs.blocks import BLOCK
from obsfs.errors import ObsfsError
from obsfs.fetch.engine import Engine
from obsfs.fetch.reader import Reader
from obsfs.limits import available_memory
from obsfs.store.types import ObjectVersion
from obsfs.vfs.frontend import FrontEnd
from obsfs.vfs.handles import BadHandleError, Mode, OpenFile
from obsfs.vfs.inodes import Node
from obsfs.vfs.listings import Entry, WouldBlockError
from obsfs.vfs.tree import Tree

log = logging.getLogger(__name__)


class Opened(NamedTuple):
    """An open file: its handle, and, if the kernel reads it by itself, the kernel's id of the cache file, else 0."""

    handle: int
    backing: int


class _IsDirectoryError(ObsfsError):
    errno = errno.EISDIR


class _ReadOnlyError(ObsfsError):
    errno = errno.EROFS


class _LookAgainError(ObsfsError):
    """The kernel looks up the name once more (open(2) does that by itself), and gets another node."""

    errno = errno.ESTALE


class Files:
    """Opens, reads and releases files. Safe to use from many threads.

    Args:
        tree: nodes and handles.
        engine: reads versions of objects.
    """

    def __init__(self, tree: Tree, engine: Engine) -> None:
        self.front = FrontEnd()
        """What speaks to the kernel."""
        self.can_pass_through = False
        """Whether the kernel takes cache files to read them by itself."""
        self._tree = tree
        self._engine = engine
        self._handles = tree.handles
        # Only for opens and releases, which write to the takeover log: a read must not wait for them.
        self._opening = threading.Lock()
        self._loads = LoadTracker(available_memory, time.monotonic)

    def try_passthrough(self) -> bool:
        """Find out whether the kernel takes cache files: privileges and the cache's file system decide."""
        try:
            self.front.close_backing(self.front.open_backing(self._engine.cache.directory_lock.fd))
        except OSError as error:
            log.info("no passthrough: %s", error.strerror)
        else:
            self.can_pass_through = True
        return self.can_pass_through

    def names_to_pass_through(self, reader: Reader) -> list[tuple[int, str]]:
        """Return ``(parent id, name)`` of files that are open through us and could be passed through if opened now."""
        if not self.can_pass_through:
            return []
        nodes = self._handles.buffered_nodes(reader)
        return [place for node in nodes if (place := self._tree.current_name(node))]

    def store_block(self, reader: Reader, block: int) -> None:
        """Put a block into the kernel's page cache of the files that are open, before a reader asks for it.

        The page faults of a memory map come one by one, and each waits for an answer. On cached pages they cost a
        tenth.
        """
        cached = reader.cached
        state_word_ref = cached.state_word_ref(block)
        if state_word_ref is None:
            return
        try:
            for node in self._handles.buffered_nodes(reader):
                if not self.front.store(node, cached.data_fd, block * BLOCK, cached.length_of(block), state_word_ref):
                    log.debug("block %d of %s is not stored: too many are waiting", block, reader.version.key)
        finally:
            os.close(state_word_ref[0])

    def needs_new_node(self, node: Node) -> bool:
        """Return whether the path of an open node needs another node, because the kernel keeps an inode in one mode.

        A file that has become complete gets a second node, which opens in passthrough from the start. One that was
        found damaged gets a node that is read through us.
        """
        file = self._handles.file(node.id)
        if not self.can_pass_through or file is None or file.reader is None:
            return False
        if file.passthrough:
            return file.reader.cached.is_cut_off or not file.reader.cached.is_fully_present()
        return file.reader.is_complete

    # takeover

    def inherit(self) -> None:
        """Open again what a predecessor had open, as the tree has it.

        The supervisor, and not this process, holds the cache files of its passthrough handles.
        """
        for file in self._handles.files():
            node = self._tree.node(file.node)
            if node.version is not None:
                file.inherited = file.passthrough
                try:
                    self._open_again(file, node.version)
                except ObsfsError as error:
                    # Only this file is lost, for now: the next read of it tries again.
                    log.warning("%s is open, and could not be opened again: %s", node.key, error)

    def _open_again(self, file: OpenFile, version: ObjectVersion) -> Reader:
        """Return a new reader of an open file, with one user for each handle. Raises ObsfsError."""
        reader = self._engine.open(version)
        for _ in range(file.handle_count - 1):
            self._engine.open(version)
        file.reader = reader
        return reader

    def keep_locks_again(self) -> None:
        """Give the front end once more the locks of the cache files that the kernel reads by itself."""
        with self._opening:
            for file in self._handles.files():
                if file.backing and file.reader is not None:
                    self._keep_lock(file.node, file.reader)

    def _keep_lock(self, node: int, reader: Reader) -> None:
        # It stays open when this process dies: the successor finds the file that the kernel reads at its name.
        lock = reader.cached.open_takeover_lock()
        if lock >= 0:
            self.front.keep_lock(node, lock)
            os.close(lock)

    # opens, reads, releases

    @contextmanager
    def at_hand(self, number: int, *, wait: bool) -> Iterator[None]:
        """Keep the cache file of a node open while the block runs, so that `open` does not wait for the cache's disk.

        Raises WouldBlockError if it is not open yet, and `wait` is false.
        """
        version = self._tree.node(number).version
        if version is None:
            yield
            return
        if not wait and not self._engine.is_at_hand(version):
            raise WouldBlockError
        with self._engine.reader_for(version) as reader:
            # Replace files that were cut off here, where no request waits for it.
            reader.cached.recover_if_damaged()
            yield

    def open(self, number: int, flags: int, unique: int = 0, *, wait: bool = True) -> Opened:
        """Open a file, pinned to the version of its node.

        Args:
            number: the node.
            flags: of open(2).
            unique: the number of the request, or 0. An open that was counted already, by a predecessor, counts once.
            wait: whether to wait for the cache's disk.
        """
        node = self._tree.node(number)
        with self.at_hand(number, wait=wait), self._opening:
            counted = self._handles.counted(unique)
            return self._open(node, flags, unique) if counted is None else self._resume_open(node, unique, counted)

    def _open(self, node: Node, flags: int, unique: int) -> Opened:
        if node.version is None:
            raise _IsDirectoryError(f"{node.key} is a directory")
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise _ReadOnlyError("the mount is read-only")
        if self._tree.must_look_up_again(node):
            raise _LookAgainError(f"{node.key} was replaced or deleted")
        reader = self._engine.open(node.version)
        self._loads.on_open(node.parent, node.name)
        # An inode is in one mode at a time: a file that is open in one mode is opened in the same.
        file = self._handles.file(node.id)
        has_backing = file is not None and file.backing > 0
        is_buffered = file is not None and file.buffered > 0
        mode = Mode.BUFFERED
        if self.can_pass_through and not is_buffered and reader.cached.acquire_passthrough(is_reopen=has_backing):
            mode = Mode.PASSTHROUGH
        elif has_backing:
            self._engine.release(reader)
            raise _LookAgainError(f"{node.key} was found damaged in the cache")
        if file is None or file.reader is None:
            # In the background, because it opens other files.
            self._engine.background.run_in_background(partial(self._expect_load, node, node.version))
        if mode is Mode.PASSTHROUGH and not (file and file.passthrough):
            self._prefault(node)
        handle = self._handles.open(node.id, mode, reader, unique)
        return Opened(handle, 0) if mode is Mode.BUFFERED else self._register(handle, unique)

    def _expect_load(self, node: Node, version: ObjectVersion) -> None:
        """Fetch what a loader that has opened this file opens next."""
        entries = self._tree.known(node.parent)
        hints = self._loads.hints(node.parent, node.name, lambda: _sizes(entries))

        def versions(names: Iterable[str]) -> Iterator[ObjectVersion]:
            return (self._tree.version(info) for name in names if (info := entries[name].info) is not None)

        if hints.starts:
            self._engine.fetch_starts([version, *versions(hints.starts)])
        if hints.shards:
            self._engine.begin_load(versions(hints.shards))

    def _prefault(self, node: Node) -> None:
        assert node.version is not None
        if size := self._loads.take(node.parent, node.name, node.size):
            self._engine.prefault(node.version, size)

    def _resume_open(self, node: Node, unique: int, mode: Mode) -> Opened:
        """Answer an open that a predecessor counted, and the kernel has no answer to."""
        handle = self._handles.handle_of(node.id, mode)
        if mode is Mode.BUFFERED:
            return Opened(handle, 0)
        file, _ = self._handles.find(handle)
        if not file.backing:
            # No process kept the file as it was, and the kernel was not told how it is open.
            if file.buffered or not self.reader(handle).cached.acquire_passthrough():
                return self._fall_back(handle, unique)
            file.inherited -= 1
        return self._register(handle, unique)

    def _register(self, handle: int, unique: int) -> Opened:
        """Have the kernel read a passthrough handle's cache file by itself, or fall back to reads through us."""
        file, _ = self._handles.find(handle)
        if not file.backing:
            try:
                reader = self.reader(handle)
                self._keep_lock(file.node, reader)
                self._handles.set_backing(file, self.front.open_backing(reader.cached.data_fd))
            except OSError as error:
                log.warning("passthrough failed: %s", error.strerror)
                return self._fall_back(handle, unique)
        return Opened(handle, file.backing)

    def _fall_back(self, handle: int, unique: int) -> Opened:
        """Turn a passthrough handle, of which the kernel does not know yet, into one that is read through us."""
        file, _ = self._handles.find(handle)
        self._release_cache_file(file)
        return Opened(self._handles.make_buffered(handle, unique), 0)

    def reader(self, handle: int) -> Reader:
        """Return the reader of an open file; it is opened again if a predecessor process had it open."""
        reader = self._handles.reader(handle)
        if reader is not None:
            return reader
        node = self._tree.node(self._handles.node_of(handle))
        file = self._handles.file(node.id)
        if node.version is None or file is None:
            raise BadHandleError(f"handle {handle} is not open")
        return self._open_again(file, node.version)

    def release(self, handle: int, unique: int = 0) -> None:
        """Close a handle. A release with a number that was counted already, by a predecessor, counts once."""
        with self._opening:
            if self._handles.counted(unique) is not None:
                return
            file, mode = self._handles.find(handle)
            if mode is Mode.PASSTHROUGH and file.passthrough == 1 and (backing := file.backing):
                self._handles.set_backing(file, 0)
                self.front.close_backing(backing)
                self.front.drop_lock(file.node)
            self._handles.release(handle, unique)
            if (reader := file.reader) is not None:
                if mode is Mode.PASSTHROUGH:
                    self._release_cache_file(file)
                self._engine.release(reader)

    @staticmethod
    def _release_cache_file(file: OpenFile) -> None:
        """End the hold on the cache file of one passthrough handle."""
        if file.inherited:
            file.inherited -= 1
        elif file.reader is not None:
            file.reader.cached.release_passthrough()


def _sizes(entries: Mapping[str, Entry]) -> Iterator[tuple[str, int]]:
    """The files in a directory: their names, and their sizes in bytes."""
    return ((entry.name, entry.info.size) for entry in entries.values() if entry.info is not None)
