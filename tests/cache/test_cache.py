"""The cache on disk: what is in it is right, whoever dies, whatever rots, and it keeps to its size."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obsfs.blocks import BLOCK
from obsfs.cache import layout, room
from obsfs.cache.directory import Cache, cached_sizes
from obsfs.cache.layout import checksum, map_path, read_blocks
from obsfs.cache.lending import Lender
from obsfs.cache.object import CachedObject
from obsfs.cache.removal import evict_blocks
from obsfs.errors import CacheError
from obsfs.store.types import ObjectVersion
from tests.conftest import MIB, random_bytes

GIB = 1 << 30


def version(size: int, key: str = "key", etag: str = '"e"') -> ObjectVersion:
    return ObjectVersion("http://here", "bucket", key, etag, size)


def put(cached: CachedObject, block: int, seed: int = 0) -> bytes:
    data = random_bytes(cached.length_of(block), seed * 1000 + block)
    blocks = range(block, block + 1)
    assert cached.claim(blocks)
    cached.store_block(block, memoryview(bytearray(data)))
    cached.release_claim(blocks)
    return data


def evict(directory: Path, target: int) -> int:
    """Have a process evict that may keep no more than that in this cache; what is left (bytes)."""
    with closing(Cache(directory, target, min_free=0)) as other:
        other.trim()
        return other.used_bytes


def test_what_is_cached_is_told_for_each_size_and_only_where_the_data_is(tmp_path: Path) -> None:
    store = Cache(tmp_path, GIB)
    for size, key in ((3 * BLOCK, "replaced"), (BLOCK, "replaced"), (BLOCK, "lost"), (BLOCK, "cut")):
        # Servers without ETags: a replaced object differs in its size alone.
        cached = store.open(version(size, key, etag=""))
        for block in range(cached.blocks):
            put(cached, block)
        cached.close()
    for entry in store.entries():
        if entry.version.key == "lost":
            entry.path.unlink()
        elif entry.version.key == "cut":
            os.truncate(entry.path, 5)
    whole = {("replaced", "", 3 * BLOCK): 3 * BLOCK, ("replaced", "", BLOCK): BLOCK}
    assert cached_sizes(tmp_path, "http://here", "bucket") == whole


def test_blocks_come_back(tmp_path: Path) -> None:
    cached = Cache(tmp_path / "c", GIB).open(version(3 * BLOCK + 5))
    assert cached.read(0, 10) is None
    parts = [put(cached, block) for block in range(4)]
    assert cached.is_fully_verified()
    whole = b"".join(parts)
    assert cached.read(0, cached.size) == whole
    assert cached.read(BLOCK - 3, 7) == whole[BLOCK - 3 : BLOCK + 4]


def test_another_version_shares_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    put(cache.open(version(BLOCK)), 0)
    for other in (version(BLOCK, etag='"f"'), version(BLOCK, key="other"), version(BLOCK + 1)):
        assert not cache.open(other).ensure_verified(0)


@pytest.mark.parametrize("sealed", [True, False])
def test_it_is_there_after_a_restart(tmp_path: Path, sealed: bool) -> None:
    cached = Cache(tmp_path / "c", GIB).open(version(2 * BLOCK))
    parts = [put(cached, block) for block in range(2)]
    if sealed:
        cached.seal()
    again = Cache(tmp_path / "c", GIB).open(version(2 * BLOCK))
    assert again.is_trusted(0) is sealed
    assert again.ensure_verified(0) and again.ensure_verified(1)
    assert again.read(0, again.size) == b"".join(parts)


@pytest.mark.parametrize("sealed", [True, False])
def test_rot_is_noticed(tmp_path: Path, sealed: bool) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(2 * BLOCK))
    put(cached, 0)
    put(cached, 1)
    if sealed:
        cached.seal()
    (path,) = (tmp_path / "c").rglob("*.data")
    time.sleep(0.02)
    with path.open("r+b") as file:
        file.write(b"rot")
    later = Cache(tmp_path / "c", GIB)
    again = later.open(version(2 * BLOCK))
    assert not again.ensure_verified(0)
    assert again.ensure_verified(1)
    assert later.corrupt_blocks == 1


def test_damage_that_many_readers_find_at_once_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(Cache(tmp_path / "c", GIB).open(version(BLOCK)), 0)
    (path,) = (tmp_path / "c").rglob("*.data")
    with path.open("r+b") as file:
        file.write(b"rot")
    later = Cache(tmp_path / "c", GIB)
    again = later.open(version(BLOCK))
    together, matches, count = threading.Barrier(4), Lender.matches_checksum, later.faults.count_corrupt_block

    def count_slowly() -> None:
        time.sleep(0.05)
        count()

    monkeypatch.setattr(Lender, "matches_checksum", lambda *given: matches(*given) or bool(together.wait(10) < 0))
    monkeypatch.setattr(later.faults, "count_corrupt_block", count_slowly)
    with ThreadPoolExecutor(4) as readers:
        assert not any(readers.map(again.ensure_verified, [0] * 4))
    assert later.corrupt_blocks == 1


@given(cut=st.integers(0, 4096 + 48), junk=st.binary(min_size=1, max_size=64))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_damage_to_the_map_gives_wrong_bytes(tmp_path: Path, cut: int, junk: bytes) -> None:
    place = tmp_path / f"{cut}-{junk.hex()[:20]}-{time.monotonic_ns()}"
    cached = Cache(place, GIB).open(version(2 * BLOCK))
    parts = [put(cached, block) for block in range(2)]
    cached.seal()
    (path,) = place.rglob("*.map")
    data = bytearray(path.read_bytes())
    data[cut : cut + len(junk)] = junk
    path.write_bytes(data)
    again = Cache(place, GIB).open(version(2 * BLOCK))
    for block in range(2):
        # A seal that was itself damaged is no seal; a flag set by damage meets a checksum.
        if again.ensure_verified(block):
            assert again.read(block * BLOCK, BLOCK) == parts[block]


def test_the_oldest_blocks_go_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 20 * BLOCK)
    cached = cache.open(version(40 * BLOCK))
    for block in range(20):
        put(cached, block)
    cached.touch(range(5))
    for block in range(20, 24):
        put(cached, block)
    assert all(cached.is_present(block) for block in (*range(5), *range(20, 24)))
    assert not cached.is_present(5)
    assert cache.used_bytes <= 20 * BLOCK
    assert cache.evicted_bytes >= 4 * BLOCK


def test_a_file_in_passthrough_is_not_punched(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 8 * BLOCK)
    held = cache.open(version(4 * BLOCK))
    whole = b"".join(put(held, block) for block in range(4))
    assert held.acquire_passthrough()
    other = cache.open(version(16 * BLOCK, key="other"))
    for block in range(16):
        put(other, block)
    assert os.pread(held.data_fd, 4 * BLOCK, 0) == whole
    held.release_passthrough()


@pytest.mark.parametrize("damaged", [True, False])
def test_a_file_that_was_in_passthrough_is_evicted_whole(tmp_path: Path, damaged: bool) -> None:
    """Somebody may have a map of it, which nobody can tell."""
    cache = Cache(tmp_path / "c", GIB)
    held = cache.open(version(4 * BLOCK))
    put_bytes = b"".join(put(held, block) for block in range(4))
    assert held.acquire_passthrough()
    held.release_passthrough()
    if damaged:
        os.pwrite(held.data_fd, b"rot", 0)
        assert cache.check(held.version, lambda size: None)[1] == [0]
    assert evict(tmp_path / "c", 3 * BLOCK if not damaged else 2 * BLOCK) == 0
    assert not held.is_in_cache
    assert os.pread(held.data_fd, 3 * BLOCK, BLOCK) == put_bytes[BLOCK:]


def test_a_file_that_was_complete_loses_blocks(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(4 * BLOCK))
    for block in range(4):
        put(cached, block)
    cached.seal()
    assert evict(tmp_path / "c", 3 * BLOCK) == 2 * BLOCK
    assert [cached.is_present(block) for block in range(4)] == [False, False, True, True]


def test_a_data_file_without_its_map_is_not_cut(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    held = cache.open(version(4 * BLOCK))
    whole = b"".join(put(held, block) for block in range(4))
    (path,) = (tmp_path / "c").rglob("*.map")
    path.unlink()
    anew = cache.open(held.version)
    assert not anew.is_present(0)
    put(anew, 0)
    assert os.pread(held.data_fd, 4 * BLOCK, 0) == whole


def test_a_map_whose_data_somebody_removed_is_evicted(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(4 * BLOCK))
    put(cached, 1)
    cached.close()
    (path,) = (tmp_path / "c").rglob("*.data")
    path.unlink()
    evict(tmp_path / "c", 0)
    assert not [*(tmp_path / "c").rglob("*.map"), *(tmp_path / "c").rglob("*.data")]


@pytest.mark.parametrize("what", ["trim", "clean"])
def test_who_opens_a_file_does_not_wait_for_who_reads_all_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Making room takes seconds in a cache of many files."""
    housekeeper, cache = Cache(tmp_path / "c", GIB), Cache(tmp_path / "c", GIB)
    for number in range(3):
        put(cache.open(version(BLOCK, key=str(number))), 0)
    begun, held = threading.Event(), threading.Event()
    listed = layout.map_paths

    def slow(root: Path) -> Iterator[Path]:
        for number, path in enumerate(listed(root)):
            if number:
                begun.set()
                assert held.wait(20)
            yield path

    monkeypatch.setattr(room, "map_paths", slow)
    with ThreadPoolExecutor() as pool:
        try:
            work: Future[object] = pool.submit(housekeeper.trim if what == "trim" else housekeeper.clean)
            assert begun.wait(20)
            cached = pool.submit(cache.open, version(BLOCK, key="new")).result(10)
            assert put(cached, 0)
            cache.pins.add(version(BLOCK, key="new"))
            pool.submit(cached.close).result(10)
            assert not work.done()
        finally:
            held.set()
        work.result(10)
    assert sum(entry.cached_bytes for entry in cache.entries()) == (4 * BLOCK if what == "trim" else BLOCK)


