"""That no order of locks can hang obsfs: the rules that `tests.lock_order` traces, over work of every kind."""

from __future__ import annotations

import itertools
import os
import random
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from obsfs.blocks import BLOCK, block_count
from obsfs.cache import scrub
from obsfs.errors import ObsfsError
from obsfs.fetch.engine import Engine
from obsfs.service.takeover_log import TakeoverLog
from obsfs.settings import Settings
from obsfs.store.address import Address
from obsfs.store.s3.store import S3Store
from obsfs.vfs.frontend import FrontEnd
from obsfs.vfs.operations import ROOT, Operations
from obsfs.vfs.tree import Tree
from tests.conftest import MIB, Store, random_bytes, small_disk, wait_for, write_model
from tests.lock_order import traced

# "Event.wait" is for the name server, which is waited for by a thread.
_NETWORK = ("Event.wait", "Future.result", "socket.connect", "socket.recv_into", "socket.sendall", "time.sleep")
ALLOWED = {
    # A lookup waits for the one that asks the bucket already, to find its answer: for nothing else.
    *(("Asking.lock", what) for what in _NETWORK),
    # Files that others keep evicting are opened again: for two seconds at most.
    ("Files._opening", "time.sleep"),
    ("CachedObject._guard", "time.sleep"),
    ("CachedObject._writing", "time.sleep"),
    ("OverflowBuffer._draining", "time.sleep"),
}

# the tracer

_CLASSES = """
import threading
class One:
    def __init__(self):
        self.lock = threading.Lock()
class Two:
    def __init__(self):
        self.lock = threading.RLock()
class Three:
    def __init__(self):
        self.changed = threading.Condition()
"""


@pytest.fixture
def made(tmp_path: Path) -> Callable[[], Any]:
    """A module of obsfs with three classes, each with a lock of another kind."""
    path = tmp_path / "made.py"
    path.write_text(_CLASSES)

    def load() -> Any:
        module = types.ModuleType("obsfs.made")
        exec(compile(_CLASSES, path, "exec"), module.__dict__)
        return module

    return load


def test_locks_that_are_taken_in_a_circle_are_found(made: Callable[[], Any]) -> None:
    with traced() as tracer:
        one, two, three = (kind() for kind in (made().One, made().Two, made().Three))
        for first, second in ((one.lock, two.lock), (two.lock, three.changed), (three.changed, one.lock)):
            with first, second:
                pass
    (said,) = tracer.report()
    assert said.startswith("One.lock -> Two.lock -> Three.changed -> One.lock\n"), said


def test_a_lock_that_is_taken_within_another_of_its_kind_is_found(made: Callable[[], Any]) -> None:
    with traced() as tracer:
        module = made()
        with module.One().lock, module.One().lock:
            pass
    assert tracer.report()[0].startswith("One.lock -> One.lock\n")


def test_a_lock_that_is_taken_twice_is_reported_and_does_not_hang(made: Callable[[], Any]) -> None:
    with traced() as tracer:
        one, two = made().One(), made().Two()
        with two.lock, two.lock:
            pass
        with one.lock, pytest.raises(RuntimeError, match=r"One\.lock"):
            one.lock.acquire()
        assert one.lock.acquire(blocking=False)
    assert [said.split(":")[0] for said in tracer.report()] == ["One.lock is held by who calls itself"]


def test_a_lock_that_is_held_by_who_waits_is_reported(made: Callable[[], Any]) -> None:
    with traced({("Two.lock", "Event.wait")}) as tracer:
        module = made()
        one, two, three = module.One(), module.Two(), module.Three()
        done: Future[None] = Future()
        done.set_result(None)
        with one.lock:
            done.result()
        with two.lock:
            threading.Event().wait(0.001)
        with three.changed:
            three.changed.wait(0.001)
            with two.lock:
                three.changed.wait(0.001)
    assert [said.split(":")[0] for said in tracer.report()] == [
        "One.lock is held by who calls Future.result",
        "Two.lock is held by who calls Condition.wait",
    ]


# obsfs


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    with small_disk(tmp_path / "disk", "size=32m") as path:
        yield path


class WithPassthrough(FrontEnd):
    """A kernel that takes cache files, without a kernel."""

    def __init__(self) -> None:
        self._backings = itertools.count(1)

    def open_backing(self, fd: int) -> int:
        return next(self._backings)


