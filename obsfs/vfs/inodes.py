"""The nodes that the kernel may know: their numbers, the paths that they stand for, and the lookups that it counts.

A node is one version of one path. Its size and ETag never change. The kernel counts the lookups of each node and gives
them back (FORGET): a node that it knows must be here, and one that it has forgotten may go. Every change is recorded
before the kernel hears of it, so that a successor can restore the same nodes.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from obsfs.errors import VersionChangedError
from obsfs.store.types import ObjectInfo, ObjectVersion
from obsfs.vfs.handles import whole_number

ROOT = 1
_MAX_LOOKED_UP = 1024
"""Requests whose lookups are remembered until they can no longer come again or go unanswered."""
_UNCOUNTED = 1 << 62
"""Lookups of a node that a predecessor did not count: it is never dropped."""
_SERVER_BITS = 40
"""A server has 2**40 node ids, above its number: no id of a predecessor comes again, even one that was not recorded."""


@dataclass(slots=True)
class Node:
    """One version of one path."""

    id: int
    parent: int
    """Node id of the directory."""
    name: str
    key: str
    """The object's key, or the directory's prefix (ending in ``/``, or empty)."""
    version: ObjectVersion | None
    """None for a directory."""
    mtime: float
    """Seconds since the epoch."""
    lookups: int = 0
    is_outdated: bool = False
    """Whether a read has found that the bucket no longer has this version."""
    listing_version: float = 0.0
    """When the listing was loaded that the kernel has of this directory (monotonic seconds)."""

    @property
    def is_dir(self) -> bool:
        """Whether this is a directory."""
        return self.version is None

    @property
    def size(self) -> int:
        """Bytes; 0 for a directory."""
        return self.version.size if self.version else 0

    @property
    def ino(self) -> int:
        """The inode number: the same for a path over all versions and mounts."""
        if self.id == ROOT:
            return ROOT
        return int.from_bytes(hashlib.blake2b(self.key.encode(), digest_size=8).digest(), "little") | 2


class Inodes:
    """Nodes by their ids and by ``(parent id, name)``. Safe to use from many threads.

    Args:
        prefix: the key prefix of the root.
        guard: the lock of the tree.
        record: appends to the takeover log.
        is_open: whether a node has a handle; such a node stays, whatever its lookups.
        max_entries: nodes that the kernel should know at most.
        server: number of this server of a mount, greater than those of its predecessors.
    """

    def __init__(
        self,
        prefix: str,
        guard: threading.RLock,
        record: Callable[..., None],
        is_open: Callable[[int], bool],
        *,
        max_entries: int,
        server: int,
    ) -> None:
        self.max_entries = max_entries
        self._guard = guard
        self._record = record
        self._is_open = is_open
        self._next_id = (server << _SERVER_BITS) + ROOT + 1
        self._nodes = {ROOT: Node(ROOT, ROOT, "", prefix, None, time.time(), lookups=1)}
        self._current: dict[tuple[int, str], int] = {}
        # By the numbers of the last requests: the nodes of which they counted a lookup.
        self._looked_up: OrderedDict[int, list[int]] = OrderedDict()
        self._uncounted = 0

    # questions

    def __len__(self) -> int:
        return len(self._nodes)

    def get(self, node_id: int) -> Node | None:
        """Return a node; None if it is not known."""
        return self._nodes.get(node_id)

    def node(self, node_id: int) -> Node:
        """Return a node. Raises VersionChangedError (ESTALE) if it is not known: the kernel looks its path up again."""
        try:
            return self._nodes[node_id]
        except KeyError:
            raise VersionChangedError(f"node {node_id} is not known") from None

    def current(self, parent: int, name: str) -> Node | None:
        """Return the node that a path stands for; None if there is none."""
        return self._nodes.get(self._current.get((parent, name), 0))

    def is_current(self, node: Node) -> bool:
        """Return whether the path of a node stands for it, and not for another version."""
        return self._current.get((node.parent, node.name)) == node.id

    def names_under(self, prefix: str, others: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
        """Return ``(parent id, name)`` of the paths, and of those among `others`, in directories under a prefix."""
        with self._guard:
            under = {node.id for node in self._nodes.values() if node.key.startswith(prefix)}
            return [place for place in (*self._current, *others) if place[0] in under]

    @property
    def over_limit(self) -> bool:
        """Whether the kernel may know more nodes than it should."""
        return len(self._nodes) - self._uncounted > self.max_entries

    def eviction_candidates(self) -> list[tuple[int, str]]:
        """Return ``(parent id, name)`` of the files that the kernel has known for longest and that are not open.

        There are enough of them to make room for a tenth of `max_entries`, and none within the limit. Directories stay:
        one of them may be the working directory of a process. A candidate goes to the end of the queue, because the
        kernel may not be able to forget it now.
        """
        with self._guard:
            if not self.over_limit:
                return []
            excess = len(self._nodes) - self._uncounted - self.max_entries + self.max_entries // 10
            idle = (
                node
                for node in self._nodes.values()
                if not (node.is_dir or self._is_open(node.id)) and node.lookups < _UNCOUNTED // 2
            )
            chosen = list(islice(idle, excess))
            for node in chosen:
                self._nodes[node.id] = self._nodes.pop(node.id)
            return [(node.parent, node.name) for node in chosen]

    # changes

    def add(self, parent: Node, name: str, key: str, version: ObjectVersion | None, mtime: float | None) -> Node:
        """Make a node for a path, which stands for it from now on. The caller holds the guard, and records it.

        Args:
            parent: the directory.
            name: its name there.
            key: the object's key, or the directory's prefix.
            version: the object's version, or None.
            mtime: seconds since the epoch; None is that of the root.
        """
        mtime = self._nodes[ROOT].mtime if mtime is None else mtime
        node = Node(self._next_id, parent.id, name, key, version, mtime)
        self._next_id += 1
        self._nodes[node.id] = node
        self._current[parent.id, name] = node.id
        return node

    def count_lookups(self, nodes: list[Node], unique: int, changes: Iterable[list[object]]) -> None:
        """Count one more lookup of each node, for the request `unique` (or 0), and record `changes` before it.

        The caller holds the guard.
        """
        for node in nodes:
            node.lookups += 1
        ids = [node.id for node in nodes]
        if unique:
            self._remember_lookups(unique, ids)
        if ids:
            self._record(*changes, ["looked", unique, ids])

    def _remember_lookups(self, unique: int, ids: list[int]) -> None:
        self._looked_up[unique] = ids
        if len(self._looked_up) > _MAX_LOOKED_UP:
            self._looked_up.popitem(last=False)

    def take_back(self, unique: int) -> None:
        """Take back the lookups that a request counted: the kernel did not get its answer."""
        with self._guard:
            ids = self._looked_up.pop(unique, ())
            self.forget([(node_id, 1) for node_id in ids])

    def forget(self, lookups: Iterable[tuple[int, int]]) -> None:
        """Take back lookups that the kernel has forgotten: ``(node id, how many)``."""
        counts: list[object] = []
        with self._guard:
            changed: list[Node] = []
            for node_id, count in lookups:
                node = self._nodes.get(node_id)
                if node is None or node_id == ROOT:
                    continue
                node.lookups -= count
                counts += [node_id, count]
                changed.append(node)
            if counts:
                self._record(["forgot", *counts])
            for node in changed:
                self.drop_if_unused(node.id)

    def drop_if_unused(self, node_id: int) -> None:
        """Drop a node that has no lookup and no handle left. The caller holds the guard.

        Different threads serve FORGET and RELEASE, so either may come last.
        """
        node = self._nodes.get(node_id)
        if node is None or node_id == ROOT or node.lookups > 0 or self._is_open(node_id):
            return
        self._drop(node)
        self._record(["forget", node_id])

    def _drop(self, node: Node) -> None:
        del self._nodes[node.id]
        if self.is_current(node):
            del self._current[node.parent, node.name]

    def mark_outdated(self, node: Node) -> bool:
        """Note that the bucket no longer has the version of a node. Returns whether that is news."""
        with self._guard:
            if node.is_outdated:
                return False
            node.is_outdated = True
            self._record(["outdated", node.id])
            return True

    # takeover

    def records(self, of_handles: Callable[[int], Iterable[list[object]]]) -> Iterator[list[object]]:
        """Yield the records that restore all nodes, each with those of its handles. The caller holds the guard."""
        for node in self._nodes.values():
            if node.id == ROOT:
                continue
            yield from describe(node)
            yield ["lookups", node.id, max(0, node.lookups)]
            if node.is_outdated:
                yield ["outdated", node.id]
            yield from of_handles(node.id)

    def request_records(self) -> Iterator[list[object]]:
        """Yield the records that restore what the last requests counted. The caller holds the guard."""
        for unique, ids in self._looked_up.items():
            yield ["answered", unique, ids]

    def restore_requests(self, kind: str, first: object, values: list[Any]) -> None:
        """Take over a record about lookups: ``looked``, ``answered`` (`first` is a request's number) or ``forgot``."""
        if kind == "forgot":
            for node_id, count in zip([first, *values[1::2]], values[::2], strict=True):
                if (node := self._nodes.get(whole_number(node_id))) is not None:
                    node.lookups -= whole_number(count)
            return
        (ids,) = values
        if kind == "looked":
            for node_id in ids:
                if node_id in self._nodes:
                    self._nodes[node_id].lookups += 1
        if first or kind == "answered":
            self._remember_lookups(whole_number(first), [whole_number(node_id) for node_id in ids])

    def restore_node(self, node_id: int, values: list[Any], pinned: Callable[[ObjectInfo], ObjectVersion]) -> None:
        """Take over a record ``node``. `pinned` returns the version of an object as it was recorded."""
        parent, name, key, etag, size, mtime = values
        if node_id <= ROOT or not isinstance(mtime, int | float):
            raise ValueError(node_id)
        version: ObjectVersion | None = None
        if etag is not None:
            version = pinned(ObjectInfo(text(key), whole_number(size), float(mtime), text(etag)))
        node = Node(node_id, whole_number(parent), text(name), text(key), version, float(mtime))
        self._nodes[node_id] = node
        self._current[node.parent, node.name] = node_id

    def restore_detail(
        self, kind: str, node: Node, values: list[Any], pinned: Callable[[ObjectInfo], ObjectVersion]
    ) -> None:
        """Take over a record about a known node: ``version``, ``lookups``, ``outdated`` or ``forget``."""
        if kind == "version":
            key, version_id = map(text, values)
            info = ObjectInfo(key, node.size, node.mtime, node.version.etag if node.version else "")
            node.version = replace(pinned(info), version_id=version_id)
        elif kind == "lookups":
            node.lookups = whole_number(values[0])
        elif kind == "outdated":
            node.is_outdated = True
        elif kind == "forget":
            self._drop(node)

    def finish_restore(self, *, is_counted: bool) -> None:
        """Drop the restored nodes that the kernel does not know, or, if not all were counted, keep them for good."""
        for node in list(self._nodes.values()):
            if node.id == ROOT:
                continue
            if not is_counted or node.lookups >= _UNCOUNTED // 2:
                node.lookups = _UNCOUNTED
                self._uncounted += 1
            elif node.lookups <= 0 and not self._is_open(node.id):
                self._drop(node)
        self._next_id = max(self._next_id, max(self._nodes) + 1)


def describe(node: Node) -> Iterator[list[object]]:
    """Yield the records of a node itself."""
    version = node.version
    etag = version.etag if version else None
    yield ["node", node.id, node.parent, node.name, node.key, etag, node.size, node.mtime]
    if version is not None and (version.version_id or version.key != node.key):
        yield ["version", node.id, version.key, version.version_id]


def text(value: object) -> str:
    """Return text from the takeover log. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(value)
    return value
