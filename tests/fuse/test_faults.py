"""What goes wrong: servers that stall or die, daemons that are killed, disks that are full, caches that rot."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from obsfs import mountinfo
from obsfs.cache.directory import Cache
from obsfs.demo.server import EmbeddedServer
from obsfs.fetch.reader import Reader
from obsfs.service.serving import serve
from obsfs.service.stop import Stop
from obsfs.settings import Settings
from tests.conftest import MIB, Mounter, Store, random_bytes, status, wait_for
from tests.faulty import FaultyLink


@pytest.fixture
def link(server: EmbeddedServer) -> Iterator[FaultyLink]:
    with FaultyLink(server.port) as faulty:
        yield faulty


def test_a_body_that_breaks_off_is_fetched_again(bucket: Store, mount: Mounter, link: FaultyLink) -> None:
    data = random_bytes(24 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket, endpoint_url=link.endpoint) / "file.bin"
    assert path.stat().st_size == len(data)
    link.cut_after(3 * MIB)
    reading = subprocess.Popen(["sha256sum", path], stdout=subprocess.PIPE, text=True)
    assert reading.communicate(timeout=60)[0].split()[0] == hashlib.sha256(data).hexdigest()
    assert link.cut.is_set()
    assert status(path.parent)["retries"] == 1
    assert status(path.parent)["errors"] == 0


def test_a_read_waits_for_a_server_that_comes_back(
    mount: Mounter, tmp_path: Path, fuse_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random_bytes(12 * MIB)
    with EmbeddedServer(tmp_path) as own, FaultyLink(own.port) as link:
        for name, value in own.environment.items():
            monkeypatch.setenv(name, value)
        client = own.client()
        client.create_bucket(Bucket="one")
        client.put_object(Bucket="one", Key="file.bin", Body=data)
        path = mount(
            "obs://one", endpoint_url=link.endpoint, fuse_backend=fuse_backend, read_ahead=0, retry_timeout="60s"
        )
        with (path / "file.bin").open("rb", buffering=0) as file:
            assert file.read(1000) == data[:1000]
            link.refusing = True
            link.break_all()
            reading = subprocess.Popen(["sha256sum", path / "file.bin"], stdout=subprocess.PIPE, text=True)
            time.sleep(1.5)
            assert reading.poll() is None
            link.refusing = False
            assert reading.communicate(timeout=60)[0].split()[0] == hashlib.sha256(data).hexdigest()
        assert status(path)["retries"] > 0


def test_a_name_waits_for_a_server_that_comes_back(
    bucket: Store, mount: Mounter, link: FaultyLink, fuse_backend: str
) -> None:
    bucket.put("dir/file.bin", b"text")
    path = mount(bucket, endpoint_url=link.endpoint, fuse_backend=fuse_backend)
    link.refusing = True
    link.break_all()
    reading = subprocess.Popen(["cat", path / "dir" / "file.bin"], stdout=subprocess.PIPE, text=True)
    time.sleep(1.5)
    assert reading.poll() is None
    link.refusing = False
    assert reading.communicate(timeout=60)[0] == "text"
    assert status(path)["retries"] > 0


def test_names_fail_together_when_patience_is_over(bucket: Store, mount: Mounter, link: FaultyLink) -> None:
    bucket.put("dir/file.bin", b"text")
    path = mount(bucket, endpoint_url=link.endpoint, retry_timeout="2s")
    link.refusing = True
    link.break_all()
    started = time.monotonic()
    waiting = [subprocess.Popen(["ls", path / "dir"], stderr=subprocess.PIPE, text=True) for _ in range(12)]
    for process in waiting:
        assert "Input/output error" in process.communicate(timeout=20)[1]
    assert 1.0 < time.monotonic() - started < 10
    link.refusing = False
    assert os.listdir(path / "dir") == ["file.bin"]


def test_names_of_one_directory_do_not_wait_for_those_of_silent_ones(
    bucket: Store, mount: Mounter, link: FaultyLink, fuse_backend: str, obsfs: Callable[..., Any]
) -> None:
    for number in range(3):
        bucket.put(f"fast-{number}/sub/file", b"text")
    for number in range(200):
        bucket.put(f"slow-{number}/file", b"text")
    path = mount(bucket, endpoint_url=link.endpoint, fuse_backend=fuse_backend)
    link.stalled_text = b"prefix=slow-"
    waiting: list[threading.Thread] = []
    for number, (start, stop) in enumerate(((0, 9), (9, 40), (40, 200))):
        for slow in range(start, stop):
            # The second look into each directory waits for the first one.
            waiting += [
                threading.Thread(target=(path / f"slow-{slow}" / name).exists, daemon=True) for name in ("file", "none")
            ]
        for thread in waiting[2 * start :]:
            thread.start()
        assert (path / f"fast-{number}" / "sub" / "file").read_bytes() == b"text"
        assert os.listdir(path / f"fast-{number}") == ["sub"]
        assert all(thread.is_alive() for thread in waiting), "those prefixes are silent"
    assert obsfs("refresh", path / "fast-1").code == 0
    assert (path / "fast-1" / "sub" / "file").read_bytes() == b"text"
    assert all(thread.is_alive() for thread in waiting), "those prefixes are silent"
    link.stalled_text = b""
    for thread in waiting:
        thread.join(30)
        assert not thread.is_alive()
    assert (path / "slow-199" / "file").read_bytes() == b"text"


def test_a_read_fails_when_patience_is_over_and_the_mount_survives(
    bucket: Store, mount: Mounter, link: FaultyLink, fuse_backend: str
) -> None:
    data = random_bytes(6 * MIB)
    bucket.put("file.bin", data)
    path = mount(
        bucket,
        endpoint_url=link.endpoint,
        fuse_backend=fuse_backend,
        read_ahead=0,
        retry_timeout="1s",
        request_timeout="1s",
    )
    file = path / "file.bin"
    assert file.stat().st_size == len(data)
    link.refusing = True
    link.break_all()
    started = time.monotonic()
    with pytest.raises(OSError) as caught:
        file.read_bytes()
    assert caught.value.errno == errno.EIO
    assert time.monotonic() - started < 20
    assert status(path)["errors"] > 0
    link.refusing = False
    assert file.read_bytes() == data


@pytest.mark.parametrize("mapped", [False, True])
def test_one_read_of_a_silent_server_is_given_up_once(
    bucket: Store, mount: Mounter, link: FaultyLink, mapped: bool
) -> None:
    """The kernel asks again for the page, after its read-ahead has failed: it is not waited for once more."""
    bucket.put("file.bin", random_bytes(6 * MIB))
    path = mount(bucket, endpoint_url=link.endpoint, read_ahead=0, retry_timeout="0.5s", request_timeout="0.5s")
    file = path / "file.bin"
    assert file.stat().st_size == 6 * MIB
    link.stalled = True
    program = (
        "import mmap,sys\n"
        "f=open(sys.argv[1],'rb',buffering=0)\n"
        "m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\n"
        f"{'m[0]' if mapped else 'f.read(1)'}"
    )
    command = [sys.executable, "-c", program, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (-7 if mapped else 1)
    assert mapped or "Errno 5" in done.stderr
    assert status(path)["errors"] == 1
    link.stalled = False
    assert file.read_bytes() == random_bytes(6 * MIB), "a new attempt is a new one"


@pytest.mark.slow
def test_four_maps_of_a_bucket_that_stalls_do_not_hang(
    bucket: Store, mount: Mounter, link: FaultyLink, fuse_backend: str
) -> None:
    bucket.put("file.bin", random_bytes(32 * MIB))
    path = mount(
        bucket, endpoint_url=link.endpoint, fuse_backend=fuse_backend, retry_timeout="2s", request_timeout="1s"
    )
    assert (path / "file.bin").stat().st_size == 32 * MIB
    link.stalled = True
    program = (
        "import mmap,sys\n"
        "f=open(sys.argv[1],'rb'); m=mmap.mmap(f.fileno(),0,prot=mmap.PROT_READ)\n"
        "s=int(sys.argv[2])*(8<<20); print(sum(m[s:s+(8<<20):4096]))"
    )
    readers = [
        subprocess.Popen([sys.executable, "-c", program, path / "file.bin", str(n)], stdout=subprocess.DEVNULL)
        for n in range(4)
    ]
    for reader in readers:
        # The kernel tells a map of a failed read by SIGBUS.
        assert reader.wait(60) == -7
    link.stalled = False
    assert hashlib.sha256((path / "file.bin").read_bytes()).digest() == hashlib.sha256(random_bytes(32 * MIB)).digest()


def test_a_stalled_read_can_be_interrupted(bucket: Store, mount: Mounter, link: FaultyLink) -> None:
    bucket.put("file.bin", random_bytes(MIB))
    path = mount(bucket, endpoint_url=link.endpoint)
    assert (path / "file.bin").stat().st_size == MIB
    link.stalled = True
    reading = subprocess.Popen(["cat", path / "file.bin"], stdout=subprocess.DEVNULL)
    time.sleep(0.5)
    reading.kill()
    assert reading.wait(5) == -9
    link.stalled = False
    assert (path / "file.bin").read_bytes() == random_bytes(MIB)


def test_lookups_that_wait_can_be_interrupted(bucket: Store, mount: Mounter, link: FaultyLink) -> None:
    """The kernel sends interrupts over any clone of its descriptor, and takes the answer over the request's own."""
    names = [f"dir{number}/file" for number in range(6)]
    for name in names:
        bucket.put(name, b"text")
    path = mount(bucket, endpoint_url=link.endpoint)
    link.stalled = True
    waiting = [subprocess.Popen(["cat", path / name], stdout=subprocess.DEVNULL) for name in names]
    time.sleep(0.5)
    for process in waiting:
        process.kill()
    try:
        assert [process.wait(5) for process in waiting] == [-9] * len(names)
    finally:
        link.stalled = False
    assert [(path / name).read_bytes() for name in names] == [b"text"] * len(names)


