"""A server that answers wrong: readers get the right bytes or a clean errno, within a bounded time."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import MIB, Mounter, Store, random_bytes, status, wait_for
from tests.faulty import FaultyServer

_SIZE = 24 * MIB
_KINDS = ("500", "503", "reset", "short", "trailing", "shifted", "long", "stall")


def read(path: Path) -> str:
    """The hash of a file, as another process reads it."""
    done = subprocess.run(["sha256sum", path], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout.partition(" ")[0] if done.returncode == 0 else done.stderr


@pytest.fixture
def data(bucket: Store) -> bytes:
    content = random_bytes(_SIZE)
    bucket.put("file.bin", content)
    return content


@pytest.mark.parametrize("kind", _KINDS)
def test_every_third_answer_is_wrong(kind: str, bucket: Store, mount: Mounter, data: bytes) -> None:
    with FaultyServer(bucket.server.port, lambda number, _: kind if number % 3 == 1 else None) as faulty:
        path = mount(bucket, endpoint_url=faulty.endpoint, connections=4, request_timeout="2s")
        assert read(path / "file.bin") == hashlib.sha256(data).hexdigest()
        assert faulty.faults[kind] >= 1
        shown = status(path)
        assert shown["errors"] == 0
        # What follows a body does no harm; everything else was tried again, or beside a silent one, and can be seen.
        assert shown["retries"] + shown["hedges"] >= (0 if kind == "trailing" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_all_faults_at_random(seed: int, bucket: Store, mount: Mounter, data: bytes) -> None:
    dice = random.Random(seed)
    choices = [dice.choice(_KINDS) if dice.random() < 0.4 else None for _ in range(997)]
    with FaultyServer(bucket.server.port, lambda number, _: choices[number % 997]) as faulty:
        path = mount(bucket, endpoint_url=faulty.endpoint, connections=8, request_timeout="1s")
        readers = [
            subprocess.Popen(["sha256sum", path / "file.bin"], stdout=subprocess.PIPE, text=True) for _ in range(4)
        ]
        for reader in readers:
            assert reader.communicate(timeout=100)[0].split()[0] == hashlib.sha256(data).hexdigest()
        assert len(faulty.faults) > 1


def test_a_silent_connection_is_not_waited_for(bucket: Store, mount: Mounter, data: bytes) -> None:
    """With a request timeout of a minute, only another request beside the silent one can bring it sooner."""
    with FaultyServer(bucket.server.port, lambda number, _: "stall" if number in (2, 3) else None) as faulty:
        path = mount(bucket, endpoint_url=faulty.endpoint, connections=4, request_timeout="60s")
        started = time.monotonic()
        assert read(path / "file.bin") == hashlib.sha256(data).hexdigest()
        assert time.monotonic() - started < 25  # the silence ends after 30
        shown = status(path)
        assert shown["hedges"] >= 1
        assert (shown["retries"], shown["errors"]) == (0, 0)


def test_an_answer_of_another_version_is_never_served(bucket: Store, mount: Mounter, data: bytes) -> None:
    with FaultyServer(bucket.server.port, lambda number, _: "etag") as faulty:
        path = mount(bucket, endpoint_url=faulty.endpoint)
        with pytest.raises(OSError) as caught, (path / "file.bin").open("rb", buffering=0) as file:
            file.read(1000)
        assert caught.value.errno == errno.ESTALE
        assert os.listdir(path) == ["file.bin"]


def test_a_flipped_bit_of_a_small_object_is_never_served(bucket: Store, mount: Mounter) -> None:
    sizes = {"config.json": 700, "tokenizer.json": 3 * MIB + 5}
    for key, size in sizes.items():
        bucket.put(key, random_bytes(size))
    with FaultyServer(bucket.server.port, lambda number, _: "flipped" if number % 3 else None) as faulty:
        path = mount(bucket, endpoint_url=faulty.endpoint)
        for key, size in sizes.items():
            assert (path / key).read_bytes() == random_bytes(size)
        assert faulty.faults["flipped"] >= 1
        shown = status(path)
        assert shown["retries"] >= 1
        assert shown["errors"] == 0


def test_a_small_object_that_comes_wrong_for_ever_is_an_error(bucket: Store, mount: Mounter) -> None:
    bucket.put("config.json", b"{}")
    with FaultyServer(bucket.server.port, lambda number, _: "flipped") as faulty:
        path = mount(bucket, endpoint_url=faulty.endpoint, retry_timeout="1s")
        with pytest.raises(OSError) as caught:
            (path / "config.json").read_bytes()
        assert caught.value.errno == errno.EIO
        assert "crc32" in status(path)["last_error"]


def test_a_storm_that_does_not_end_is_an_error_in_time(bucket: Store, mount: Mounter, data: bytes) -> None:
    with FaultyServer(bucket.server.port, lambda number, _: "503") as faulty:
        path = mount(bucket, endpoint_url=faulty.endpoint, retry_timeout="2s")
        started = time.monotonic()
        with pytest.raises(OSError) as caught, (path / "file.bin").open("rb", buffering=0) as file:
            file.read(1000)
        assert caught.value.errno == errno.EIO
        assert time.monotonic() - started < 15
        # With jitter and growing pauses, not a storm of our own.
        assert faulty.faults["503"] < 60
        assert os.listdir(path) == ["file.bin"]


def test_a_token_that_is_over_is_replaced_without_anybody_noticing(
    bucket: Store, mount: Mounter, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The credentials file has another profile's keys after a while, as tools that renew tokens write them."""
    server = bucket.server
    bucket.put("dir/late.txt", b"late")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    credentials = tmp_path / "aws-credentials"
    is_over = False

    def write(agent: str) -> None:
        keys = f"aws_access_key_id = {server.access_key}\naws_secret_access_key = {server.secret_key}\n"
        credentials.write_text(f"[default]\n{keys}")
        (tmp_path / "aws-config").write_text(f"[default]\nsdk_ua_app_id = {agent}\n")

    def choose(number: int, headers: Mapping[str, str]) -> str | None:
        return "expired" if is_over and re.search("app/old", headers.get("User-Agent", "")) else None

    write("old")
    with FaultyServer(server.port, choose) as faulty:
        path = mount(bucket, endpoint_url=faulty.endpoint, read_ahead=0)
        with (path / "file.bin").open("rb", buffering=0) as file:
            assert file.read(1000) == data[:1000]
            is_over = True
            write("new")
            file.seek(20 * MIB)
            assert file.read(1000) == data[20 * MIB : 20 * MIB + 1000]
        assert (path / "dir" / "late.txt").read_bytes() == b"late"
        assert faulty.faults["expired"] >= 1
        assert status(path)["errors"] == 0


