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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from obsfs.access.loaders import Loads, companions, shards
from obsfs.errors import ObsfsError
from obsfs.fetch.reader import Engine, Reader
from obsfs.limits import available_memory
from obsfs.settings import Settings
from obsfs.store.types import ObjectVersion
from obsfs.version import __version__
from obsfs.vfs.tree import ROOT, Listing, Node, Tree, WouldBlockError

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
    """An open file. `direct_fd` is a complete local copy that the engine may hand to the kernel, or None."""

    handle: int
    direct_fd: int | None


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


class _BadHandleError(ObsfsError):
    errno = errno.EBADF


class _LookAgainError(ObsfsError):
    """Has the kernel look up the name once more (open(2) does so by itself), which gives it another node."""

    errno = errno.ESTALE


class Operations:
    """The calls, over a tree and an engine. Handles are derived from node ids, so that a successor knows them too.

    `identity` is shown in the status: at least mountpoint, source, pid and engine; `sites` tells of the endpoints.
    """

    def __init__(
        self,
        tree: Tree,
        engine: Engine,
        settings: Settings,
        identity: dict[str, object],
        sites: Callable[[], object] = lambda: [],
    ) -> None:
        self.tree = tree
        self.engine = engine
        self.can_be_direct = False
        self.identity = identity
        self._sites = sites
        self._data_path = "splice" if settings.fuse_backend == "native" else "copy"
        self._readers: dict[int, Reader] = {}
        self._listings: dict[int, Listing] = {}
        # A successor's handles must not be those that its predecessor has given.
        self._handles = itertools.count(time.time_ns())
        self._inherited: dict[int, int] = {}
        self._loads = Loads(available_memory, time.monotonic)
        self._uid = os.getuid() if settings.uid is None else settings.uid
        self._gid = os.getgid() if settings.gid is None else settings.gid
        self._file_mode = stat.S_IFREG | (0o444 & ~settings.umask)
        self._dir_mode = stat.S_IFDIR | (0o555 & ~settings.umask)

    def inherit(self) -> None:
        """Take over what a predecessor had open, as the tree has it. What it held for direct readers stays held by
        its supervisor."""
        for node in self.tree.opened():
            if node.version is not None:
                self._inherited[node.id] = node.direct_opens
                try:
                    self._reopen(node, node.version)
                except ObsfsError as error:
                    # It costs this file, for now: whoever reads it has it tried again.
                    log.warning("%s is open, and could not be opened again: %s", node.key, error)

    def _reopen(self, node: Node, version: ObjectVersion) -> Reader:
        """The reader of what a predecessor had open, held once for each open. Raises ObsfsError."""
        reader = self.engine.open(version)
        for _ in range(node.opens + node.direct_opens - 1):
            self.engine.open(version)
        self._readers[node.id] = reader
        return reader

    # names and attributes

    def lookup(self, parent: int, name: str, *, wait: bool = True, unique: int = 0) -> Attributes:
        """The attributes of a name; counts one lookup of its node, to be given back with `forget`.

        `unique` is the request's number, if it has one: :meth:`unanswered` takes back what it counted.
        """
        directory = self._directory(parent)
        node = self.tree.lookup(directory, name, wait=wait, needs_new_node=self._needs_new_node, unique=unique)
        return self._attributes(node, self.tree.entry_ttl(directory, name, node))

    def negative_ttl(self, parent: int, name: str) -> float:
        """For how many seconds a name that `lookup` did not find is known to be absent."""
        return self.tree.negative_ttl(self.tree.node(parent), name)

    def refresh(self, number: int) -> list[tuple[int, str]]:
        """Ask the bucket again for all that is shown under a directory, or under that of a file.

        Returns ``(parent, name)`` of what the engine has to have looked up anew.
        """
        node = self.tree.node(number)
        return self.tree.refresh(node if node.is_dir else self.tree.node(node.parent))

    def outdate(self, reader: Reader) -> list[tuple[int, str]]:
        """The bucket no longer has the version of a reader: the next open of its name asks the bucket again.

        Returns ``(parent, name)`` of what the engine has to have looked up anew.
        """
        numbers = [number for number, other in list(self._readers.items()) if other.version == reader.version]
        return [place for number in numbers if (place := self.tree.outdate(number))]

    def _needs_new_node(self, node: Node) -> bool:
        # The kernel keeps an inode in one mode while it is open. A file that has become complete meanwhile gets a
        # second node, which opens in passthrough from the start; one that was found damaged, a node to be read through
        # us.
        reader = self._readers.get(node.id)
        if not self.can_be_direct or reader is None:
            return False
        if node.direct_opens:
            return reader.cached.is_cut_off or not reader.cached.is_fully_present()
        return node.opens > 0 and reader.is_complete

    def forget(self, lookups: Iterable[tuple[int, int]]) -> None:
        """So many lookups of some nodes are over."""
        self.tree.forget(lookups)

    def unanswered(self, unique: int) -> None:
        """The kernel did not get the answer to a request that counted lookups."""
        self.tree.unanswered(unique)

    def getattr(self, node: int) -> Attributes:
        """The attributes of a node, which never change."""
        return self._attributes(self.tree.node(node))

    def _attributes(self, node: Node, ttl: float = 0.0) -> Attributes:
        mode = self._dir_mode if node.is_dir else self._file_mode
        return Attributes(node.id, node.ino, mode, node.size, node.mtime, self._uid, self._gid, ttl)

    def _directory(self, number: int) -> Node:
        node = self.tree.node(number)
        if not node.is_dir:
            raise _NotDirectoryError(f"{node.key} is a file")
        return node

    # directories

    def opendir(self, node: int, *, wait: bool = True) -> int:
        """A handle on the directory as it is now."""
        handle = next(self._handles)
        self._listings[handle] = self.tree.listing(self._directory(node), wait=wait)
        return handle

    def note_shown(self, number: int, handle: int) -> bool:
        """The kernel is about to be shown this directory, and may keep it. Whether it was shown the same before."""
        node, loaded = self.tree.node(number), self._listings[handle].loaded
        is_same = node.listing_version == loaded
        node.listing_version = loaded
        return is_same

    def unopened_dir(self, number: int, handle: int) -> None:
        """The kernel did not get the answer to `opendir`: it has neither the handle nor what it was to be shown."""
        self.releasedir(handle)
        self.tree.node(number).listing_version = 0.0

    def readdir(self, node: int, handle: int, offset: int, *, wait: bool = True) -> Iterator[tuple[str, bool, int]]:
        """``(name, is directory, next offset)`` from `offset` on, in the order of names."""
        directory = self._directory(node)
        listing = self._listings.get(handle)
        if listing is None:
            listing = self._listings[handle] = self.tree.listing(directory, wait=wait)
        names, entries = listing.names, listing.entries
        return ((names[i], entries[names[i]].info is None, i + 1) for i in range(offset, len(names)))

    def enter(self, node: int, handle: int, names: Sequence[str], unique: int = 0) -> list[Attributes]:
        """Like `lookup`, for names that `readdir` of this handle has just given; none if each is to be looked up."""
        directory, listing = self.tree.node(node), self._listings[handle]
        entered = self.tree.enter(directory, listing, names, self._needs_new_node, unique)
        lifetime = self.tree.remaining_ttl(listing.loaded)
        return [self._attributes(node, lifetime) for node in entered]

    def releasedir(self, handle: int) -> None:
        """The directory was closed."""
        self._listings.pop(handle, None)

    # files

    @contextmanager
    def at_hand(self, number: int, *, wait: bool) -> Iterator[None]:
        """While the block runs, the cache file of a node is open, so that `open` does not wait for the cache's disk."""
        version = self.tree.node(number).version
        if version is None:
            yield
            return
        if not wait and not self.engine.is_at_hand(version):
            raise WouldBlockError
        with self.engine.reader_for(version) as reader:
            # Here, where nobody waits for it: files that were cut off are replaced.
            reader.cached.recover_if_damaged()
            yield

    def open(self, number: int, flags: int, unique: int = 0) -> Opened:
        """Open a file, pinned to the version of its node. `unique` is the request's number, if it has one."""
        node = self.tree.node(number)
        if node.version is None:
            raise _IsDirectoryError(f"{node.key} is a directory")
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise _ReadOnlyError("the mount is read-only")
        if self.tree.should_look_again(node):
            raise _LookAgainError(f"{node.key} was replaced or deleted")
        reader = self.engine.open(node.version)
        self._loads.on_open(node.parent, node.name)
        # An inode is in one mode at a time: what is open through us stays so, what is direct stays direct.
        direct = self.can_be_direct and not node.opens and reader.cached.acquire_passthrough(is_reopen=node.backing > 0)
        if node.backing and not direct:
            self.engine.release(reader)
            raise _LookAgainError(f"{node.key} was found damaged in the cache")
        if number not in self._readers:
            self._readers[number] = reader
            # Beside it: that opens the files of others.
            self.engine.background.run_in_background(partial(self._expect_load, node, node.version))
        if direct and not node.direct_opens:
            self._warm(node)
        self.tree.count_open(node, 1, direct=direct, unique=unique)
        return Opened(number << 1 | direct, reader.cached.data_fd if direct else None)

    def _expect_load(self, node: Node, version: ObjectVersion) -> None:
        entries = self.tree.known(node.parent)
        if others := companions(node.name, entries):
            self.engine.fetch_starts([version, *map(self.tree.version, others)])
        if self._loads.is_loading(node.parent) and (weights := shards(node.name, entries)):
            self.engine.begin_load(map(self.tree.version, weights))

    def _warm(self, node: Node) -> None:
        assert node.version is not None
        if size := self._loads.take(node.parent, node.name, node.size):
            self.engine.prefault(node.version, size)

    def opened_before(self, number: int, unique: int, *, direct: bool) -> Opened:
        """An open that a predecessor has counted, and the kernel has no answer to."""
        if not direct or self.tree.node(number).backing:
            return Opened(number << 1 | direct, None)
        # Nobody kept the file as it was, nor was the kernel told how it is open.
        cached = self.reader(number << 1).cached
        if self.tree.node(number).opens or not cached.acquire_passthrough():
            return self.reopen_indirect(number << 1 | 1, unique)
        self._inherited[number] -= 1
        return Opened(number << 1 | 1, cached.data_fd)

    def open_lock(self, number: int) -> int:
        """A descriptor that says that a file which is open directly is open in the cache. The caller closes it; -1 when
        the file is no longer there."""
        return self._readers[number].cached.open_takeover_lock()

    def reopen_indirect(self, handle: int, unique: int = 0) -> Opened:
        """The engine could not serve an open directly: the same open, through us."""
        number = handle >> 1
        node = self.tree.node(number)
        self.tree.count_open(node, -1, direct=True)
        self._release_whole(number)
        self.tree.count_open(node, 1, direct=False, unique=unique)
        return Opened(number << 1, None)

    def reader(self, handle: int) -> Reader:
        """The reader of an open file; opened again if a predecessor process had it open."""
        number = handle >> 1
        reader = self._readers.get(number)
        if reader is None:
            node = self.tree.node(number)
            if node.version is None or not (node.opens or node.direct_opens):
                raise _BadHandleError(f"handle {handle} is not open")
            reader = self._reopen(node, node.version)
        return reader

    def open_nodes(self, reader: Reader) -> list[int]:
        """The nodes that this reader's version is open as, through us."""
        readers = list(self._readers.items())
        return [number for number, other in readers if other is reader and self.tree.is_open(number)]

    def release(self, handle: int, unique: int = 0) -> None:
        """A file was closed for the last time by those who share this open of it."""
        number, direct = handle >> 1, bool(handle & 1)
        node = self.tree.node(number)
        self.tree.count_open(node, -1, direct=direct, unique=unique)
        reader = self._readers.get(number)
        if reader is None:
            return
        if direct:
            self._release_whole(number)
        if not node.opens and not node.direct_opens:
            del self._readers[number]
            self._inherited.pop(number, None)
        self.engine.release(reader)

    def _release_whole(self, number: int) -> None:
        if self._inherited.get(number):
            self._inherited[number] -= 1
        else:
            self._readers[number].cached.release_passthrough()

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
        node = self.tree.node(number)
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
        return [f"{XATTR_PREFIX}{name}" for name in ("key", "etag")] if self.tree.node(number).version else []

    def _cached_bytes(self, node: Node) -> int:
        assert node.version is not None
        with self.engine.reader_for(node.version) as reader:
            return reader.cached.cached_bytes

    def _served_by(self, node: Node) -> str:
        if node.direct_opens:
            return "passthrough"
        if node.opens or not self.can_be_direct:
            return self._data_path
        assert node.version is not None
        with self.engine.reader_for(node.version) as reader:
            return "passthrough" if reader.is_complete else self._data_path

    def status(self) -> dict[str, object]:
        """Everything that ``obsfs status`` shows of one mount."""
        open_files = len(self._readers)
        return {
            **self.identity,
            "endpoints": self._sites(),
            "version": __version__,
            "passthrough": self.can_be_direct,
            "data_path": self._data_path,
            "memory_bytes": _memory(),
            "open_files": open_files,
            "nodes": self.tree.node_count,
            "listed": self.tree.listed_count,
            "max_entries": self.tree.max_entries,
            "hidden_keys": self.tree.hidden,
            "bad_entries": self.tree.bad_entries,
            **self.engine.statistics(),
        }


def _memory() -> int:
    """Bytes of memory that this process has for itself; the cache's pages, which are mapped too, do not count."""
    return _kernel_figure("/proc/self/status", "RssAnon")


def _kernel_figure(path: str, name: str) -> int:
    fields = dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
    return int(fields[name].split()[0]) * 1024
