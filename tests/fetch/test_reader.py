"""The engine: what readers get from it, on a real server and a real cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from obsfs.cache.directory import Cache
from obsfs.cache.object import CachedObject
from obsfs.errors import CacheError
from obsfs.fetch.engine import Engine
from obsfs.settings import Settings
from obsfs.store.address import Address
from obsfs.store.s3.store import S3Store
from obsfs.store.types import ObjectVersion
from tests.cache.test_cache import evict
from tests.conftest import MIB, Store, random_bytes, wait_for

Start = Callable[[], tuple[S3Store, Engine]]


@pytest.fixture
def start(bucket: Store, tmp_path: Path) -> Iterator[Start]:
    """A new engine on the same cache, when the one before has ended."""
    engines: list[Engine] = []

    def make() -> tuple[S3Store, Engine]:
        while engines:
            engines.pop().close()
        settings = Settings.load(cache_dir=tmp_path / "blocks", endpoint_url=bucket.server.endpoint)
        source = S3Store(Address("obs", bucket.name), settings)
        engines.append(Engine(source, settings, seals=False))
        return source, engines[-1]

    yield make
    for engine in engines:
        engine.close()


def fill(engine: Engine, version: ObjectVersion) -> None:
    engine.fill(version, range(-(-version.size // MIB)))


def test_what_somebody_waits_for_does_not_wait_for_files_that_are_verified(
    bucket: Store, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("left.bin", random_bytes(40 * MIB))
    bucket.put("model-00001-of-00001.safetensors", random_bytes(9 * MIB))
    source, engine = start()
    left = source.version(source.head("left.bin"))
    fill(engine, left)

    source, engine = start()
    held, begun = threading.Event(), threading.Event()
    verify = CachedObject.verify

    def held_up(cached: CachedObject, block: int) -> bool:
        if cached.version == left:
            begun.set()
            assert held.wait(20)
        return verify(cached, block)

    monkeypatch.setattr(CachedObject, "verify", held_up)
    completed: list[str] = []
    engine.subscribe(on_complete=lambda reader: completed.append(reader.version.key))
    reader = engine.open(left)
    assert begun.wait(20)

    weights = source.version(source.head("model-00001-of-00001.safetensors"))
    told = threading.Event()
    engine.fetch_starts([weights], lambda readers: told.set())
    assert told.wait(20), "a load that begins"
    other = engine.open(weights)
    fill(engine, weights)
    wait_for(lambda: completed == [weights.key])
    engine.prefault(weights, weights.size)

    assert not completed[1:]
    held.set()
    wait_for(lambda: completed == [weights.key, left.key])
    assert reader.is_complete
    assert engine.fetcher.stats.bytes_fetched == weights.size
    engine.release(other)
    engine.release(reader)


def test_a_file_that_was_left_half_is_verified_when_the_rest_has_come(bucket: Store, start: Start) -> None:
    bucket.put("half.bin", random_bytes(20 * MIB))
    source, engine = start()
    version = source.version(source.head("half.bin"))
    engine.fill(version, range(9))

    source, engine = start()
    completed: list[str] = []
    engine.subscribe(on_complete=lambda reader: completed.append(reader.version.key))
    reader = engine.open(version)
    engine.fill(version, range(9, 20))
    wait_for(lambda: completed == ["half.bin"])
    assert reader.is_complete
    assert engine.fetcher.stats.bytes_fetched == 11 * MIB
    engine.release(reader)


def test_a_file_that_has_rotted_is_not_taken_for_complete(bucket: Store, start: Start, tmp_path: Path) -> None:
    data = random_bytes(20 * MIB)
    bucket.put("rot.bin", data)
    source, engine = start()
    version = source.version(source.head("rot.bin"))
    fill(engine, version)
    (stored,) = (tmp_path / "blocks").rglob("*.data")
    with stored.open("r+b") as file:
        file.seek(17 * MIB)
        file.write(b"rot")

    source, engine = start()
    completed: list[str] = []
    engine.subscribe(on_complete=lambda reader: completed.append(reader.version.key))
    reader = engine.open(version)
    wait_for(lambda: engine.cache.corrupt_blocks == 1)
    assert not completed
    assert reader.read(0, len(data)) == data
    wait_for(lambda: completed == ["rot.bin"])
    engine.release(reader)


def test_a_block_in_memory_that_another_process_has_stored_is_verified_in_the_file(bucket: Store, start: Start) -> None:
    data = random_bytes(2 * MIB)
    bucket.put("a.bin", data)
    source, engine = start()
    version = source.version(source.head("a.bin"))
    reader = engine.open(version)
    engine.cache.overflow.add(reader.cached, 1, data[MIB:])
    other = Engine(source, Settings.load(cache_dir=engine.cache.directory), seals=False)
    fill(other, version)
    other.close()
    assert reader.read(0, 100) == data[:100]
    assert not reader.is_complete
    reader._settle()
    wait_for(lambda: reader.is_complete)
    engine.release(reader)


def test_a_reader_learns_what_its_version_is_pinned_by(bucket: Store, start: Start) -> None:
    """As of one that the cache alone has told of, which keeps neither its date nor its number in the bucket."""
    bucket.put("a.bin", b"text")
    source, engine = start()
    full = replace(source.version(source.head("a.bin")), version_id="v7")
    assert full.modified
    bare = replace(full, version_id="", modified=0.0)
    for told in (bare, replace(full, modified=0.0), replace(full, version_id=""), bare):
        with engine.reader_for(told) as reader:
            pass
    for version in (reader.version, reader.cached.version):
        assert (version.version_id, version.modified) == ("v7", full.modified)


def test_one_file_whose_disk_is_slow_holds_up_no_other(
    bucket: Store, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("slow", "fast", "bad"):
        bucket.put(key, random_bytes(3 * MIB))
    source, engine = start()
    slow, fast, bad = (source.version(source.head(key)) for key in ("slow", "fast", "bad"))
    begun, held, opened = threading.Event(), threading.Event(), []
    open_file = Cache.open

    def slowly(cache: Cache, version: ObjectVersion) -> CachedObject:
        opened.append(version.key)
        if version != fast:
            begun.set()
            assert held.wait(20)
        if version == bad:
            raise CacheError("planted", "none")
        return open_file(cache, version)

    monkeypatch.setattr(Cache, "open", slowly)
    with ThreadPoolExecutor() as pool:
        try:
            waiting = [pool.submit(engine.open, slow) for _ in range(3)]
            failing = [pool.submit(engine.open, bad) for _ in range(2)]
            assert begun.wait(20)
            reader = pool.submit(engine.open, fast).result(10)
            assert pool.submit(reader.read, 0, 3 * MIB).result(10) == random_bytes(3 * MIB)
            pool.submit(engine.prefetch, [(0, fast, 1)]).result(10)
            pool.submit(engine.release, reader).result(10)
            assert not any(one.done() for one in (*waiting, *failing))
        finally:
            held.set()
        readers = [one.result(10) for one in waiting]
        for one in failing:
            with pytest.raises(CacheError, match="planted"):
                one.result(10)
    assert readers[0] is readers[1] is readers[2]
    assert readers[0].users == 3
    assert opened.count("slow") == 1
    assert readers[0].read(0, 3 * MIB) == random_bytes(3 * MIB)


def test_room_is_made_beside_those_who_fetch(bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a block does not wait until all maps have been read."""
    bucket.put("big", random_bytes(70 * MIB))
    settings = Settings.load(cache_dir=tmp_path / "c", endpoint_url=bucket.server.endpoint, cache_size="1GiB")
    source = S3Store(Address("obs", bucket.name), settings)
    trim, threads = Cache.trim, []

    def noted(cache: Cache) -> None:
        threads.append(threading.current_thread().name)
        trim(cache)

    monkeypatch.setattr(Cache, "trim", noted)
    with closing(Engine(source, settings, seals=False)) as engine:
        wait_for(lambda: len(threads) == 1)
        fill(engine, source.version(source.head("big")))
        wait_for(lambda: len(threads) > 1)
    assert set(threads) == {"obsfs-house"}


def test_a_file_that_was_evicted_whole_gives_its_room_back_though_nobody_opens_another(
    bucket: Store, start: Start, tmp_path: Path
) -> None:
    bucket.put("a", random_bytes(2 * MIB))
    source, engine = start()
    version = source.version(source.head("a"))
    reader = engine.open(version)
    assert reader.read(0, 2 * MIB) == random_bytes(2 * MIB)
    wait_for(lambda: reader.is_complete)
    assert reader.cached.acquire_passthrough()
    reader.cached.release_passthrough()
    assert evict(tmp_path / "blocks", 0) == 0
    assert not engine.cache.present_blocks(version)
    time.sleep(1.2)
    assert reader.read(0, 2 * MIB) == random_bytes(2 * MIB), "somebody reads it"
    engine.release(reader)
    wait_for(lambda: reader.cached.data_fd == -1)
