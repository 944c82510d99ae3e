"""The embedded S3 server ends with who started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from obsfs.cli.output import terminate_like_interrupt
from obsfs.demo import lifeline
from obsfs.demo.server import EmbeddedServer
from tests.conftest import is_running, wait_for

_SLEEPS = ["sleep", "600"]
_STARTER = """
import subprocess, sys
from obsfs.demo import lifeline
keeper = subprocess.Popen(
    [sys.executable, "-I", "-S", lifeline.__file__, sys.argv[1], "sleep", "600"], stdin=subprocess.PIPE
)
print(keeper.pid, flush=True)
if sys.argv[2] == "stop":
    keeper.terminate()
    print(keeper.wait(), flush=True)
sys.stdin.read()
"""


def _start(pattern: Path, what: str) -> tuple[subprocess.Popen[bytes], psutil.Process]:
    command = [sys.executable, "-c", _STARTER, str(pattern), what]
    starter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert starter.stdout
    return starter, psutil.Process(int(starter.stdout.readline()))


@pytest.mark.parametrize("victim", ["starter", "keeper"])
def test_a_killed_starter_or_keeper_leaves_no_program(tmp_path: Path, victim: str) -> None:
    (tmp_path / "data").mkdir()
    starter, keeper = _start(tmp_path / "da*", "stay")
    try:
        wait_for(lambda: len(keeper.children()) == 1 and keeper.children()[0].name() == "sleep")
        (program,) = keeper.children()
        (starter if victim == "starter" else keeper).kill()
        wait_for(lambda: not is_running(program.pid))
        if victim == "starter":
            wait_for(lambda: not is_running(keeper.pid))
            assert list(tmp_path.iterdir()) == []
    finally:
        starter.kill()
        starter.communicate()


def test_the_program_gets_sigterm_and_its_data_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    command = [sys.executable, "-I", "-S", lifeline.__file__, str(tmp_path / "data"), *_SLEEPS]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE)
    wait_for(lambda: [one.name() for one in psutil.Process(keeper.pid).children()] == ["sleep"])
    keeper.terminate()
    assert keeper.wait(10) == 128 + signal.SIGTERM
    assert (tmp_path / "data").exists()
    keeper.communicate()


def test_a_server_that_is_closed_is_gone_with_all_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with EmbeddedServer(tmp_path) as server:
        pids = [server.process.pid, *(one.pid for one in psutil.Process(server.process.pid).children(recursive=True))]
        assert len(pids) == 2
        port = server.port
    assert not any(map(is_running, pids))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), 1):
        pass


def test_a_second_signal_does_not_cut_cleaning_up_short() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for number in before:
            cleaned = False
            with suppress(KeyboardInterrupt), terminate_like_interrupt():
                try:
                    os.kill(os.getpid(), number)
                finally:
                    os.kill(os.getpid(), signal.SIGTERM)
                    os.kill(os.getpid(), signal.SIGHUP)
                    cleaned = True
            assert cleaned
            assert {one: signal.getsignal(one) for one in before} == before
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with terminate_like_interrupt():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN, "nohup"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
