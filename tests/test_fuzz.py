"""Some seconds of fuzzing for each target of :mod:`tests.fuzz`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_SECONDS = int(os.environ.get("OBSFS_TEST_FUZZ", "5"))


@pytest.mark.slow
@pytest.mark.timeout(2 * _SECONDS + 120)
@pytest.mark.parametrize("target", ["kernel", "cache", "text", "formats"])
def test_hostile_input_is_refused(target: str, tmp_path: Path) -> None:
    # No limit of memory: libFuzzer counts what the process that started it had at most, which is pytest's.
    options = [f"-max_total_time={_SECONDS}", "-seed=1", "-rss_limit_mb=0", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", target, *options],
        capture_output=True,
        text=True,
        timeout=2 * _SECONDS + 100,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs, done.stderr[-1000:]
    assert int(runs[1]) > 100