def test_one_process_at_a_time_makes_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    for number in range(10):
        put(cache.open(version(BLOCK, key=str(number))), 0)
    others = [Cache(tmp_path / "c", 5 * BLOCK, min_free=0) for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(Cache.trim, others))
    # Each alone takes what is too much, and a twentieth: together they take no more.
    assert {other.used_bytes for other in others} == {4 * BLOCK}


def test_room_is_given_back_when_writing_fails(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 16 * BLOCK, min_free=0)

    def fail() -> bool:
        raise MemoryError

    for _ in range(20):
        with pytest.raises(MemoryError):
            cache.room.reserve_and_write(BLOCK, fail)
        assert not cache.room.reserve_and_write(BLOCK, lambda: False)
    assert cache.used_bytes == 0
    put(cache.open(version(15 * BLOCK)), 3)
    assert (cache.used_bytes, cache.overflow.count) == (BLOCK, 0)


def test_a_block_that_another_process_has_stored_is_not_counted_as_ours(tmp_path: Path) -> None:
    cache, other = Cache(tmp_path / "c", GIB), Cache(tmp_path / "c", GIB)
    cached = cache.open(version(2 * BLOCK))
    cache.overflow.add(cached, 1, random_bytes(BLOCK, 1))
    put(other.open(version(2 * BLOCK)), 1)
    put(cached, 0)
    assert (cache.used_bytes, len(cache.overflow)) == (BLOCK, 0)
    assert cached.read(BLOCK, BLOCK) == random_bytes(BLOCK, 1)


