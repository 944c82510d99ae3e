"""Names and listings against a reference, with a bucket in memory and a clock that the test turns."""

from __future__ import annotations

import errno
import hashlib
import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.errors import NotFoundError, VersionChangedError
from obsfs.store.address import is_valid_name
from obsfs.store.memory import MemoryStore, Request
from obsfs.store.types import ObjectInfo, Page
from obsfs.vfs import listings
from obsfs.vfs.handles import Mode
from obsfs.vfs.inodes import ROOT, Node
from obsfs.vfs.listings import Entry, InterruptedCallError, TooLongError, WouldBlockError, read_page
from obsfs.vfs.tree import Tree


def bucket_of(texts: Mapping[str, str], page: int = 1000) -> MemoryStore:
    """A bucket whose objects are these texts."""
    return MemoryStore({key: text.encode() for key, text in texts.items()}, page_size=page, now=lambda: 1.0)


def put(bucket: MemoryStore, text: str, *keys: str) -> None:
    """Write the same text to each of the keys; to all that there are, where none is named."""
    for key in keys or bucket.keys:
        bucket.put(key, text.encode())


def asked(bucket: MemoryStore) -> int:
    """How often a tree has asked the bucket."""
    return sum(request.operation in ("page", "head") for request in bucket.requests)


def meanwhile(bucket: MemoryStore, act: Callable[[], object], *, answer: int = 1) -> None:
    """Have something happen once, while an answer is on its way: the next one, or the one after so many."""
    left = [answer]

    def on_answer(request: Request) -> None:
        if request.operation not in ("page", "head"):
            return
        left[0] -= 1
        if left[0] == 0:
            bucket.after = lambda request: None
            act()

    bucket.after = on_answer


def tag_of(text: str) -> str:
    return f'"{hashlib.md5(text.encode()).hexdigest()}"'


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


names = st.text("ab./", min_size=1, max_size=6)


@given(keys=st.dictionaries(names, st.sampled_from(["1", "2"]), max_size=12), page=st.integers(1, 5))
def test_it_shows_what_the_rules_say(keys: dict[str, str], page: int) -> None:
    tree = Tree(bucket_of(keys, page), "", 60, now=Clock())
    shown: dict[str, bool] = {}
    for key in keys:
        head, slash, _ = key.partition("/")
        if is_valid_name(head):
            shown[head] = shown.get(head, False) or bool(slash)
    listing = tree.listing(tree.node(ROOT))
    assert {name: entry.info is None for name, entry in listing.entries.items()} == shown
    fresh = Tree(bucket_of(keys, page), "", 60, now=Clock())
    for name in ("a", "b", "ab", "ba", "aa", ".a", "..."):
        if name in shown:
            node = fresh.lookup(fresh.node(ROOT), name)
            assert node.is_dir == shown[name]
            assert node.is_dir or (node.version is not None and node.version.etag == tag_of(keys[name]))
        else:
            with pytest.raises(NotFoundError):
                fresh.lookup(fresh.node(ROOT), name)


_HOSTILE = st.text(st.one_of(st.sampled_from("./\\\0\n\x1b~\u202e\ud800"), st.characters()), max_size=300)


@given(st.lists(_HOSTILE), st.lists(_HOSTILE), _HOSTILE)
def test_no_key_leads_out_of_the_mount(keys: list[str], prefixes: list[str], prefix: str) -> None:
    entries: dict[str, Entry] = {}
    page = Page([ObjectInfo(prefix + key, 1, 1.0, '"e"') for key in keys], [f"{prefix}{one}/" for one in prefixes])
    read_page(page, prefix, entries)
    for name in entries:
        assert name not in {"", ".", ".."}
        assert not set(name) & set("/\0")
        assert len(name.encode()) <= 255


def test_beyond_the_bound_the_oldest_listings_go_and_the_kernel_is_to_forget_files() -> None:
    bucket = bucket_of({f"d{n:02}/{m:03}": "1" for n in range(20) for m in range(100)})
    tree = Tree(bucket, "", 60, now=Clock(), max_entries=1000)
    root = tree.node(1)
    for n in range(20):
        directory = tree.lookup(root, f"d{n:02}")
        listing = tree.listing(directory)
        for name in listing.entries:
            tree.enter(directory, listing, [name])
            assert tree.listed_count <= 1000 + 101
    assert tree.over_limit
    opened = tree.lookup(tree.lookup(root, "d00"), "000")
    tree.handles.open(opened.id, Mode.BUFFERED)
    candidates = tree.eviction_candidates()
    nodes = {(node.parent, node.name): node for node in tree._inodes._nodes.values()}
    assert not any(nodes[place].is_dir for place in candidates)
    assert (opened.parent, opened.name) not in candidates
    for place in candidates:
        tree.forget([(nodes[place].id, 1)])
    assert tree.node_count == 900
    assert tree.eviction_candidates() == []


