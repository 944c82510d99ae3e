"""``python3 -m tests [PYTEST ARGUMENTS]``: set up, then run ruff, import-linter, mypy and pytest.

All tests run in as many processes as the machine has threads, at most four. With arguments, pytest runs alone, in one.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests import venv

_GATES = (
    ("ruff", "check", "."),
    ("ruff", "format", "--check", "."),
    ("lint-imports", "--no-cache"),
    ("mypy",),
)
_ALL_TESTS = ("--numprocesses", "logical", "--maxprocesses", "4", "--dist", "worksteal")


def main() -> int:
    """The exit status of the first gate that failed, else that of pytest."""
    venv.ensure_system()
    venv.ensure()
    environment = {**os.environ, "PATH": os.pathsep.join([str(venv.HOME / "bin"), os.environ.get("PATH", "")])}
    gates = [("pytest", *sys.argv[1:])] if sys.argv[1:] else [*_GATES, ("pytest", *_ALL_TESTS)]
    for gate in gates:
        print(f"== {' '.join(gate)}", flush=True)
        command = [str(venv.HOME / "bin" / gate[0]), *gate[1:]]
        status = subprocess.run(command, cwd=venv.ROOT, env=environment, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
