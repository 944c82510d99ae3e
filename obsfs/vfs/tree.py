"""Names, node ids, attributes and listings, and how long they are believed.

A node is one version of one path: its size and ETag never change. When the object at a path is replaced, the next
lookup after the metadata lifetime gives the path a new node, and whoever has the old one open keeps the old one.
Every node that the kernel may know, and every open of it, is written to a journal before the kernel is told, so
that a successor process can restore the tree (:meth:`Tree.restore`). So is every lookup that the kernel counts: a
node that it knows must be here, and one that it has forgotten may go.

What a listing shows: ``a/b`` under ``a/`` makes a directory ``a``; a directory hides an object of the same name; a
key that ends in ``/`` is a directory and no file; names that no directory can show (:func:`is_valid_name`) are
hidden and counted.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

from obsfs.errors import NotFoundError, ObsfsError, VersionChangedError
from obsfs.limits import available_memory
from obsfs.store.address import is_valid_name
from obsfs.store.types import ObjectInfo, ObjectVersion, Page

log = logging.getLogger(__name__)

ROOT = 1
_MAX_COUNTED = 4096
_MAX_PROBED = 4096
_MAX_ABSENT = 4096
_MAX_LOOKED = 1024
_MOST_ANSWERS = 3
"""To one lookup, when each was found to be outdated before it could be given."""
MAX_NAMES = 20_000_000
"""Of one directory that is listed: twenty times as many as are tried, and about 10 GB of memory."""
_ENTRY_BYTES = 400
"""Of a name, beside its text (measured)."""
_UNCOUNTED = 1 << 62
"""Lookups of a node that a predecessor did not count: it is never forgotten."""
_SERVER_BITS = 40
"""A server gives at most so many bits of ids, above its number: none of a predecessor, also one that was lost."""


class Source(Protocol):
    """The part of :class:`~obsfs.store.base.ObjectStore` that a tree asks."""

    def list(self, prefix: str) -> Iterator[Page]: ...
    def head(self, key: str) -> ObjectInfo: ...
    def version(self, info: ObjectInfo) -> ObjectVersion: ...


class InterruptedCallError(ObsfsError):
    """Nobody waits for the answer any more."""

    errno = errno.EINTR


class TooLongError(ObsfsError):
    """A directory has more names than may be held."""

    errno = errno.ENOMEM


class WouldBlockError(Exception):
    """The answer is not at hand: the bucket must be asked, which the caller did not want to wait for.

    `is_alone`: about one name, so that nobody else waits for the same answer; else about a directory.
    """

    def __init__(self, *, is_alone: bool = False) -> None:
        super().__init__()
        self.is_alone = is_alone


class Entry(NamedTuple):
    """A name in a directory. `info` is None for a directory."""

    name: str
    info: ObjectInfo | None


@dataclass(slots=True, eq=False)
class _Question:
    """What is asked about the directory `prefix`, or about one name in it.

    The one rule of what is believed: once somebody has learnt that a version is gone, or has asked for a refresh,
    nothing that was asked before is an answer to anybody who asks later. All that was asked and all that is being asked
    is therefore marked then.
    """

    prefix: str
    name: str | None = None
    is_outdated: bool = False


@dataclass
class Listing:
    """What is known of a directory since `loaded` (monotonic seconds); whole unless it stops at key `known_to`."""

    entries: dict[str, Entry]
    loaded: float
    question: _Question
    hidden: int = 0
    bad: int = 0
    """Entries that could not be read."""
    known_to: str | None = None
    pages: int = 1
    """How many pages the whole of it has, as far as that is known."""
    is_hint: bool = False
    """Whether it was made before anybody had looked: then only what it shows is believed."""
    probed: dict[str, tuple[float, Entry | None]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether it may be shown as the directory."""
        return self.known_to is None and not self.is_hint

    def knows(self, name: str, key: str) -> bool:
        """Whether presence or absence of `name` (whose object would be `key`) can be told from the entries."""
        is_covered = self.known_to is None or f"{key}/" <= self.known_to
        return is_covered and (name in self.entries or not self.is_hint)