def test_a_directory_of_a_hundred_thousand_lists_and_looks_up() -> None:
    bucket = bucket_of({f"many/file-{n:06}": "1" for n in range(100_000)})
    tree = Tree(bucket, "", 60, now=Clock())
    directory = tree.lookup(tree.node(ROOT), "many")
    before = asked(bucket)
    assert tree.lookup(directory, "file-099999").size == 1
    assert asked(bucket) - before <= 3, "one name needs no whole listing"
    assert len(tree.listing(directory).names) == 100_000
    assert asked(bucket) - before <= 103
    with pytest.raises(NotFoundError):
        tree.lookup(directory, "file-1")
    assert asked(bucket) - before <= 103


def test_who_walks_through_a_long_directory_for_longer_than_names_are_believed_does_not_ask_for_each() -> None:
    """Of a directory that was listed before, some names are asked for one by one; then it is listed again."""
    bucket, clock = bucket_of({f"{number:04}": "1" for number in range(500)}, page=10), Clock()
    tree = Tree(bucket, "", 60, now=clock)
    root = tree.node(ROOT)
    names_of = list(tree.listing(root).names)
    for _ in range(3):
        clock.now += 61
        before = asked(bucket)
        for name in reversed(names_of):
            assert tree.lookup(root, name).key == name
        assert asked(bucket) - before <= 1 + 3 * 50  # the first page, a list and a head for each of 50, 50 pages
    clock.now += 61
    before = asked(bucket)
    tree.lookup(root, "0400")
    assert asked(bucket) - before == 3  # one name does not cost a listing
    put(bucket, "2", "0401")
    bucket.delete("0402")
    clock.now += 61
    for name in reversed(names_of):
        if name == "0402":
            with pytest.raises(NotFoundError):
                tree.lookup(root, name)
        else:
            version = tree.lookup(root, name).version
            assert version is not None
            assert version.etag == tag_of("2" if name == "0401" else "1")


def test_absence_is_remembered_until_the_lifetime_is_over() -> None:
    bucket, clock = bucket_of({"a": "1"}), Clock()
    tree = Tree(bucket, "", 10, now=clock)
    root = tree.node(ROOT)
    for _ in range(3):
        with pytest.raises(NotFoundError):
            tree.lookup(root, "new")
    assert asked(bucket) == 1
    assert tree.entry_ttl(root, "new", None) == 10
    put(bucket, "1", "new")
    clock.now += 9
    assert tree.entry_ttl(root, "new", None) == 1
    with pytest.raises(NotFoundError):
        tree.lookup(root, "new")
    clock.now += 2
    assert tree.lookup(root, "new").size == 1


def test_who_will_not_wait_is_told_so() -> None:
    tree = Tree(bucket_of({"a/b": "1"}), "", 10, now=Clock())
    with pytest.raises(WouldBlockError):
        tree.lookup(tree.node(ROOT), "a", wait=False)
    directory = tree.lookup(tree.node(ROOT), "a")
    with pytest.raises(WouldBlockError):
        tree.listing(directory, wait=False)


def test_a_new_version_is_a_new_node_with_the_same_inode_number() -> None:
    bucket, clock = bucket_of({"a": "1"}), Clock()
    tree = Tree(bucket, "", 10, now=clock)
    old = tree.lookup(tree.node(ROOT), "a")
    assert tree.lookup(tree.node(ROOT), "a") is old
    put(bucket, "22", "a")
    clock.now += 11
    new = tree.lookup(tree.node(ROOT), "a")
    assert new.id != old.id
    assert new.ino == old.ino
    assert tree.node(old.id).size == 1
    assert new.size == 2


