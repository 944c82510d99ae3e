"""What the README says first: `pip install .`, with the pip that a new virtual environment has."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from obsfs.version import __version__

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_new_environment_gets_the_command(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", str(source)], check=True, timeout=500)
    told = subprocess.run([python.with_name("obsfs"), "--version"], capture_output=True, text=True, check=True).stdout
    assert __version__ in told
    told = subprocess.run([python.with_name("obsfs"), "--help"], capture_output=True, text=True, check=True).stdout
    assert {"mount", "train", "merge", "chat", "serve"} <= set(told.split())
    for verb in (["train", "run.yaml"], ["train", "--guide"], ["merge", "a", "b"], ["chat", "a"], ["serve", "a"]):
        done = subprocess.run([python.with_name("obsfs"), *verb], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
        assert "pip install " in done.stderr, done
        assert "trl>=" in done.stderr, done  # the packages by name: obsfs itself is not on an index
    loaded = "import sys, obsfs, fsspec; fsspec.get_filesystem_class('obs'); print(sys.prefix)"
    found = subprocess.run([python, "-c", loaded], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(tmp_path / "venv") != sys.prefix
