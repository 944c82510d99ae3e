"""A pinned mount shows one state, whatever happens in the bucket afterwards."""

from __future__ import annotations

import errno
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from obsfs.errors import UsageError
from tests.conftest import MIB, Mounter, Store, contents, random_bytes, write_model
from tests.library.test_push import Run


def push(obsfs: Run, model: Path, name: str) -> None:
    done = obsfs("push", model, name)
    assert done.code == 0, done.err


def test_a_run_sees_one_base_for_its_whole_life(bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter) -> None:
    model = write_model(tmp_path / "m", mib=2)
    old = contents(model)
    push(obsfs, model, f"{bucket}/lib/m@v1")
    push(obsfs, model, f"{bucket}/lib/plain")
    path = mount(f"{bucket}/lib", snapshot="now", metadata_ttl="100ms")
    assert sorted(os.listdir(path)) == ["m", "m@v1", "plain"]
    write_model(model, mib=2, seed=9)
    push(obsfs, model, f"{bucket}/lib/m@v2")
    push(obsfs, model, f"{bucket}/lib/plain")
    bucket.put("lib/m@v1/more.txt", b"")
    time.sleep(0.3)
    assert sorted(os.listdir(path)) == ["m", "m@v1", "plain"]
    assert contents(path / "m") == contents(path / "m@v1") == old
    assert (path / "plain" / "sub" / "notes.md").read_bytes() == b"notes"  # not replaced, and so still there
    with pytest.raises(OSError) as caught:
        (path / "plain" / "model-00001-of-00002.safetensors").read_bytes()
    assert caught.value.errno == errno.ESTALE
    fresh = mount(f"{bucket}/lib", snapshot="now")
    assert contents(fresh / "m") == contents(fresh / "plain") == contents(model)


def test_a_time_and_a_version(bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter) -> None:
    model = write_model(tmp_path / "m", mib=1)
    old = contents(model)
    push(obsfs, model, f"{bucket}/m@v1")
    push(obsfs, model, f"{bucket}/n@v1")
    time.sleep(1.1)
    moment = datetime.now(UTC).isoformat()
    time.sleep(1.1)
    write_model(model, mib=1, seed=9)
    push(obsfs, model, f"{bucket}/m@v2")
    then = mount(bucket, snapshot=moment)
    assert sorted(os.listdir(then)) == ["m", "m@v1", "n", "n@v1"]
    assert contents(then / "m") == old
    second = mount(bucket, snapshot="v2")
    assert os.listdir(second) == ["m"]
    assert contents(second / "m") == contents(model)
    alone = mount(f"{bucket}/m", snapshot="v1")
    assert contents(alone) == old
    newest = mount(f"{bucket}/m", snapshot="now")
    assert contents(newest) == contents(model)
    for wanted, words in (("v3", "v2"), ("2001-01-01", "as old as")):
        with pytest.raises(UsageError, match=words):
            mount(bucket, snapshot=wanted)
    with pytest.raises(UsageError, match="no published model"):
        mount(f"{bucket}/nothing", snapshot="now")


def test_a_bucket_that_keeps_versions_still_has_what_was_replaced(
    bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter
) -> None:
    enabled = {"Status": "Enabled"}
    bucket.client.put_bucket_versioning(Bucket=bucket.name, VersioningConfiguration=enabled)
    model = write_model(tmp_path / "m", mib=9)
    old = contents(model)
    push(obsfs, model, f"{bucket}/plain")
    path = mount(bucket, snapshot="now")
    time.sleep(1.1)
    moment = datetime.now(UTC).isoformat()
    time.sleep(1.1)
    write_model(model, mib=9, seed=9)
    push(obsfs, model, f"{bucket}/plain")
    assert contents(path / "plain") == old
    then = mount(bucket, snapshot=moment, cache_dir=tmp_path / "other")
    assert contents(then / "plain") == old
    assert contents(mount(bucket, snapshot="now") / "plain") == contents(model)


def test_an_ordinary_mount_shows_what_is_there(bucket: Store, mount: Mounter, obsfs: Run, tmp_path: Path) -> None:
    push(obsfs, write_model(tmp_path / "m", mib=1), f"{bucket}/m@v1")
    bucket.put("data/x.bin", random_bytes(MIB))
    path = mount(bucket)
    assert sorted(os.listdir(path)) == ["data", "m@v1"]
    assert (path / "m@v1" / ".obsfs" / "manifest.json").is_file()
    assert obsfs("status", path, "--json").json["snapshot"] is None
