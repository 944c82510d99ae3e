"""The server of a mount is killed: another one takes over, and no reader sees an error or a wrong byte."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from obsfs.service import mounts
from tests.conftest import MIB, Mounter, Store, is_running, random_bytes, status, wait_for
from tests.faulty import FaultyLink

_LONG = 6 * MIB
_KILLS = int(os.environ.get("OBSFS_TEST_KILLS", "25"))


def kill(path: Path) -> int:
    """Kill the server of a mount, and return its pid once another one answers."""
    pid = int(status(path)["pid"])
    os.kill(pid, signal.SIGKILL)
    return pid


def successor(path: Path, old: int) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def is_another() -> bool:
        found.update(status(path))
        return bool(found["pid"] != old)

    wait_for(is_another)
    return found


@pytest.mark.slow
def test_a_cold_read_goes_on(bucket: Store, mount: Mounter) -> None:
    data = random_bytes(48 * MIB)
    bucket.put("file.bin", data)
    with FaultyLink(bucket.server.port) as link:
        link.bytes_per_second = 4e6
        path = mount(bucket, endpoint_url=link.endpoint, connections=4)
        reading = subprocess.Popen(["sha256sum", path / "file.bin"], stdout=subprocess.PIPE, text=True)
        time.sleep(1.0)
        assert reading.poll() is None
        old = kill(path)
        shown = successor(path, old)
        assert (shown["restarts"], shown["supervisor"]) == (1, mount.process(path).pid)
        assert reading.communicate(timeout=60)[0].split()[0] == hashlib.sha256(data).hexdigest()
        assert status(path)["errors"] == 0


@pytest.mark.slow
def test_what_is_open_stays_open_and_is_counted_right(bucket: Store, mount: Mounter) -> None:
    data = random_bytes(12 * MIB)
    bucket.put("direct.bin", data)
    bucket.put("through.bin", data)
    path = mount(bucket, read_ahead=0)
    (path / "direct.bin").read_bytes()

    def served(name: str) -> bytes:
        return os.getxattr(path / name, "user.obsfs.served_by")

    wait_for(lambda: served("direct.bin") == b"passthrough")
    direct = [(path / "direct.bin").open("rb", buffering=0) for _ in range(2)]
    through = [(path / "through.bin").open("rb", buffering=0) for _ in range(2)]
    assert through[0].read(1000) == data[:1000]
    mapped = mmap.mmap(direct[0].fileno(), 0, prot=mmap.PROT_READ)
    names = os.scandir(path)
    first = next(names).name
    for _ in range(3):
        shown = successor(path, kill(path))
        assert shown["open_files"] == 2
        assert served("direct.bin") == b"passthrough"
        assert mapped[5 * MIB : 5 * MIB + 100] == data[5 * MIB : 5 * MIB + 100]
        assert os.pread(direct[1].fileno(), 100, 7 * MIB) == data[7 * MIB : 7 * MIB + 100]
        assert os.pread(through[1].fileno(), 100, 9 * MIB) == data[9 * MIB : 9 * MIB + 100]
        with (path / "direct.bin").open("rb", buffering=0) as more:
            assert more.read(10) == data[:10]
    assert {first, *(entry.name for entry in names)} == {"direct.bin", "through.bin"}
    through.pop().close()
    assert os.pread(through[0].fileno(), 100, 3 * MIB) == data[3 * MIB : 3 * MIB + 100]
    mapped.close()
    for file in (*direct, *through):
        file.close()
    wait_for(lambda: status(path)["open_files"] == 0)
    assert (path / "through.bin").read_bytes() == data
    wait_for(lambda: served("through.bin") == b"passthrough")
    subprocess.run(["umount", path], check=True, timeout=10)


@pytest.mark.slow
def test_what_is_open_directly_is_opened_directly_at_once(bucket: Store, mount: Mounter) -> None:
    """Also before the successor has verified what its predecessor had: the kernel fails an open of another mode."""
    names = [f"{number}.bin" for number in range(16)]
    datas = {name: random_bytes(12 * MIB, number) for number, name in enumerate(names)}
    for name, data in datas.items():
        bucket.put(name, data)
    path = mount(bucket)
    for name in names:
        (path / name).read_bytes()
    wait_for(lambda: all(os.getxattr(path / name, "user.obsfs.served_by") == b"passthrough" for name in names))
    with ExitStack() as files:
        for name in names:
            files.enter_context((path / name).open("rb"))
        old = kill(path)
        with ThreadPoolExecutor(len(names)) as pool:
            assert all(pool.map(lambda name: (path / name).read_bytes() == datas[name], names))
        successor(path, old)
    wait_for(lambda: status(path)["open_files"] == 0)


@pytest.mark.slow
def test_a_file_that_is_damaged_under_a_direct_reader_can_be_opened(
    bucket: Store, mount: Mounter, tmp_path: Path
) -> None:
    data = random_bytes(12 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket, cache_dir=tmp_path / "blocks")
    (path / "file.bin").read_bytes()
    wait_for(lambda: os.getxattr(path / "file.bin", "user.obsfs.served_by") == b"passthrough")
    with (path / "file.bin").open("rb", buffering=0):
        (stored,) = (tmp_path / "blocks").glob("v1/??/*.data")
        with stored.open("r+b") as file:
            file.seek(5 * MIB)
            file.write(b"damage")
        successor(path, kill(path))
        wait_for(lambda: status(path)["corrupt_blocks"] == 1)
        assert (path / "file.bin").read_bytes() == data


@pytest.mark.slow
def test_a_direct_reader_keeps_its_bytes_while_nobody_serves(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    """Between the death and the successor, another mount that needs room does not punch holes under the reader."""
    data = random_bytes(16 * MIB)
    bucket.put("file.bin", data)
    bucket.put("other.bin", random_bytes(24 * MIB, 2))
    path = mount(bucket, cache_size="24MiB")
    other = mount(bucket, cache_size="24MiB")
    (path / "file.bin").read_bytes()
    wait_for(lambda: os.getxattr(path / "file.bin", "user.obsfs.served_by") == b"passthrough")
    with (path / "file.bin").open("rb", buffering=0) as file:
        for _ in range(3):
            old = kill(path)
            (other / "other.bin").read_bytes()
            assert file.read() == data
            file.seek(0)
            successor(path, old)


@pytest.mark.slow
@pytest.mark.timeout(300 + 10 * _KILLS)
def test_killed_over_and_over_under_load(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    files = {f"dir{i % 3}/f{i}.bin": random_bytes(5 * MIB + i * 1000, i) for i in range(9)}
    hashes = {key: hashlib.sha256(data).hexdigest() for key, data in files.items()}
    for key, data in files.items():
        bucket.put(key, data)
    path = mount(bucket, metadata_ttl="1s", cache_size="40MiB")
    stop = threading.Event()
    wrong: list[str] = []
    rounds = [0, 0, 0]

    def guarded(number: int, work: Callable[[random.Random], None]) -> None:
        dice = random.Random(number)
        while not stop.is_set() and not wrong:
            try:
                work(dice)
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
            rounds[number % 3] += 1

    def read(dice: random.Random) -> None:
        key = dice.choice(list(files))
        found = subprocess.run(["sha256sum", path / key], capture_output=True, text=True, check=False, timeout=60)
        assert found.stdout.partition(" ")[0] == hashes[key], (key, found.stderr)

    def touch(dice: random.Random) -> None:
        key = dice.choice(list(files))
        with (path / key).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for _ in range(20):
                at = dice.randrange(len(mapped) - 100)
                assert mapped[at : at + 100] == files[key][at : at + 100], key

    def look(dice: random.Random) -> None:
        assert sorted(os.listdir(path)) == ["dir0", "dir1", "dir2"]
        for entry in os.scandir(path / f"dir{dice.randrange(3)}"):
            assert entry.stat().st_size == len(files[f"{Path(entry.path).parent.name}/{entry.name}"])

    threads = [threading.Thread(target=guarded, args=(number, (read, touch, look)[number % 3])) for number in range(6)]
    for thread in threads:
        thread.start()
    dice = random.Random(0)
    try:
        for _ in range(_KILLS):
            old = kill(path)
            time.sleep(dice.choice((0.0, 0.1, 0.6, 1.2)))
            successor(path, old)
            if wrong:
                break
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not wrong
    assert all(rounds), rounds
    assert status(path)["restarts"] == _KILLS
    wait_for(lambda: status(path)["open_files"] == 0)


@pytest.fixture
def held_up(bucket: Store, mount: Mounter) -> Iterator[tuple[Path, FaultyLink, subprocess.Popen[bytes]]]:
    """A mount of which a thread waits in the kernel for the lock of a directory, which a reader holds until it gets an
    answer: the path, the link that keeps the answer back, and the reader."""
    data = random_bytes(_LONG)
    bucket.put("dir/file.bin", data)
    with FaultyLink(bucket.server.port) as link:
        path = mount(bucket, endpoint_url=link.endpoint, metadata_ttl="1s", read_ahead=0)
        with (path / "dir" / "file.bin").open("rb", buffering=0) as file:
            assert file.read(MIB) == data[:MIB]
            directory = os.open(path / "dir", os.O_RDONLY)
            time.sleep(1.0)
            link.stalled_listings = True
            absent = f"/proc/self/fd/{directory}/absent"
            looking = subprocess.Popen(["cat", absent], stderr=subprocess.DEVNULL, pass_fds=[directory])
            os.close(directory)
            time.sleep(0.5)
            # Now the kernel is told to ask for what it knows there.
            threading.Thread(target=mounts.refresh, args=(path,), daemon=True).start()
            server = psutil.Process(status(path)["pid"])
            wait_for(lambda: any(is_held_up(child.pid) for child in server.children()))
            yield path, link, looking
    looking.kill()
    looking.wait(10)


def is_held_up(pid: int) -> bool:
    """Whether it waits in the kernel, and not only for a moment, as for a page of its own program."""
    for _ in range(5):
        if psutil.Process(pid).status() != psutil.STATUS_DISK_SLEEP:
            return False
        time.sleep(0.05)
    return True


def test_killed_while_it_waits_for_the_kernel(held_up: tuple[Path, FaultyLink, subprocess.Popen[bytes]]) -> None:
    """What waits cannot end before the successor has answered the reader, but the server is gone, with its locks."""
    path, link, looking = held_up
    notifiers = psutil.Process(status(path)["pid"]).children()
    old = kill(path)
    wait_for(lambda: not is_running(old))
    assert any(is_held_up(notifier.pid) for notifier in notifiers if notifier.is_running())
    successor(path, old)
    assert looking.poll() is None
    link.stalled_listings = False
    assert looking.wait(10) == 1
    wait_for(lambda: not any(notifier.is_running() for notifier in notifiers))
    assert (path / "dir" / "file.bin").read_bytes() == random_bytes(_LONG)


def test_both_killed_while_they_wait_for_the_kernel(
    bucket: Store, mount: Mounter, held_up: tuple[Path, FaultyLink, subprocess.Popen[bytes]]
) -> None:
    path, _, looking = held_up
    mount.kill(path, wait=False)
    assert looking.poll() is None
    assert (mount(bucket, at=path) / "dir" / "file.bin").read_bytes() == random_bytes(_LONG)
    assert looking.wait(10) == 1


def test_ended_while_it_waits_for_the_kernel(
    mount: Mounter, held_up: tuple[Path, FaultyLink, subprocess.Popen[bytes]]
) -> None:
    path, _, looking = held_up
    server = int(status(path)["pid"])
    mount.process(path).terminate()
    assert mount.process(path).wait(20) == 0
    assert looking.wait(10) == 1
    assert os.listdir(path) == []
    wait_for(lambda: not Path(f"/proc/{server}").exists())


@pytest.mark.slow
def test_upgrade_changes_the_server_under_a_reader(bucket: Store, mount: Mounter, obsfs: Callable[..., Any]) -> None:
    data = random_bytes(8 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket)
    before = status(path)["pid"]
    with (path / "file.bin").open("rb", buffering=0) as file:
        assert file.read(100) == data[:100]
        done = obsfs("upgrade", path)
        assert (done.code, done.err) == (0, "")
        assert "obsfs" in done.out
        assert file.read(100) == data[100:200]
    assert status(path)["pid"] != before
    wrong = obsfs("upgrade", path.parent)
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)


@pytest.mark.slow
def test_when_both_die_it_can_be_mounted_again_at_once(bucket: Store, mount: Mounter) -> None:
    bucket.put("file.txt", b"text")
    path = mount(bucket)
    mount.kill(path, wait=False)
    assert (mount(bucket, at=path) / "file.txt").read_bytes() == b"text"


def test_a_refresh_after_a_takeover_shows_a_name_that_was_absent(bucket: Store, mount: Mounter) -> None:
    """The kernel remembers that a name is absent, by the word of a server that was killed since."""
    bucket.put("d/x", b"1")
    path = mount(bucket, metadata_ttl=3600)
    names = [path / "new", path / "d" / "new", path / "d" / "é"]
    assert not any(name.exists() for name in names)
    successor(path, kill(path))
    for name in names:
        bucket.put(name.relative_to(path).as_posix(), b"here")
    assert not names[0].exists()
    mounts.refresh(path)
    assert [name.read_bytes() for name in names] == [b"here"] * 3
