"""The directory tree: names, nodes, listings and open files as one, behind one lock.

A node is one version of one path: its size and ETag never change. When the object at a path is replaced, the next
lookup after the metadata lifetime gives the path a new node, and a process that has the old one open keeps the old one.
Every node that the kernel may know, every lookup that it counts, and every open is written to the takeover log before
the kernel is told, so that a successor process can restore the tree (:meth:`Tree.restore`).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from obsfs.errors import VersionChangedError
from obsfs.limits import available_memory
from obsfs.store.types import ObjectInfo, ObjectVersion, Page
from obsfs.vfs.handles import HandleTable, whole_number
from obsfs.vfs.inodes import ROOT, Inodes, Node, describe, text
from obsfs.vfs.listings import Entry, Listing, Listings, Question, Source

_MAX_ABSENT = 4096
"""Names that the kernel may take to be absent at a time."""
_MAX_ANSWERS = 3
"""Answers of the bucket to one lookup, when each was outdated before it could be given."""


class Tree:
    """The directory tree under `prefix`. Safe to use from many threads.

    Args:
        source: the bucket, or a snapshot of it.
        prefix: what the root shows, empty or ending in ``/``.
        ttl: seconds for which listings and absences are believed.
        record: appends records to the takeover log, as lists for JSON, each before the kernel hears of it.
        now: monotonic seconds.
        max_entries: names to remember, of listings and in the kernel, beyond the directory that is being listed.
        server: number of this server of a mount, greater than those of its predecessors.
        room: returns the bytes of memory that are left.
    """

    def __init__(
        self,
        source: Source,
        prefix: str,
        ttl: float,
        record: Callable[..., None] = lambda *changes: None,
        *,
        now: Callable[[], float] = time.monotonic,
        max_entries: int = 250_000,
        server: int = 0,
        room: Callable[[], int] = available_memory,
    ) -> None:
        self.ttl = ttl
        self.max_entries = max_entries
        self._source = source
        self._record = record
        self._now = now
        self._guard = threading.RLock()
        self.handles = HandleTable(self._guard, record, self._on_closed)
        self._inodes = Inodes(prefix, self._guard, record, self.handles.is_open, max_entries=max_entries, server=server)
        self._listings = Listings(source, ttl, self._guard, now, max_entries=max_entries, room=room)
        # (parent id, name) of what the kernel may take to be absent, and until when (monotonic seconds).
        self._absent: OrderedDict[tuple[int, str], float] = OrderedDict()

    def _on_closed(self, node_id: int) -> None:
        self._inodes.drop_if_unused(node_id)

    # nodes

    def node(self, node_id: int) -> Node:
        """Return the node with this id. Raises VersionChangedError (ESTALE): the kernel looks its path up again."""
        return self._inodes.node(node_id)

    def lookup(
        self,
        parent: Node,
        name: str,
        *,
        wait: bool = True,
        needs_new_node: Callable[[Node], bool] | None = None,
        unique: int = 0,
    ) -> Node:
        """Return the node that a name stands for now, with one more lookup counted.

        Args:
            parent: the directory.
            name: the name in it.
            wait: whether to wait for the bucket if it must be asked.
            needs_new_node: tells of a node that is still right whether the path should get a fresh one all the same.
            unique: the number of the request, for :meth:`take_back`.

        Raises:
            NotFoundError: there is no such name.
            WouldBlockError: the bucket must be asked, and `wait` is false.
            VersionChangedError: the object is replaced whenever the bucket is asked.
            ObsfsError: what the bucket says.
        """
        for _ in range(_MAX_ANSWERS):
            with self._listings.question(parent.key, name) as question:
                entry = self._listings.find(parent, name, wait)
                if nodes := self._enter_all(parent, [entry], question, needs_new_node, unique):
                    return nodes[0]
        raise VersionChangedError(f"{parent.key}{name} is replaced over and over", "open it again")

    def enter(
        self,
        parent: Node,
        listing: Listing,
        names: Iterable[str],
        needs_new_node: Callable[[Node], bool] | None = None,
        unique: int = 0,
    ) -> list[Node]:
        """Return the nodes of names in a listing, with one more lookup counted of each.

        Returns an empty list if the listing is no longer believed.
        """
        return self._enter_all(
            parent, [listing.entries[name] for name in names], listing.question, needs_new_node, unique
        )

    def _enter_all(
        self,
        parent: Node,
        entries: Iterable[Entry],
        question: Question,
        needs_new_node: Callable[[Node], bool] | None,
        unique: int,
    ) -> list[Node]:
        changes: list[list[object]] = []
        with self._guard:
            if question.is_outdated:
                return []
            nodes = [self._enter(parent, entry, needs_new_node, changes) for entry in entries]
            self._inodes.count_lookups(nodes, unique, changes)
            return nodes

    def _enter(
        self, parent: Node, entry: Entry, needs_new_node: Callable[[Node], bool] | None, changes: list[list[object]]
    ) -> Node:
        version = self._source.version(entry.info) if entry.info else None
        known = self._inodes.current(parent.id, entry.name)
        is_right = known is not None and known.version == version and not known.is_outdated
        if known is None or not is_right or (needs_new_node is not None and needs_new_node(known)):
            key = entry.info.key if entry.info else f"{parent.key}{entry.name}/"
            known = self._inodes.add(parent, entry.name, key, version, entry.info.mtime if entry.info else None)
            changes.extend(describe(known))
        return known

    def take_back(self, unique: int) -> None:
        """Take back the lookups that a request counted: the kernel did not get its answer."""
        self._inodes.take_back(unique)

    def forget(self, lookups: Iterable[tuple[int, int]]) -> None:
        """Take back lookups that the kernel has forgotten: ``(node id, how many)``."""
        self._inodes.forget(lookups)

    def current_name(self, node_id: int) -> tuple[int, str] | None:
        """Return ``(parent id, name)`` of the path of a node; None if that stands for another node now."""
        with self._guard:
            node = self._inodes.get(node_id)
            return (node.parent, node.name) if node and self._inodes.is_current(node) else None

    @property
    def over_limit(self) -> bool:
        """Whether the kernel may know more nodes than it should."""
        return self._inodes.over_limit

    def eviction_candidates(self) -> list[tuple[int, str]]:
        """Return ``(parent id, name)`` of files that the kernel should forget (:meth:`Inodes.eviction_candidates`)."""
        return self._inodes.eviction_candidates()

    @property
    def node_count(self) -> int:
        """Nodes that the kernel may know."""
        return len(self._inodes)

    # directories

    def listing(self, directory: Node, *, wait: bool = True) -> Listing:
        """Return the whole of a directory (:meth:`Listings.listing`)."""
        return self._listings.listing(directory, wait=wait)

    def known(self, directory: int) -> Mapping[str, Entry]:
        """Return the entries of a directory (a node id) that are known now. Does not ask the bucket."""
        node = self._inodes.get(directory)
        return self._listings.known(node) if node else {}

    def version(self, info: ObjectInfo) -> ObjectVersion:
        """Return the identity of the object that `info` describes."""
        return self._source.version(info)

    def seed_root(self, page: Page) -> None:
        """Take the first page of the root, loaded before any lookup."""
        self._listings.seed(self.node(ROOT).key, page)

    def await_names(self, is_awaited: Callable[[int], bool]) -> None:
        """Have `is_awaited` tell whether a request waits for names of a directory (a node id).

        A listing is given up when no request waits for the rest of it.
        """
        self._listings.is_awaited = is_awaited

    @property
    def hidden(self) -> int:
        """Keys that the listings in memory could not show."""
        return self._listings.hidden

    @property
    def bad_entries(self) -> int:
        """Entries of the listings in memory that could not be read, and are left out."""
        return self._listings.bad_entries

    @property
    def listed_count(self) -> int:
        """Names in the listings in memory, with the listings themselves."""
        return self._listings.listed_count

    # lifetimes

    def entry_ttl(self, directory: Node, name: str, node: Node | None) -> float:
        """Return for how many more seconds a name stands for `node`, or, if that is None, for nothing."""
        return self._listings.entry_ttl(directory, name, node)

    def remaining_ttl(self, loaded: float) -> float:
        """Return for how many more seconds an answer from that moment (monotonic seconds) is believed."""
        return self._listings.remaining_ttl(loaded)

    def negative_ttl(self, directory: Node, name: str) -> float:
        """Return for how many seconds the kernel may take a name to be absent, and note that it is told.

        It is 0 beyond _MAX_ABSENT names: the kernel keeps none that :meth:`refresh` does not know.
        """
        with self._guard:
            now, ttl = self._now(), self.entry_ttl(directory, name, None)
            while self._absent and next(iter(self._absent.values())) <= now:
                self._absent.popitem(last=False)
            place = directory.id, name
            if ttl <= 0 or (len(self._absent) >= _MAX_ABSENT and place not in self._absent):
                return 0.0
            self._note_absent(place, now + ttl)
            self._record(["absent", *place])
            return ttl

    def _note_absent(self, place: tuple[int, str], until: float) -> None:
        self._absent[place] = until
        self._absent.move_to_end(place)

    def refresh(self, directory: Node) -> list[tuple[int, str]]:
        """Stop believing what is known of a directory and those under it.

        Returns:
            ``(parent id, name)`` of what the kernel may know there: it should look them up again.
        """
        with self._guard:
            self._listings.outdate(lambda question: question.prefix.startswith(directory.key))
            return self._inodes.names_under(directory.key, self._absent)

    def outdate(self, node_id: int) -> tuple[int, str] | None:
        """Stop believing the name of a node, because the bucket no longer has its version.

        Returns:
            ``(parent id, name)`` if the kernel may know the name as this node: it should look it up again.
        """
        with self._guard:
            node = self._inodes.get(node_id)
            if node is None:
                return None
            is_news = self._inodes.mark_outdated(node)
            if is_news or self._listings.shows(node):
                prefix = node.key.removesuffix(node.name)
                self._listings.outdate(lambda one: one.prefix == prefix and one.name in (None, node.name))
            return (node.parent, node.name) if self._inodes.is_current(node) else None

    def must_look_up_again(self, node: Node) -> bool:
        """Return whether the name of a node stands for a version that is gone: look it up before opening it."""
        with self._guard:
            return node.is_outdated and self._inodes.is_current(node)

    # takeover

    def snapshot(self) -> Iterator[list[object]]:
        """Yield the records that restore the tree as it is now, to begin a takeover log with."""
        with self._guard:
            yield from self._inodes.records(self.handles.records_of)
            for parent, name in self._absent:
                yield ["absent", parent, name]
            yield from self.handles.records()
            yield from self._inodes.request_records()

    def restore(
        self,
        records: Iterable[list[object]],
        pinned: Callable[[ObjectInfo], ObjectVersion] | None = None,
        *,
        is_counted: bool = True,
    ) -> int:
        """Take over what a predecessor recorded: the same node ids, versions, lookups and opens.

        Args:
            records: its takeover log. A record that cannot be understood costs what it is about: the kernel gets
                ESTALE.
            pinned: returns the version that an object had; the source may know another one by now.
            is_counted: whether the log has all lookups. Else no restored node is ever dropped: one that the kernel
                knows must be here.

        Returns:
            How many records could not be understood.
        """
        pinned = pinned or self._source.version
        lost = 0
        with self._guard:
            for record in records:
                try:
                    self._restore(record, pinned)
                except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError):
                    lost += 1
            self._inodes.finish_restore(is_counted=is_counted and not lost)
        return lost

    def _restore(self, record: list[object], pinned: Callable[[ObjectInfo], ObjectVersion]) -> None:
        kind, number, *rest = record
        values: list[Any] = rest
        if kind in ("looked", "answered", "forgot"):
            self._inodes.restore_requests(str(kind), number, values)
        elif kind == "counted":
            self.handles.restore("counted", whole_number(number), values)
        elif kind == "absent":
            # How long its predecessor told the kernel is not known: at most this.
            self._note_absent((whole_number(number), text(values[0])), self._now() + self.ttl)
        elif kind == "node":
            self._inodes.restore_node(
                whole_number(number), values, lambda info: self._known_version(info) or pinned(info)
            )
        elif (node := self._inodes.get(whole_number(number))) is None:
            return
        elif kind in ("open", "backing"):
            self.handles.restore(str(kind), node.id, values)
        else:
            self._inodes.restore_detail(str(kind), node, values, pinned)

    def _known_version(self, info: ObjectInfo) -> ObjectVersion | None:
        """Return the source's own version of a recorded object, if it is the same: the source knows more of it."""
        with suppress(KeyError):
            known = self._source.version(info)
            if (known.etag, known.size) == (info.etag, info.size):
                return known
        return None