def test_who_is_interrupted_while_he_waits_for_the_cache_holds_up_nobody(tmp_path: Path) -> None:
    """Ctrl-C in a notebook, while another process holds the lock of the directory."""
    cache, other = Cache(tmp_path / "c", GIB), Cache(tmp_path / "c", GIB)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with other.directory_lock:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(KeyboardInterrupt):
                cache.open(version(BLOCK))
    finally:
        signal.signal(signal.SIGUSR1, before)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(cache.open, version(BLOCK)).result(5)
    with cache.directory_lock, (tmp_path / "c" / "v1" / "lock").open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "c", GIB)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cached = cache.open(version(BLOCK))
    data = put(cached, 0)
    with ThreadPoolExecutor() as pool:
        pool.submit(cache.trim).result(5)
    assert cached.read(0, BLOCK) == data


def test_two_processes_do_not_fetch_the_same_block(tmp_path: Path) -> None:
    one = Cache(tmp_path / "c", GIB).open(version(4 * BLOCK))
    other = Cache(tmp_path / "c", GIB).open(version(4 * BLOCK))
    assert one.claim(range(0, 2))
    assert not other.claim(range(1, 3))
    assert other.claim(range(2, 4))
    one.release_claim(range(0, 2))
    assert other.claim(range(1, 2))
    data = put(other, 3)
    assert one.ensure_verified(3)
    assert one.read(3 * BLOCK, BLOCK) == data


