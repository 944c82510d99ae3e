"""What the bucket says of directories, and how long that is believed.

What a listing shows: ``a/b`` under ``a/`` makes a directory ``a``; a directory hides an object of the same name; a
key that ends in ``/`` is a directory and no file; names that no directory can show (:func:`is_valid_name`) are
hidden and counted.
"""

from __future__ import annotations

import errno
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, Protocol

from obsfs.errors import NotFoundError, ObsfsError
from obsfs.store.address import is_valid_name
from obsfs.store.types import ObjectInfo, ObjectVersion, Page
from obsfs.vfs.inodes import Node

log = logging.getLogger(__name__)

MAX_NAMES = 20_000_000
"""Names of one directory that is listed: twenty times as many as were tried, about 10 GB of memory."""
_MAX_PROBED = 4096
"""Names of one long directory whose own answers are kept."""
_ENTRY_BYTES = 400
"""Memory of a name, without its text (measured)."""


class Source(Protocol):
    """The part of :class:`~obsfs.store.base.ObjectStore` that a tree asks."""

    def list(self, prefix: str) -> Iterator[Page]: ...
    def head(self, key: str) -> ObjectInfo: ...
    def version(self, info: ObjectInfo) -> ObjectVersion: ...


class InterruptedCallError(ObsfsError):
    """The request was interrupted: no process waits for the answer."""

    errno = errno.EINTR


class TooLongError(ObsfsError):
    """A directory has more names than the memory may hold."""

    errno = errno.ENOMEM


class WouldBlockError(Exception):
    """The answer is not in memory, and the caller does not want to wait for the bucket or the disk.

    Args:
        is_alone: whether the question is about one name, so that no other call waits for the same answer; else it is
            about a directory.
    """

    def __init__(self, *, is_alone: bool = False) -> None:
        super().__init__()
        self.is_alone = is_alone


class Entry(NamedTuple):
    """A name in a directory. `info` is None for a directory."""

    name: str
    info: ObjectInfo | None


@dataclass(slots=True, eq=False)
class Question:
    """A question to the bucket about the directory `prefix`, or about one name in it.

    One rule decides what is believed: after a reader finds that a version is gone, or a user asks for a refresh, no
    answer to an earlier question counts. So both mark every earlier question, answered or not, as outdated.
    """

    prefix: str
    name: str | None = None
    is_outdated: bool = False


@dataclass
class Listing:
    """What is known of a directory."""

    entries: dict[str, Entry]
    loaded: float
    """When the bucket was asked (monotonic seconds)."""
    question: Question
    hidden: int = 0
    """Keys that a directory cannot show."""
    bad: int = 0
    """Entries that could not be read."""
    known_to: str | None = None
    """The key at which it stops; None if it has all names."""
    pages: int = 1
    """Pages of the whole directory, if that is known."""
    is_hint: bool = False
    """Whether it was loaded before any lookup: only presence of a name is believed, not absence."""
    probed: dict[str, tuple[float, Entry | None]] = field(default_factory=dict)
    """Answers about single names, and when the bucket was asked (monotonic seconds)."""
    names: list[str] = field(default_factory=list)
    """Sorted; empty until a directory is opened."""

    @property
    def is_whole(self) -> bool:
        """Whether it has every name of the directory."""
        return self.known_to is None and not self.is_hint

    def knows(self, name: str, key: str) -> bool:
        """Return whether the entries tell if `name` (whose object would be `key`) is present."""
        is_covered = self.known_to is None or f"{key}/" <= self.known_to
        return is_covered and (name in self.entries or not self.is_hint)


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