def test_forgotten_nodes_go_and_open_ones_stay() -> None:
    tree = Tree(bucket_of({"a": "1"}), "", 10, now=Clock())
    node = tree.lookup(tree.node(ROOT), "a")
    handle = tree.handles.open(node.id, Mode.BUFFERED)
    tree.forget([(node.id, 1)])
    assert tree.node(node.id) is node
    tree.handles.release(handle)
    with pytest.raises(VersionChangedError):
        tree.node(node.id)
    tree.forget([(ROOT, 1)])
    assert tree.node(ROOT).is_dir


def test_a_successor_knows_what_its_predecessor_told_the_kernel() -> None:
    records: list[list[object]] = []
    tree = Tree(
        bucket_of({"a/x": "1", "b": "22", "c": "3"}), "", 10, lambda *changes: records.extend(changes), now=Clock()
    )
    root = tree.node(ROOT)
    inner = tree.lookup(tree.lookup(root, "a"), "x")
    opened = tree.lookup(root, "b")
    handle = tree.handles.open(opened.id, Mode.PASSTHROUGH)
    gone = tree.lookup(root, "c")
    tree.forget([(gone.id, 1)])
    for source in (records, list(tree.snapshot())):
        successor = Tree(bucket_of({}), "", 10, now=Clock())
        successor.restore(source)
        assert successor.node(inner.id).version == inner.version
        file, mode = successor.handles.find(handle)
        assert (file.node, file.passthrough, mode) == (opened.id, 1, Mode.PASSTHROUGH)
        assert successor.node(opened.id).ino == opened.ino
        with pytest.raises(VersionChangedError):
            successor.node(gone.id)


def test_a_successor_can_refresh_every_name_that_the_kernel_takes_to_be_absent() -> None:
    records: list[list[object]] = []
    bucket, clock = bucket_of({"d/x": "1"}), Clock()
    tree = Tree(bucket, "", 60, lambda *changes: records.extend(changes), now=clock)
    directory = tree.lookup(tree.node(ROOT), "d")
    told = {(directory.id, "new"), (directory.id, "é"), (ROOT, "new")}
    for parent, name in told:
        with pytest.raises(NotFoundError):
            tree.lookup(tree.node(parent), name)
        tree.negative_ttl(tree.node(parent), name)
    for source in (records, list(tree.snapshot())):
        successor = Tree(bucket, "", 60, now=clock)
        assert successor.restore(source) == 0
        assert told <= set(successor.refresh(successor.node(ROOT)))


def test_a_successor_knows_which_versions_are_gone() -> None:
    records: list[list[object]] = []
    bucket = bucket_of({"a": "1", "b": "1"})
    tree = Tree(bucket, "", 60, lambda *changes: records.extend(changes), now=Clock())
    gone, right = (tree.lookup(tree.node(ROOT), name) for name in "ab")
    tree.outdate(gone.id)
    for source in (records, list(tree.snapshot())):
        successor = Tree(bucket, "", 60, now=Clock())
        assert successor.restore(source) == 0
        assert successor.must_look_up_again(successor.node(gone.id))
        assert not successor.must_look_up_again(successor.node(right.id))


def test_the_kernel_keeps_no_absent_name_that_a_refresh_would_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("obsfs.vfs.tree._MAX_ABSENT", 4)
    clock = Clock()
    tree = Tree(bucket_of({}), "", 60, now=clock)
    root = tree.node(ROOT)
    tree.listing(root)
    kept = [name for name in "abcdefgh" if tree.negative_ttl(root, name) > 0]
    assert kept == list("abcd")
    assert [name for _, name in tree.refresh(root)] == kept
    # A name that is told again takes no room, and what the kernel no longer believes makes some.
    tree.listing(root)
    assert tree.negative_ttl(root, "b") == 60
    clock.now += 61
    tree.listing(root)
    assert [name for name in "efghi" if tree.negative_ttl(root, name) > 0] == list("efgh")


def test_what_came_with_the_mount_hides_nothing_that_came_since() -> None:
    bucket = bucket_of({"old/a": "1"})
    tree = Tree(bucket, "", 60, now=Clock())
    tree.seed_root(next(bucket.list("")))
    root = tree.node(ROOT)
    before = asked(bucket)
    assert tree.lookup(root, "old", wait=False).is_dir
    put(bucket, "1", "new/a")
    with pytest.raises(WouldBlockError):
        tree.lookup(root, "new", wait=False)
    assert tree.lookup(root, "new").is_dir
    assert asked(bucket) == before + 1
    with pytest.raises(NotFoundError):
        tree.lookup(root, "neither", wait=False)
    tree.seed_root(next(bucket.list("")))
    put(bucket, "1", "newer/a")
    assert "newer" in tree.listing(root).names