def test_a_map_says_what_it_is_of(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(2 * BLOCK + 10, key="models/a b.bin"))
    put(cached, 2)
    (entry,) = cache.entries()
    assert entry.version == version(2 * BLOCK + 10, key="models/a b.bin")
    assert entry.cached_bytes == 10
    assert time.time() - entry.last_used < 60


def test_cleaning(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    for key in ("models/a/w", "models/ab/w", "data"):
        cached = cache.open(version(BLOCK, key=key))
        put(cached, 0)
        cached.close()
    assert cache.clean(older_than=3600) == 0
    assert cache.clean(selects=lambda version: version.key.startswith("models/a/")) == BLOCK
    assert sorted(entry.version.key for entry in cache.entries()) == ["data", "models/ab/w"]
    assert cache.clean() == 2 * BLOCK
    assert list((tmp_path / "c").rglob("*.data")) == []


def test_nobody_else_can_look_in(tmp_path: Path) -> None:
    put(Cache(tmp_path / "c", GIB).open(version(BLOCK)), 0)
    for path in (tmp_path / "c").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be used"):
        Cache(tmp_path / "file", GIB)


def test_a_file_system_that_cannot_hold_it_is_refused(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "ramfs", "ramfs", tmp_path], check=True)
    try:
        with pytest.raises(CacheError, match="takes no holes"):
            Cache(tmp_path / "c", 1 << 30)
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@given(st.text(), st.text(), st.integers(0, 1 << 50))
def test_no_key_leads_out_of_the_directory(key: str, etag: str, size: int) -> None:
    path = map_path(Path("/cache/v1"), ObjectVersion("e", "b", f"../{key}", etag, size))
    assert re.fullmatch(r"/cache/v1/[0-9a-f]{2}/[0-9a-f]{40}\.map", str(path))


def test_the_checksum_is_of_the_bytes() -> None:
    assert checksum(b"a" * MIB) != checksum(b"a" * (MIB - 1) + b"b")


