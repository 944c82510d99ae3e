"""Other distributions have packages of the names `obsfs` and `trainer`: told in one line, not by what breaks later."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import obsfs.ours

ROOT = Path(obsfs.ours.__file__).resolve().parents[1]


def run(first: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, with a directory that comes before all others on ``sys.path``."""
    return subprocess.run(
        [sys.executable, "-m", "obsfs", *arguments],
        env={**os.environ, "PYTHONPATH": str(first)},
        cwd=first,
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_trainer(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("raise SystemExit(99)")
    # obsfs itself comes from where it is.
    (tmp_path / "obsfs").symlink_to(ROOT / "obsfs")
    done = run(tmp_path, "train", "run.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
    assert f"{tmp_path}/trainer" in done.stderr
    assert "pip uninstall" in done.stderr
    assert run(tmp_path, "--version").returncode == 0


def test_another_obsfs_over_ours(tmp_path: Path) -> None:
    """As pip leaves it that installs one over the other: their ``__init__``, and our modules."""
    shutil.copytree(ROOT / "obsfs", tmp_path / "obsfs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "obsfs" / "__init__.py").write_text("__version__ = '9'")
    for verb in (["status"], ["models", "obs://models"], ["--version"]):
        done = run(tmp_path, *verb)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done
        assert f"{tmp_path}/obsfs" in done.stderr


def test_no_hint_names_a_distribution_that_is_not_on_an_index() -> None:
    hint = re.compile(r"pip install [\"']?obsfs")
    for path in (ROOT / "obsfs").rglob("*.py"):
        assert path.name == "ours.py" or not hint.search(path.read_text()), path
