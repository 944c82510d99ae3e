"""What each file system call means here. Knows names, nodes and bytes, and no kernel's format of them.

Both FUSE backends serve these: the native one (:mod:`obsfs.fuse.kernel`) and libfuse (:mod:`obsfs.fuse.libfuse`). The
mount is read-only. A call that may have to ask the bucket takes `wait`; without it, it raises WouldBlockError
instead of waiting. Everything else that goes wrong is an ObsfsError with its errno.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from obsfs.access.loaders import Loads, companions, shards
from obsfs.cache.layout import BLOCK
from obsfs.errors import ObsfsError
from obsfs.fetch.reader import Engine, Reader
from obsfs.limits import available_memory
from obsfs.settings import Settings
from obsfs.store.types import ObjectVersion
from obsfs.version import __version__
from obsfs.vfs.frontend import FrontEnd
from obsfs.vfs.handles import BadHandleError, Mode, OpenFile
from obsfs.vfs.inodes import ROOT, Node
from obsfs.vfs.listings import Listing, WouldBlockError
from obsfs.vfs.tree import Tree

__all__ = ["ROOT", "UNKNOWN_INO", "Attributes", "Opened", "Operations", "StatFs"]

log = logging.getLogger(__name__)

UNKNOWN_INO = 0xFFFFFFFF
"""Stands in a directory for an inode number that has not been looked up, as libfuse has it; 0 would hide the name."""
XATTR_PREFIX = "user.obsfs."
REFRESH = f"{XATTR_PREFIX}refresh"
"""Who reads this attribute has :meth:`Operations.refresh` done: a mount that cannot be written takes no other order."""


class Attributes(NamedTuple):
    """What stat(2) shows, and the node it is about. Times in seconds, sizes in bytes.

    `ttl` is for how much longer the name stands for this node; the node itself never changes.
    """

    node: int
    ino: int
    mode: int
    size: int
    mtime: float
    uid: int
    gid: int
    ttl: float


class Opened(NamedTuple):
    """An open file: its handle, and, if the kernel reads it by itself, the kernel's id of the cache file, else 0."""

    handle: int
    backing: int


class StatFs(NamedTuple):
    """What statfs(2) shows: a bucket has no size, so it is shown as 1 PiB with nothing used."""

    block_size: int = 1 << 20
    blocks: int = 1 << 30
    free: int = 1 << 30
    name_max: int = 255


class _NoAttributeError(ObsfsError):
    errno = errno.ENODATA


class _NoNamespaceError(ObsfsError):
    errno = errno.EOPNOTSUPP


class _IsDirectoryError(ObsfsError):
    errno = errno.EISDIR


class _NotDirectoryError(ObsfsError):
    errno = errno.ENOTDIR


class _ReadOnlyError(ObsfsError):
    errno = errno.EROFS


class _LookAgainError(ObsfsError):
    """Has the kernel look up the name once more (open(2) does so by itself), which gives it another node."""

    errno = errno.ESTALE