class Listings:
    """Listings of directories, and answers about single names. Each is believed for `ttl` seconds.

    Beyond `max_entries` names the oldest listings are dropped, all but the newest. Safe to use from many threads; only
    one of them asks the bucket about a directory at a time.

    A listing may have no end. It is given up when no request waits for it, when it has MAX_NAMES names, and when the
    listings that are being loaded take more memory than is left.

    Args:
        source: the bucket.
        ttl: seconds.
        guard: the lock of the tree.
        now: monotonic seconds.
        max_entries: names to hold.
        room: returns the bytes of memory that are left.
    """

    def __init__(
        self,
        source: Source,
        ttl: float,
        guard: threading.RLock,
        now: Callable[[], float],
        *,
        max_entries: int,
        room: Callable[[], int],
    ) -> None:
        self.is_awaited: Callable[[int], bool] = lambda directory: True
        """Whether a request waits for names of a directory (a node id): asked between pages of a listing."""
        self.ttl = ttl
        self._source = source
        self._guard = guard
        self._now = now
        self._max_entries = max_entries
        self._room = room
        self._loading = 0
        self._asking: dict[str, _Asking] = {}
        self._questions: set[Question] = set()
        self._listings: dict[str, Listing] = {}
        self._listed = 0

    def entry_ttl(self, directory: Node, name: str, node: Node | None) -> float:
        """Return for how many more seconds a name stands for `node`, or, if that is None, for nothing.

        It is 0 if something else is known by now.
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
        """Return for how many more seconds an answer from `loaded` (monotonic seconds) is believed."""
        return max(0.0, self.ttl - (self._now() - loaded))

    def shows(self, node: Node) -> bool:
        """Return whether the path of a node is known to stand for its version."""
        listing = self._listings.get(node.key.removesuffix(node.name))
        if listing is None:
            return False
        return self._is_same(listing.entries.get(node.name) or listing.probed.get(node.name, (0.0, None))[1], node)

    def outdate(self, is_about: Callable[[Question], bool]) -> None:
        """Stop believing the answers to these questions, those to come included. The caller holds the guard."""
        for question in self._questions:
            question.is_outdated |= is_about(question)
        for prefix, listing in list(self._listings.items()):
            if is_about(listing.question):
                listing.question.is_outdated = True
                self._drop_listing(prefix)

    @contextmanager
    def question(self, prefix: str, name: str | None = None) -> Iterator[Question]:
        """Have a question that :meth:`outdate` can mark while the block runs."""
        question = Question(prefix, name)
        with self._guard:
            self._questions.add(question)
        try:
            yield question
        finally:
            with self._guard:
                self._questions.discard(question)

    @property
    def hidden(self) -> int:
        """Keys that the listings in memory could not show."""
        with self._guard:
            return sum(listing.hidden for listing in self._listings.values())

    @property
    def bad_entries(self) -> int:
        """Entries of the listings in memory that could not be read, and are left out."""
        with self._guard:
            return sum(listing.bad for listing in self._listings.values())

    @property
    def listed_count(self) -> int:
        """Names in the listings in memory, plus the listings themselves."""
        return self._listed

    def listing(self, directory: Node, *, wait: bool = True) -> Listing:
        """Return the whole of a directory.

        Raises:
            WouldBlockError: the bucket must be asked, and `wait` is false.
            InterruptedCallError: every request that waited for it was interrupted.
            TooLongError: it has too many names for the memory.
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

    def known(self, directory: Node) -> Mapping[str, Entry]:
        """Return the entries of a directory that are known now. Does not ask the bucket."""
        listing = self._fresh(directory.key)
        return listing.entries if listing else {}

    def find(self, parent: Node, name: str, wait: bool) -> Entry:
        """Return the entry of a name. Raises NotFoundError, and WouldBlockError if `wait` is false."""
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
        """Find a name in a directory that has more than one page."""
        if self._is_listing_cheaper(parent.key):
            try:
                return self.listing(parent).entries.get(name)
            except TooLongError:
                if (listing := self._listings.get(parent.key)) is not None:
                    listing.pages = 1  # do not try again
        return self._probe(parent, name, key)

    @staticmethod
    def _must_load(listing: Listing | None, name: str) -> bool:
        """Return whether to load the first page of a directory before asking for one name."""
        return listing is None or (listing.is_hint and name not in listing.entries)

    def _is_listing_cheaper(self, prefix: str) -> bool:
        """Return whether asking for single names has cost as much as a whole listing: a program walks through them."""
        listing = self._listings.get(prefix)
        return listing is not None and 1 < listing.pages <= len(listing.probed)

    def _probe(self, parent: Node, name: str, key: str) -> Entry | None:
        """Ask the bucket for one name of a directory that has more than one page."""
        entry: Entry | None = None
        asked = self._now()
        with self.question(parent.key, name) as question:
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

    def seed(self, prefix: str, page: Page) -> None:
        """Take the first page of a directory, from before any lookup. A name that it does not have is asked for."""
        self._load(prefix, [page], whole=False).is_hint = True

    def _awaited_pages(self, directory: Node) -> Iterator[Page]:
        """Yield the pages of a directory while a request waits for them: a listing may have no end."""
        for page in self._source.list(directory.key):
            yield page
            if not page.is_last and not self.is_awaited(directory.id):
                raise InterruptedCallError(f"no request waits for the listing of {directory.key}")

    @contextmanager
    def _bounded(self, pages: Iterator[Page], prefix: str) -> Iterator[Iterator[Page]]:
        """Yield pages while the memory may hold them. Their size counts while the block runs."""
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
        """Return whether the listings that are being loaded take more memory than is left."""
        try:
            return self._loading > self._room()
        except OSError:  # no descriptor is left to look with
            return False

    def _load(self, prefix: str, pages: Iterable[Page], *, whole: bool) -> Listing:
        """Load the first page of a directory, or all pages, and keep the listing."""
        with self.question(prefix) as question:
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
                    if self._listed > self._max_entries and oldest != prefix:
                        self._drop_listing(oldest)
        return listing

    def _drop_listing(self, prefix: str) -> None:
        if (old := self._listings.pop(prefix, None)) is not None:
            self._listed -= 1 + len(old.entries)

    @contextmanager
    def _only(self, prefix: str) -> Iterator[None]:
        """Hold the right to ask about this directory while the block runs."""
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
    """Return the bytes that the names of a page take as entries, each of them as a key and as a name."""
    texts = [text for info in page.objects for text in (info.key, info.key, info.etag)]
    texts += [text for prefix in page.prefixes for text in (prefix, prefix)]
    return _ENTRY_BYTES * (len(page.objects) + len(page.prefixes)) + sum(map(sys.getsizeof, texts))


@dataclass(slots=True)
class _Asking:
    """The calls that ask about one directory, or wait to."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
