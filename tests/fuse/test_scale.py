"""Very many objects, readers and operations: what they cost stays bounded."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import MIB, Mounter, Store, random_bytes, status, wait_for
from tests.faulty import ListedServer

_OBJECTS = int(os.environ.get("OBSFS_TEST_OBJECTS", "100000"))
_OPERATIONS = int(os.environ.get("OBSFS_TEST_OPERATIONS", "40000"))
_IN_DIRECTORY = 1000
_MOST = 20_000

_WORKER = """
import errno, mmap, os, random, sys
mounted, local, count, seed = *sys.argv[1:3], *map(int, sys.argv[3:])
dice = random.Random(seed)
names = [f"{d}/{name}" for d in os.listdir(local) for name in os.listdir(f"{local}/{d}")]
contents = {name: open(f"{local}/{name}", "rb").read() for name in names}
for _ in range(count):
    name = dice.choice(names)
    path, content = f"{mounted}/{name}", contents[name]
    kind = dice.randrange(8)
    if kind == 0:
        assert sorted(os.listdir(os.path.dirname(path))) == sorted(os.listdir(os.path.dirname(f"{local}/{name}")))
    elif kind == 1:
        assert not os.path.exists(path + str(dice.random()))
    elif kind == 2:
        assert os.getxattr(path, "user.obsfs.key").decode() == name
    elif kind == 3 and content:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            at = dice.randrange(len(content))
            assert mapped[at : at + 100] == content[at : at + 100]
    elif kind <= 5:
        assert os.stat(path).st_size == len(content)
    else:
        fd = os.open(path, os.O_RDONLY)
        at = dice.randrange(len(content) + 1)
        assert os.pread(fd, 4096, at) == content[at : at + 4096]
        os.close(fd)
"""


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")


def descriptors(pid: int, cache: Path) -> Counter[str]:
    """How many a process has to files of a cache directory, to pipes, and to anything else."""
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            name = str(entry.readlink())
            found["cache" if name.startswith(str(cache)) else "pipe" if name.startswith("pipe:") else "other"] += 1
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("keys")
@pytest.mark.timeout(120 + _OBJECTS // 500)
def test_find_over_more_than_may_be_remembered(mount: Mounter) -> None:
    names = (f"d{n // _IN_DIRECTORY:04}/f{n % _IN_DIRECTORY:03}.bin" for n in range(_OBJECTS))
    with ListedServer(names) as listed:
        path = mount("obs://any", endpoint_url=listed.endpoint, max_entries=_MOST)
        assert len(os.listdir(path / "d0007")) == _IN_DIRECTORY
        assert set(listed.asked) == {"", "d0007/"}, "one directory is shown without reading the others"
        before = status(path)["memory_bytes"]
        assert subprocess.check_output(["find", path, "-type", "f", "-size", "-2", "-printf", "x"]) == b"x" * _OBJECTS
        shown = status(path)
        assert shown["listed"] <= _MOST + _IN_DIRECTORY + 1
        directories = _OBJECTS // _IN_DIRECTORY
        wait_for(lambda: status(path)["nodes"] <= _MOST + directories + 1)
        print(f"{_OBJECTS} objects: {shown['memory_bytes'] - before} bytes of memory more, {len(listed.asked)} pages")
        assert shown["memory_bytes"] - before < 200 * MIB
        # What was forgotten is found again.
        assert (path / "d0000" / "f000.bin").stat().st_size == 1


@pytest.mark.slow
@pytest.mark.usefixtures("keys")
def test_a_directory_of_a_hundred_thousand(mount: Mounter) -> None:
    with ListedServer(f"all/{n:06}" for n in range(100_000)) as listed:
        path = mount("obs://any", endpoint_url=listed.endpoint)
        assert (path / "all" / "099999").stat().st_size == 1
        assert not (path / "all" / "100000").exists()
        assert len(listed.asked) < 10, "a name is looked up without reading the whole directory"
        assert os.listdir(path / "all") == [f"{n:06}" for n in range(100_000)]
        assert len(listed.asked) < 110


@pytest.mark.slow
def test_sixty_four_processes_read_sixty_four_models(bucket: Store, mount: Mounter) -> None:
    models = {f"model-{n}/model.safetensors": random_bytes(MIB + n, n) for n in range(64)}
    for key, data in models.items():
        bucket.put(key, data)
    path = mount(bucket)
    readers = {key: subprocess.Popen(["sha256sum", path / key], stdout=subprocess.PIPE, text=True) for key in models}
    for key, reader in readers.items():
        assert reader.communicate(timeout=60)[0].split()[0] == hashlib.sha256(models[key]).hexdigest()
    assert status(path)["bytes_fetched"] == sum(map(len, models.values()))


@pytest.mark.slow
@pytest.mark.timeout(120 + _OPERATIONS // 200)
def test_memory_and_descriptors_stay_bounded(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    """Four processes at everything, through a cache that is too small, with listings that are over in a second."""
    local = tmp_path / "local"
    for n in range(40):
        key = f"dir{n % 4}/{n}.bin"
        (local / key).parent.mkdir(parents=True, exist_ok=True)
        (local / key).write_bytes(data := random_bytes(n * 70_001, n))
        bucket.put(key, data)
    cache = tmp_path / "cache"
    path = mount(bucket, metadata_ttl="1s", cache_size="32MiB", max_entries=1000, cache_dir=cache)

    def work(count: int, seed: int) -> None:
        command = [sys.executable, "-c", _WORKER, str(path), str(local), str(count // 4)]
        workers = [subprocess.Popen([*command, str(seed + n)]) for n in range(4)]
        assert [worker.wait() for worker in workers] == [0] * 4

    work(_OPERATIONS // 4, seed=0)
    shown = status(path)
    memory, before = shown["memory_bytes"], descriptors(shown["pid"], cache)
    work(_OPERATIONS * 3 // 4, seed=4)
    after = status(path)
    grown, open_now = after["memory_bytes"] - memory, descriptors(shown["pid"], cache)
    print(f"{_OPERATIONS} operations: {grown} bytes of memory more, descriptors {before} before and {open_now} after")
    assert (after["pid"], after["errors"], after["corrupt_blocks"]) == (shown["pid"], 0, 0)
    assert grown < 32 * MIB
    # The data file of each object, and its map file while that is in use; the directory's lock.
    assert open_now["cache"] <= 2 * 40 + 1
    # Every thread that answers has a pipe for splice, and there are two to the supervisor and the writer.
    assert open_now["pipe"] <= 2 * len(os.listdir(f"/proc/{shown['pid']}/task")) + 4
    assert open_now["other"] <= before["other"] + 4
    assert status(path)["open_files"] == 0
