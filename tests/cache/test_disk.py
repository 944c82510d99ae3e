"""What the cache's disk does to it: no room, no inodes, files cut off, replaced or removed. No read fails for it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from obsfs.blocks import BLOCK
from obsfs.cache import layout
from obsfs.cache.directory import Cache
from obsfs.cache.layout import map_path
from obsfs.cache.object import CachedObject
from obsfs.store.types import ObjectVersion
from tests.cache.test_cache import evict, put, version
from tests.conftest import MIB, random_bytes, small_disk

GIB = 1 << 30
TIB = 1 << 40


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 12 MiB and 64 inodes."""
    with small_disk(tmp_path / "disk", "size=12m,nr_inodes=64") as path:
        yield path


def fill_up(disk: Path, kind: str) -> None:
    try:
        for number in range(100):
            path = disk / f"other{number}"
            path.touch()
            if kind == "bytes":
                path.write_bytes(bytes(MIB))
    except OSError as error:
        assert error.errno == errno.ENOSPC
    if kind == "bytes":
        # The last page too.
        with pytest.raises(OSError, match="No space"), (disk / "other99").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()


def whole(cached: CachedObject) -> bytes | None:
    return cached.read(0, cached.size)


def files(place: Path, suffix: str) -> list[Path]:
    return sorted(place.rglob(f"*.{suffix}"))


# no room


