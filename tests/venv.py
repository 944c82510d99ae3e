"""``python3 -m tests.venv COMMAND ...`` runs a command in ``.venv``, which it makes first if need be.

Needs only Python's standard library. torch comes as its CPU build where there is no NVIDIA GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv"
PYTHON = HOME / "bin" / "python"
S3FS_SOURCE = HOME / "s3fs"
_CONSTRAINTS = ROOT / "tests" / "constraints.txt"
_TORCH = "torch==2.13.0"


def ensure() -> None:
    """Make ``.venv`` with obsfs (editable) and everything that its tests, demo and benchmarks need."""
    wanted = hashlib.sha256(
        b"\0".join(path.read_bytes() for path in (ROOT / "pyproject.toml", _CONSTRAINTS, Path(__file__)))
    )
    stamp = HOME / "obsfs-stamp"
    if stamp.exists() and stamp.read_text() == wanted.hexdigest():
        return
    print(f"setting up {HOME} (once; some minutes)", file=sys.stderr, flush=True)
    if not PYTHON.exists():
        venv.create(HOME, with_pip=True)
        _pip("install", "-q", "-U", "pip")
    _install_torch()
    ours = ("-e", f"{ROOT}[test,benchmarks]")
    try:
        _pip("install", "-q", "-c", str(_CONSTRAINTS), *ours)
    except subprocess.CalledProcessError:
        # Another Python or processor, or an index that has dropped one of them.
        print(f"some versions of {_CONSTRAINTS} are missing: installing the newest", file=sys.stderr, flush=True)
        _pip("install", "-q", _TORCH, *ours)
    _fetch_s3fs_tests()
    stamp.write_text(wanted.hexdigest())


def _pip(*arguments: str) -> None:
    subprocess.run([PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def _fetch_s3fs_tests() -> None:
    """s3fs's own tests, which obsfs runs on its file system, are in its source distribution only."""
    show = "from importlib.metadata import version; print(version('s3fs'))"
    version = subprocess.run([PYTHON, "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    _pip("download", "-q", "--no-deps", "--no-binary", "s3fs", "-d", str(S3FS_SOURCE), f"s3fs=={version}")


def _install_torch() -> None:
    """pip takes a CUDA build from PyPI; uv knows where the CPU builds are."""
    report = subprocess.run(
        [PYTHON, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", _TORCH],
        capture_output=True,
        text=True,
        check=False,
    )
    found = json.loads(report.stdout)["install"][0]["metadata"] if report.returncode == 0 else {}
    needs_cuda = any("nvidia" in line or "cuda" in line for line in found.get("requires_dist", ()))
    if found and (Path("/dev/nvidiactl").exists() or not needs_cuda or "+cpu" in found["version"]):
        _pip("install", "-q", _TORCH)
        return
    _pip("install", "-q", "uv")
    uv = [str(HOME / "bin" / "uv"), "pip", "install", "-q", "--python", str(PYTHON), "--torch-backend=cpu", _TORCH]
    subprocess.run(uv, check=True)


def ensure_system() -> None:
    """libfuse for its FUSE backend, the kernel's header for the wire format, and fio: installed where we may."""
    present = (*map(shutil.which, ("fusermount3", "gcc", "fio")), Path("/usr/include/linux/fuse.h").exists())
    if all(present):
        return
    packages = ["fio", "fuse3", "gcc", "libc6-dev", "linux-libc-dev"]
    if os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "-qq", "update"], check=False)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        command = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", *packages]
        if subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0:
            return
    sys.exit(f"tests: missing system packages: {' '.join(packages)} (install them, or run as root on Debian or Ubuntu)")


def main() -> int:
    """Run the command of ``sys.argv`` in the environment."""
    ensure()
    if not sys.argv[1:]:
        return 0
    path = os.pathsep.join([str(HOME / "bin"), os.environ.get("PATH", "")])
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, "PATH": path, "VIRTUAL_ENV": str(HOME)})


if __name__ == "__main__":
    sys.exit(main())
