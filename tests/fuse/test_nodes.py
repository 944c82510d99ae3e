"""Names that the kernel knows are known to every server of a mount, and those that it has forgotten to none."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Mounter, status, wait_for
from tests.faulty import ListedServer

_DIRECTORIES = 4
_FILES = 800
_MOST = 1000


@pytest.fixture
def path(mount: Mounter, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mount of more files than may be remembered."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    names = (f"d{n % _DIRECTORIES}/f{n // _DIRECTORIES:03}" for n in range(_DIRECTORIES * _FILES))
    with ListedServer(names) as listed:
        yield mount("obs://any", endpoint_url=listed.endpoint, max_entries=_MOST, metadata_ttl="1s")


def look_at_all(path: Path, n: int) -> None:
    for entry in os.scandir(path / f"d{n}"):
        assert entry.stat().st_size == 1


def follow(path: Path) -> None:
    """Kill the server, and return when another one answers."""
    old = status(path)["pid"]
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: bool(status(path)["pid"] != old))


def test_restored_nodes_are_forgotten_like_others(path: Path) -> None:
    for n in range(_DIRECTORIES - 1):
        look_at_all(path, n)
        follow(path)
    look_at_all(path, _DIRECTORIES - 1)
    wait_for(lambda: status(path)["nodes"] <= _MOST)
    follow(path)
    wait_for(lambda: status(path)["nodes"] <= _MOST)


@pytest.mark.slow
def test_what_the_kernel_knows_is_not_forgotten(path: Path) -> None:
    stop = threading.Event()
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            try:
                if seed % 2:
                    look_at_all(path, dice.randrange(_DIRECTORIES))
                else:
                    assert (path / f"d{dice.randrange(_DIRECTORIES)}" / f"f{dice.randrange(_FILES):03}").exists()
            except BaseException as error:
                wrong.append(error)
                return

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    held: list[tuple[int, str]] = []
    dice = random.Random(1)
    try:
        for worker in workers:
            worker.start()
        for _ in range(3):
            for _ in range(60):
                # Known to the kernel, and to nobody else: such a descriptor opens nothing.
                name = f"d{dice.randrange(_DIRECTORIES)}/f{dice.randrange(_FILES):03}"
                held.append((os.open(path / name, os.O_PATH), name))
            time.sleep(dice.random() / 2)
            follow(path)
            for fd, name in held:
                assert os.getxattr(f"/proc/self/fd/{fd}", "user.obsfs.key").decode() == name
    finally:
        stop.set()
        for worker in workers:
            worker.join(60)
        for fd, _ in held:
            os.close(fd)
    assert not wrong
    look_at_all(path, 0)
    wait_for(lambda: status(path)["nodes"] <= _MOST)
