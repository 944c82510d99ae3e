from __future__ import annotations

import os
from pathlib import Path

from tests.conftest import MIB, Mounter, Store, contents, random_bytes, status, wait_for, write_model
from tests.library.test_push import Run


def test_what_was_warmed_needs_no_bucket(bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter) -> None:
    model = write_model(tmp_path / "m", mib=5)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    options = ("--cache-dir", tmp_path / "blocks")
    first = obsfs("warm", f"{bucket}/m@v1", *options, "--json").json[0]
    assert first["bytes_fetched"] == first["bytes"] == sum(map(len, contents(model).values()))
    assert obsfs("warm", f"{bucket}/m", *options, "--json").json[0]["bytes_fetched"] == 0  # the newest version
    path = mount(bucket)
    assert contents(path / "m@v1") == contents(model)


def test_files_prefixes_and_paths_on_a_mount(bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter) -> None:
    bucket.put("data/a.bin", random_bytes(3 * MIB))
    bucket.put("data/deep/b.bin", random_bytes(2 * MIB))
    path = mount(bucket)
    assert obsfs("warm", path / "data" / "a.bin", "--json").json[0]["bytes_fetched"] == 3 * MIB
    assert os.getxattr(path / "data" / "a.bin", "user.obsfs.cached_bytes") == str(3 * MIB).encode()
    both = obsfs("warm", path / "data", "--json").json[0]
    assert (both["bytes"], both["bytes_fetched"]) == (5 * MIB, 2 * MIB)
    (path / "data" / "deep" / "b.bin").read_bytes()
    assert status(path)["bytes_fetched"] == 0


def test_no_more_than_wanted_and_no_more_than_fits(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    bucket.put("a.bin", random_bytes(20 * MIB))
    assert obsfs("warm", f"{bucket}/a.bin", "--max-bytes", "4MiB", "--json").json[0]["bytes_fetched"] == 4 * MIB
    full = obsfs("warm", f"{bucket}/a.bin", "--cache-size", "16MiB")
    assert (full.code, full.err.count("\n")) == (2, 1)
    assert "20.0 MiB of a cache of 16.0 MiB" in full.err
    missing = obsfs("warm", f"{bucket}/b.bin")
    assert (missing.code, missing.err.count("\n")) == (2, 1)


def test_pins_outlast_eviction_and_cleaning(bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter) -> None:
    bucket.put("pinned.bin", random_bytes(8 * MIB))
    bucket.put("other.bin", random_bytes(40 * MIB))
    bucket.put("third.bin", random_bytes(40 * MIB, 3))
    options = ("--cache-dir", tmp_path / "blocks", "--cache-size", "20MiB")
    assert obsfs("warm", f"{bucket}/pinned.bin", "--pin", *options).code == 0
    path = mount(bucket, cache_size="20MiB")
    (path / "other.bin").read_bytes()
    assert status(path)["cache_bytes"] <= 20 * MIB
    assert os.getxattr(path / "pinned.bin", "user.obsfs.cached_bytes") == str(8 * MIB).encode()
    obsfs("cache", "clean", *options[:2])
    assert "8.0 MiB in" in obsfs("cache", "info", *options[:2]).out
    refused = obsfs("warm", f"{bucket}/other.bin", "--pin", "--max-bytes", "1MiB", *options)
    assert refused.code == 2
    assert "unpin" in refused.err
    assert obsfs("unpin", f"{bucket}/pinned.bin", *options[:2]).out.startswith("1 object unpinned")
    (path / "third.bin").read_bytes()
    wait_for(lambda: os.getxattr(path / "pinned.bin", "user.obsfs.cached_bytes") != str(8 * MIB).encode())
    assert obsfs("unpin").code == 2


def test_a_profile_says_what_a_load_needs(bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter) -> None:
    model = write_model(tmp_path / "m", mib=8)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    path = mount(bucket)
    (path / "m@v1" / "config.json").read_bytes()
    file = path / "m@v1" / "model-00002-of-00002.safetensors"
    with file.open("rb", buffering=0) as opened:
        os.pread(opened.fileno(), 100, 5 * MIB)
    used = int(os.getxattr(file, "user.obsfs.cached_bytes"))
    assert used < 8 * MIB
    assert obsfs("warm", path / "m@v1", "--record", "rank0").code == 0
    fresh = ("--cache-dir", tmp_path / "fresh")
    warmed = obsfs("warm", f"{bucket}/m@v1", "--for", "rank0", *fresh, "--json").json[0]
    assert 0 < warmed["bytes_fetched"] == warmed["bytes"] < 18 * MIB
    again = mount(bucket, cache_dir=tmp_path / "fresh")
    with (again / "m@v1" / "model-00002-of-00002.safetensors").open("rb", buffering=0) as opened:
        os.pread(opened.fileno(), 100, 5 * MIB)
    unknown = obsfs("warm", f"{bucket}/m@v1", "--for", "rank1")
    assert unknown.code == 2
    assert "rank0" in unknown.err
    bucket.put("m@v1/.obsfs/profiles/bad.json", b"[]")
    assert "cannot be read" in obsfs("warm", f"{bucket}/m@v1", "--for", "bad").err