def test_after_a_refresh_the_bucket_is_asked_again() -> None:
    bucket = bucket_of({"a/b/1": "x", "c": "x"})
    tree = Tree(bucket, "", 60, now=Clock())
    root = tree.node(ROOT)
    a = tree.lookup(root, "a")
    b = tree.lookup(a, "b")
    tree.lookup(b, "1")
    for parent, name in ((root, "d"), (b, "2")):
        with pytest.raises(NotFoundError):
            tree.lookup(parent, name)
        assert tree.negative_ttl(parent, name) == 60
    put(bucket, "x", "d", "a/b/2")
    put(bucket, "y", "a/b/1")
    assert set(tree.refresh(a)) == {(a.id, "b"), (b.id, "1"), (b.id, "2")}
    tree.lookup(b, "2")
    found = tree.lookup(b, "1")
    assert found.version is not None
    assert found.version.etag == tag_of("y")
    with pytest.raises(NotFoundError):
        tree.lookup(root, "d")
    assert (ROOT, "d") in tree.refresh(root)
    tree.lookup(root, "d")


def test_a_listing_that_was_asked_for_before_a_refresh_is_not_kept() -> None:
    bucket = bucket_of({"a": "x"})
    tree = Tree(bucket, "", 60, now=Clock())
    meanwhile(bucket, lambda: (put(bucket, "x", "b"), tree.refresh(tree.node(ROOT))))
    assert set(tree.listing(tree.node(ROOT)).entries) == {"a"}
    assert set(tree.listing(tree.node(ROOT)).entries) == {"a", "b"}


def etag(node: Node) -> str:
    assert node.version is not None
    return next(text for text in ("1", "2", "3", "x", "y") if node.version.etag == tag_of(text))


@pytest.mark.parametrize("page", [1000, 2])
@pytest.mark.parametrize("how", ["gone", "refresh"])
def test_nothing_that_was_asked_before_is_an_answer_afterwards(page: int, how: str) -> None:
    """A lookup is on its way to the bucket while a reader learns that a version is gone, or somebody asks for a
    refresh: also in a directory that is too long for a page, where the bucket is asked for one name."""
    bucket, clock = bucket_of(dict.fromkeys(("d/a", "d/b", "d/c", "d/d"), "1"), page), Clock()
    tree = Tree(bucket, "", 60, now=clock)
    directory = tree.lookup(tree.node(ROOT), "d")
    old = tree.lookup(directory, "d")
    clock.now += 61
    tree.lookup(tree.node(ROOT), "d")
    if page == 2:
        tree.lookup(directory, "a")  # so that what is on its way is about one name

    def replaced() -> None:
        put(bucket, "2")
        if how == "gone":
            tree.outdate(old.id)
        else:
            tree.refresh(tree.node(ROOT))

    meanwhile(bucket, replaced)
    assert etag(tree.lookup(directory, "d")) == "2"
    new = tree.lookup(directory, "d")
    assert etag(new) == "2"
    assert not tree.must_look_up_again(new)
    assert tree.entry_ttl(directory, "d", new) == 60
    assert tree.entry_ttl(directory, "d", old) == 0


def test_a_name_that_was_absent_before_a_refresh_is_not_said_to_be() -> None:
    bucket = bucket_of(dict.fromkeys(("d/a", "d/b", "d/c"), "1"), page=2)
    tree = Tree(bucket, "", 60, now=Clock())
    directory = tree.lookup(tree.node(ROOT), "d")
    tree.lookup(directory, "a")

    def made() -> None:
        put(bucket, "1", "d/new")
        tree.refresh(directory)
        tree.lookup(directory, "new")

    meanwhile(bucket, made, answer=2)
    with pytest.raises(NotFoundError):
        tree.lookup(directory, "new")
    # By now it is known to be there, and the kernel is not told that it is not.
    assert tree.negative_ttl(directory, "new") == 0
    assert etag(tree.lookup(directory, "new")) == "1"


