"""What rots on the disk under a running cache is found without anybody reading it."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from obsfs import mountinfo
from obsfs.blocks import BLOCK
from obsfs.cache import scrub
from obsfs.cache.directory import Cache
from obsfs.cache.layout import map_path
from obsfs.cache.scrub import Scrubber
from obsfs.service.serving import serve
from obsfs.service.stop import Stop
from obsfs.settings import Settings
from obsfs.store.types import ObjectVersion
from tests.cache.test_cache import put, version
from tests.conftest import MIB, Store, random_bytes, status, wait_for

FAST = 1 << 40


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs use the disk while tests run."""
    monkeypatch.setattr(scrub, "_pressure", lambda: 0.0)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    store = Cache(tmp_path / "c", 1 << 30)
    yield store
    store.close()


def rot(cache: Cache, where: ObjectVersion, offset: int) -> None:
    """Change bytes of a data file, and make it look as if nobody had."""
    path = map_path(cache.root, where).with_suffix(".data")
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"rot")
        os.fsync(file.fileno())


@pytest.mark.parametrize("at", [[0], [3 * BLOCK + 6], [BLOCK - 2, 2 * BLOCK + 99]])
def test_what_has_rotted_is_dropped_and_told(cache: Cache, at: list[int]) -> None:
    where = version(3 * BLOCK + 9)
    cached = cache.open(where)
    parts = [put(cached, block) for block in range(4)]
    cached.seal()
    assert cached.acquire_passthrough()
    for offset in at:
        rot(cache, where, offset)
    told: list[tuple[ObjectVersion, list[int]]] = []
    scrubber = Scrubber(cache, FAST, on_damage=lambda *damage: told.append(damage))
    assert scrubber.run_pass()
    bad = sorted({block for offset in at for block in (offset // BLOCK, (offset + 2) // BLOCK)})
    assert told == [(where, bad)]
    assert (scrubber.bytes, scrubber.errors) == (where.size, len(bad))
    # Who has it open sees so at once, and what is fetched again goes to where it was, for the kernel's readers too.
    assert [block for block in range(4) if not cached.ensure_verified(block)] == bad
    for block in bad:
        put(cached, block)
    assert os.pread(cached.data_fd, where.size, 0) == b"".join(parts)


def test_a_block_that_is_evicted_while_it_is_read_is_not_damaged(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    where = version(2 * BLOCK)
    cached = cache.open(where)
    put(cached, 0)
    put(cached, 1)
    read = scrub._UncachedFile.read

    def late(medium: Any, offset: int, size: int) -> bytes:
        if offset:
            cache.drop(where)
        return read(medium, offset, size)

    monkeypatch.setattr(scrub._UncachedFile, "read", late)
    told: list[object] = []
    scrubber = Scrubber(cache, FAST, on_damage=lambda *damage: told.append(damage))
    assert scrubber.run_pass()
    assert (scrubber.errors, told, cache.corrupt_blocks) == (0, [], 0)
    assert not cached.is_present(1)


def test_the_medium_is_read_and_not_the_page_cache(tmp_path: Path) -> None:
    """The kernel has the right bytes still, and the disk no longer."""
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        cache = Cache(place / "c", min_free=0)
        cached = cache.open(version(2 * BLOCK))
        data = put(cached, 0) + put(cached, 1)
        os.fsync(cached.data_fd)
        with image.open("r+b") as file:
            at = file.read().find(data[BLOCK + 5000 : BLOCK + 5100])
            assert at > 0
            file.seek(at)
            file.write(b"rot")
        assert cached.read(0, 2 * BLOCK) == data
        scrubber = Scrubber(cache, FAST)
        assert scrubber.run_pass()
        assert scrubber.errors == 1
        assert not cached.ensure_verified(1)
        cached.close()
        cache.close()
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_each_block_is_read_once_in_seven_days(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache.open(version(BLOCK)), 0)
    first, second = Scrubber(cache, FAST), Scrubber(cache, FAST)
    assert first.last_pass is None
    before = time.time()
    assert first.run_pass()
    assert not first.run_pass()
    assert not second.run_pass()
    assert (first.bytes, second.bytes) == (BLOCK, 0)
    assert before <= (second.last_pass or 0) <= time.time()
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 6.9 * 86400)
    assert not second.run_pass()
    monkeypatch.setattr(time, "time", lambda: now() + 7.1 * 86400)
    assert second.run_pass()
    assert second.bytes == BLOCK


def test_it_goes_on_where_it_was(cache: Cache) -> None:
    for number in range(5):
        put(cache.open(version(BLOCK, key=str(number))), 0)
    first, second = Scrubber(cache, FAST), Scrubber(cache, FAST)
    first._is_idle = lambda: first.bytes < 2 * BLOCK or first._stopping.set() or False
    assert not first.run_pass()
    assert first.bytes == 2 * BLOCK
    assert second.run_pass()
    assert second.bytes == 3 * BLOCK


@pytest.mark.parametrize("junk", [b"", b"{", b"[1]", b'{"format": 2}', b'{"format": 1, "began": "x"}', b"\xff" * 99])
def test_notes_that_cannot_be_read_begin_a_pass(cache: Cache, junk: bytes) -> None:
    put(cache.open(version(BLOCK)), 0)
    (cache.root / "scrub.json").write_bytes(junk)
    scrubber = Scrubber(cache, FAST)
    assert scrubber.last_pass is None
    assert scrubber.run_pass()
    assert json.loads((cache.root / "scrub.json").read_bytes())["format"] == 1
    assert stat.S_IMODE((cache.root / "scrub.json").stat().st_mode) == 0o600


def test_one_process_does_it(cache: Cache) -> None:
    put(cache.open(version(BLOCK)), 0)
    scrubber = Scrubber(cache, FAST)
    with (cache.root / "scrub.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not scrubber.run_pass()
    assert scrubber.run_pass()


def test_it_keeps_to_its_pace_and_ends_at_once(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = cache.open(version(4 * BLOCK))
    for block in range(4):
        put(cached, block)
    waits: list[float] = []
    scrubber = Scrubber(cache, BLOCK // 2)
    monkeypatch.setattr(scrubber._stopping, "wait", lambda seconds: waits.append(seconds) or len(waits) > 2)
    assert not scrubber.run_pass()
    assert waits == [2.0, 2.0, 2.0]
    assert scrubber.bytes == 2 * BLOCK


def test_a_mount_heals_what_has_rotted(bucket: Store, tmp_path: Path) -> None:
    data = random_bytes(6 * MIB)
    bucket.put("a.bin", data)
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    pid = os.fork()
    if not pid:
        try:
            scrub._POLL_SECONDS = scrub._BUSY_SECONDS = 0.05
            settings = Settings.load(cache_dir=tmp_path / "cache", scrub="1GiB")
            serve(str(bucket), mountpoint, settings, lambda: None, Stop())
        finally:
            os._exit(0)
    try:
        wait_for(lambda: mountinfo.mounted_at(mountpoint) is not None)
        shown: dict[str, Any] = {}
        wait_for(lambda: bool(shown.update(status(mountpoint)) or shown["last_scrub"]))
        assert (mountpoint / "a.bin").read_bytes() == data
        wait_for(lambda: os.getxattr(mountpoint / "a.bin", "user.obsfs.served_by") == b"passthrough")
        with (mountpoint / "a.bin").open("rb", buffering=0) as held:
            (path,) = (tmp_path / "cache").rglob("*.data")
            with path.open("r+b") as file:
                file.seek(4 * MIB)
                file.write(b"rot")
            (tmp_path / "cache" / "v1" / "scrub.json").unlink()
            wait_for(lambda: status(mountpoint)["scrub_errors"] == 1)
            wait_for(lambda: path.read_bytes() == data)
            assert os.pread(held.fileno(), MIB, 4 * MIB) == data[4 * MIB : 5 * MIB]
        assert (mountpoint / "a.bin").read_bytes() == data
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False, timeout=20)
        wait_for(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)