class Mount:
    """What a server has, without a kernel: an engine through a cache that is too small, and a tree over a bucket."""

    def __init__(self, bucket: Store, disk: Path, home: Path) -> None:
        settings = Settings.load(
            cache_dir=disk / "cache", cache_size="16MiB", cache_min_free=0, endpoint_url=bucket.server.endpoint,
            metadata_ttl="0.2s",
        )  # fmt: skip
        self.source = S3Store(Address("obs", bucket.name), settings)
        self.engine = Engine(self.source, settings)
        self.journal = TakeoverLog(home / "journal")
        self.tree = Tree(self.source, "", 0.2, self.journal.record, max_entries=4)
        self.journal.snapshot = self.tree.snapshot
        self.journal.renew()
        self.operations = Operations(self.tree, self.engine, settings, {})
        self.operations.can_pass_through = True
        self.operations.attach(WithPassthrough())

    def read(self, name: str, chance: random.Random) -> bytes | None:
        """Open a file, read a part of it and close it, as a server does."""
        operations = self.operations
        try:
            node = operations.lookup(ROOT, name).node
        except ObsfsError:
            return None
        try:
            with suppress(ObsfsError):
                opened = operations.open(node, os.O_RDONLY)
                reader = operations.reader(opened.handle)
                try:
                    return reader.read(chance.randrange(reader.size), 3 * BLOCK)
                finally:
                    operations.release(opened.handle)
            return None
        finally:
            operations.forget([(node, 1)])

    def close(self) -> None:
        self.engine.close()
        self.journal.close()


def read_much(mount: Mount, names: list[str], seed: int, count: int) -> int:
    chance = random.Random(seed)
    return sum(bool(mount.read(chance.choice(names), chance)) for _ in range(count))


def keep_house(mount: Mount, bucket: Store) -> None:
    """What others do meanwhile: a file is replaced, one pinned, all is refreshed, cleaned and scrubbed."""
    engine, cache = mount.engine, mount.engine.cache
    pinned = mount.source.version(mount.source.head("0.bin"))
    for number in range(2):
        bucket.put("1.bin", random_bytes(2 * MIB + number))
        with suppress(ObsfsError):
            cache.pins.add(pinned)
        mount.operations.refresh(ROOT)
        mount.operations.releasedir(mount.operations.opendir(ROOT))
        engine.fill(pinned, range(2))
        (cache.root / "scrub.json").unlink(missing_ok=True)
        scrub.Scrubber(cache, 1 << 40, on_damage=engine._fetch_again).run_pass()
        cache.pins.remove(lambda version: True)
        cache.clean(selects=lambda version: version.key == "2.bin")
        cache.check(pinned, lambda size: None)
        engine.prefault(pinned, MIB)


def fill_up(path: Path) -> None:
    """Leave no page of a disk free."""
    with suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def work(mount: Mount, bucket: Store, disk: Path, names: list[str]) -> None:
    """Reads by many threads: of more than there is room for, on a full disk, of files cut off, and while closing."""
    cache, filler = mount.engine.cache, disk / "other"
    with ThreadPoolExecutor(8) as pool:

        def read(count: int) -> list[Future[int]]:
            return [pool.submit(read_much, mount, names, seed, count) for seed in range(6)]

        house = pool.submit(keep_house, mount, bucket)
        assert all(one.result() for one in read(8))
        house.result()
        versions = [mount.source.version(mount.source.head(name)) for name in names]

        def fill_all() -> bool:
            cache.clean()
            for one in versions:
                mount.engine.fill(one, range(block_count(one.size)))
            return cache.evicted_bytes > 0

        # Again: where all was in use a moment ago, the next second evicts nothing, and blocks stay in memory.
        wait_for(fill_all)
        cache.clean()
        fill_up(filler)
        assert all(one.result() for one in read(4))
        assert cache.overflow.count, "the disk was not full"
        filler.unlink()
        # What is new is stored, and what is held with it.
        with mount.engine.reader_for(versions[0]) as first:
            cache.overflow.add(first.cached, 0, random_bytes(3 * MIB + 100)[:BLOCK])
            assert mount.read("new.bin", random.Random(0))
        assert all(one.result() for one in read(4))
        for path in cache.root.rglob("*.data"):
            os.truncate(path, 0)
        assert all(one.result() for one in read(4))
        cache.clean()
        # No server opens files any more when the engine is closed, but others may still fetch.
        last = [pool.submit(mount.engine.fill, one, range(block_count(one.size))) for one in versions]
        mount.close()
        for filled in last:
            filled.exception()


@pytest.mark.timeout(60)
def test_no_order_of_locks_can_hang(bucket: Store, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrub, "_pressure", lambda: 0.0)
    write_model(tmp_path / "model", mib=3)
    for path in (tmp_path / "model").glob("*.safetensors"):
        bucket.put(path.name, path.read_bytes())
    for number in range(4):
        bucket.put(f"{number}.bin", random_bytes((number + 3) * MIB + 100))
    names = [
        info.key for page in S3Store(Address("obs", bucket.name), Settings.load()).list("") for info in page.objects
    ]
    bucket.put("new.bin", random_bytes(2 * BLOCK))
    with traced(ALLOWED) as tracer:
        mount = Mount(bucket, disk, tmp_path)
        work(mount, bucket, disk, names)
        assert tracer.report() == []
        for two in (
            ("DirectoryLock.evicting", "DirectoryLock.lock"),
            ("OverflowBuffer._draining", "CachedObject._writing"),
            ("Files._opening", "Tree._guard"),
            ("Tree._guard", "TakeoverLog._guard"),
        ):
            assert two in tracer.edges, "this was not tried"
