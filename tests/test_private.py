"""Which directories may hold private data: the rule, and that everything obsfs makes keeps to it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from obsfs import private
from obsfs.errors import UsageError
from obsfs.paths import state_dir
from tests.conftest import MIB, Mounter, Result, Store, random_bytes, write_model

NOBODY = 65534


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def make(path: Path) -> None:
    private.make_directory(path, "test directory", "choose another")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "place"
    path.mkdir()
    return path


@pytest.fixture(params=[0o000, 0o022, 0o277])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_what_is_made_is_private_whatever_the_umask(place: Path, umask: None) -> None:
    make(place / "a" / "b")
    private.make_level(place / "a" / "b" / "c")
    os.close(private.open_file(place / "a" / "b" / "file"))
    private.write_file(place / "a" / "b" / "text", b"x")
    assert [mode(place / name) for name in ("a", "a/b", "a/b/c")] == [0o700] * 3
    assert [mode(place / "a" / "b" / name) for name in ("file", "text")] == [0o600] * 2


@pytest.mark.parametrize("bits", [0o755, 0o750, 0o711, 0o777])
def test_a_directory_of_ours_is_tightened(place: Path, bits: int, caplog: pytest.LogCaptureFixture) -> None:
    place.chmod(bits)
    assert not private.is_private(place)
    make(place)
    assert mode(place) == 0o700
    assert private.is_private(place)
    assert str(place) in caplog.text


def test_a_directory_that_others_could_fill_is_refused(place: Path) -> None:
    (place / "v1").mkdir()
    place.chmod(0o777)
    with pytest.raises(UsageError, match=r"not empty.*chmod 700"):
        make(place)
    assert mode(place) == 0o777


@pytest.mark.parametrize("bits", [0o777, 0o757, 0o775])
def test_a_chain_that_others_can_change_is_refused(place: Path, bits: int) -> None:
    os.chown(place, 0, NOBODY)
    place.chmod(bits)
    with pytest.raises(UsageError, match=f"can write to {place}.*chmod go-w"):
        make(place / "cache")
    assert not (place / "cache").exists()


def test_a_sticky_directory_is_as_good_as_tmp(place: Path) -> None:
    place.chmod(0o1777)
    make(place / "cache")
    assert private.is_private(place / "cache")


@pytest.mark.parametrize("level", ["", "upper"])
def test_a_directory_of_another_user_is_refused(place: Path, level: str) -> None:
    (place / "upper" / "cache").mkdir(parents=True)
    os.chown(place / "upper" / ("cache" if not level else ""), NOBODY, NOBODY)
    with pytest.raises(UsageError, match="belongs to another user"):
        make(place / "upper" / "cache")


def test_symlinks_on_the_way_are_judged_too(place: Path) -> None:
    (place / "real").mkdir()
    (place / "good").symlink_to("real")
    make(place / "good" / "cache")
    assert private.is_private(place / "real" / "cache")
    (place / "foreign").symlink_to(place / "real")
    os.chown(place / "foreign", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(UsageError, match=r"symlink .* belongs to another user"):
        make(place / "foreign" / "cache")
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    (place / "out").symlink_to("open/../open")
    with pytest.raises(UsageError, match="other users can write"):
        make(place / "out" / "cache")
    (place / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="too many levels"):
        make(place / "loop" / "cache")


def test_below_it_no_symlink_is_followed(place: Path) -> None:
    victim = place / "victim"
    victim.write_text("precious")
    (place / "file").symlink_to(victim)
    (place / "level").symlink_to(place)
    with pytest.raises(OSError, match="symbolic links"):
        private.open_file(place / "file")
    with pytest.raises(OSError, match="not a directory"):
        private.make_level(place / "level")
    private.write_file(place / "file", b"new")
    assert victim.read_text() == "precious"
    os.mkfifo(place / "pipe")
    with pytest.raises(OSError, match="not a file"):
        private.open_file(place / "pipe")
    os.chown(victim, NOBODY, NOBODY)
    with pytest.raises(OSError, match="not a file of this user"):
        private.open_file(victim)


def others_can_reach(top: Path) -> list[str]:
    return [f"{mode(path):o} {path}" for path in (top, *top.rglob("*")) if mode(path) & 0o077]


def test_a_mount_and_a_pull_leave_nothing_open(
    bucket: Store, mount: Mounter, obsfs: Callable[..., Result], tmp_path: Path
) -> None:
    """Also with a umask that leaves everything open, in a cache directory as ``mkdir`` makes it."""
    model = write_model(tmp_path / "model", mib=9)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    cache = tmp_path / "blocks"
    cache.mkdir(mode=0o755)
    cache.chmod(0o755)
    program = "import os, sys; os.umask(0); os.execv(sys.executable, [sys.executable, '-m', 'obsfs', *sys.argv[1:]])"
    command = [sys.executable, "-c", program, "pull", f"{bucket}/m@v1", "--cache-dir", str(cache)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    before = os.umask(0)
    try:
        path = mount(bucket, cache_dir=cache, log_level="debug")
        assert (path / "m@v1" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    finally:
        os.umask(before)
    assert others_can_reach(cache) == []
    assert others_can_reach(state_dir()) == []


@pytest.mark.parametrize("planted", ["v1", "v1/lock"])
def test_a_cache_that_somebody_has_prepared(
    bucket: Store, obsfs: Callable[..., Result], tmp_path: Path, planted: str
) -> None:
    bucket.put("m/a.bin", random_bytes(MIB))
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "text").write_text("precious")
    cache = tmp_path / "blocks"
    (cache / planted).parent.mkdir(parents=True)
    (cache / planted).symlink_to(victim if planted == "v1" else victim / "text")
    done = obsfs("warm", f"{bucket}/m/a.bin", "--cache-dir", cache)
    assert (done.code, done.err.count("\n")) == (2, 1), done
    assert [*victim.iterdir()] == [victim / "text"]
    assert (victim / "text").read_text() == "precious"