def test_a_waiting_reader_is_answered_before_its_range_is_whole(
    bucket: Store, mount: Mounter, link: FaultyLink
) -> None:
    data = random_bytes(16 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket, endpoint_url=link.endpoint, connections=1) / "file.bin"
    with path.open("rb", buffering=0) as file:
        assert file.read(MIB) == data[:MIB]
        link.bytes_per_second = 4 * MIB
        started = time.monotonic()
        assert os.pread(file.fileno(), 4096, 2 * MIB) == data[2 * MIB : 2 * MIB + 4096]
        answered = time.monotonic() - started
        longest = max(stop - start for start, stop in link.ranges)
        assert longest >= 3 * MIB
        assert answered < longest / link.bytes_per_second
        link.bytes_per_second = None


def test_no_range_is_asked_for_twice(bucket: Store, mount: Mounter, link: FaultyLink) -> None:
    data = random_bytes(40 * MIB + 17)
    bucket.put("file.bin", data)
    path = mount(bucket, endpoint_url=link.endpoint) / "file.bin"
    readers = [subprocess.Popen(["sha256sum", path], stdout=subprocess.DEVNULL) for _ in range(4)]
    assert [reader.wait(60) for reader in readers] == [0] * 4
    asked = sorted(link.ranges)
    assert asked[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(asked))
    assert asked[-1][1] == len(data)