@dataclass(slots=True)
class Node:
    """One version of one path. `key` is the object's, or the directory's prefix (ending in ``/``, or empty)."""

    id: int
    parent: int
    name: str
    key: str
    version: ObjectVersion | None
    mtime: float
    lookups: int = 0
    opens: int = 0
    direct_opens: int = 0
    backing: int = 0
    """By which the kernel knows the file that it reads by itself, while `direct_opens`."""
    is_outdated: bool = False
    """Whether a read has found that the bucket no longer has this version."""
    listing_version: float = 0.0
    """When the listing of this directory was loaded that the kernel was shown last (monotonic seconds)."""

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


def read_page(page: Page, prefix: str, entries: dict[str, Entry]) -> int:
    """Add a page's names to `entries`, by the rules at the top of this module. Returns how many keys are hidden."""
    hidden = 0
    for info in page.objects:
        name = info.key[len(prefix) :]
        if not name or (name.endswith("/") and is_valid_name(name[:-1])):
            if name:
                entries[name[:-1]] = Entry(name[:-1], None)
            continue
        shown = entries.get(name)
        if not is_valid_name(name) or (shown and shown.info is None):
            hidden += 1
        else:
            entries[name] = Entry(name, info)
    for common in page.prefixes:
        name = common[len(prefix) :].removesuffix("/")
        if not is_valid_name(name):
            hidden += 1
            continue
        shown = entries.get(name)
        hidden += bool(shown and shown.info)
        entries[name] = Entry(name, None)
    return hidden


