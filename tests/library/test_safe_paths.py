"""What lies in a target is not trusted: no link in it, nor its record, leads out of it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from obsfs import private
from obsfs.errors import UsageError
from obsfs.library.safe_paths import open_file, path_below, real_path, size_and_mtime
from tests.conftest import Store, contents
from tests.library.test_push import Run


@pytest.fixture
def small(bucket: Store, obsfs: Run, tmp_path: Path) -> Path:
    """Published as ``m@v1``."""
    path = tmp_path / "model"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text('{"architectures": ["A"]}')
    (path / "sub" / "notes.md").write_text("notes")
    assert obsfs("push", path, f"{bucket}/m@v1", "--source", "hf:victim/model", "--revision", "0" * 40).code == 0
    return path


@pytest.mark.parametrize("depth", ["a", "a/b", "a/b/c"])
def test_no_parent_is_a_link(tmp_path: Path, depth: str) -> None:
    place, outside = tmp_path / "place", tmp_path / "outside"
    (place / depth).parent.mkdir(parents=True, exist_ok=True)
    outside.mkdir()
    (outside / "file").write_text("theirs")
    (place / depth).symlink_to(outside)
    with pytest.raises(UsageError, match="symbolic link"):
        path_below(place, f"{depth}/file")
    assert size_and_mtime(place, f"{depth}/file") is None
    with pytest.raises(UsageError):
        open_file(place, f"{depth}/file")


def test_a_link_is_followed_to_a_blob_of_its_own_repository_only(tmp_path: Path) -> None:
    home = tmp_path / "models--o--m"
    place = home / "snapshots" / "rev"
    (home / "blobs").mkdir(parents=True)
    place.mkdir(parents=True)
    (home / "blobs" / "abc").write_text("blob")
    (home / "secret").write_text("secret")
    (place / "good").symlink_to("../../blobs/abc")
    assert real_path(place, "good") == home / "blobs" / "abc"
    for number, lead in enumerate(
        ("../../secret", "/etc/passwd", "../../blobs/../secret", "../../blobs/x/../../secret")
    ):
        (place / f"bad{number}").symlink_to(lead)
        with pytest.raises(UsageError, match="symbolic link"):
            real_path(place, f"bad{number}")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        open_file(tmp_path, "pipe")  # and does not wait for a writer


def test_a_small_file_is_written_through_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    (tmp_path / f"file.{os.getpid()}.new").symlink_to(outside)
    (tmp_path / "file").symlink_to(outside)
    private.write_file(tmp_path / "file", b"ours", 0o644)
    assert outside.read_text() == "theirs"
    assert (tmp_path / "file").read_text() == "ours"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("linked", ["sub", ".obsfs", ".obsfs/incomplete"])
def test_a_pull_writes_into_no_linked_directory(
    bucket: Store, obsfs: Run, small: Path, tmp_path: Path, linked: str
) -> None:
    place, outside = tmp_path / "place", tmp_path / "outside"
    outside.mkdir()
    (place / linked).parent.mkdir(parents=True)
    (place / linked).symlink_to(outside)
    done = obsfs("pull", f"{bucket}/m@v1", place, "--force")
    assert done.code == 2
    assert f"{place / linked} is a symbolic link" in done.err
    assert list(outside.iterdir()) == []


def test_a_record_names_nothing_outside(bucket: Store, obsfs: Run, small: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    victims = [tmp_path / "victim", tmp_path / "elsewhere" / "victim"]
    for victim in victims:
        victim.parent.mkdir(exist_ok=True)
        victim.write_text("theirs")
    (place / ".obsfs").mkdir(parents=True)
    (place / "link").symlink_to(victims[1].parent)
    states = [[found.st_size, found.st_mtime_ns, "x"] for found in (one.stat() for one in victims)]
    names = ["../victim", str(victims[0]), "sub/../../victim", "", "a\0b"]
    record = {**dict.fromkeys(names, states[0]), "link/victim": states[1], "odd": 10**400, "short": [1]}
    (place / ".obsfs" / "pulled.json").write_text(json.dumps({**record, "odd": "X"}).replace('"X"', "1" + "0" * 400))
    done = obsfs("pull", f"{bucket}/m@v1", place)
    assert all(victim.read_text() == "theirs" for victim in victims)
    (place / "link").unlink()
    assert done.code == 2 or contents(place) == contents(small)
    assert obsfs("pull", f"{bucket}/m@v1", place).code == 0
    assert contents(place) == contents(small)


@pytest.mark.parametrize("record", ["[" * 100_000, "[]", "7", '{"config.json": [1e400, 1, "x"]}', "\0", ""])
def test_a_record_that_nobody_wrote_costs_nothing(
    bucket: Store, obsfs: Run, small: Path, tmp_path: Path, record: str
) -> None:
    place = tmp_path / "place"
    shutil.copytree(small, place)
    (place / ".obsfs").mkdir()
    (place / ".obsfs" / "pulled.json").write_text(record)
    assert obsfs("pull", f"{bucket}/m@v1", place).code == 0
    assert contents(place) == contents(small)


def test_the_manifest_does_not_choose_a_repository(bucket: Store, obsfs: Run, small: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    refs = hf / "hub" / "models--victim--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("f" * 40)
    done = obsfs("pull", f"{bucket}/m@v1", "--to-hf-cache", HF_HOME=str(hf))
    assert done.code == 0, done.err
    assert (refs / "main").read_text() == "f" * 40
    assert [path.name for path in (hf / "hub").iterdir() if path.name != refs.parent.name] == ["models--m"]


@pytest.mark.parametrize("linked", ["models--m/refs", "models--m/blobs", "models--m/snapshots", "models--m"])
def test_no_link_in_a_hubs_cache_is_followed(
    bucket: Store, obsfs: Run, small: Path, tmp_path: Path, linked: str
) -> None:
    hub, outside = tmp_path / "hf" / "hub", tmp_path / "outside"
    outside.mkdir()
    (hub / linked).parent.mkdir(parents=True)
    (hub / linked).symlink_to(outside)
    done = obsfs("pull", f"{bucket}/m@v1", "--to-hf-cache", HF_HOME=str(tmp_path / "hf"))
    assert done.code == 2
    assert "is a symbolic link" in done.err
    assert list(outside.iterdir()) == []


def test_verify_reads_past_no_link(bucket: Store, obsfs: Run, small: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    assert obsfs("pull", f"{bucket}/m@v1", place).code == 0
    moved = tmp_path / "moved"
    (place / "sub").rename(moved)
    (place / "sub").symlink_to(moved)
    (place / "config.json").unlink()
    os.mkfifo(place / "config.json")
    done = obsfs("verify", place)
    assert done.code == 1
    assert "sub/notes.md: it cannot be read" in done.out
    assert "config.json: it cannot be read (no regular file)" in done.out
