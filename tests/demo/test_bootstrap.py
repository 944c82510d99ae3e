"""``python3 -m obsfs.demo``: the demo from a clone with nothing installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import obsfs
from obsfs.demo import __main__ as bootstrap

_BARE = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
"""As a user's shell has it: nothing says where modules are, or are not, looked for."""
_PIP = """#!/bin/sh
echo "$*" >> {log}
case "$*" in *--report*) echo '{report}';; esac
"""


def test_it_imports_only_the_standard_library() -> None:
    """With ``-S``, Python finds no installed package."""
    check = "import obsfs.demo.__main__, sys; print('click' in sys.modules, 'numpy' in sys.modules)"
    where = Path(obsfs.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-c", check],
        cwd=where,
        env=_BARE,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr


def test_outside_a_clone_it_says_what_to_install(tmp_path: Path) -> None:
    package = tmp_path / "obsfs"
    (package / "demo").mkdir(parents=True)
    for name in ("__init__.py", "version.py", "demo/__init__.py", "demo/__main__.py"):
        (package / name).write_bytes((Path(obsfs.__file__).parent / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-S", "-m", "obsfs.demo"],
        cwd=tmp_path,
        env=_BARE,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "obsfs.demo: packages are missing: run it in a clone of obsfs, which then sets up .venv\n",
    )


@pytest.mark.parametrize(
    ("requires", "has_gpu", "uses_uv"),
    [
        (['nvidia-cublas-cu12; platform_system == "Linux"'], False, True),
        (["cuda-bindings"], False, True),
        (["nvidia-cublas-cu12"], True, False),
        (["filelock"], False, False),  # the index has CPU builds
        (None, False, False),  # torch is installed
    ],
)
def test_only_what_the_demo_needs_is_installed(
    requires: list[str] | None, has_gpu: bool, uses_uv: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, log = tmp_path / "venv", tmp_path / "log"
    monkeypatch.setattr(bootstrap, "_NVIDIA", tmp_path if has_gpu else tmp_path / "none")
    made: list[bool] = []

    def create(place: os.PathLike[str], *, with_pip: bool) -> None:
        made.append(with_pip)
        (home / "bin").mkdir(parents=True)
        packages = [] if requires is None else [{"metadata": {"requires_dist": requires}}]
        report = json.dumps({"install": packages})
        for name in ("python", "uv"):
            (home / "bin" / name).write_text(_PIP.format(log=log, report=report))
            (home / "bin" / name).chmod(0o755)

    monkeypatch.setattr(venv, "create", create)
    bootstrap.install(home)
    ran = log.read_text().splitlines()
    clone = Path(obsfs.__file__).parents[1]
    assert made == [True]
    assert ran[-1] == f"-m pip install -e {clone}[demo]"
    assert [line for line in ran if "--torch-backend=cpu" in line] == (
        [f"pip install --python {home}/bin/python --torch-backend=cpu torch>=2.4"] if uses_uv else []
    )
