"""No temporary directory stays, however a run ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.temporary import temporary_directory

_HOLDER = """
import sys, time
from obsfs.cli.output import terminate_like_interrupt
from trainer.temporary import temporary_directory
try:
    with terminate_like_interrupt(), temporary_directory("obsfs-test-") as place:
        for number in range(300):
            (place / str(number)).write_text("x")
        print(place, flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def holder() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_nothing(number: int, temporary: Path) -> None:
    process, place = holder()
    assert place.is_dir()
    for _ in range(3):  # as somebody who is in a hurry
        process.send_signal(number)
    assert process.wait(30) == 130
    assert not list(temporary.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_one_alone_if_it_is_ones_own(temporary: Path) -> None:
    killed, left = holder()
    lives, used = holder()
    assert left != used
    killed.kill()
    killed.wait()
    other = temporary / "obsfs-test-other"
    other.mkdir()
    os.chown(other, 12345, 12345)
    elsewhere = temporary / "elsewhere"
    (elsewhere / "kept").mkdir(parents=True)
    link, file, unlike = (temporary / name for name in ("obsfs-test-link", "obsfs-test-file", "obsfs-tests"))
    link.symlink_to(elsewhere)
    file.touch()
    unlike.mkdir()
    assert left.is_dir()
    with temporary_directory("obsfs-test-") as own:
        assert not left.exists()
        assert len(list(used.iterdir())) == 300
        there = set(temporary.iterdir())
        assert there == {own, used, other, elsewhere, link, file, unlike}
        assert (elsewhere / "kept").is_dir()
    assert not own.exists()
    lives.terminate()
    lives.wait()


def test_a_directory_elsewhere_is_cleaned_up_there_alone(temporary: Path) -> None:
    parent = temporary / "[results]"
    left, other = parent / "obsfs-test-left", temporary / "obsfs-test-other"
    for place in (left, other):  # nobody holds a lock on them
        place.mkdir(parents=True)
    with temporary_directory("obsfs-test-", parent) as own:
        assert own.parent == parent
        assert not left.exists()
        assert other.exists()
    assert not list(parent.iterdir())


def test_where_directories_cannot_be_locked_they_are_made_and_removed_all_the_same(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EBADF, "as NFS says of a directory")

    monkeypatch.setattr("trainer.temporary.fcntl.flock", refused)
    with temporary_directory("obsfs-test-") as own:
        with temporary_directory("obsfs-test-") as other:
            assert own.is_dir() and other.is_dir()
        assert own.is_dir() and not other.exists()
    assert not list(temporary.iterdir())


def test_runs_that_start_at_once_keep_their_own(temporary: Path) -> None:
    def once(_: int) -> bool:
        with temporary_directory("obsfs-test-") as place:
            (place / "a").write_text("x")
            return (place / "a").exists()

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(once, range(200)))
    assert not list(temporary.iterdir())