def test_a_name_that_is_replaced_whenever_it_is_asked_for_ends() -> None:
    bucket = bucket_of({"a": "1"})
    tree = Tree(bucket, "", 60, now=Clock())

    def again() -> None:
        meanwhile(bucket, again)
        tree.refresh(tree.node(ROOT))

    meanwhile(bucket, again)
    with pytest.raises(VersionChangedError):
        tree.lookup(tree.node(ROOT), "a")
    bucket.after = lambda request: None
    assert etag(tree.lookup(tree.node(ROOT), "a")) == "1"


@pytest.mark.parametrize("how", ["gone", "refresh"])
def test_what_an_open_directory_has_is_no_answer_once_it_is_outdated(how: str) -> None:
    bucket = bucket_of({"a": "1", "b": "1"})
    tree = Tree(bucket, "", 60, now=Clock())
    root = tree.node(ROOT)
    shown = tree.listing(root)
    (old,) = tree.enter(root, shown, ["a"])
    put(bucket, "2")
    if how == "gone":
        tree.outdate(old.id)
    else:
        tree.refresh(root)
    assert tree.enter(root, shown, ["a", "b"]) == []
    assert [etag(node) for node in tree.enter(root, tree.listing(root), ["a", "b"])] == ["2", "2"]


def test_who_polls_a_version_that_is_gone_makes_nobody_ask_again() -> None:
    bucket = bucket_of({"a": "1", "d/x": "1"})
    tree = Tree(bucket, "", 60, now=Clock())
    old = tree.lookup(tree.node(ROOT), "a")
    put(bucket, "2", "a")
    tree.outdate(old.id)
    directory = tree.lookup(tree.node(ROOT), "d")
    meanwhile(bucket, lambda: tree.outdate(old.id))
    tree.lookup(directory, "x")
    bucket.requests.clear()
    tree.lookup(directory, "x")
    tree.lookup(tree.node(ROOT), "a")
    assert asked(bucket) == 0


def test_a_listing_that_nobody_waits_for_is_given_up_between_pages() -> None:
    bucket = bucket_of({f"d/{number}": "1" for number in range(9)}, page=2)
    tree = Tree(bucket, "", 60, now=Clock())
    directory = tree.lookup(tree.node(ROOT), "d")
    bucket.requests.clear()
    waited: list[int] = []
    tree.await_names(lambda node: bool(waited.append(node)) or len(waited) < 3)
    with pytest.raises(InterruptedCallError):
        tree.listing(directory)
    assert (waited, asked(bucket)) == ([directory.id] * 3, 3)
    tree.await_names(lambda node: False)
    bucket.page_size = 9
    assert len(tree.listing(directory).names) == 9, "the last page is at hand, whoever waits"


@pytest.mark.parametrize("page", [1000, 2])
def test_a_version_that_is_gone_has_its_name_looked_up_again(page: int) -> None:
    bucket = bucket_of(dict.fromkeys(("d/a", "d/b", "d/c", "d/d"), "1"), page)
    tree = Tree(bucket, "", 60, now=Clock())
    directory = tree.lookup(tree.node(ROOT), "d")
    old = {name: tree.lookup(directory, name) for name in "abcd"}
    put(bucket, "2")
    assert tree.lookup(directory, "d") is old["d"]
    assert tree.outdate(old["d"].id) == (directory.id, "d")
    assert [tree.must_look_up_again(node) for node in old.values()] == [False, False, False, True]
    new = tree.lookup(directory, "d")
    assert new.version is not None
    assert (new.version.etag, new.id == old["d"].id) == (tag_of("2"), False)
    assert not tree.must_look_up_again(old["d"])
    # Of what was asked for since, nothing is asked again by who reads on.
    tree.lookup(directory, "a")
    before = asked(bucket)
    assert tree.outdate(old["d"].id) is None
    assert tree.lookup(directory, "a").version == tree.lookup(directory, "a").version
    assert asked(bucket) == before


def test_after_a_version_is_gone_no_older_listing_is_believed() -> None:
    """Replaced twice: the listing that was loaded in between shows a version that is gone, too."""
    bucket, clock = bucket_of({"d/a": "1"}), Clock()
    tree = Tree(bucket, "", 60, now=clock)
    directory = tree.lookup(tree.node(ROOT), "d")
    old = tree.lookup(directory, "a")
    clock.now += 61
    put(bucket, "2")
    tree.listing(directory)
    clock.now += 0.1
    put(bucket, "3")
    tree.outdate(old.id)
    new = tree.lookup(directory, "a")
    assert new.version is not None
    assert new.version.etag == tag_of("3")
    # Who reads on from the old version asks no more of the bucket.
    before = asked(bucket)
    clock.now += 2
    tree.outdate(old.id)
    assert tree.lookup(directory, "a") is new
    assert asked(bucket) == before