class Tree:
    """The directory tree under `prefix`. Listings and absences are believed for `ttl` seconds.

    Beyond `max_entries` names the oldest listings are dropped, all but the newest, and :meth:`eviction_candidates`
    names what the kernel should forget. `record` gets every change that a successor must know, as lists for JSON.
    `server` is the number of this server of a mount, greater than those of its predecessors. Safe to use from many
    threads; only one of them asks the bucket about a directory at a time.

    A listing may have no end: it is given up when nobody waits for it, when it has MAX_NAMES names, and when those that
    are being loaded hold half of the memory that there was. `room` tells how many bytes are left.
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
        self.is_awaited: Callable[[int], bool] = lambda directory: True
        """Whether anybody still waits for names of a directory, by its node id: asked between pages of a listing."""
        self.max_entries = max_entries
        self._source = source
        self._record = record
        self._now = now
        self._room = room
        self._loading = 0
        self._guard = threading.RLock()
        self._asking: dict[str, _Asking] = {}
        self._questions: set[_Question] = set()
        self._listings: dict[str, Listing] = {}
        self._listed = 0
        self._next_id = (server << _SERVER_BITS) + ROOT + 1
        started = time.time()
        self._nodes = {ROOT: Node(ROOT, ROOT, "", prefix, None, started, lookups=1)}
        self._current: dict[tuple[int, str], int] = {}
        # Opens and releases by the kernel's numbers, the newest last, and whether each was direct.
        self._counted: OrderedDict[int, bool] = OrderedDict()
        # By the numbers of the last requests: the nodes of which they counted a lookup.
        self._looked: OrderedDict[int, list[int]] = OrderedDict()
        self._uncounted = 0
        # (parent id, name) of what the kernel may take to be absent, and until when (monotonic seconds).
        self._absent: OrderedDict[tuple[int, str], float] = OrderedDict()

    # nodes

    def node(self, node_id: int) -> Node:
        """The node with this id. Raises VersionChangedError: the kernel looks up the path anew then, if it can."""
        try:
            return self._nodes[node_id]
        except KeyError:
            raise VersionChangedError(f"node {node_id} is not known") from None

    def lookup(
        self,
        parent: Node,
        name: str,
        *,
        wait: bool = True,
        needs_new_node: Callable[[Node], bool] | None = None,
        unique: int = 0,
    ) -> Node:
        """The node of a name now, with one more lookup counted.

        Raises NotFoundError, WouldBlockError if the bucket must be asked and `wait` is false, and what the bucket
        says. `needs_new_node` tells of a node that is still right whether the path should get a fresh one all the same.
        `unique` is the number of the request, for :meth:`unanswered`.
        """
        for _ in range(_MOST_ANSWERS):
            with self._question(parent.key, name) as question:
                entry = self._find(parent, name, wait)
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
        """The nodes of names in a listing, with one more lookup counted of each; none if it is believed no more."""
        return self._enter_all(
            parent, [listing.entries[name] for name in names], listing.question, needs_new_node, unique
        )

    def _enter_all(
        self,
        parent: Node,
        entries: Iterable[Entry],
        question: _Question,
        needs_new_node: Callable[[Node], bool] | None,
        unique: int,
    ) -> list[Node]:
        changes: list[list[object]] = []
        with self._guard:
            if question.is_outdated:
                return []
            nodes = [self._enter(parent, entry, needs_new_node, changes) for entry in entries]
            for node in nodes:
                node.lookups += 1
            ids = [node.id for node in nodes]
            if unique:
                self._remember_lookups(unique, ids)
            if ids:
                self._record(*changes, ["looked", unique, ids])
            return nodes

    def _enter(
        self, parent: Node, entry: Entry, needs_new_node: Callable[[Node], bool] | None, changes: list[list[object]]
    ) -> Node:
        version = self._source.version(entry.info) if entry.info else None
        known = self._nodes.get(self._current.get((parent.id, entry.name), 0))
        is_right = known is not None and known.version == version and not known.is_outdated
        if known is None or not is_right or (needs_new_node is not None and needs_new_node(known)):
            key = entry.info.key if entry.info else f"{parent.key}{entry.name}/"
            mtime = entry.info.mtime if entry.info else self._nodes[ROOT].mtime
            known = Node(self._next_id, parent.id, entry.name, key, version, mtime)
            self._next_id += 1
            self._nodes[known.id] = known
            self._current[parent.id, entry.name] = known.id
            changes.extend(_describe(known))
        return known

    def _remember_lookups(self, unique: int, ids: list[int]) -> None:
        self._looked[unique] = ids
        if len(self._looked) > _MAX_LOOKED:
            self._looked.popitem(last=False)

    def unanswered(self, unique: int) -> None:
        """The kernel did not get the answer to a request: the lookups that it counted are none."""
        with self._guard:
            ids = self._looked.pop(unique, ())
            self.forget([(number, 1) for number in ids])

    def forget(self, lookups: Iterable[tuple[int, int]]) -> None:
        """The kernel dropped lookups: ``(node id, how many)``."""
        counts: list[object] = []
        with self._guard:
            left: list[Node] = []
            for number, count in lookups:
                node = self._nodes.get(number)
                if node is None or number == ROOT:
                    continue
                node.lookups -= count
                counts += [number, count]
                left.append(node)
            if counts:
                self._record(["forgot", *counts])
            for node in left:
                self._drop_if_unused(node)

    def _drop_if_unused(self, node: Node) -> None:
        # FORGET and RELEASE are served by different threads, so that either may come last.
        if node.lookups > 0 or node.opens or node.direct_opens:
            return
        if self._nodes.pop(node.id, None) is None:
            return
        self._drop_name(node)
        self._record(["forget", node.id])

    def _drop_name(self, node: Node) -> None:
        if self._is_current(node):
            del self._current[node.parent, node.name]

    def _is_current(self, node: Node) -> bool:
        return self._current.get((node.parent, node.name)) == node.id

    def count_open(self, node: Node, change: int, *, direct: bool, unique: int = 0) -> None:
        """Note that a node was opened (`change` 1) or released (-1), by passthrough if `direct`.

        `unique` is the number of the request, by which :meth:`counted` knows it when it is sent again.
        """
        with self._guard:
            if direct:
                node.direct_opens += change
            else:
                node.opens += change
            self._remember(unique, direct)
            self._record(["open", node.id, node.opens, node.direct_opens, unique, direct])
            self._drop_if_unused(node)

    def _remember(self, unique: int, direct: bool) -> None:
        if unique:
            self._counted[unique] = direct
            if len(self._counted) > _MAX_COUNTED:
                self._counted.popitem(last=False)

    def counted(self, unique: int) -> bool | None:
        """Whether the open or release with this number was direct; None when it was not counted yet."""
        with self._guard:
            return self._counted.get(unique)

    def set_backing(self, node: Node, backing: int) -> None:
        """Note by which id the kernel reads the file of a node."""
        with self._guard:
            node.backing = backing
            self._record(["backing", node.id, backing])

    def is_open(self, node_id: int) -> bool:
        """Whether somebody has a node open, other than by passthrough."""
        node = self._nodes.get(node_id)
        return node is not None and node.opens > 0

    def current_name(self, node_id: int) -> tuple[int, str] | None:
        """``(parent id, name)`` of the path of a node; None when that shows another one now."""
        with self._guard:
            node = self._nodes.get(node_id)
            return (node.parent, node.name) if node and self._is_current(node) else None

    def snapshot(self) -> Iterator[list[object]]:
        """The records that restore the tree as it is now: a journal made anew."""
        with self._guard:
            for node in self._nodes.values():
                if node.id == ROOT:
                    continue
                yield from _describe(node)
                yield ["lookups", node.id, max(0, node.lookups)]
                if node.is_outdated:
                    yield ["outdated", node.id]
                if node.opens or node.direct_opens:
                    yield ["open", node.id, node.opens, node.direct_opens, 0, False]
                    yield ["backing", node.id, node.backing]
            for parent, name in self._absent:
                yield ["absent", parent, name]
            for unique, direct in self._counted.items():
                yield ["counted", unique, direct]
            for unique, ids in self._looked.items():
                yield ["answered", unique, ids]

    def restore(
        self,
        records: Iterable[list[object]],
        pinned: Callable[[ObjectInfo], ObjectVersion] | None = None,
        *,
        is_counted: bool = True,
    ) -> int:
        """Take over what a predecessor recorded: the same node ids, versions, lookups and opens.

        Args:
            records: its journal. A record that cannot be understood costs what it is about: the kernel gets ESTALE.
            pinned: the version that an object had. The source may know another one by now.
            is_counted: whether the journal has all lookups. Else no restored node is forgotten, ever: one that the
                kernel knows must be here.

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
            for node in list(self._nodes.values()):
                if node.id == ROOT:
                    continue
                if lost or not is_counted or node.lookups >= _UNCOUNTED // 2:
                    node.lookups = _UNCOUNTED
                    self._uncounted += 1
                elif node.lookups <= 0 and not (node.opens or node.direct_opens):
                    del self._nodes[node.id]
                    self._drop_name(node)
            self._next_id = max(self._next_id, max(self._nodes) + 1)
        return lost

    def _restore(self, record: list[object], pinned: Callable[[ObjectInfo], ObjectVersion]) -> None:
        kind, number, *rest = record
        values: list[Any] = rest
        if kind == "looked":
            (ids,) = values
            for one in ids:
                if one in self._nodes:
                    self._nodes[one].lookups += 1
            if number:
                self._remember_lookups(_whole(number), [_whole(one) for one in ids])
        elif kind == "answered":
            (ids,) = values
            self._remember_lookups(_whole(number), [_whole(one) for one in ids])
        elif kind == "counted":
            self._remember(_whole(number), bool(values[0]))
        elif kind == "absent":
            # For how long its predecessor has told the kernel is not known: at most for as long as this.
            self._note_absent((_whole(number), _text(values[0])), self._now() + self.ttl)
        elif kind == "forgot":
            for one, count in zip([number, *values[1::2]], values[::2], strict=True):
                if (node := self._nodes.get(_whole(one))) is not None:
                    node.lookups -= _whole(count)
        elif kind == "node":
            node = self._node_of(_whole(number), values, pinned)
            self._nodes[node.id] = node
            self._current[node.parent, node.name] = node.id
        elif (node := self._nodes.get(_whole(number))) is None:
            return
        elif kind == "version":
            key, version_id = map(_text, values)
            info = ObjectInfo(key, node.size, node.mtime, node.version.etag if node.version else "")
            node.version = replace(pinned(info), version_id=version_id)
        elif kind == "lookups":
            node.lookups = _whole(values[0])
        elif kind == "open":
            opens, direct_opens, unique, direct = values
            node.opens, node.direct_opens = _whole(opens), _whole(direct_opens)
            self._remember(_whole(unique), bool(direct))
        elif kind == "backing":
            node.backing = _whole(values[0])
        elif kind == "outdated":
            node.is_outdated = True
        elif kind == "forget":
            del self._nodes[node.id]
            self._drop_name(node)

    def _node_of(self, number: int, values: list[Any], pinned: Callable[[ObjectInfo], ObjectVersion]) -> Node:
        parent, name, key, etag, size, mtime = values
        if number <= ROOT or not isinstance(mtime, int | float):
            raise ValueError(number)
        version: ObjectVersion | None = None
        if etag is not None:
            info = ObjectInfo(_text(key), _whole(size), float(mtime), _text(etag))
            version = self._known_version(info) or pinned(info)
        return Node(number, _whole(parent), _text(name), _text(key), version, float(mtime))

    def _known_version(self, info: ObjectInfo) -> ObjectVersion | None:
        """The source's own version of what is recorded, if that is the same: it knows more of it."""
        with suppress(KeyError):
            found = self._source.version(info)
            if (found.etag, found.size) == (info.etag, info.size):
                return found
        return None

    @property
    def over_limit(self) -> bool:
        """Whether the kernel may know more nodes than it should."""
        return len(self._nodes) - self._uncounted > self.max_entries

    def eviction_candidates(self) -> list[tuple[int, str]]:
        """``(parent id, name)`` of the files that the kernel has known for longest and nobody has open: as many as make
        room for a tenth of `max_entries`, and none while it is not crowded.

        Directories stay: one of them may be somebody's working directory. What was named has its next turn last: the
        kernel may not be able to forget it now.
        """
        with self._guard:
            if not self.over_limit:
                return []
            excess = len(self._nodes) - self._uncounted - self.max_entries + self.max_entries // 10
            idle = (
                node
                for node in self._nodes.values()
                if not (node.is_dir or node.opens or node.direct_opens) and node.lookups < _UNCOUNTED // 2
            )
            chosen = list(islice(idle, excess))
            for node in chosen:
                self._nodes[node.id] = self._nodes.pop(node.id)
            return [(node.parent, node.name) for node in chosen]

    def opened(self) -> list[Node]:
        """The nodes that somebody has open."""
        with self._guard:
            return [node for node in self._nodes.values() if node.opens or node.direct_opens]

    # listings

    def entry_ttl(self, directory: Node, name: str, node: Node | None) -> float:
        """For how many more seconds it is believed that a name stands for `node`, or, if that is None, for nothing.

        0 if something else is known by now.
        """
        with self._guard:
            listing, key = self._listings.get(directory.key), directory.key + name
            found = self._known(directory, name, key)
            if listing is None or found is WouldBlockError or not self._is_same(found, node):
                return 0.0
            is_listed = listing.knows(name, key)
            return self.remaining_ttl(listing.loaded if is_listed else listing.probed[name][0])

    def _is_same(self, found: Entry | type[WouldBlockError] | None, node: Node | None) -> bool:
        if not isinstance(found, Entry) or node is None:
            return found is None and node is None
        return (self._source.version(found.info) if found.info else None) == node.version

    def remaining_ttl(self, loaded: float) -> float:
        """For how many more seconds is believed what was asked at that moment (monotonic seconds)."""
        return max(0.0, self.ttl - (self._now() - loaded))

    def negative_ttl(self, directory: Node, name: str) -> float:
        """The `entry_ttl` of a name that is not there, of which the kernel is told now.

        It is 0 beyond _MAX_ABSENT names: the kernel keeps none that :meth:`refresh` does not know.
        """
        with self._guard:
            now, lifetime = self._now(), self.entry_ttl(directory, name, None)
            while self._absent and next(iter(self._absent.values())) <= now:
                self._absent.popitem(last=False)
            place = directory.id, name
            if lifetime <= 0 or (len(self._absent) >= _MAX_ABSENT and place not in self._absent):
                return 0.0
            self._note_absent(place, now + lifetime)
            self._record(["absent", *place])
            return lifetime

    def _note_absent(self, place: tuple[int, str], until: float) -> None:
        self._absent[place] = until
        self._absent.move_to_end(place)

    def refresh(self, directory: Node) -> list[tuple[int, str]]:
        """Believe nothing of what was known of a directory and those under it. Returns ``(parent id, name)`` of what
        the kernel may know there: names that it should ask for again."""
        with self._guard:
            self._outdate(lambda question: question.prefix.startswith(directory.key))
            under = {node.id for node in self._nodes.values() if node.key.startswith(directory.key)}
            return [place for place in (*self._current, *self._absent) if place[0] in under]

    def outdate(self, number: int) -> tuple[int, str] | None:
        """The bucket no longer has the version of a node: what was known of its name is believed no more.

        Returns ``(parent id, name)`` if the kernel may know the name as this node; it should ask again.
        """
        with self._guard:
            node = self._nodes.get(number)
            if node is None:
                return None
            is_news = not node.is_outdated
            if is_news:
                node.is_outdated = True
                self._record(["outdated", node.id])
            if is_news or self._is_shown(node):
                prefix = node.key.removesuffix(node.name)
                self._outdate(lambda one: one.prefix == prefix and one.name in (None, node.name))
            return (node.parent, node.name) if self._is_current(node) else None

    def _is_shown(self, node: Node) -> bool:
        """Whether what is known stands for the version of a node."""
        listing = self._listings.get(node.key.removesuffix(node.name))
        if listing is None:
            return False
        return self._is_same(listing.entries.get(node.name) or listing.probed.get(node.name, (0.0, None))[1], node)

    def _outdate(self, is_about: Callable[[_Question], bool]) -> None:
        """Believe no answer to these questions, whether it was given or not. The caller holds the guard."""
        for question in self._questions:
            question.is_outdated |= is_about(question)
        for prefix, listing in list(self._listings.items()):
            if is_about(listing.question):
                listing.question.is_outdated = True
                self._drop_listing(prefix)

    @contextmanager
    def _question(self, prefix: str, name: str | None = None) -> Iterator[_Question]:
        """What is asked while the block runs."""
        question = _Question(prefix, name)
        with self._guard:
            self._questions.add(question)
        try:
            yield question
        finally:
            with self._guard:
                self._questions.discard(question)

    def should_look_again(self, node: Node) -> bool:
        """Whether the name of a node is to be looked up before it is opened: it stands for a version that is gone."""
        with self._guard:
            return node.is_outdated and self._is_current(node)

    @property
    def hidden(self) -> int:
        """Keys that the listings now held could not show."""
        with self._guard:
            return sum(listing.hidden for listing in self._listings.values())

    @property
    def bad_entries(self) -> int:
        """Entries of the listings now held that could not be read, and are left out."""
        with self._guard:
            return sum(listing.bad for listing in self._listings.values())

    @property
    def listed_count(self) -> int:
        """Names in the listings now held, with the listings themselves."""
        return self._listed

    @property
    def node_count(self) -> int:
        """Nodes that the kernel may know."""
        return len(self._nodes)

    def listing(self, directory: Node, *, wait: bool = True) -> Listing:
        """The whole of a directory.

        Raises WouldBlockError as `lookup` does, InterruptedCallError once nobody waits, TooLongError when it is too
        much to hold.
        """
        fresh = self._fresh(directory.key)
        if fresh is None or not fresh.is_whole:
            if not wait:
                raise WouldBlockError
            with self._only(directory.key):
                fresh = self._fresh(directory.key)
                if fresh is None or not fresh.is_whole:
                    with self._bounded(self._awaited_pages(directory), directory.key) as pages:
                        fresh = self._load(directory.key, pages, whole=True)
        if not fresh.names:
            fresh.names = sorted(fresh.entries)
        return fresh

    def known(self, directory: int) -> Mapping[str, Entry]:
        """The entries of a directory as far as they are known now. Asks nobody."""
        node = self._nodes.get(directory)
        listing = self._fresh(node.key) if node else None
        return listing.entries if listing else {}

    def version(self, info: ObjectInfo) -> ObjectVersion:
        """The identity of what `info` describes."""
        return self._source.version(info)

    def _find(self, parent: Node, name: str, wait: bool) -> Entry:
        key = parent.key + name
        found = self._known(parent, name, key) if is_valid_name(name) else None
        if found is WouldBlockError:
            if not wait:
                is_listed = not self._must_load(self._fresh(parent.key), name)
                raise WouldBlockError(is_alone=is_listed and not self._is_listing_cheaper(parent.key))
            with self._only(parent.key):
                if self._must_load(self._fresh(parent.key), name):
                    self._load(parent.key, self._source.list(parent.key), whole=False)
                found = self._known(parent, name, key)
            if found is WouldBlockError:
                found = self._find_in_long(parent, name, key)
        if not isinstance(found, Entry):
            raise NotFoundError(f"{key} does not exist")
        return found

    def _known(self, parent: Node, name: str, key: str) -> Entry | type[WouldBlockError] | None:
        listing = self._fresh(parent.key)
        if listing is None:
            return WouldBlockError
        if listing.knows(name, key):
            return listing.entries.get(name)
        when, probed = listing.probed.get(name, (-self.ttl, None))
        return probed if self._now() - when < self.ttl else WouldBlockError

    def _find_in_long(self, parent: Node, name: str, key: str) -> Entry | None:
        """Find a name in a directory that is too long for one page."""
        if self._is_listing_cheaper(parent.key):
            try:
                return self.listing(parent).entries.get(name)
            except TooLongError:
                if (listing := self._listings.get(parent.key)) is not None:
                    listing.pages = 1  # by which it is not tried again
        return self._probe(parent, name, key)

    @staticmethod
    def _must_load(listing: Listing | None, name: str) -> bool:
        """Whether the first page of a directory has to be asked for before anything can be said of a name."""
        return listing is None or (listing.is_hint and name not in listing.entries)

    def _is_listing_cheaper(self, prefix: str) -> bool:
        """Whether asking name by name has cost as much as a listing of all names would: somebody walks through them."""
        listing = self._listings.get(prefix)
        return listing is not None and 1 < listing.pages <= len(listing.probed)

    def _probe(self, parent: Node, name: str, key: str) -> Entry | None:
        """Ask for one name of a directory that is too long for one page."""
        entry: Entry | None = None
        asked = self._now()
        with self._question(parent.key, name) as question:
            first = next(self._source.list(f"{key}/"))
            if first.objects or first.prefixes:
                entry = Entry(name, None)
            else:
                with suppress(NotFoundError):
                    entry = Entry(name, self._source.head(key))
            with self._guard:
                listing = self._listings.get(parent.key)
                if listing is not None and not question.is_outdated:
                    listing.probed[name] = asked, entry
                    if len(listing.probed) > _MAX_PROBED:
                        del listing.probed[next(iter(listing.probed))]
        return entry

    def _fresh(self, prefix: str) -> Listing | None:
        listing = self._listings.get(prefix)
        if listing is None or listing.question.is_outdated or self._now() - listing.loaded >= self.ttl:
            return None
        return listing

    def seed_root(self, page: Page) -> None:
        """The first page of the root, from before anybody has looked."""
        self._load(self._nodes[ROOT].key, [page], whole=False).is_hint = True

    def _awaited_pages(self, directory: Node) -> Iterator[Page]:
        """The pages of a directory, for as long as somebody waits: a listing may have no end."""
        for page in self._source.list(directory.key):
            yield page
            if not page.is_last and not self.is_awaited(directory.id):
                raise InterruptedCallError(f"nobody waits for the listing of {directory.key}")

    @contextmanager
    def _bounded(self, pages: Iterator[Page], prefix: str) -> Iterator[Iterator[Page]]:
        """Pages of a directory, for as long as they may be held. What they hold counts while the block runs."""
        held = 0

        def bounded() -> Iterator[Page]:
            nonlocal held
            count = 0
            for page in pages:
                count += len(page.objects) + len(page.prefixes) + page.bad
                size = _memory_of(page)
                held += size
                with self._guard:
                    self._loading += size
                if count > MAX_NAMES or self._is_memory_short():
                    error = TooLongError(f"{prefix} has {count} names or more, which is too much to hold")
                    log.warning("%s: mount a prefix below it, or open files by their names", error)
                    raise error
                yield page

        try:
            yield bounded()
        finally:
            with self._guard:
                self._loading -= held

    def _is_memory_short(self) -> bool:
        """Whether the listings that are being loaded hold more than is left."""
        try:
            return self._loading > self._room()
        except OSError:  # no descriptor is left to look with
            return False

    def _load(self, prefix: str, pages: Iterable[Page], *, whole: bool) -> Listing:
        """What the bucket says of a directory: its first page, or all pages."""
        with self._question(prefix) as question:
            listing, before = Listing({}, self._now(), question), self._listings.get(prefix)
            for number, page in enumerate(pages, 1):
                listing.hidden += read_page(page, prefix, listing.entries)
                listing.bad += page.bad
                listing.pages = number
                if not whole:
                    if not page.is_last:
                        last = max([info.key for info in page.objects[-1:]] + page.prefixes[-1:], default="")
                        listing.known_to, listing.pages = last, before.pages if before else 1
                    break
            with self._guard:
                self._drop_listing(prefix)
                self._listings[prefix] = listing
                self._listed += 1 + len(listing.entries)
                # In the order in which they were loaded.
                for oldest in list(islice(self._listings, 64)):
                    if self._listed > self.max_entries and oldest != prefix:
                        self._drop_listing(oldest)
        return listing

    def _drop_listing(self, prefix: str) -> None:
        if (old := self._listings.pop(prefix, None)) is not None:
            self._listed -= 1 + len(old.entries)

    @contextmanager
    def _only(self, prefix: str) -> Iterator[None]:
        """While the block runs, nobody else asks about this directory."""
        with self._guard:
            asking = self._asking.setdefault(prefix, _Asking())
            asking.users += 1
        try:
            with asking.lock:
                yield
        finally:
            with self._guard:
                asking.users -= 1
                if not asking.users:
                    del self._asking[prefix]


def _memory_of(page: Page) -> int:
    """Bytes that the names of a page take once they are entries: each is there as a key, and as a name."""
    texts = [text for info in page.objects for text in (info.key, info.key, info.etag)]
    texts += [text for prefix in page.prefixes for text in (prefix, prefix)]
    return _ENTRY_BYTES * (len(page.objects) + len(page.prefixes)) + sum(map(sys.getsizeof, texts))


@dataclass(slots=True)
class _Asking:
    """Those who ask about one directory, or wait to."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


def _describe(node: Node) -> Iterator[list[object]]:
    """The records of a node."""
    version = node.version
    etag = version.etag if version else None
    yield ["node", node.id, node.parent, node.name, node.key, etag, node.size, node.mtime]
    if version is not None and (version.version_id or version.key != node.key):
        yield ["version", node.id, version.key, version.version_id]


def _whole(value: object) -> int:
    """A number from a journal. Raises ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(value)
    return value


def _text(value: object) -> str:
    """Text from a journal. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(value)
    return value
