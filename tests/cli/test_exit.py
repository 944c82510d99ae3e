"""How a command ends when nobody reads it, it cannot print, or it is interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from obsfs import mountinfo
from tests.conftest import Store

_VERBS = [("--help",), (), ("models", "{b}", "--json")]


def _run(*arguments: str, **streams: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "obsfs", *arguments]
    return subprocess.run(command, text=True, stderr=subprocess.PIPE, timeout=60, check=False, **streams)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("verb", _VERBS, ids=" ".join)
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(bucket: Store, verb: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = _run(*(word.replace("{b}", str(bucket)) for word in verb), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("verb", _VERBS[1:], ids=" ".join)
def test_a_disk_that_is_full_is_told(bucket: Store, verb: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = _run(*(word.replace("{b}", str(bucket)) for word in verb), stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("obsfs: cannot print what was asked (No space left on device): ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_are_not_used_for_anything_else(bucket: Store, tmp_path: Path, closed: str) -> None:
    bucket.put("m/config.json", b"{}")
    command = f"exec {sys.executable} -m obsfs warm {bucket}/m/config.json {closed}"
    assert subprocess.run(["bash", "-c", command], timeout=60, check=False, capture_output=True).returncode == 0
    done = subprocess.run(["bash", "-c", f"{command} --no-such"], timeout=60, check=False, capture_output=True)
    assert done.returncode == 2


def test_nobody_needs_to_hear_of_a_mistake() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "obsfs", "no-such-verb"]
        assert subprocess.run(command, stderr=full, timeout=60, check=False).returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "verb",
    [("models", "obs://models"), ("mount", "obs://models", "{d}"), ("mount", "--foreground", "obs://models", "{d}")],
    ids=" ".join,
)
def test_what_waits_for_a_silent_server_can_be_interrupted(
    bucket: Store, tmp_path: Path, verb: tuple[str, ...], number: signal.Signals
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        environment = {**os.environ, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        words = [word.replace("{d}", str(tmp_path)) for word in verb]
        (tmp_path / "mnt").mkdir()
        words = [f"{word}/mnt" if word == str(tmp_path) else word for word in words]
        command = [sys.executable, "-m", "obsfs", *words]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        with silent.accept()[0]:
            process.send_signal(number)
            said = process.communicate(timeout=12)[1]  # less than it waits for the server
    assert process.returncode == 130
    assert said.strip().splitlines()[-1] == "obsfs: interrupted"
    assert mountinfo.mounted_at(tmp_path / "mnt") is None


def test_interrupted_while_it_imports_it_ends_as_by_the_signal() -> None:
    code = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from obsfs.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
