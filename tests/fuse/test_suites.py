"""What suites of others say, as far as they can judge a mount that is read-only: fio, with its own checksums."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import Mounter, Store, status

_BLOCK = ["--bs=64k", "--size=24m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]


def fio(*options: object) -> None:
    done = subprocess.run(
        ["fio", *map(str, options), *_BLOCK], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["psync", "mmap", "libaio", "io_uring", "splice"])
@pytest.mark.parametrize("order", ["read", "randread"])
def test_fio_verifies_what_it_wrote(bucket: Store, mount: Mounter, tmp_path: Path, how: str, order: str) -> None:
    written = tmp_path / "written"
    fio("--name=write", "--rw=write", "--do_verify=0", f"--filename={written}")
    bucket.put("file.bin", written.read_bytes())
    path = mount(bucket)
    jobs = ["--thread", "--numjobs=4", "--group_reporting"]
    fio("--name=read", f"--rw={order}", f"--ioengine={how}", f"--filename={path / 'file.bin'}", "--readonly", *jobs)
    assert status(path)["bytes_fetched"] == written.stat().st_size