@pytest.mark.parametrize("kind", ["bytes", "inodes"])
@pytest.mark.parametrize("size", [100, BLOCK, 3 * BLOCK + 7])
def test_a_disk_without_room_takes_the_first_open_of_a_file(
    disk: Path, kind: str, size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(disk / "c", min_free=0)
    fill_up(disk, kind)
    cached = cache.open(version(size))
    parts = b"".join(put(cached, block) for block in range(cached.blocks))
    assert whole(cached) == parts
    assert cache.is_overflowing
    assert caplog.text.count("No space left") == 1
    # Once there is room, the same object goes to the disk.
    for path in disk.glob("other*"):
        path.unlink()
    monkeypatch.setattr(time, "monotonic", lambda: 1e12)
    if kind == "inodes":
        put(cached, 0)
    else:
        cache.overflow.drain_one()
    for _ in range(cached.blocks):
        cache.overflow.drain_one()
    assert not cache.is_overflowing
    assert cached.is_fully_verified()
    assert whole(cached) == parts
    assert sum(path.stat().st_size for path in files(disk, "data")) == size


@pytest.mark.timeout(20)
def test_room_for_a_held_block_is_made_by_closing_other_files(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who closes a file waits until nobody writes held blocks, and so nobody may wait for room while he does."""
    cache = Cache(disk / "c", min_free=0)
    idle, cached = cache.open(version(4 * BLOCK, key="idle")), cache.open(version(BLOCK))
    for block in range(4):
        put(idle, block)
    assert idle.acquire_passthrough()
    fill_up(disk, "bytes")
    data = put(cached, 0)
    assert not cached.is_present(0)
    idle.release_passthrough()
    cache.subscribe(on_removed=idle.close)
    monkeypatch.setattr(time, "monotonic", lambda: 1e12)
    cache.overflow.drain_one()
    assert cached.is_present(0)
    assert not idle.is_in_cache
    assert whole(cached) == data
    assert not cache.is_overflowing


def test_a_full_disk_does_not_fail_what_is_written_to_an_open_map(disk: Path) -> None:
    """Its map is sparse: the entry of a block far away needs room of its own."""
    cache = Cache(disk / "c", min_free=0)
    cached = cache.open(version(TIB))
    put(cached, 0)
    fill_up(disk, "bytes")
    last = cached.blocks - 1
    data = put(cached, last)
    assert cached.read(last * BLOCK, BLOCK) == data
    assert not cached.is_present(last)
    cached.touch(range(last - 1, last + 1))
    # It may have been evicted, to make room.
    assert cached.read(0, BLOCK) in (None, random_bytes(BLOCK, 0))
    assert cached.cached_bytes + BLOCK >= files(disk, "data")[0].stat().st_blocks * 512


def test_a_cache_begins_on_a_disk_that_is_full(disk: Path) -> None:
    cache = Cache(disk / "c", min_free=0)
    put(cache.open(version(BLOCK)), 0)
    cache.close()
    fill_up(disk, "bytes")
    again = Cache(disk / "c", min_free=0)
    assert again.open(version(BLOCK)).ensure_verified(0)
    fill_up(disk, "inodes")
    assert put(again.open(version(BLOCK, key="other")), 0)
    nowhere = Cache(disk / "d", min_free=0)
    cached = nowhere.open(version(2 * BLOCK))
    assert put(cached, 0) + put(cached, 1) == whole(cached)


def test_a_disk_that_takes_no_changes(disk: Path) -> None:
    cache = Cache(disk / "c", min_free=0)
    cached = cache.open(version(2 * BLOCK))
    first = put(cached, 0)
    cached.close()
    cache.close()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    later = Cache(disk / "c", min_free=0)
    for key in ("key", "other"):
        again = later.open(version(2 * BLOCK, key=key))
        assert put(again, 0) == first
        assert again.read(0, BLOCK) == first
        again.close()


# how much room


def test_it_leaves_free_what_is_to_be_left_free(disk: Path) -> None:
    cache = Cache(disk / "c", min_free=7 * MIB)
    cached = cache.open(version(20 * BLOCK))
    for block in range(10):
        put(cached, block)
        found = os.statvfs(disk)
        assert found.f_bavail * found.f_frsize >= 7 * MIB
    assert 0 < cache.used_bytes <= 5 * MIB
    assert cache.limit <= 5 * MIB
    assert cached.is_present(9)
    # Somebody else needs room: what is stored next makes it.
    (disk / "other").write_bytes(bytes(2 * MIB))
    put(cached, 10)
    found = os.statvfs(disk)
    assert found.f_bavail * found.f_frsize >= 7 * MIB
    assert cached.read(10 * BLOCK, BLOCK) == random_bytes(BLOCK, 10)


@pytest.mark.parametrize(
    ("size", "free"),
    [(12 * MIB, 6 * MIB), (2 * GIB, GIB), (10 * GIB, GIB), (20 * GIB, GIB), (100 * GIB, 5 * GIB), (TIB, TIB // 20)],
)
def test_the_least_that_is_left_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, free: int) -> None:
    cache = Cache(tmp_path / "c")
    like = os.statvfs_result((4096, 4096, size // 4096, 0, size // 4096 // 2, 0, 0, 0, 0, 255))
    monkeypatch.setattr("obsfs.cache.room.os.statvfs", lambda path: like)
    assert cache.min_free == free
    assert cache.limit == max(0, size // 2 - free)
    assert Cache(tmp_path / "c", 5 * MIB).limit == min(5 * MIB, cache.limit)
    assert Cache(tmp_path / "c", min_free=0).limit == size // 2


def test_what_was_there_before_counts(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    put(cache.open(version(3 * BLOCK)), 1)
    again = Cache(tmp_path / "c")
    assert BLOCK <= again.used_bytes <= 2 * BLOCK
    again.trim()
    assert again.used_bytes == BLOCK


def test_the_map_grows_with_what_is_cached(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    size = 5 * TIB - 3
    cached = cache.open(version(size))
    at = [0, 1, 4097, 1 << 20, cached.blocks - 1]
    parts = {block: put(cached, block) for block in at}
    (path,) = files(tmp_path, "map")
    assert path.stat().st_blocks * 512 <= 4096 * (len(at) + 1)
    assert cached.cached_bytes == sum(map(len, parts.values()))
    assert cache.present_blocks(version(size)) == at
    cached.close()
    again = Cache(tmp_path / "c", GIB).open(version(size))
    assert all(again.ensure_verified(block) and again.read(block * BLOCK, 9) == parts[block][:9] for block in at)
    assert again.check() == 0
    evict(tmp_path / "c", 0)
    assert [*map(again.is_present, at)] == [False] * len(at)


def test_memory_grows_with_what_is_cached(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    tracemalloc.start()
    try:
        opened = [cache.open(version(size, key=f"{size}-{n}")) for size in (99, 5 * TIB) for n in range(20)]
        for cached in opened:
            put(cached, 0)
            if cached.blocks > 1:
                put(cached, cached.blocks - 1)
        small, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert small < 20 * (16 << 10) + 20 * (80 << 10) + MIB


def test_maps_count(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", 2 * MIB)
    for number in range(400):
        cached = cache.open(version(10, key=str(number)))
        put(cached, 0)
        cached.close()
    cache.trim()
    maps = sum(path.stat().st_blocks * 512 for path in files(tmp_path, "map"))
    cache.trim()
    assert maps <= 2 * MIB
    assert cache.used_bytes > 0


# files that somebody has changed


@pytest.mark.parametrize("size", [0, 1, BLOCK, 3 * BLOCK + 99, 4 * BLOCK - 1, 9 * BLOCK])
@pytest.mark.parametrize("suffix", ["data", "map"])
def test_a_file_that_is_cut_off_costs_a_fetch(
    tmp_path: Path, suffix: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(4 * BLOCK))
    parts = [put(cached, block) for block in range(4)]
    (path,) = files(tmp_path, suffix)
    os.truncate(path, size if suffix == "data" else size // BLOCK * 30)
    assert not cached.acquire_passthrough()
    found = b""
    for block in range(4):
        data = cached.read(block * BLOCK, BLOCK) if cached.ensure_verified(block) else None
        if data is None:
            assert not cached.ensure_verified(block)
            data = put(cached, block)
        assert data == parts[block]
        found += data
    for block in range(4):
        if not cached.ensure_verified(block):
            put(cached, block)
    assert whole(cached) == found
    assert cached.acquire_passthrough()
    assert os.pread(cached.data_fd, 4 * BLOCK, 0) == found
    assert caplog.text.count("has another length") <= 1
    assert caplog.text
    assert path.stat().st_size in (4 * BLOCK, layout.map_size(4 * BLOCK))


def test_a_file_is_not_swapped_under_the_kernel(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(3 * BLOCK))
    parts = [put(cached, block) for block in range(3)]
    assert cached.acquire_passthrough()
    inode = os.fstat(cached.data_fd).st_ino
    os.truncate(files(tmp_path, "data")[0], 5)
    assert cached.read(BLOCK, 10) is None
    assert put(cached, 1) == parts[1]
    assert cached.read(BLOCK, 10) == parts[1][:10]
    assert os.fstat(cached.data_fd).st_ino == inode
    cached.release_passthrough()
    put(cached, 0)
    assert os.fstat(cached.data_fd).st_ino != inode


def test_another_file_in_its_place(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(2 * BLOCK))
    parts = [put(cached, block) for block in range(2)]
    (path,) = files(tmp_path, "data")
    (tmp_path / "other").write_bytes(bytes(2 * BLOCK))
    (tmp_path / "other").replace(path)
    assert whole(cached) == b"".join(parts)
    again = cache.open(version(2 * BLOCK))
    assert not again.ensure_verified(0)
    assert not again.ensure_verified(1)
    assert not cached.is_in_cache


@pytest.mark.parametrize("what", ["cache", "v1", "level"])
def test_a_cache_that_is_removed_is_made_again(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(2 * BLOCK))
    parts = [put(cached, block) for block in range(2)]
    path = map_path(tmp_path / "c" / "v1", version(2 * BLOCK))
    shutil.rmtree({"cache": tmp_path / "c", "v1": tmp_path / "c" / "v1", "level": path.parent}[what])
    assert whole(cached) == b"".join(parts)
    again = cache.open(version(2 * BLOCK))
    assert not again.is_present(0)
    assert put(again, 0) == parts[0]
    assert path.exists()
    assert all(not stat.S_IMODE(one.stat().st_mode) & 0o077 for one in (tmp_path / "c").rglob("*"))
    assert ("made again" in caplog.text) == (what != "level")
    cache.pins.add(version(2 * BLOCK))
    evict(tmp_path / "c", 0)
    assert again.is_present(0)


@pytest.mark.parametrize("suffix", ["data", "map"])
@pytest.mark.parametrize("kind", ["link", "foreign", "pipe"])
def test_what_is_no_cache_file_is_removed(tmp_path: Path, suffix: str, kind: str) -> None:
    cache = Cache(tmp_path / "c", GIB)
    path = map_path(tmp_path / "c" / "v1", version(BLOCK)).with_suffix(f".{suffix}")
    path.parent.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"x")
        os.chown(path, 65534, 65534)
    for _ in range(2):
        with_files = cache.open(version(BLOCK))
        data = put(with_files, 0)
        assert with_files.read(0, BLOCK) == data
        with_files.close()
    assert victim.read_bytes() == b"precious"
    assert stat.S_ISREG(path.lstat().st_mode)
    assert path.lstat().st_uid == os.geteuid()


def test_a_link_in_place_of_the_cache_is_not_followed(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(2 * BLOCK))
    parts = [put(cached, block) for block in range(2)]
    (tmp_path / "c" / "v1").rename(tmp_path / "before")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "c" / "v1").symlink_to(tmp_path / "elsewhere")
    assert whole(cached) == b"".join(parts)
    other = cache.open(version(BLOCK, key="other"))
    assert put(other, 0) == whole(other)
    cache.trim()
    assert not [*(tmp_path / "elsewhere").iterdir()]
    (tmp_path / "c" / "v1").unlink()
    assert put(cache.open(version(BLOCK, key="third")), 0)
    assert len(files(tmp_path / "c", "data")) == 1


def test_a_disk_that_fails_to_read_costs_a_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path / "c", GIB)
    cached = cache.open(version(2 * BLOCK))
    put(cached, 0)
    pread = os.pread

    def failing(fd: int, size: int, offset: int) -> bytes:
        if fd == cached.data_fd:
            raise OSError(errno.EIO, "planted")
        return pread(fd, size, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pread", failing)
        assert cached.read(0, 10) is None
        assert not cached.ensure_verified(0)
    data = put(cached, 0)
    assert cached.read(0, BLOCK) == data


# a disk that loses what it took


@pytest.fixture
def thin(tmp_path: Path) -> Iterator[Path]:
    """A disk that seems to have 64 MiB, on 6 MiB: it takes what it is given, and loses some of it later."""
    behind, path = tmp_path / "behind", tmp_path / "thin"
    behind.mkdir()
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", behind], check=True)
    subprocess.run(["truncate", "-s", "64M", behind / "image"], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", behind / "image"], check=True)
    subprocess.run(["mount", "-o", "loop", behind / "image", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path], check=True)
    subprocess.run(["umount", "-l", behind], check=True)


def write_back(directory: Path) -> None:
    """Have the kernel write what it holds of these files, and need their memory."""
    subprocess.run(["sync", "-f", directory], check=False, capture_output=True)
    for path in files(directory, "data"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("how", ["looked at", "sealed", "opened by the kernel", "read by the kernel", "read"])
def test_what_the_disk_has_lost_is_not_read(thin: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(thin / "c", min_free=0)
    cached = cache.open(version(12 * BLOCK))
    parts = [put(cached, block) for block in range(12)]
    if how == "read by the kernel":
        assert cached.acquire_passthrough()
    if how != "sealed":
        write_back(thin)
    if how == "sealed":
        cached.seal()
        write_back(thin)
    elif how == "opened by the kernel":
        assert not cached.acquire_passthrough()
    else:
        if how == "read":
            # At once: nobody has looked since. In parts, as a reader takes them, and whole, as a loader does.
            buffer = memoryview(bytearray(12 * BLOCK))
            assert [cached.read(block * BLOCK, BLOCK) for block in range(12)] == [None] * 12
            assert [cached.read(block * BLOCK - 10, 20) for block in range(1, 12)] == [None] * 11
            assert not cached.readinto(0, buffer)
            assert [cached.state_word_ref(block) for block in range(12)] == [None] * 12
        cached.recover_if_damaged()
    assert caplog.text.count("the disk has lost") == 1
    again = cached
    if how == "read by the kernel":
        assert cached.is_beyond_repair
        assert "the kernel reads it" in caplog.text
        again = cache.open(version(12 * BLOCK))
    assert not any(map(again.ensure_verified, range(12)))
    assert again.read(5 * BLOCK, 10) is None
    assert put(again, 5) == parts[5]
    assert again.read(5 * BLOCK, BLOCK) == parts[5]
    cached.recover_if_damaged()
    assert caplog.text.count("the disk has lost") == 1


def test_what_the_disk_has_lost_is_fetched_without_anybody_looking(thin: Path) -> None:
    """The first reader finds it out, and goes on with another file. It does not find the lost one at its name again."""
    cache = Cache(thin / "c", min_free=0)
    cached = cache.open(version(12 * BLOCK))
    parts = [put(cached, block) for block in range(12)]
    write_back(thin)
    assert cached.read(5 * BLOCK, 10) is None
    assert not any(map(cached.ensure_verified, range(12)))
    for block in (5, 6):
        assert put(cached, block) == parts[block]
        assert cached.read(block * BLOCK, BLOCK) == parts[block]
    assert not any(cached.ensure_verified(block) for block in range(12) if block not in (5, 6))


# seals


def test_a_seal_is_over_when_the_disk_was_mounted_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where: ObjectVersion = version(2 * BLOCK)
    cached = Cache(tmp_path / "c", GIB).open(where)
    for block in range(2):
        put(cached, block)
    cached.seal()
    assert Cache(tmp_path / "c", GIB).open(where).is_fully_verified()
    for changed in (12345, None):
        monkeypatch.setattr(layout, "mount_session", lambda fd, changed=changed: changed)
        again = Cache(tmp_path / "c", GIB).open(where)
        assert not again.is_trusted(0)
        assert again.ensure_verified(0)
        assert again.ensure_verified(1)


def test_a_sealed_file_that_was_touched_is_verified_before_the_kernel_has_it(tmp_path: Path) -> None:
    cached = Cache(tmp_path / "c", GIB).open(version(2 * BLOCK))
    for block in range(2):
        put(cached, block)
    cached.seal()
    assert cached.acquire_passthrough()
    cached.release_passthrough()
    (path,) = files(tmp_path, "data")
    with path.open("r+b") as file:
        file.write(b"rot")
    assert not cached.acquire_passthrough()
    assert not cached.ensure_verified(0)
    assert cached.ensure_verified(1)


def test_a_cache_of_an_earlier_version_is_used(tmp_path: Path) -> None:
    """Its map files have room for every entry, a seal that knows no mounts, and the lock of whoever has it open."""
    where = version(200 * BLOCK + 9, key="models/a.bin")
    path = map_path(tmp_path / "c" / "v1", where)
    path.parent.mkdir(parents=True, mode=0o700)
    data = path.with_suffix(".data")
    parts = {block: random_bytes(BLOCK if block < 200 else 9, block) for block in (0, 170, 171, 200)}
    with data.open("wb") as file:
        file.truncate(where.size)
        for block, part in parts.items():
            file.seek(block * BLOCK)
            file.write(part)
    found = data.stat()
    seal = struct.pack("<4Q", found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    identity = (
        b'{"bucket": "bucket", "endpoint": "http://here", "etag": "\\"e\\"", "key": "models/a.bin", "size": 209715209}'
    )
    head = b"OBSFSMAP" + struct.pack("<QQ", 1 << 20, where.size) + seal + struct.pack("<Q", len(identity)) + identity
    with path.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, 4096 + 24 * 201)
        file.write(head)
        for block, part in parts.items():
            file.seek(4096 + 24 * block)
            file.write(struct.pack("<3Q", xxhash.xxh3_64_intdigest(part), 10**18, 3))
    for one in (path, data):
        one.chmod(0o600)
    cache = Cache(tmp_path / "c")
    (entry,) = cache.entries()
    assert (entry.version, entry.cached_bytes) == (where, 3 * BLOCK + 9)
    cached = cache.open(where)
    assert not cached.is_trusted(0)
    assert {block: cached.read_verified(block) for block in parts} == parts
    put(cached, 5)
    assert cached.cached_bytes == 4 * BLOCK + 9
