"""s3fs's own tests, on OBSFileSystem: nothing fails that s3fs passes, but what is named here with its reason.

They need a mock (moto): what they ask of a server, such as bucket policies, SeaweedFS does not have.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests import venv

_ANOTHER_WAY = {
    "test_raise_exception_when_file_has_changed_during_reading[False]": "what the cache has of the old version is read",
    "test_raise_exception_when_file_has_changed_during_reading[True]": "what the cache has of the old version is read",
}
"""Tests of s3fs that cannot pass, and what obsfs promises instead."""
_NOT_RUN = {
    "test_list_versions_many": "writes 1,200 objects to the mock, which takes half of the time; s3fs's own listing",
    "test_s3_big_ls": "writes 1,200 objects to the mock; s3fs's own listing",
}
_ALSO_WITH_S3FS = {
    "test_async_close": "asks for Amazon's own endpoint",
    "test_invalidate_cache": "a coroutine, which needs a plugin of pytest",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_fails_that_s3fs_passes(tmp_path: Path) -> None:
    sources = list(venv.S3FS_SOURCE.glob("s3fs-*.tar.gz"))
    assert len(sources) == 1, (
        f"{venv.S3FS_SOURCE} has no source of s3fs: remove .venv/obsfs-stamp and run the tests again"
    )
    with tarfile.open(sources[0]) as archive:
        names = [name for name in archive.getnames() if name.endswith("/tests/test_s3fs.py")]
        suite = archive.extractfile(names[0])
        assert suite is not None
        (tmp_path / "test_s3fs.py").write_bytes(suite.read())
    report = tmp_path / "report.xml"
    left_out = [f"--deselect=test_s3fs.py::{name}" for name in _NOT_RUN]
    plugins = ["-p", "tests.s3fs_plugin", "-p", "no:cacheprovider", "-o", "timeout=120"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *left_out, f"--junitxml={report}", "test_s3fs.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(venv.ROOT)},
    )
    assert report.exists(), done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {case.get("name", "") for case in cases if {child.tag for child in case} & {"failure", "error"}}
    assert len(cases) > 200
    assert failed - {*_ANOTHER_WAY, *_ALSO_WITH_S3FS} == set(), done.stdout[-20_000:]
    assert {*_ANOTHER_WAY} <= failed, "a test passes that is named as one which cannot: remove its name"