def test_what_was_opened_and_not_read_leaves_no_files(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    first, second = cache.open(version(3 * BLOCK)), cache.open(version(3 * BLOCK))
    first.close()
    put(second, 1)
    second.close()
    assert [entry.cached_bytes for entry in cache.entries()] == [BLOCK]
    cache.clean()
    cache.open(version(3 * BLOCK)).close()
    assert not list((tmp_path / "c").rglob("*.data"))
    assert not list((tmp_path / "c").rglob("*.map"))


def test_files_that_took_the_place_of_an_empty_one_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    old = cache.open(version(BLOCK))
    for path in [*(tmp_path / "c").rglob("*.map"), *(tmp_path / "c").rglob("*.data")]:
        path.unlink()
    new = cache.open(version(BLOCK))
    data = put(new, 0)
    new.close()
    old.close()
    again = cache.open(version(BLOCK))
    assert again.ensure_verified(0)
    assert again.read(0, BLOCK) == data


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_power_may_fail_at_any_write(tmp_path: Path, data: st.DataObject) -> None:
    """A crash keeps any subset of the sectors that were written, of data and map, each in any of its states."""
    home = tmp_path / str(time.monotonic_ns())
    store = Cache(home, GIB)
    cached = store.open(version(3 * BLOCK))
    paths = [*home.rglob("*.data"), *home.rglob("*.map")]
    states = [[path.read_bytes() for path in paths]]
    for _ in range(data.draw(st.integers(1, 6))):
        block = data.draw(st.integers(0, 2))
        if cached.is_present(block) and data.draw(st.booleans()):
            _evict(home, block)
        elif not cached.is_present(block):
            put(cached, block)
        if data.draw(st.booleans()):
            cached.seal()
        states.append([path.read_bytes() for path in paths])
    seed = data.draw(st.randoms(use_true_random=False))
    for index, path in enumerate(paths):
        size = 4096 if path.suffix == ".data" else 8
        torn = bytearray(states[-1][index])
        for start in range(0, len(torn), size):
            torn[start : start + size] = seed.choice(states)[index][start : start + size]
        path.write_bytes(torn)
    cached.close()
    with closing(store.open(version(3 * BLOCK))) as again:
        for block in range(3):
            found = again.read(block * BLOCK, BLOCK) if again.ensure_verified(block) else None
            assert found in (None, random_bytes(BLOCK, block))
    store.close()
    shutil.rmtree(home)


def _evict(home: Path, block: int) -> None:
    """Evict one block, as a process that needs room does."""
    (path,) = home.rglob("*.map")
    evict_blocks(path, [one for one in read_blocks(path) if one.number == block])


def test_what_the_disk_did_not_take_is_written_later(tmp_path: Path) -> None:
    """One block for each that the disk takes, also when many threads have it take some at once."""
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(16 * BLOCK))
    held = {block: random_bytes(BLOCK, block) for block in range(8)}
    for block, data in held.items():
        cache.overflow.add(cached, block, data)
    assert cache.is_overflowing
    with ThreadPoolExecutor(8) as threads:
        put_bytes = list(threads.map(lambda block: put(cached, block), range(8, 16)))
    assert not cache.is_overflowing
    assert cached.are_verified(range(16))
    assert cached.read(0, 16 * BLOCK) == b"".join([*held.values(), *put_bytes])


@pytest.mark.parametrize("sealed", [True, False])
def test_checking_finds_every_damaged_block(tmp_path: Path, sealed: bool) -> None:
    cached = Cache(tmp_path / "c", GIB).open(version(4 * BLOCK))
    for block in (0, 1, 3):
        put(cached, block)
    if sealed:
        put(cached, 2)
        cached.seal()
    (path,) = (tmp_path / "c").rglob("*.data")
    with path.open("r+b") as file:
        for block in (1, 3):
            file.seek(block * BLOCK + 77)
            file.write(b"rot")
    store = Cache(tmp_path / "c", GIB)
    seen: list[int] = []
    assert store.open(version(4 * BLOCK)).check(seen.append) == 2
    assert sum(seen) == (4 if sealed else 3) * BLOCK
    again = store.open(version(4 * BLOCK))
    assert again.check() == 0
    assert [again.ensure_verified(block) for block in range(4)] == [True, False, sealed, False]


@pytest.mark.parametrize(("limit", "advice"), [(16 << 20, "raise --cache-size"), (None, "make room on the disk of ")])
def test_what_makes_a_cache_larger_is_what_limits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, advice: str
) -> None:
    cache = Cache(tmp_path / "c", limit)
    if limit is None:
        monkeypatch.setattr(room.Room, "_disk", lambda self: (GIB, GIB))  # nothing more than is to stay free
    assert cache.how_to_enlarge.startswith(advice)
    with pytest.raises(CacheError, match=f"unpin others, or {advice}"):
        cache.pins.add(version(GIB))
