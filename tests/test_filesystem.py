"""fsspec, pandas and pyarrow by URL, through the same cache as the mount."""

from __future__ import annotations

import errno
import gc
import hashlib
import multiprocessing
import os
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import fsspec
import pandas
import pyarrow.parquet
import pytest

import obsfs
from tests.conftest import MIB, Mounter, Store, random_bytes, status, wait_for
from tests.faulty import FaultyLink


def test_importing_obsfs_is_enough(bucket: Store) -> None:
    bucket.put("dir/config.json", b'{"a": 1}\n{"b": 2}\n')
    with fsspec.open(f"{bucket}/dir/config.json", "rt") as file:
        assert list(file) == ['{"a": 1}\n', '{"b": 2}\n']
    filesystem = fsspec.filesystem("obs")
    assert isinstance(filesystem, obsfs.OBSFileSystem)
    assert filesystem.ls(f"{bucket}/dir", detail=False) == [f"{bucket.name}/dir/config.json"]
    assert filesystem.info(f"{bucket}/dir/config.json")["size"] == 18


def test_pandas_and_pyarrow(bucket: Store, tmp_path: Path) -> None:
    frame = pandas.DataFrame({"a": range(10_000), "b": ["text"] * 10_000})
    frame.to_parquet(tmp_path / "f.parquet")
    frame.to_csv(tmp_path / "f.csv", index=False)
    for name in ("f.parquet", "f.csv"):
        bucket.put(name, (tmp_path / name).read_bytes())
    pandas.testing.assert_frame_equal(pandas.read_parquet(f"{bucket}/f.parquet"), frame)
    pandas.testing.assert_frame_equal(pandas.read_csv(f"{bucket}/f.csv"), frame)
    assert pyarrow.parquet.read_table(f"fsspec+{bucket}/f.parquet").num_rows == 10_000


def test_every_way_of_reading(bucket: Store, tmp_path: Path) -> None:
    data = random_bytes(11 * MIB + 7)
    bucket.put("file.bin", data)
    filesystem = fsspec.filesystem("obs")
    path = f"{bucket.name}/file.bin"
    assert filesystem.cat_file(path) == data
    assert filesystem.cat_file(path, start=5, end=-5) == data[5:-5]
    assert filesystem.cat_ranges([path, path], [0, MIB], [10, MIB + 10]) == [data[:10], data[MIB : MIB + 10]]
    filesystem.get(path, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == data
    with filesystem.open(path) as file:
        file.seek(-100, os.SEEK_END)
        assert file.read() == data[-100:]
        assert file.seek(3 * MIB) == 3 * MIB
        assert file.read(2 * MIB) == data[3 * MIB : 5 * MIB]
    with pytest.raises(FileNotFoundError):
        filesystem.open(f"{bucket.name}/missing")
    with pytest.raises(FileNotFoundError):
        filesystem.cat_file(f"{bucket.name}/missing")


def test_one_cache_with_the_mount(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    data = random_bytes(20 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket)
    assert (path / "file.bin").read_bytes() == data
    filesystem = fsspec.filesystem("obs", cache_dir=tmp_path / "blocks", skip_instance_cache=True)
    assert filesystem.cat_file(f"{bucket.name}/file.bin") == data
    assert filesystem.engine.fetcher.stats.bytes_fetched == 0
    assert status(path)["bytes_fetched"] == len(data)


def test_a_file_that_nobody_closed_is_given_back_without_waiting(bucket: Store) -> None:
    """Garbage is collected in any thread, also in one that holds the engine's lock."""
    bucket.put("file.bin", random_bytes(MIB))
    filesystem = fsspec.filesystem("obs")
    file = filesystem.open(f"{bucket.name}/file.bin")
    assert file.read(10)
    reader = file._reader
    with filesystem.engine._guard:
        del file
        gc.collect()
        assert reader.users == 1
    wait_for(lambda: not reader.users)


def test_a_replaced_object_is_never_mixed(bucket: Store) -> None:
    bucket.put("file.bin", random_bytes(30 * MIB, 1))
    filesystem = fsspec.filesystem("obs", read_ahead=0, skip_instance_cache=True)
    with filesystem.open(f"{bucket.name}/file.bin") as file:
        assert file.read(10) == random_bytes(30 * MIB, 1)[:10]
        bucket.put("file.bin", random_bytes(30 * MIB, 2))
        file.seek(25 * MIB)
        with pytest.raises(OSError) as caught:
            file.read(10)
        assert caught.value.errno == errno.ESTALE


def test_writing_is_s3fs_s(bucket: Store) -> None:
    filesystem = fsspec.filesystem("obs", skip_instance_cache=True)
    with filesystem.open(f"{bucket.name}/new.txt", "wb") as file:
        file.write(b"written")
    assert filesystem.cat_file(f"{bucket.name}/new.txt") == b"written"


def test_it_can_be_pickled_and_forked(bucket: Store) -> None:
    bucket.put("file.bin", random_bytes(2 * MIB))
    filesystem = fsspec.filesystem("obs")
    path = f"{bucket.name}/file.bin"
    digest = hashlib.sha256(filesystem.cat_file(path)).digest()
    assert hashlib.sha256(pickle.loads(pickle.dumps(filesystem)).cat_file(path)).digest() == digest
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_digest, (filesystem, path)) == digest


def _digest(filesystem: obsfs.OBSFileSystem, path: str) -> bytes:
    with filesystem.open(path) as file:
        return hashlib.sha256(file.read()).digest()


@pytest.mark.parametrize("seconds", [1.5, 60.0])
def test_a_name_that_does_not_resolve(bucket: Store, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """For a while, which nobody notices, or longer than anybody waits. None fails on demand, but this."""
    bucket.put("a.bin", data := random_bytes(3 * MIB))
    resolve, asked = socket.getaddrinfo, list[float]()

    def fail(*arguments: Any, **options: Any) -> Any:
        asked.append(time.monotonic())
        if asked[-1] < asked[0] + seconds:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(*arguments, **options)

    with FaultyLink(bucket.server.port) as link:
        filesystem = obsfs.OBSFileSystem(endpoint_url=link.endpoint, retry_timeout="5s", skip_instance_cache=True)
        with filesystem.open(f"{bucket.name}/a.bin") as file:
            link.break_all()
            monkeypatch.setattr(socket, "getaddrinfo", fail)
            if seconds < 5:
                assert file.read() == data
            else:
                with pytest.raises(OSError, match="cannot reach"):
                    file.read()
                assert asked[-1] - asked[0] < 15
    assert len(asked) > 1


def test_keys_given_as_s3fs_takes_them(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("a", b"a")
    server = bucket.server
    for name in server.environment:
        monkeypatch.delenv(name)
    filesystem = fsspec.filesystem(
        "obs",
        key=server.access_key,
        secret=server.secret_key,
        client_kwargs={"endpoint_url": server.endpoint},
        skip_instance_cache=True,
    )
    assert filesystem.cat_file(f"{bucket.name}/a") == b"a"
