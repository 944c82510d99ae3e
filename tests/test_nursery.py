"""A command that is forked ends, writes and sees what one that is started does."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Result, run_command, wait_for
from tests.nursery import Nursery


def in_both_ways(nursery: Nursery, *arguments: str, **environment: str) -> list[Result]:
    changed = {**os.environ, **environment}
    assert nursery.can_start(changed)
    code, *written = nursery.run([*arguments], changed, 60)
    return [Result(code, *(text.decode() for text in written)), run_command([*arguments], changed, 60)]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        (),
        ("verify", "."),
        ("umount", "n\u00fc\udcff"),
        ("models", "--help"),
        ("cache", "info", "--json"),
    ],
    ids=lambda words: ascii(" ".join(words)),
)
def test_what_it_says_and_how_it_ends(nursery: Nursery, arguments: tuple[str, ...]) -> None:
    forked, started = in_both_ways(nursery, *arguments)
    assert forked == started
    assert forked.out + forked.err


def test_it_works_where_and_as_its_caller_does(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a mount").mkdir()
    forked, started = in_both_ways(nursery, "mount", "obs://models", "a mount", OBSFS_CONNECTIONS="many")
    assert forked == started
    assert forked.code == 2
    assert "OBSFS_CONNECTIONS" in forked.err
    forked, started = in_both_ways(nursery, "verify", "a mount")
    assert forked == started
    assert "a mount" in forked.err


def test_another_python_than_ours_is_started(nursery: Nursery, obsfs: Callable[..., Result]) -> None:
    assert not nursery.can_start({**os.environ, "PYTHONOPTIMIZE": "1"})
    assert obsfs("--version", PYTHONOPTIMIZE="1").code == 0


def test_what_takes_too_long_is_killed(nursery: Nursery) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {**os.environ, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        command = ["models", "obs://models", "--endpoint-url", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        with pytest.raises(subprocess.TimeoutExpired):
            nursery.run(command, environment, 1.0)
        wait_for(lambda: not psutil.Process(nursery.pid).children())
        assert nursery.run(["--version"], environment, 60)[0] == 0
