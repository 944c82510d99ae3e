"""Pulling: verified, through the cache, gone on with after kill -9, never over what is somebody's own."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tqdm import tqdm

import obsfs as package
from obsfs.cache.directory import cached_sizes
from obsfs.errors import NotFoundError, UnavailableError, UsageError
from obsfs.library import file_download
from obsfs.library import pull as pull_module
from obsfs.library.names import parse_model
from obsfs.settings import Settings
from tests.conftest import MIB, Mounter, Store, contents, random_bytes, status, stop_group, wait_for, write_model
from tests.faulty import FaultyLink, FaultyServer
from tests.library.test_push import Run, start


@pytest.fixture
def model(bucket: Store, obsfs: Run, tmp_path: Path) -> Path:
    """Published as ``m@v1``."""
    path = write_model(tmp_path / "model")
    assert obsfs("push", path, f"{bucket}/m@v1").code == 0
    return path


def test_pull_brings_all_files_verified_and_the_second_time_costs_nothing(
    bucket: Store, obsfs: Run, model: Path, tmp_path: Path
) -> None:
    first = obsfs("pull", f"{bucket}/m@v1", tmp_path / "a", "--json").json
    size = sum(map(len, contents(model).values()))
    assert contents(tmp_path / "a") == contents(model)
    assert (first["bytes_fetched"], first["bytes"], first["verified"]) == (size, size, True)
    assert obsfs("pull", f"{bucket}/m@v1", tmp_path / "b", "--json").json["bytes_fetched"] == 0
    assert contents(tmp_path / "b") == contents(model)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")}
    again = obsfs("pull", f"{bucket}/m@v1", tmp_path / "b")
    assert (again.code, again.out) == (0, f"{tmp_path / 'b'}\n")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "b").rglob("*")}


@pytest.mark.parametrize("is_broken", [False, True])
def test_what_another_version_has_is_not_fetched_again(
    bucket: Store, obsfs: Run, tmp_path: Path, is_broken: bool
) -> None:
    """Only the configuration differs. What the cache has of the first version is damaged on the disk, or not."""
    model = write_model(tmp_path / "model", mib=20)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    obsfs("pull", f"{bucket}/m@v1", tmp_path / "a")
    (model / "config.json").write_text('{"number": 2}')
    assert obsfs("push", model, f"{bucket}/m@v2").code == 0
    if is_broken:
        for data in (tmp_path / "cache").rglob("*.data"):
            if data.stat().st_size > 2 * MIB:
                with data.open("r+b") as file:
                    file.seek(MIB + 5)
                    byte = file.read(1)[0]
                    file.seek(MIB + 5)
                    file.write(bytes([byte ^ 1]))
    bucket.put("m@v0/.obsfs/manifest.json", b"")  # nobody's business here
    done = obsfs("pull", f"{bucket}/m@v2", tmp_path / "b", "--json").json
    assert contents(tmp_path / "b") == contents(model)
    assert (done["bytes_fetched"] > MIB) == is_broken
    assert done["bytes_fetched"] < 5 * MIB
    assert obsfs("cache", "verify").code == 0


def test_what_another_version_has_is_not_taken_for_this_one_before_it_is_hashed(
    bucket: Store, obsfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever kills a pull leaves nothing in the cache that is only said to be right."""
    model = write_model(tmp_path / "model", mib=12, shards=1)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    place = tmp_path / "cache" / "obsfs"
    obsfs("pull", f"{bucket}/m@v1", tmp_path / "a")
    (model / "config.json").write_text('{"number": 2}')
    assert obsfs("push", model, f"{bucket}/m@v2").code == 0
    settings = Settings.load(cache_dir=place, endpoint_url=bucket.server.endpoint)
    (weights,) = model.glob("*.safetensors")

    def cached_bytes() -> int:
        sizes = cached_sizes(place, bucket.server.endpoint, bucket.name)
        return sum(size for (key, *_), size in sizes.items() if key == f"m@v2/{weights.name}")

    def killed(arrival: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(file_download.FileDownload, "_finish", killed)
        pull = pull_module.Pull(parse_model(f"{bucket}/m@v2"), settings)
        pull.run(tmp_path / "b", files=pull.files())
    assert cached_bytes() == 0
    assert obsfs("pull", f"{bucket}/m@v2", tmp_path / "b", "--json").json["bytes_fetched"] < MIB
    assert contents(tmp_path / "b") == contents(model)
    assert cached_bytes() == weights.stat().st_size


def test_a_name_means_what_is_there_or_the_newest_version(
    bucket: Store, obsfs: Run, model: Path, tmp_path: Path
) -> None:
    (model / "config.json").write_text('{"number": 2}')
    time.sleep(1.1)  # manifests tell seconds
    assert obsfs("push", model, f"{bucket}/m@v2").code == 0
    place = obsfs("pull", f"{bucket}/m").out.strip()
    assert place.endswith("/m@v2")
    assert (Path(place) / "config.json").read_text() == '{"number": 2}'
    assert obsfs("pull", "m@v1", OBSFS_LIBRARY=str(bucket)).out.strip().endswith("/m@v1")
    unknown = obsfs("pull", f"{bucket}/m@v3")
    assert unknown.code == 2
    assert "m@v2" in unknown.err
    assert "m@v1" in obsfs("pull", f"{bucket}/n").err


def test_what_the_mount_has_read_is_not_fetched_again(
    bucket: Store, obsfs: Run, model: Path, mount: Mounter, tmp_path: Path
) -> None:
    path = mount(bucket)
    for file in contents(model):
        (path / "m@v1" / file).read_bytes()
    done = obsfs("pull", f"{bucket}/m@v1", tmp_path / "a", "--cache-dir", tmp_path / "blocks", "--json").json
    assert done["bytes_fetched"] == 0
    assert contents(tmp_path / "a") == contents(model)
    again = mount(bucket, cache_dir=tmp_path / "cache" / "obsfs")
    obsfs("pull", f"{bucket}/m@v1", tmp_path / "b")
    (again / "m@v1" / "model-00001-of-00002.safetensors").read_bytes()
    assert status(again)["bytes_fetched"] == 0


def test_a_directory_follows_its_model_and_keeps_what_is_not_of_it(
    bucket: Store, obsfs: Run, model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "a"
    assert obsfs("push", model, f"{bucket}/m").code == 0
    assert obsfs("pull", f"{bucket}/m", place).code == 0
    (place / "mine.txt").write_text("mine")
    (model / "sub" / "notes.md").unlink()
    (model / "config.json").write_text("{}")
    assert obsfs("push", model, f"{bucket}/m").code == 0
    assert obsfs("pull", f"{bucket}/m", place).code == 0
    assert contents(place) == {**contents(model), "mine.txt": b"mine"}
    (place / "config.json").write_text("my change")
    (model / "config.json").write_text('{"third": 3}')
    assert obsfs("push", model, f"{bucket}/m").code == 0
    refused = obsfs("pull", f"{bucket}/m", place)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "config.json" in refused.err and "--force" in refused.err
    assert (place / "config.json").read_text() == "my change"
    assert obsfs("pull", f"{bucket}/m", place, "--force").code == 0
    assert contents(place) == {**contents(model), "mine.txt": b"mine"}
    (place / "config.json").unlink()
    (place / "config.json").mkdir()
    refused = obsfs("pull", f"{bucket}/m", place, "--force")
    assert f"{place}/config.json cannot be written (Is a directory)" in refused.err


def test_without_a_manifest_what_the_bucket_offers_is_checked(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    bucket.put("raw/config.json", b"{}")
    bucket.put("raw/x/weights.bin", data := random_bytes(3 * MIB))
    done = obsfs("pull", f"{bucket}/raw", tmp_path / "a")
    assert done.code == 0
    assert "no manifest" in done.err
    assert contents(tmp_path / "a") == {"config.json": b"{}", "x/weights.bin": data}


def test_without_a_manifest_a_flipped_bit_of_a_large_object_is_found(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    """The server has one checksum of all parts; each range by itself looks right."""
    data = random_bytes(12 * MIB)
    place = {"Bucket": bucket.name, "Key": "raw/weights.bin"}
    kind = {"ChecksumAlgorithm": "CRC64NVME"}
    upload = bucket.client.create_multipart_upload(**place, **kind, ChecksumType="FULL_OBJECT")["UploadId"]
    parts = []
    for number in (1, 2):
        body = data[(number - 1) * 6 * MIB : number * 6 * MIB]
        part = bucket.client.upload_part(**place, **kind, UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": part["ETag"]})
    bucket.client.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": parts})
    with FaultyServer(bucket.server.port, lambda number, _: "flipped" if number == 1 else None) as faulty:
        given = ("pull", f"{bucket}/raw", tmp_path / "a", "--endpoint-url", faulty.endpoint)
        done = obsfs(*given)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert "weights.bin is not what its crc64nvme says" in done.err
        assert not (tmp_path / "a" / "weights.bin").exists()
        assert obsfs(*given).code == 0  # and nothing of it was left in the cache
    assert contents(tmp_path / "a") == {"weights.bin": data}


def test_other_bytes_than_the_manifest_says_are_never_given(
    bucket: Store, obsfs: Run, model: Path, tmp_path: Path
) -> None:
    key = "m@v1/.obsfs/manifest.json"
    manifest = json.loads(bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read())
    right = json.dumps(manifest).encode()
    next(file for file in manifest["files"] if file["path"] == "config.json")["sha256"] = "0" * 64
    bucket.put(key, json.dumps(manifest).encode())
    done = obsfs("pull", f"{bucket}/m@v1", tmp_path / "a")
    assert (done.code, done.out) == (2, "")
    assert "config.json is not what its manifest says" in done.err
    assert not (tmp_path / "a" / "config.json").exists()
    bucket.put(key, right)
    bucket.put("m@v1/sub/notes.md", b"other")
    assert (
        "was replaced since it was published"
        in obsfs("pull", f"{bucket}/m@v1", tmp_path / "b", "--cache-dir", tmp_path / "c").err
    )
    bucket.put(key, b"{")
    assert "cannot be read" in obsfs("pull", f"{bucket}/m@v1", tmp_path / "c").err


def test_a_disk_that_is_too_small(bucket: Store, obsfs: Run, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    for size, words in (("20M", "free, of"), ("100M", "")):
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
        try:
            done = obsfs("pull", f"{bucket}/m@v1", place / "m")
            assert done.code == (2 if words else 0), done
            assert words in done.err
            assert done.err.count("\n") == 1
            assert not words or not contents(place)
        finally:
            subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_meanwhile(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "big", mib=40)
    assert obsfs("push", model, f"{bucket}/big@v1").code == 0
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=150M", "tmpfs", place], check=True)
    try:
        with FaultyLink(bucket.server.port) as link:
            link.bytes_per_second = 10e6
            process = start(
                "pull", f"{bucket}/big@v1", place / "m", "--connections", "2", AWS_ENDPOINT_URL=link.endpoint
            )
            wait_for(lambda: link.passed > 4 * MIB)
            (place / "other").write_bytes(bytes(100 * MIB))
            _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert err.count("\n") == 1
        assert "is full" in err
        right = contents(model)
        assert all(right[path] == data for path, data in contents(place / "m").items())
        (place / "other").unlink()
        assert obsfs("pull", f"{bucket}/big@v1", place / "m", "--json").json["bytes_fetched"] < 80 * MIB
        assert contents(place / "m") == contents(model)
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cache_size", ["1GiB", "64MiB"])
def test_killed_half_way_it_fetches_little_again(bucket: Store, tmp_path: Path, cache_size: str, obsfs: Run) -> None:
    """Also when the cache holds a small part of the model only."""
    model = write_model(tmp_path / "m", mib=100)
    size = sum(map(len, contents(model).values()))
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    with FaultyLink(bucket.server.port) as link:
        link.bytes_per_second = 20e6
        options = (tmp_path / "a", "--connections", "4", "--cache-size", cache_size)
        process = start("pull", f"{bucket}/m@v1", *options, AWS_ENDPOINT_URL=link.endpoint)
        while link.passed < size / 2:
            assert process.poll() is None
            time.sleep(0.01)
        stop_group(process)
        link.passed = 0
        link.bytes_per_second = None
        again = start("pull", f"{bucket}/m@v1", *options, AWS_ENDPOINT_URL=link.endpoint)
        _, err = again.communicate(timeout=120)
        assert again.returncode == 0, err
        fetched = link.passed / size
    assert contents(tmp_path / "a") == contents(model)
    assert fetched < 0.55


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_any_moment_no_wrong_file_is_ever_there(bucket: Store, tmp_path: Path, obsfs: Run) -> None:
    """Kill -9, fifteen times, at random."""
    model = write_model(tmp_path / "m", mib=12)
    right = contents(model)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    rng = random.Random(7)
    kills = 0
    with FaultyLink(bucket.server.port) as link:
        link.bytes_per_second = 30e6
        for number in range(4):
            place = tmp_path / f"a{number}"
            cache = tmp_path / f"cache{number}"
            for delay in (*(rng.uniform(0.4, 1.6) for _ in range(5)), 60):
                command = ("pull", f"{bucket}/m@v1", place, "--connections", "2", "--cache-dir", cache)
                process = start(*command, AWS_ENDPOINT_URL=link.endpoint)
                try:
                    _, err = process.communicate(timeout=delay)
                except subprocess.TimeoutExpired:
                    stop_group(process)
                    kills += 1
                    found = contents(place) if place.exists() else {}
                    assert all(right[path] == data for path, data in found.items())
                    continue
                assert process.returncode == 0, err
                break
            assert contents(place) == right
    assert kills >= 8


def test_snapshot_download_is_the_hubs(
    bucket: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = package.snapshot_download(f"{bucket}/m", revision="v1", allow_patterns=["*.json", "sub/"])
    assert set(contents(Path(place))) == {"config.json", "sub/notes.md"}
    monkeypatch.setenv("OBSFS_LIBRARY", str(bucket))
    assert package.snapshot_download("m@v1", local_dir=tmp_path / "a", ignore_patterns="*.md") == str(tmp_path / "a")
    assert set(contents(tmp_path / "a")) == {path for path in contents(model) if path != "sub/notes.md"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert package.snapshot_download("m", revision="v1", local_files_only=True) == place
    with pytest.raises(UsageError):
        package.snapshot_download("n", revision="v1", local_files_only=True)
    with pytest.raises(UsageError):
        package.snapshot_download("m", repo_type="dataset")
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.server.endpoint)
    with pytest.raises(NotFoundError, match="m@v1"):
        package.snapshot_download("m", revision="v9")


def test_the_hubs_libraries_find_what_was_pulled_into_their_caches(
    bucket: Store, obsfs: Run, model: Path, tmp_path: Path
) -> None:
    """Real huggingface_hub, transformers and modelscope_hub, with no network."""
    hf, ms = tmp_path / "hf", tmp_path / "ms"
    names = {"HF_HOME": str(hf), "MODELSCOPE_CACHE": str(ms)}
    config = {"model_type": "qwen2", "hidden_size": 8, "num_attention_heads": 1, "architectures": ["Qwen2ForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    assert obsfs("push", model, f"{bucket}/m@v2").code == 0
    done = obsfs("pull", f"{bucket}/m@v2", "--to-hf-cache", "--to-modelscope-cache", "--as", "org/m.5", **names)
    assert done.code == 0, done.err
    assert (
        obsfs("pull", f"{bucket}/m@v2", "--to-hf-cache", "--as", "org/m.5", "--json", **names).json["bytes_fetched"]
        == 0
    )
    program = (
        "import sys\n"
        "from transformers import AutoConfig\n"
        "from huggingface_hub import snapshot_download, scan_cache_dir\n"
        "assert AutoConfig.from_pretrained('org/m.5').hidden_size == 8\n"
        "assert AutoConfig.from_pretrained('org/m.5', revision='v2').hidden_size == 8\n"
        "print(snapshot_download('org/m.5'))\n"
        "assert not scan_cache_dir().warnings\n"
        "from modelscope_hub import HubApi\n"
        "print(HubApi().download_repo('org/m.5', 'model', local_files_only=True))\n"
    )
    command = [sys.executable, "-c", program]
    offline = {**os.environ, **names, "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    for place in ran.stdout.splitlines()[-2:]:
        assert contents(Path(place)) == contents(model)


def test_two_pulls_into_one_directory(bucket: Store, model: Path, tmp_path: Path) -> None:
    with FaultyLink(bucket.server.port) as link:
        link.bytes_per_second = 20e6
        processes = [start("pull", f"{bucket}/m@v1", tmp_path / "a", AWS_ENDPOINT_URL=link.endpoint) for _ in range(2)]
        errors = [process.communicate(timeout=60)[1] for process in processes]
    assert sorted(process.returncode for process in processes) in ([0, 0], [0, 2]), errors
    assert contents(tmp_path / "a") == contents(model)


def test_without_a_directory_it_shares_its_bytes_with_the_cache(
    bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter
) -> None:
    model = write_model(tmp_path / "m", mib=12)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    place = Path(obsfs("pull", f"{bucket}/m@v1").out.strip())
    assert contents(place) == contents(model)
    large = place / "model-00001-of-00002.safetensors"
    assert large.stat().st_nlink == 2
    assert (place / "config.json").stat().st_nlink == 1  # what people edit is a copy
    again = obsfs("pull", f"{bucket}/m@v1", "--json").json
    assert again["bytes_fetched"] == 0
    # The cache serves it, keeps it, and does not count it; what else is in it comes and goes.
    bucket.put("other.bin", random_bytes(60 * MIB))
    path = mount(bucket, cache_dir=tmp_path / "cache" / "obsfs", cache_size="32MiB")
    (path / "other.bin").read_bytes()
    assert contents(path / "m@v1").keys() >= contents(model).keys()
    assert status(path)["bytes_fetched"] < 61 * MIB
    assert status(path)["cache_bytes"] <= 32 * MIB
    assert os.getxattr(path / "m@v1" / large.name, "user.obsfs.served_by") == b"passthrough"
    assert obsfs("cache", "clean").code == 0
    assert contents(place) == contents(model)
    assert obsfs("verify", f"{bucket}/m@v1", "--in", "cache").code == 0
    # It is the cache's again when its other name goes.
    for file in place.rglob("*"):
        if file.is_file():
            file.unlink()
    obsfs("cache", "clean")
    assert "\n0 B in " in obsfs("cache", "info").out


def test_a_cache_whose_map_is_lost_never_touches_what_was_pulled(
    bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter
) -> None:
    model = write_model(tmp_path / "m", mib=12)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    place = Path(obsfs("pull", f"{bucket}/m@v1").out.strip())
    for number, damaged in enumerate((tmp_path / "cache" / "obsfs").rglob("*.map")):
        damaged.unlink() if number % 2 else damaged.write_bytes(b"" if number % 4 else b"damaged")
    path = mount(bucket, cache_dir=tmp_path / "cache" / "obsfs")
    for file, data in contents(model).items():
        assert (path / "m@v1" / file).read_bytes() == data
    assert contents(place) == contents(model)


def test_a_cache_that_is_too_small_to_share(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=20)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    place = Path(obsfs("pull", f"{bucket}/m@v1", "--cache-size", "16MiB").out.strip())
    assert contents(place) == contents(model)
    assert (place / "model-00001-of-00002.safetensors").stat().st_nlink == 1


def test_what_cannot_be_meant_is_refused(bucket: Store, obsfs: Run, model: Path, tmp_path: Path) -> None:
    obsfs("push", model, f"{bucket}/m@v1")
    for words, said in (
        (("--include", "nothing"), f"no file of {bucket}/m@v1 is left"),
        (("--exclude", "*"), f"no file of {bucket}/m@v1 is left"),
        (("--as", "org/name"), "--as names a repository in a hub's cache: add --to-hf-cache"),
    ):
        done = obsfs("pull", f"{bucket}/m@v1", tmp_path / "out", *words)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert said in done.err
        assert not (tmp_path / "out").exists()


def test_without_credentials_a_bucket_that_is_not_public_says_so(bucket: Store, obsfs: Run) -> None:
    done = obsfs("models", bucket, "--no-sign-request")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "no credentials were sent: leave out --no-sign-request" in done.err


def test_snapshot_download_knows_every_argument_of_the_hubs(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    assert set(inspect.signature(huggingface_hub.snapshot_download).parameters) <= set(
        inspect.signature(package.snapshot_download).parameters
    )
    url, place = f"{bucket}/m@v1", tmp_path / "m"
    assert obsfs("push", write_model(tmp_path / "model", mib=1), url).code == 0
    seen = package.snapshot_download(url, local_dir=place, dry_run=True, allow_patterns="*.json")
    assert [(one.filename, one.local_path, one.is_cached, one.will_download) for one in seen] == [
        ("config.json", str(place / "config.json"), False, True)
    ]
    assert {field.name for field in dataclasses.fields(huggingface_hub.DryRunFileInfo)} == set(vars(seen[0]))
    assert not place.exists()
    bars: list[tqdm] = []

    def bar(**options: Any) -> tqdm:
        bars.append(tqdm(**options, file=io.StringIO()))
        return bars[-1]

    package.snapshot_download(url, local_dir=place, token=False, library_name="x", etag_timeout=9, tqdm_class=bar)
    assert [(one.n, one.total) for one in bars] == [(sum(map(len, contents(place).values())),) * 2]
    for one in package.snapshot_download(url, local_dir=place, dry_run=True):
        assert (one.is_cached, one.file_size) == (True, (place / one.filename).stat().st_size)
    refused: list[dict[str, Any]] = [
        {"token": True},
        {"token": "t"},
        {"headers": {"a": "b"}},
        {"etag_timeout": 0},
        {"proxies": {}},
    ]
    for given in refused:
        (name,) = given
        with pytest.raises(UsageError, match=name):
            package.snapshot_download(url, **given)


def test_etag_timeout_ends_the_look_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UnavailableError, match="sent nothing"):
            package.snapshot_download("obs://bucket/m", etag_timeout=0.3, endpoint=endpoint)


def test_what_others_could_have_changed_in_the_cache_is_not_given_out(
    bucket: Store, obsfs: Run, tmp_path: Path, model: Path
) -> None:
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    above = tmp_path / "above"
    above.mkdir()
    given = ("pull", f"{bucket}/m@v1", "--cache-dir", above / "cache")
    assert obsfs(*given).code == 0
    above.chmod(0o777)
    refused = obsfs(*given)
    assert (refused.code, refused.out) == (2, "")
    assert f"other users can write to {above}" in refused.err
    above.chmod(0o755)
    assert obsfs(*given).code == 0