def test_a_version_that_comes_back_can_be_opened() -> None:
    bucket = bucket_of({"a": "1"})
    tree = Tree(bucket, "", 60, now=Clock())
    old = tree.lookup(tree.node(ROOT), "a")
    tree.outdate(old.id)
    new = tree.lookup(tree.node(ROOT), "a")
    assert (new.version, new.id == old.id, tree.must_look_up_again(new)) == (old.version, False, False)


class Endless(MemoryStore):
    """``long/`` has names without end: as many as asked for, all different, or the same again, or none to be shown."""

    def __init__(self, name: str = "{:09}") -> None:
        super().__init__({"fine/a": b"1", "long/z": b"1"})
        self.pattern = name

    def list(self, prefix: str, *, page_size: int = 1000, delimiter: str = "/") -> Iterator[Page]:
        if prefix != "long/":
            yield from super().list(prefix, page_size=page_size, delimiter=delimiter)
            return
        for start in itertools.count(0, 1000):
            self.requests.append(Request("page", prefix))
            keys = [f"long/{self.pattern.format(number)}" for number in range(start, start + 1000)]
            yield Page([ObjectInfo(key, 1, 1.0, '"e"') for key in keys], [], False)


@pytest.mark.parametrize("name", ["{:09}", "same", "//{:09}", "{:09}/"])
def test_a_listing_without_end_costs_its_directory(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listings, "MAX_NAMES", 5000)
    bucket = Endless(name)
    tree = Tree(bucket, "", 60, now=Clock())
    long = tree.lookup(tree.node(ROOT), "long")
    with pytest.raises(TooLongError) as caught:
        tree.listing(long)
    assert caught.value.errno == errno.ENOMEM
    assert "long/ has 6000 names or more, which is too much to hold: mount a prefix below it" in caplog.text
    assert tree.listed_count < 100
    assert tree.lookup(long, "z").key == "long/z", "by its name, it is there"
    fine = tree.lookup(tree.node(ROOT), "fine")
    assert tree.listing(fine).names == ["a"]


def test_names_that_are_being_loaded_take_half_of_the_memory_together() -> None:
    left = 2 << 20
    tree = Tree(Endless(), "", 60, now=Clock(), room=lambda: left)
    long = tree.lookup(tree.node(ROOT), "long")
    for _ in range(3):
        with pytest.raises(TooLongError, match=r"long/ has [0-9]{4} names or more"):
            tree.listing(long)
    tree = Tree(bucket_of({f"d/{number}": "1" for number in range(3000)}), "", 60, now=Clock(), room=lambda: left)
    for _ in range(9):  # what is loaded counts no more
        assert len(tree.listing(tree.lookup(tree.node(ROOT), "d")).names) == 3000
        tree.refresh(tree.node(ROOT))


def test_what_a_name_takes_is_about_what_is_counted() -> None:
    keys = [f"d/{'x' * 40}{number:08}" for number in range(20_000)]
    page = Page([ObjectInfo(key, 5000, 1.5, f'"{key[-8:] * 4}"') for key in keys], [])
    tracemalloc.start()
    try:
        entries: dict[str, Entry] = {}
        read_page(Page([info._replace(key="".join(info.key)) for info in page.objects], []), "d/", entries)
        names = sorted(entries)
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(names) == 20_000
    assert taken < listings._memory_of(page)


@pytest.mark.parametrize("first", [True, False])
def test_a_name_is_found_where_the_whole_is_too_long(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = bucket_of({f"d/{number:04}": "1" for number in range(400)}, page=10)
    clock = Clock()
    tree = Tree(bucket, "", 60, now=clock)
    directory = tree.lookup(tree.node(ROOT), "d")
    if first:
        tree.listing(directory)  # it was shorter once, and its pages are known
        clock.now += 100
    monkeypatch.setattr(listings, "MAX_NAMES", 100)
    for number in range(50, 150):
        assert tree.lookup(directory, f"{number:04}").size == 1
    bucket.requests.clear()
    assert tree.lookup(directory, "0399").size == 1
    assert asked(bucket) <= 2
