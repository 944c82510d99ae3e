from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from obsfs import mountinfo
from tests.conftest import stop_group, wait_for

_DEMO = [sys.executable, "-m", "obsfs", "demo"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the demo has its bucket, its cache and its mountpoint."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("TMPDIR", str(home))
    return home


def remains(home: Path) -> list[str]:
    mounts = [str(entry.mountpoint) for entry in mountinfo.mounts() if entry.mountpoint.is_relative_to(home)]
    return mounts + [str(path) for path in home.iterdir()]  # also what torch and others would leave


@pytest.mark.slow
def test_the_demo_runs_and_leaves_nothing(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "obsfs", "demo"], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    fetched = re.search(r"fetched from the bucket\s+([\d.]+) MiB\s+0 B", done.stdout)
    assert fetched and float(fetched[1]) > 50, done.stdout
    assert "the same text both times" in done.stdout
    assert remains(home) == []


@pytest.mark.slow
def test_keep_leaves_bucket_and_mount_until_ctrl_c(home: Path) -> None:
    process = subprocess.Popen([*_DEMO, "--keep"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout
        said = ""
        while "Ctrl-C here" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        (mountpoint,) = [entry.mountpoint for entry in mountinfo.mounts() if entry.mountpoint.is_relative_to(home)]
        assert f"  ls -l {mountpoint}/tiny-qwen2\n" in said
        assert (mountpoint / "tiny-qwen2" / "config.json").stat().st_size > 100
        commands = [line.strip() for line in said.splitlines() if line.startswith("  ")][-4:]
        done = subprocess.run(
            ["sh", "-ec", "\n".join(commands)], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "config.json" in done.stdout  # ls
        assert "mounted" in done.stdout or "served by" in done.stdout  # status
        assert "Qwen2ForCausalLM" in done.stdout  # models
        os.kill(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert (process.returncode, rest) == (0, "server, mount, cache and model are removed\n")
    finally:
        stop_group(process)
    assert remains(home) == []


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(home: Path) -> None:
    process = subprocess.Popen(_DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_for(lambda: any("mnt" in path for path in remains(home)), 100)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert b"Traceback" not in err
    finally:
        stop_group(process)
    wait_for(lambda: remains(home) == [], 10)