def test_kill_9_and_mount_again_at_once(bucket: Store, mount: Mounter, fuse_backend: str) -> None:
    data = random_bytes(20 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket, fuse_backend=fuse_backend)
    assert (path / "file.bin").read_bytes() == data
    mount.kill(path)
    with pytest.raises(OSError) as caught:
        os.listdir(path)
    assert caught.value.errno == errno.ENOTCONN
    assert mount(bucket, at=path, fuse_backend=fuse_backend) == path
    assert (path / "file.bin").read_bytes() == data
    # What was in the cache when it was killed is verified by its checksums, not fetched again.
    assert status(path)["bytes_fetched"] == 0


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_read_over_and_over(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    data = random_bytes(64 * MIB, 5)
    bucket.put("file.bin", data)
    path = tmp_path / "again"
    path.mkdir()
    for attempt in range(5):
        mount(bucket, at=path)
        reading = subprocess.Popen(["cat", path / "file.bin"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.02 + 0.03 * attempt)
        mount.kill(path)
        reading.wait(10)
    mount(bucket, at=path)
    assert (path / "file.bin").read_bytes() == data
    assert status(path)["corrupt_blocks"] == 0


def test_sigterm_unmounts(bucket: Store, mount: Mounter, fuse_backend: str) -> None:
    bucket.put("file.bin", b"data")
    path = mount(bucket, fuse_backend=fuse_backend)
    assert (path / "file.bin").read_bytes() == b"data"
    mount.process(path).terminate()
    assert mount.process(path).wait(20) == 0
    assert os.listdir(path) == []
    mount(bucket, at=path, fuse_backend=fuse_backend)


def test_a_corrupt_cache_is_noticed_and_fetched_again(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    data = random_bytes(10 * MIB)
    bucket.put("file.bin", data)
    first = mount(bucket)
    assert (first / "file.bin").read_bytes() == data
    mount.process(first).terminate()
    assert mount.process(first).wait(20) == 0
    (blocks,) = (tmp_path / "blocks").rglob("*.data")
    with blocks.open("r+b") as file:
        file.seek(4 * MIB + 1000)
        byte = file.read(1)
        file.seek(4 * MIB + 1000)
        file.write(bytes([byte[0] ^ 1]))
    second = mount(bucket)
    assert (second / "file.bin").read_bytes() == data
    assert status(second)["corrupt_blocks"] == 1
    assert status(second)["bytes_fetched"] == MIB


def test_the_cache_keeps_to_its_size(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    for n in range(4):
        bucket.put(f"{n}.bin", random_bytes(24 * MIB, n))
    path = mount(bucket, cache_size="40MiB")
    for n in (0, 1, 2, 3, 0):
        assert (path / f"{n}.bin").read_bytes() == random_bytes(24 * MIB, n)
    assert status(path)["cache_bytes"] <= 40 * MIB
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "blocks").rglob("*") if file.is_file())
    assert used <= 41 * MIB


def test_a_full_disk_does_not_fail_a_read(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    data = random_bytes(48 * MIB)
    bucket.put("file.bin", data)
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", small], check=True)
    try:
        path = mount(bucket, cache_dir=small / "blocks", cache_min_free=0)
        (small / "other").write_bytes(bytes(199 * MIB))
        assert hashlib.sha256((path / "file.bin").read_bytes()).digest() == hashlib.sha256(data).digest()
        failed = status(path)["cache_write_errors"]
        assert failed > 0
        # There is room again: what comes from now on is kept, and what had to stay in memory goes to the disk.
        (small / "other").unlink()
        bucket.put("other.bin", other := random_bytes(64 * MIB))
        wait_for(lambda: (path / "other.bin").exists())
        assert hashlib.sha256((path / "other.bin").read_bytes()).digest() == hashlib.sha256(other).digest()
        shown = status(path)
        assert shown["cache_write_errors"] == failed
        # What the mount counts may be more than there is, until it looks again.
        assert shown["cache_bytes"] >= len(data) + len(other)
        assert sum(one.cached_bytes for one in Cache(small / "blocks").entries()) == len(data) + len(other)
        mount.close()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.slow
def test_the_host_sleeps_and_wakes(bucket: Store, mount: Mounter, link: FaultyLink) -> None:
    """What a suspended host is to its programs: they stop, and when they go on all their connections are gone."""
    data = random_bytes(24 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket, endpoint_url=link.endpoint, connections=4)
    assert (path / "file.bin").stat().st_size == len(data)
    link.bytes_per_second = 2 * MIB
    reading = subprocess.Popen(["sha256sum", path / "file.bin"], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: link.passed > 4 * MIB)
    shown = status(path)
    for pid in (shown["supervisor"], shown["pid"]):
        os.kill(pid, signal.SIGSTOP)
    link.break_all()
    time.sleep(3)
    link.bytes_per_second = None
    for pid in (shown["supervisor"], shown["pid"]):
        os.kill(pid, signal.SIGCONT)
    assert reading.communicate(timeout=60)[0].split()[0] == hashlib.sha256(data).hexdigest()
    after = status(path)
    assert (after["pid"], after["errors"], after["restarts"]) == (shown["pid"], 0, 0)


def test_two_mounts_share_a_cache(bucket: Store, mount: Mounter) -> None:
    data = random_bytes(40 * MIB)
    bucket.put("file.bin", data)
    one, other = mount(bucket), mount(bucket)
    readers = [subprocess.Popen(["sha256sum", path / "file.bin"], stdout=subprocess.DEVNULL) for path in (one, other)]
    assert [reader.wait(60) for reader in readers] == [0, 0]
    assert status(one)["bytes_fetched"] + status(other)["bytes_fetched"] == len(data)


def test_a_mistake_of_ours_is_answered(bucket: Store, tmp_path: Path) -> None:
    """A server process with a bug in it: whoever meets it gets EIO, at once, and the mount lives on."""
    bucket.put("a.bin", data := random_bytes(4 * MIB))
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    pid = os.fork()
    if not pid:
        try:
            ready = Reader.ready

            def broken(self: Reader, offset: int, *arguments: Any, **options: Any) -> bool:
                if offset < MIB:
                    raise RuntimeError("planted")
                return ready(self, offset, *arguments, **options)

            Reader.ready = broken  # type: ignore[method-assign]
            settings = Settings.load(cache_dir=tmp_path / "cache")
            serve(str(bucket), mountpoint, settings, lambda: None, Stop())
        finally:
            os._exit(0)
    try:
        wait_for(lambda: mountinfo.mounted_at(mountpoint) is not None)

        def read(offset: int) -> subprocess.CompletedProcess[bytes]:
            command = ["dd", f"if={mountpoint / 'a.bin'}", "bs=1M", f"skip={offset}", "count=1"]
            return subprocess.run(command, capture_output=True, timeout=20, check=False)

        assert b"Input/output error" in read(0).stderr
        assert read(3).stdout == data[3 * MIB :]
        assert status(mountpoint)["pid"] == pid
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False, timeout=20)
        wait_for(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)


@pytest.mark.parametrize("kind", ["bytes", "inodes"])
def test_files_that_are_new_to_a_full_disk_are_read(
    bucket: Store, mount: Mounter, tmp_path: Path, fuse_backend: str, kind: str
) -> None:
    for size in (7, 3 * MIB, 9 * MIB + 5):
        bucket.put(f"{size}.bin", random_bytes(size))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=16", "tmpfs", small], check=True)
    try:
        path = mount(bucket, cache_dir=small / "blocks", fuse_backend=fuse_backend, cache_min_free=0)
        with suppress(OSError):
            for number in range(100):
                (small / f"other{number}").write_bytes(bytes(MIB if kind == "bytes" else 0))
        for size in (7, 3 * MIB, 9 * MIB + 5):
            assert (path / f"{size}.bin").read_bytes() == random_bytes(size)
        assert status(path)["errors"] == 0
        mount.close()
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.parametrize("passthrough", [True, False])
@pytest.mark.parametrize("how", ["cut", "replaced", "removed", "map"])
def test_a_cache_file_that_somebody_spoils_costs_a_fetch(
    bucket: Store, mount: Mounter, tmp_path: Path, how: str, passthrough: bool
) -> None:
    """While the file is open, and when it is opened next: the right bytes, at once, and no thread that spins."""
    data = random_bytes(9 * MIB + 5)
    bucket.put("file.bin", data)
    bucket.put("next.bin", b"text")
    path = mount(bucket, passthrough=passthrough) / "file.bin"
    assert path.read_bytes() == data
    wait_for(lambda: os.getxattr(path, "user.obsfs.served_by") == (b"passthrough" if passthrough else b"splice"))
    (place,) = (tmp_path / "blocks").rglob("*.data")
    if how == "cut":
        os.truncate(place, 2 * MIB + 7)
    elif how == "replaced":
        (tmp_path / "other").write_bytes(bytes(len(data)))
        (tmp_path / "other").replace(place)
    elif how == "removed":
        shutil.rmtree(tmp_path / "blocks")
    else:
        os.truncate(place.with_suffix(".map"), 100)
    for _ in range(2):
        # Past the page cache: the server is asked.
        command = ["dd", f"if={path}", "iflag=direct", "bs=1M", "status=none"]
        assert subprocess.run(command, capture_output=True, timeout=30, check=True).stdout == data
    assert (path.parent / "next.bin").read_bytes() == b"text"
    server = psutil.Process(status(path.parent)["pid"])
    before = sum(server.cpu_times()[:2])
    time.sleep(0.5)
    assert sum(server.cpu_times()[:2]) - before < 0.25
    assert status(path.parent)["restarts"] == 0


def test_reads_go_on_while_opens_wait_for_the_cache(
    bucket: Store, mount: Mounter, tmp_path: Path, fuse_backend: str
) -> None:
    """As they do for a disk that is slow, and for another process that makes room."""
    data = random_bytes(2 * MIB)
    bucket.put("a.bin", data)
    names = [f"{number}.bin" for number in range(12)]
    for name in names:
        bucket.put(name, b"text")
    path = mount(bucket, cache_dir=tmp_path / "cache", passthrough=False, fuse_backend=fuse_backend)
    fd = os.open(path / "a.bin", os.O_RDONLY | os.O_DIRECT)
    assert (path / names[0]).stat().st_size == 4
    wait_for(lambda: os.pread(fd, 2 * MIB, 0) == data and status(path)["requests_in_flight"] == 0)
    with ThreadPoolExecutor(20) as pool, (tmp_path / "cache" / "v1" / "lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            opening = [pool.submit((path / name).read_bytes) for name in names[:8]]
            killed = [subprocess.Popen(["cat", path / name]) for name in names[8:]]
            time.sleep(0.3)
            assert pool.submit(os.pread, fd, MIB, MIB).result(10) == data[MIB:]
            assert pool.submit((path / "a.bin").read_bytes).result(10) == data
            assert pool.submit(os.listdir, path).result(10) == sorted([*names, "a.bin"])
            assert not any(one.done() for one in opening)
            for process in killed:
                process.kill()
            if fuse_backend == "native":
                assert [process.wait(10) for process in killed] == [-9] * 4
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)
        assert [one.result(10) for one in opening] == [b"text"] * 8
        assert [process.wait(10) for process in killed] == [-9] * 4
    os.close(fd)
    wait_for(lambda: status(path)["open_files"] == 0)
    assert [(path / name).read_bytes() for name in names] == [b"text"] * 12


def test_names_of_one_directory_do_not_wait_for_each_other(bucket: Store, mount: Mounter, link: FaultyLink) -> None:
    """In one that is too long for a page, where each is asked for by itself; also while the kernel is to be told."""
    names = [f"long/f{n:04}" for n in range(1010)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: bucket.put(name, b"data"), names))
    path = mount(bucket, endpoint_url=link.endpoint, metadata_ttl="1h")
    assert (path / "long" / "f0000").stat().st_size == 4
    link.stalled_text = b"f1absent"
    absent = [path / "long" / f"f1absent{n}" for n in range(20)]
    waiting = [subprocess.Popen(["cat", name], stderr=subprocess.DEVNULL) for name in absent]
    try:
        wait_for(lambda: link.held == 20)
        # Each is complete as soon as it was read, of which the kernel would like to be told.
        for name in ("f0001", "f1005", "f0002", "f1006"):
            assert (path / "long" / name).read_bytes() == b"data"
        assert link.held == 20
    finally:
        link.stalled_text = b""
        for process in waiting:
            assert process.wait(30) == 1
