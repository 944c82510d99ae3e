"""No key leaves the memory of the processes that need it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from obsfs import OBSFileSystem, ObsfsError
from tests.conftest import MIB, Mounter, Store, random_bytes, status, write_model
from tests.faulty import FaultyServer


@pytest.mark.slow
def test_a_planted_key_is_found_nowhere(
    bucket: Store, mount: Mounter, obsfs: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = bucket.server.secret_key
    token = "planted-session-token-0123456789"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("OBSFS_ACCESS_KEY_ID", bucket.server.access_key)
    monkeypatch.setenv("OBSFS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("OBSFS_DEBUG", "1")
    bucket.put("file.bin", random_bytes(3 * MIB))
    said = []
    path = mount(bucket, log_level="debug")
    (path / "file.bin").read_bytes()
    said.append(str(status(path)))
    arguments = Path(f"/proc/{status(path)['pid']}/cmdline").read_bytes()
    limits = Path(f"/proc/{status(path)['pid']}/limits").read_text()
    assert "Max core file size        0                    0" in limits
    model = write_model(tmp_path / "model", mib=1)
    for words in (
        ("push", model, f"{bucket}/m@v1"),
        ("pull", f"{bucket}/m@v1", tmp_path / "pulled"),
        ("models", bucket, "--json"),
        ("status", "--json"),
        ("cache", "info", "--json"),
        ("mount", f"{bucket}/nothing-here", tmp_path / "none"),
        ("models", "obs://no-such-bucket-here"),
        ("verify", f"{bucket}/m@v1"),
    ):
        done = obsfs(*words)
        said += [done.out, done.err]
    wrong = obsfs("models", bucket, OBSFS_SESSION_TOKEN=token, OBSFS_SECRET_ACCESS_KEY=secret[::-1])
    assert wrong.code == 2
    said += [wrong.out, wrong.err]
    for name in (secret, secret[::-1], token):
        assert not [text for text in said if name in text]
        assert name.encode() not in arguments
        for file in tmp_path.rglob("*"):
            if file.is_file() and not file.is_relative_to(path) and "server" not in file.parts:
                assert name.encode() not in file.read_bytes(), file


def test_keys_are_no_settings(tmp_path: Path) -> None:
    for name in ("secret_access_key", "access_key_id", "session_token", "password"):
        done = subprocess.run(
            [sys.executable, "-m", "obsfs", "mount", "obs://b", str(tmp_path), f"--{name.replace('_', '-')}", "x"],
            capture_output=True, text=True, env=os.environ, check=False, timeout=30,
        )  # fmt: skip
        assert done.returncode == 2
        assert "No such option" in done.stderr


def test_a_certificate_is_verified_unless_somebody_says_insecure(
    bucket: Store, mount: Mounter, certificate: Path, obsfs: Callable[..., Any], tmp_path: Path
) -> None:
    bucket.put("file.txt", b"text")
    with FaultyServer(bucket.server.port, certificate=certificate) as server:
        refused = obsfs("models", bucket, "--endpoint-url", server.endpoint)
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert "certificate" in refused.err.lower()
        with pytest.raises(ObsfsError, match=r"(?i)certificate"):
            mount(bucket, endpoint_url=server.endpoint)
        assert (mount(bucket, endpoint_url=server.endpoint, insecure_tls=True) / "file.txt").read_bytes() == b"text"
        trusted = {"AWS_CA_BUNDLE": str(tmp_path / "cert.pem")}
        assert obsfs("models", bucket, "--endpoint-url", server.endpoint, **trusted).code == 0
        fs = OBSFileSystem(endpoint_url=server.endpoint, insecure_tls=True, cache_dir=tmp_path / "c")
        assert fs.cat(f"{bucket}/file.txt") == b"text"
