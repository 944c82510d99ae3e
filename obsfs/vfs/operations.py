"""The file system calls, and the only face of the file system. No kernel's format of them is known here.

Both FUSE backends call these: the native one (:mod:`obsfs.fuse.kernel`) and libfuse (:mod:`obsfs.fuse.libfuse`). The
mount is read-only. A call that may have to ask the bucket takes `wait`. If that is false, it raises WouldBlockError
instead of waiting. Every other failure is an ObsfsError with its errno.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from obsfs.errors import ObsfsError
from obsfs.fetch.engine import Engine
from obsfs.fetch.reader import Reader
from obsfs.settings import Settings
from obsfs.store.types import ObjectVersion
from obsfs.version import __version__
from obsfs.vfs.files import Files, Opened
from obsfs.vfs.frontend import FrontEnd
from obsfs.vfs.inodes import ROOT, Node
from obsfs.vfs.listings import Listing
from obsfs.vfs.tree import Tree

__all__ = ["ROOT", "UNKNOWN_INO", "Attributes", "Opened", "Operations", "StatFs"]

log = logging.getLogger(__name__)

UNKNOWN_INO = 0xFFFFFFFF
"""The inode number in a directory of a name that was not looked up, as in libfuse; 0 would hide the name."""
XATTR_PREFIX = "user.obsfs."
REFRESH = f"{XATTR_PREFIX}refresh"
"""Reading this attribute calls :meth:`Operations.refresh`: a read-only mount takes no other order."""


class Attributes(NamedTuple):
    """What stat(2) shows of a node, which never changes, and how long its name stands for it."""

    node: int
    """Node id."""
    ino: int
    """Inode number: the same for all versions of a path."""
    mode: int
    size: int
    """Bytes."""
    mtime: float
    """Seconds since the epoch."""
    uid: int
    gid: int
    ttl: float
    """Seconds for which the name stands for this node; 0 if that is not known."""


class StatFs(NamedTuple):
    """What statfs(2) shows. A bucket has no size, so it shows 1 PiB with nothing used."""

    block_size: int = 1 << 20
    blocks: int = 1 << 30
    free: int = 1 << 30
    name_max: int = 255


class _NoAttributeError(ObsfsError):
    errno = errno.ENODATA


class _NoNamespaceError(ObsfsError):
    errno = errno.EOPNOTSUPP


class _NotDirectoryError(ObsfsError):
    errno = errno.ENOTDIR


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
        self.identity = identity
        self._tree = tree
        self._engine = engine
        self._handles = tree.handles
        self._files = Files(tree, engine)
        self._front = FrontEnd()
        # Bound here, not wrapped in methods: every read calls the first.
        self.reader = self._files.reader
        self.open = self._files.open
        self.release = self._files.release
        self.at_hand = self._files.at_hand
        self.inherit = self._files.inherit
        self.keep_locks_again = self._files.keep_locks_again
        self.try_passthrough = self._files.try_passthrough
        self._sites = sites
        self._data_path = "splice" if settings.fuse_backend == "native" else "copy"
        self._listings: dict[int, Listing] = {}
        # Open all the time: status is asked for when a process has no descriptor left, too.
        self._process_status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._process_status)
        # Directory handles of a successor must not be those that its predecessor gave.
        self._directory_handles = itertools.count(time.time_ns())
        self._uid = os.getuid() if settings.uid is None else settings.uid
        self._gid = os.getgid() if settings.gid is None else settings.gid
        self._file_mode = stat.S_IFREG | (0o444 & ~settings.umask)
        self._dir_mode = stat.S_IFDIR | (0o555 & ~settings.umask)

    # the front end

    def attach(self, front: FrontEnd) -> None:
        """Tell a front end of names and blocks from now on, and ask it for passthrough."""
        self._front = self._files.front = front
        self._tree.await_names(front.is_awaited)
        self._engine.subscribe(
            on_complete=self._on_complete,
            on_changed=self._on_changed,
            on_prefetched=self._files.store_block if front.can_store else None,
        )

    @property
    def can_pass_through(self) -> bool:
        """Whether the kernel takes cache files to read them by itself. A successor sets what its predecessor found."""
        return self._files.can_pass_through

    @can_pass_through.setter
    def can_pass_through(self, can: bool) -> None:
        self._files.can_pass_through = can

    def run_in_background(self, steps: Iterator[None]) -> None:
        """Run `steps` one by one, in the background, while nothing more urgent waits."""
        self._engine.background.run_in_steps(steps)

    def _on_complete(self, reader: Reader) -> None:
        self._front.forget_names(self._files.names_to_pass_through(reader))

    def _on_changed(self, reader: Reader) -> None:
        self._front.forget_names(self.outdate(reader))

    # names and attributes

    def lookup(self, parent: int, name: str, *, wait: bool = True, unique: int = 0) -> Attributes:
        """Return the attributes of a name, and count one lookup of its node, which the kernel gives back by FORGET.

        Args:
            parent: node id of the directory.
            name: the name in it.
            wait: whether to wait for the bucket if it must be asked.
            unique: the number of the request, or 0. :meth:`take_back` takes back what it counted.

        Raises:
            WouldBlockError: the bucket must be asked, and `wait` is false.
            ObsfsError: there is no such name (NotFoundError), or the bucket does not answer.
        """
        directory = self._directory(parent)
        node = self._tree.lookup(directory, name, wait=wait, needs_new_node=self._files.needs_new_node, unique=unique)
        return self._attributes(node, self._tree.entry_ttl(directory, name, node))

    def negative_ttl(self, parent: int, name: str) -> float:
        """Return for how many seconds the kernel may take a name to be absent that `lookup` did not find."""
        return self._tree.negative_ttl(self._tree.node(parent), name)

    def refresh(self, number: int) -> list[tuple[int, str]]:
        """Ask the bucket again for everything under a directory, or under the directory of a file.

        Args:
            number: node id of the directory, or of the file.

        Returns:
            ``(parent node id, name)`` of what the kernel should look up again.
        """
        node = self._tree.node(number)
        return self._tree.refresh(node if node.is_dir else self._tree.node(node.parent))

    def outdate(self, reader: Reader) -> list[tuple[int, str]]:
        """Note that the bucket no longer has the version of a reader: the next open of its name asks the bucket again.

        Returns:
            ``(parent node id, name)`` of what the kernel should look up again.
        """
        files = [file for file in self._handles.files() if file.reader and file.reader.version == reader.version]
        return [place for file in files if (place := self._tree.outdate(file.node))]

    def forget(self, lookups: Iterable[tuple[int, int]]) -> None:
        """Take back lookups that the kernel has forgotten: ``(node id, how many)``."""
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
        """Return ``(parent node id, name)`` of files that the kernel should forget."""
        return self._tree.eviction_candidates()

    def getattr(self, node: int) -> Attributes:
        """Return the attributes of a node, which never change."""
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
        """Open a directory as it is now, and return its handle. Raises WouldBlockError if `wait` is false."""
        handle = next(self._directory_handles)
        self._listings[handle] = self._tree.listing(self._directory(node), wait=wait)
        return handle

    def note_shown(self, number: int, handle: int) -> bool:
        """Note that the kernel gets this directory, and may keep it. Returns whether it got the same before."""
        node, loaded = self._tree.node(number), self._listings[handle].loaded
        is_same = node.listing_version == loaded
        node.listing_version = loaded
        return is_same

    def take_back_opendir(self, number: int, handle: int) -> None:
        """Undo `opendir`: the kernel did not get its answer, so it has neither the handle nor the directory."""
        self.releasedir(handle)
        self._tree.node(number).listing_version = 0.0

    def readdir(self, node: int, handle: int, offset: int, *, wait: bool = True) -> Iterator[tuple[str, bool, int]]:
        """Yield ``(name, is directory, next offset)`` from `offset` on, sorted by name."""
        directory = self._directory(node)
        listing = self._listings.get(handle)
        if listing is None:
            listing = self._listings[handle] = self._tree.listing(directory, wait=wait)
        names, entries = listing.names, listing.entries
        return ((names[i], entries[names[i]].info is None, i + 1) for i in range(offset, len(names)))

    def enter(self, node: int, handle: int, names: Sequence[str], unique: int = 0) -> list[Attributes]:
        """Look up names that `readdir` of this handle has just given, as :meth:`lookup` does.

        Returns an empty list if the listing is no longer believed: then the kernel looks up each name.
        """
        directory, listing = self._tree.node(node), self._listings[handle]
        entered = self._tree.enter(directory, listing, names, self._files.needs_new_node, unique)
        ttl = self._tree.remaining_ttl(listing.loaded)
        return [self._attributes(node, ttl) for node in entered]

    def releasedir(self, handle: int) -> None:
        """Close a directory."""
        self._listings.pop(handle, None)

    # the whole

    def statfs(self) -> StatFs:
        """Return the figures for df(1)."""
        return StatFs()

    def getxattr(self, number: int, name: str) -> bytes:
        """Return an extended attribute.

        Every node has ``user.obsfs.status``, the status of the mount as JSON: a bind mount may show any part of the
        mount as its root. A file also has ``key``, ``etag``, ``cached_bytes`` and ``served_by``.

        Access control lists and security labels are answered with EOPNOTSUPP, for which ``ls -l`` asks once per mount;
        with ENODATA it would ask for every file.
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
        """Return the attributes that stay true of a copy of the file: tools such as ``cp -a`` copy what is listed."""
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
        """Return what ``obsfs status`` shows of one mount."""
        return {
            **self.identity,
            "endpoints": self._sites(),
            "version": __version__,
            "passthrough": self.can_pass_through,
            "data_path": self._data_path,
            "memory_bytes": self._memory(),
            "open_files": sum(file.reader is not None for file in self._handles.files()),
            "nodes": self._tree.node_count,
            "listed": self._tree.listed_count,
            "max_entries": self._tree.max_entries,
            "hidden_keys": self._tree.hidden,
            "bad_entries": self._tree.bad_entries,
            **self._engine.statistics(),
        }

    def _memory(self) -> int:
        """Return the bytes of memory that this process alone uses; mapped pages of the cache do not count."""
        text = os.pread(self._process_status, 1 << 14, 0).decode()
        fields = dict(line.split(":", 1) for line in text.splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024
