"""What it is for: models load from the mount, from several processes at once, and fetch no more than they touch."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors import safe_open
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from obsfs.demo.model import generate, load_model, make_model
from tests.conftest import MIB, Mounter, Store, random_bytes, status

_LOAD = """
import sys, hashlib
from obsfs.demo.model import load_model
loaded = load_model(sys.argv[1])
digest = hashlib.sha256()
for name, tensor in sorted(loaded.model.state_dict().items()):
    digest.update(name.encode() + tensor.view(-1).view(__import__("torch").uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def local_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    make_model(directory, hidden_size=256, layers=12, max_shard_size="6MB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.mark.slow
def test_a_model_in_shards(bucket: Store, mount: Mounter, fuse_backend: str, local_model: Path) -> None:
    size = bucket.server.upload(local_model, bucket.name, "tiny/")
    path = mount(bucket, fuse_backend=fuse_backend) / "tiny"
    ours, theirs = load_model(path), load_model(local_model)
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor)
    assert generate(ours, "The import", 8) == generate(theirs, "The import", 8)
    assert status(path.parent)["bytes_fetched"] <= size


@pytest.mark.slow
def test_several_processes_load_at_once(bucket: Store, mount: Mounter, local_model: Path) -> None:
    size = bucket.server.upload(local_model, bucket.name, "tiny/")
    path = mount(bucket) / "tiny"
    command = [sys.executable, "-c", _LOAD]
    processes = [
        subprocess.Popen([*command, place], stdout=subprocess.PIPE, text=True) for place in (path, path, local_model)
    ]
    assert len({process.communicate(timeout=100)[0] for process in processes}) == 1
    assert status(path.parent)["bytes_fetched"] <= size


def test_torch_load_by_map(bucket: Store, mount: Mounter, fuse_backend: str, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(1024, 1024), "b": torch.arange(3_000_000)}
    torch.save(tensors, tmp_path / "model.pt")
    bucket.put("model.pt", (tmp_path / "model.pt").read_bytes())
    loaded = torch.load(mount(bucket, fuse_backend=fuse_backend) / "model.pt", mmap=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.slow
def test_one_tensor_costs_little_more_than_its_bytes(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.weight": torch.randn(1024, 2048) for n in range(32)}
    save_file(tensors, tmp_path / "big.safetensors")
    bucket.put("big.safetensors", (tmp_path / "big.safetensors").read_bytes())
    for n in (0, 7, 9, 31):
        path = mount(bucket, cache_dir=tmp_path / f"cache-{n}")
        with safe_open(path / "big.safetensors", "pt") as file:
            name = f"model.layers.{n}.weight"
            assert torch.equal(file.get_tensor(name), tensors[name])
        assert status(path)["bytes_fetched"] <= MIB + 2 * 8 * MIB


def settled(path: Path) -> int:
    """Bytes that were fetched, once nothing more comes."""
    fetched = -1
    while fetched != (fetched := status(path)["bytes_fetched"]):
        time.sleep(0.3)
    return fetched


@pytest.mark.parametrize("column", ["c0", "c4"])
def test_one_column_costs_at_most_twice_its_bytes(bucket: Store, mount: Mounter, tmp_path: Path, column: str) -> None:
    rows = 300_000
    table = pa.table({f"c{n}": np.random.default_rng(n).random(rows) for n in range(10)})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=rows // 2, use_dictionary=False)
    data = (tmp_path / "t.parquet").read_bytes()
    bucket.put("t.parquet", data)
    path = mount(bucket)
    assert parquet.read_table(path / "t.parquet", columns=[column])[column].equals(table[column])
    # Two chunks of 1.2 MiB, each in 2 or 3 blocks, and the footer.
    assert settled(path) <= 2 * (3 + 3 + 1) * MIB + 4 * MIB
    filesystem = fsspec.filesystem("obs", cache_dir=str(tmp_path / "own"), skip_instance_cache=True)
    with filesystem.open(f"{bucket.name}/t.parquet") as file:
        assert parquet.read_table(file, columns=[column])[column].equals(table[column])
    assert filesystem.engine.fetcher.stats.bytes_fetched <= 2 * (3 + 3 + 1) * MIB + 4 * MIB


@pytest.mark.parametrize("mapped", [False, True])
def test_strided_reads_cost_at_most_twice_their_bytes(bucket: Store, mount: Mounter, mapped: bool) -> None:
    stride, size = 2.5, 0.1
    data = random_bytes(100 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket)
    touched: set[int] = set()
    with (
        (path / "file.bin").open("rb", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory,
    ):
        for at in range(int(1.3 * MIB), 98 * MIB, int(stride * MIB)):
            stop = at + int(size * MIB)
            found = memory[at:stop] if mapped else os.pread(file.fileno(), stop - at, at)
            assert found == data[at:stop]
            # The kernel reads half a MiB around a page that is touched by a map.
            around = MIB // 2 * mapped
            touched |= set(range((at - around) // MIB, (stop + around) // MIB + 1))
    assert settled(path) <= (2 * len(touched) + 4) * MIB


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("every", [3, 7])
def test_tensors_that_are_left_out_are_not_fetched(
    bucket: Store, mount: Mounter, tmp_path: Path, every: int, mapped: bool
) -> None:
    """At most twice what is touched, and 4 MiB."""
    tensors = {f"model.layers.{n}.weight": np.full((900, 256), n, np.float32) for n in range(63)}
    save_numpy(tensors, tmp_path / "m.safetensors")
    bucket.put("m.safetensors", (tmp_path / "m.safetensors").read_bytes())
    path = mount(bucket)
    touched = {0}
    with (path / "m.safetensors").open("rb") as file, safe_open(path / "m.safetensors", "np") as opened:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name in list(header)[1::every]:
            start, stop = (8 + size + offset for offset in header[name]["data_offsets"])
            # A page fault reads half a MiB before its page, and as much behind it.
            around = MIB // 2 * mapped
            touched |= set(range(max(0, start - around) // MIB, (stop + around) // MIB + 1))
            found = opened.get_tensor(name).tobytes() if mapped else os.pread(file.fileno(), stop - start, start)
            assert found == tensors[name].tobytes()
    assert settled(path) <= (2 * len(touched) + 4) * MIB


@pytest.mark.slow
def test_a_pickle_of_tensors_is_opened_by_its_directory_alone(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    """torch seeks to the start of each tensor, by a buffered file: a block of each, and those of the tensor used."""
    tensors = 20
    torch.save({f"t{i}": torch.randn(1024, 1024) for i in range(tensors)}, tmp_path / "x.pt")
    bucket.put("x.pt", (tmp_path / "x.pt").read_bytes())
    path = mount(bucket)
    loaded = torch.load(path / "x.pt", weights_only=True, mmap=True)
    expected = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert torch.equal(loaded["t3"], expected["t3"])
    touched = tensors + 1 + 5  # the start of each, the archive's own directory, and one tensor across five blocks
    assert status(path)["bytes_fetched"] <= (touched + 8) * MIB


def test_a_seek_of_a_buffered_reader_costs_the_block_that_it_touches(bucket: Store, mount: Mounter) -> None:
    data = random_bytes(40 * MIB)
    bucket.put("x.bin", data)
    path = mount(bucket)
    places = [number * 4 * MIB + 2192 for number in range(1, 10)]
    with (path / "x.bin").open("rb") as file:
        for place in places:
            file.seek(place)
            assert file.read(4096) == data[place : place + 4096]
    assert status(path)["bytes_fetched"] == len(places) * MIB


def test_a_mapped_load_fetches_every_byte_once(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    tensors = {f"model.layers.{n}.weight": torch.randn(1024, 512) for n in range(40)}
    save_file(tensors, tmp_path / "model.safetensors")
    bucket.put("model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    path = mount(bucket) / "model.safetensors"
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert status(path.parent)["bytes_fetched"] == path.stat().st_size


def test_what_a_mapped_load_skips_is_in_the_page_cache_before_it_is_read(
    bucket: Store, mount: Mounter, tmp_path: Path
) -> None:
    tensors = {f"model.layers.{n}.weight": torch.randn(1024, 2048) for n in range(16)}
    save_file(tensors, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    bucket.put("model.safetensors", data)
    path = mount(bucket) / "model.safetensors"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        header = len(data) - 16 * 8 * MIB
        for n in range(16):
            start = header + n * 8 * MIB
            assert memory[start] == data[start]
        deadline = time.monotonic() + 20
        while int(os.getxattr(path, "user.obsfs.cached_bytes")) < len(data) * 0.8:
            assert time.monotonic() < deadline, "it comes back for the rest"
            time.sleep(0.05)
        time.sleep(0.5)
        assert hashlib.sha256(memory).digest() == hashlib.sha256(data).digest()
        assert status(path.parent)["bytes_read"] < len(data) * 0.7, "most of it the kernel had already"
    assert path.read_bytes() == data


def test_who_opens_config_and_index_is_given_the_first_weights(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    for n in (1, 2):
        name = f"model-0000{n}-of-00002.safetensors"
        save_file({f"model.layers.{n}.weight": torch.randn(1024, 2048)}, tmp_path / name)
        bucket.put(f"m/{name}", (tmp_path / name).read_bytes())
    for name in ("config.json", "model.safetensors.index.json"):
        bucket.put(f"m/{name}", b"{}")
    path = mount(bucket) / "m"
    (path / "model.safetensors.index.json").read_bytes()
    time.sleep(0.5)
    assert status(path.parent)["bytes_fetched"] < MIB, "an index alone is read for what is in it"
    (path / "config.json").read_bytes()
    (path / "model.safetensors.index.json").read_bytes()
    for n in (1, 2):
        shard = path / f"model-0000{n}-of-00002.safetensors"
        deadline = time.monotonic() + 20
        while int(os.getxattr(shard, "user.obsfs.cached_bytes")) < shard.stat().st_size:
            assert time.monotonic() < deadline, "a model of 16 MiB comes whole"
            time.sleep(0.05)
