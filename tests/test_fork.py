"""A forked child, and who unpickles, reads on: with file systems and files that were used before, and no hang."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest

from tests.conftest import MIB, Store, random_bytes

_SIZE = 24 * MIB + 5
_DATA, _OTHER = random_bytes(_SIZE, 1), random_bytes(_SIZE, 2)

_CHECK = """
import multiprocessing, os, random, signal, sys, threading, time, traceback
import fsspec
bucket, place = sys.argv[1:]
data, other = (open(f"{place}/{name}", "rb").read() for name in ("data", "other"))
fs = fsspec.filesystem("obs", read_ahead="8MiB")
file = fs.open(f"{bucket}/data.bin")

def check(seed, file=file):
    dice = random.Random(seed)
    for _ in range(4):
        at = dice.randrange(len(data))
        file.seek(at)
        assert file.read(1000) == data[at : at + 1000]
        at = dice.randrange(len(data))
        assert fs.cat_file(f"{bucket}/other.bin", start=at, end=at + 1000) == other[at : at + 1000]
    assert sorted(name.rpartition("/")[2] for name in fs.ls(bucket)) == ["data.bin", "other.bin"]
    with fs.open(f"{bucket}/other.bin") as late:
        assert late.read(MIB) == other[:MIB]

def in_child(call):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            signal.alarm(40)
            call()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed, or hung"

MIB = 1 << 20
"""

_CASES = {
    "nothing was used": "in_child(lambda: check(1))",
    "all was used, and by the child's child again": """
check(1)
in_child(lambda: (check(2), in_child(lambda: check(3)), check(4)))
check(5)
in_child(lambda: check(6))
""",
    "threads are reading": """
ending = threading.Event()
def read(seed):
    with fs.open(f"{bucket}/other.bin") as mine:
        dice = random.Random(seed)
        while not ending.is_set():
            at = dice.randrange(len(other))
            mine.seek(at)
            assert mine.read(100) == other[at : at + 100]
            file_of_all = fs.cat_file(f"{bucket}/data.bin", start=at, end=at + 10)
            assert file_of_all == data[at : at + 10]
threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
for thread in threads:
    thread.start()
for seed in range(2):
    time.sleep(0.05)
    in_child(lambda: check(seed))
ending.set()
for thread in threads:
    thread.join()
check(9)
""",
    "every lock is held": """
check(1)
engine, held, ending = fs.engine, threading.Event(), threading.Event()
locks = [fs._engine_guard, file._guard, engine._guard, engine.fetcher._changed, engine.cache.room._guard,
         file._reader.load.guard, file._reader.cached._guard,
         engine.cache.directory_lock._threads, engine.cache.room._evicting._threads]
def hold():
    for lock in locks:
        lock.acquire()
    held.set()
    ending.wait()
    for lock in locks:
        lock.release()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
in_child(lambda: (check(2), file.close()))
ending.set()
thread.join()
check(3)
file.close()
""",
    "files are closed, and dropped, in the child": """
check(1)
more = [fs.open(f"{bucket}/data.bin") for _ in range(3)]
def close():
    global file
    more[0].read(10)
    more[0].close()
    more[1].close()
    more.clear()
    file.close()
    del file
    with fs.open(f"{bucket}/data.bin") as new:
        check(2, new)
in_child(close)
check(3)
assert [one.read(10) for one in more] == [data[:10]] * 3
""",
    "by multiprocessing": """
check(1)
context = multiprocessing.get_context("fork")
with context.Pool(2) as pool:
    pool.map(check, range(6))
worker = context.Process(target=check, args=(7,))
worker.start()
worker.join(60)
assert worker.exitcode == 0
check(8)
""",
    "asynchronous": """
import asyncio
async def use(fs):
    session = await fs.set_session()
    assert await fs._cat_file(f"{bucket}/data.bin", start=5, end=10) == data[5:10]
    assert (await fs._info(f"{bucket}/data.bin"))["size"] == len(data)
    await session.close()
mine = fsspec.filesystem("obs", asynchronous=True, skip_instance_cache=True)
asyncio.run(use(mine))
in_child(lambda: asyncio.run(use(mine)))
""",
}


@pytest.fixture
def place(bucket: Store, tmp_path: Path) -> Path:
    for name, data in (("data", _DATA), ("other", _OTHER)):
        bucket.put(f"{name}.bin", data)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def run(program: str, bucket: Store, place: Path, timeout: float = 90) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, bucket.name, place],
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", _CASES)
def test_a_child_reads_when(case: str, bucket: Store, place: Path) -> None:
    run(_CHECK + _CASES[case], bucket, place)


_LOADER = """
import torch
class Blocks(torch.utils.data.Dataset):
    def __init__(self):
        self.file = file
        self.file.read(100)
    def __len__(self):
        return 48
    def __getitem__(self, number):
        at = (number * 7919 * 1013) % (len(data) - 100)
        self.file.seek(at)
        found = self.file.read(100)
        assert found == data[at : at + 100]
        assert fs.cat_file(f"{bucket}/other.bin", start=at, end=at + 50) == other[at : at + 50]
        return torch.frombuffer(bytearray(found), dtype=torch.uint8)
loader = torch.utils.data.DataLoader(Blocks(), batch_size=4, num_workers=2, timeout=60, multiprocessing_context="fork")
for epoch in range(2):
    assert sum(len(batch) for batch in loader) == 48
check(1)
"""


@pytest.mark.slow
def test_workers_of_a_data_loader(bucket: Store, place: Path) -> None:
    run(_CHECK + _LOADER, bucket, place, timeout=200)


def test_a_child_holds_none_of_the_parents_locks(bucket: Store, place: Path) -> None:
    """Its parent may be killed in the middle of a fetch: others take over its blocks, however long the child lives."""
    program = """
file.read(10)
def look():
    names = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not [name for name in names if name.endswith((".map", ".data", "/lock"))], names
in_child(look)
check(1)
"""
    run(_CHECK + program, bucket, place)


def test_a_pickled_file_is_of_the_same_version_at_the_same_place(bucket: Store) -> None:
    bucket.put("file.bin", _DATA)
    filesystem = fsspec.filesystem("obs", skip_instance_cache=True, read_ahead=0)
    with filesystem.open(f"{bucket.name}/file.bin") as file:
        file.seek(5 * MIB + 7)
        head = file.read(10)
        pickled = pickle.dumps(file)
    with pickle.loads(pickled) as again:
        assert again.tell() == 5 * MIB + 17
        assert again.read(100) == _DATA[5 * MIB + 17 : 5 * MIB + 117]
        again.seek(5 * MIB + 7)
        assert again.read(10) == head
        assert again.size == _SIZE
        assert again.info()["size"] == _SIZE
    bucket.put("file.bin", _OTHER)
    with pickle.loads(pickled) as again:
        assert again.read(10) == _DATA[5 * MIB + 17 : 5 * MIB + 27], "that is in the cache"
        again.seek(20 * MIB)
        with pytest.raises(OSError, match="replaced"):
            again.read(10)