class Operations:
    """The file system calls, over a tree and an engine.

    Args:
        tree: names, nodes and open files.
        engine: reads versions of objects.
        settings: of the mount.
        identity: what the status shows of the mount itself, at least ``mountpoint``, ``source`` and ``pid``.
        sites: returns what the status shows of the endpoints.
    """

    def __init__(
        self,
        tree: Tree,
        engine: Engine,
        settings: Settings,
        identity: dict[str, object],
        sites: Callable[[], object] = lambda: [],
    ) -> None:
        self.can_pass_through = False
        """Whether the kernel takes cache files to read them by itself."""
        self.identity = identity
        self._tree = tree
        self._engine = engine
        self._handles = tree.handles
        self._front = FrontEnd()
        self._sites = sites
        self._data_path = "splice" if settings.fuse_backend == "native" else "copy"
        # For opens and releases alone: they record more than a read may wait for.
        self._opening = threading.Lock()
        self._listings: dict[int, Listing] = {}
        # Directory handles of a successor must not be those that its predecessor gave.
        self._directory_handles = itertools.count(time.time_ns())
        self._loads = Loads(available_memory, time.monotonic)
        self._uid = os.getuid() if settings.uid is None else settings.uid
        self._gid = os.getgid() if settings.gid is None else settings.gid
        self._file_mode = stat.S_IFREG | (0o444 & ~settings.umask)
        self._dir_mode = stat.S_IFDIR | (0o555 & ~settings.umask)

    # the front end

    def attach(self, front: FrontEnd) -> None:
        """Tell a front end of names and blocks from now on, and ask it for passthrough."""
        self._front = front
        self._tree.await_names(front.is_awaited)
        self._engine.on_complete = self._on_complete
        self._engine.on_changed = self._on_changed
        if front.can_store:
            self._engine.on_prefetched = self._on_prefetched

    def try_passthrough(self) -> bool:
        """Find out whether the kernel takes cache files: privileges and the cache's file system decide."""
        try:
            self._front.close_backing(self._front.open_backing(self._engine.cache.directory_lock.fd))
        except OSError as error:
            log.info("no passthrough: %s", error.strerror)
        else:
            self.can_pass_through = True
        return self.can_pass_through

    def run_in_background(self, steps: Iterator[None]) -> None:
        """Run something in small steps while nothing more urgent is to do."""
        self._engine.background.run_in_steps(steps)

    def _on_complete(self, reader: Reader) -> None:
        """Have files looked up again that are open through us and could be opened in passthrough from now on."""
        if self.can_pass_through:
            nodes = self._handles.buffered_nodes(reader)
            self._front.forget_names(place for node in nodes if (place := self._tree.current_name(node)))

    def _on_changed(self, reader: Reader) -> None:
        self._front.forget_names(self.outdate(reader))

    def _on_prefetched(self, reader: Reader, block: int) -> None:
        """Put a block into the kernel's page cache of the files that are open, before anybody asks for it.

        Page faults of a memory map come one after the other, each with a wait for an answer; on pages that are there
        they cost a tenth.
        """
        cached = reader.cached
        state_word_ref = cached.state_word_ref(block)
        if state_word_ref is None:
            return
        try:
            for node in self._handles.buffered_nodes(reader):
                if not self._front.store(node, cached.data_fd, block * BLOCK, cached.length_of(block), state_word_ref):
                    log.debug("block %d of %s is not stored: too many are waiting", block, reader.version.key)
        finally:
            os.close(state_word_ref[0])

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
                    # It costs this file, for now: the next read of it tries again.
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
            self._front.keep_lock(node, lock)
            os.close(lock)

    # names and attributes

    def lookup(self, parent: int, name: str, *, wait: bool = True, unique: int = 0) -> Attributes:
        """The attributes of a name; counts one lookup of its node, to be given back with `forget`.

        `unique` is the request's number, if it has one: :meth:`take_back` takes back what it counted.
        """
        directory = self._directory(parent)
        node = self._tree.lookup(directory, name, wait=wait, needs_new_node=self._needs_new_node, unique=unique)
        return self._attributes(node, self._tree.entry_ttl(directory, name, node))

    def negative_ttl(self, parent: int, name: str) -> float:
        """For how many seconds a name that `lookup` did not find is known to be absent."""
        return self._tree.negative_ttl(self._tree.node(parent), name)

    def refresh(self, number: int) -> list[tuple[int, str]]:
        """Ask the bucket again for all that is shown under a directory, or under that of a file.

        Returns ``(parent, name)`` of what the engine has to have looked up anew.
        """
        node = self._tree.node(number)
        return self._tree.refresh(node if node.is_dir else self._tree.node(node.parent))

    def outdate(self, reader: Reader) -> list[tuple[int, str]]:
        """The bucket no longer has the version of a reader: the next open of its name asks the bucket again.

        Returns ``(parent, name)`` of what the engine has to have looked up anew.
        """
        files = [file for file in self._handles.files() if file.reader and file.reader.version == reader.version]
        return [place for file in files if (place := self._tree.outdate(file.node))]

    def _needs_new_node(self, node: Node) -> bool:
        # The kernel keeps an inode in one mode while it is open. A file that has become complete since gets a second
        # node, which opens in passthrough from the start; one that was found damaged, a node to be read through us.
        file = self._handles.file(node.id)
        if not self.can_pass_through or file is None or file.reader is None:
            return False
        if file.passthrough:
            return file.reader.cached.is_cut_off or not file.reader.cached.is_fully_present()
        return file.reader.is_complete

    def forget(self, lookups: Iterable[tuple[int, int]]) -> None:
        """So many lookups of some nodes are over."""
        self._tree.forget(lookups)

    def take_back(self, unique: int) -> None:
        """Take back the lookups that a request counted: the kernel did not get its answer."""
        self._tree.take_back(unique)

    def version(self, node: int) -> ObjectVersion | None:
        """Return the version that a node stands for; None for a directory."""
        return self._tree.node(node).version

    @property
    def over_limit(self) -> bool:
        """Whether the kernel may know more names than it should."""
        return self._tree.over_limit

    def eviction_candidates(self) -> list[tuple[int, str]]:
        """Return ``(parent, name)`` of files that the kernel should forget."""
        return self._tree.eviction_candidates()

    def getattr(self, node: int) -> Attributes:
        """The attributes of a node, which never change."""
        return self._attributes(self._tree.node(node))

    def _attributes(self, node: Node, ttl: float = 0.0) -> Attributes:
        mode = self._dir_mode if node.is_dir else self._file_mode
        return Attributes(node.id, node.ino, mode, node.size, node.mtime, self._uid, self._gid, ttl)

    def _directory(self, number: int) -> Node:
        node = self._tree.node(number)
        if not node.is_dir:
            raise _NotDirectoryError(f"{node.key} is a file")
        return node

    # directories

    def opendir(self, node: int, *, wait: bool = True) -> int:
        """A handle on the directory as it is now."""
        handle = next(self._directory_handles)
        self._listings[handle] = self._tree.listing(self._directory(node), wait=wait)
        return handle

    def note_shown(self, number: int, handle: int) -> bool:
        """The kernel is about to be shown this directory, and may keep it. Whether it was shown the same before."""
        node, loaded = self._tree.node(number), self._listings[handle].loaded
        is_same = node.listing_version == loaded
        node.listing_version = loaded
        return is_same

    def take_back_opendir(self, number: int, handle: int) -> None:
        """The kernel did not get the answer to `opendir`: it has neither the handle nor what it was to be shown."""
        self.releasedir(handle)
        self._tree.node(number).listing_version = 0.0

    def readdir(self, node: int, handle: int, offset: int, *, wait: bool = True) -> Iterator[tuple[str, bool, int]]:
        """``(name, is directory, next offset)`` from `offset` on, in the order of names."""
        directory = self._directory(node)
        listing = self._listings.get(handle)
        if listing is None:
            listing = self._listings[handle] = self._tree.listing(directory, wait=wait)
        names, entries = listing.names, listing.entries
        return ((names[i], entries[names[i]].info is None, i + 1) for i in range(offset, len(names)))

    def enter(self, node: int, handle: int, names: Sequence[str], unique: int = 0) -> list[Attributes]:
        """Like `lookup`, for names that `readdir` of this handle has just given; none if each is to be looked up."""
        directory, listing = self._tree.node(node), self._listings[handle]
        entered = self._tree.enter(directory, listing, names, self._needs_new_node, unique)
        lifetime = self._tree.remaining_ttl(listing.loaded)
        return [self._attributes(node, lifetime) for node in entered]

    def releasedir(self, handle: int) -> None:
        """The directory was closed."""
        self._listings.pop(handle, None)

    # files

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
            # Here, where nobody waits for it: files that were cut off are replaced.
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
        entries = self._tree.known(node.parent)
        if others := companions(node.name, entries):
            self._engine.fetch_starts([version, *map(self._tree.version, others)])
        if self._loads.is_loading(node.parent) and (weights := shards(node.name, entries)):
            self._engine.begin_load(map(self._tree.version, weights))

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
            # Nobody kept the file as it was, nor was the kernel told how it is open.
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
                self._handles.set_backing(file, self._front.open_backing(reader.cached.data_fd))
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
                self._front.close_backing(backing)
                self._front.drop_lock(file.node)
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

    # the whole

    def statfs(self) -> StatFs:
        """Figures for df."""
        return StatFs()

    def getxattr(self, number: int, name: str) -> bytes:
        """``user.obsfs.status`` of the mount (JSON); ``key``, ``etag``, ``cached_bytes`` and ``served_by`` of a file.

        Every node has the status: a bind mount may show any part of the mount as its root.

        Only those of :meth:`listxattr` are listed. Access control lists and security labels are
        not supported, which ``ls -l`` asks once per mount, where it asks for every file that just has none.
        """
        if not name.startswith("user."):
            raise _NoNamespaceError(f"no attributes like {name} here")
        node = self._tree.node(number)
        if name == REFRESH:
            self.refresh(number)
            return b""
        if name == f"{XATTR_PREFIX}status":
            return json.dumps(self.status()).encode()
        values: dict[str, Callable[[], object]] = {}
        if (version := node.version) is not None:
            values = {
                "key": lambda: version.key,
                "etag": lambda: version.etag,
                "cached_bytes": lambda: self._cached_bytes(node),
                "served_by": lambda: self._served_by(node),
            }
        value = values.get(name.removeprefix(XATTR_PREFIX)) if name.startswith(XATTR_PREFIX) else None
        if value is None:
            raise _NoAttributeError(f"no attribute {name}")
        return str(value()).encode()

    def listxattr(self, number: int) -> list[str]:
        """The attributes of a file that stay true of a copy: tools that copy (``cp -a``) take along what is listed."""
        return [f"{XATTR_PREFIX}{name}" for name in ("key", "etag")] if self._tree.node(number).version else []

    def _cached_bytes(self, node: Node) -> int:
        assert node.version is not None
        with self._engine.reader_for(node.version) as reader:
            return reader.cached.cached_bytes

    def _served_by(self, node: Node) -> str:
        if (file := self._handles.file(node.id)) is not None:
            return "passthrough" if file.passthrough else self._data_path
        if not self.can_pass_through:
            return self._data_path
        assert node.version is not None
        with self._engine.reader_for(node.version) as reader:
            return "passthrough" if reader.is_complete else self._data_path

    def status(self) -> dict[str, object]:
        """Everything that ``obsfs status`` shows of one mount."""
        return {
            **self.identity,
            "endpoints": self._sites(),
            "version": __version__,
            "passthrough": self.can_pass_through,
            "data_path": self._data_path,
            "memory_bytes": _memory(),
            "open_files": sum(file.reader is not None for file in self._handles.files()),
            "nodes": self._tree.node_count,
            "listed": self._tree.listed_count,
            "max_entries": self._tree.max_entries,
            "hidden_keys": self._tree.hidden,
            "bad_entries": self._tree.bad_entries,
            **self._engine.statistics(),
        }


def _memory() -> int:
    """Bytes of memory that this process has for itself; the cache's pages, which are mapped too, do not count."""
    return _kernel_figure("/proc/self/status", "RssAnon")


def _kernel_figure(path: str, name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return int(fields[name].split()[0]) * 1024