@pytest.mark.slow
def test_four_daemons_share_a_cache_and_are_killed_at_random(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    files = {f"f{i}.bin": random_bytes(6 * MIB, i) for i in range(4)}
    for key, content in files.items():
        bucket.put(key, content)
    dice = random.Random(7)
    for rounds in range(5):
        paths = [mount(bucket, at=_fresh(tmp_path / f"m{i}-{rounds}"), cache_size="20MiB") for i in range(4)]
        readers = [
            subprocess.Popen(["sha256sum", path / name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for path in paths
            for name in files
        ]
        time.sleep(dice.uniform(0.0, 0.4))
        victim = dice.choice(paths)
        os.kill(mount.process(victim).pid, signal.SIGKILL)
        finished = 0
        for index, reader in enumerate(readers):
            out, err = reader.communicate(timeout=60)
            name = list(files)[index % 4]
            if reader.returncode == 0:
                finished += 1
                assert out.split()[0] == hashlib.sha256(files[name]).hexdigest()
            else:
                assert "Transport endpoint" in err or "abort" in err, err
        assert finished >= 12  # those of the three that lived
        for path in paths:
            subprocess.run(["umount", "-l", path], check=True, timeout=10)
        wait_for(lambda paths=paths: all(mount.process(path).poll() is not None for path in paths))


def _fresh(path: Path) -> Path:
    path.mkdir()
    return path
