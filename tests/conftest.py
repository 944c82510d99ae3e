"""Fixtures: a real S3 server, buckets, and real mounts of them, all taken down whatever happens."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

from obsfs import mountinfo
from obsfs.demo.server import EmbeddedServer, find_program
from obsfs.fuse.kernel import channel
from obsfs.service import mounts
from obsfs.settings import Settings
from tests.nursery import Nursery

# Where an image of containers says that no bytecode is to be written, each of the thousands of processes of the tests
# would compile all of obsfs again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# torch's models here are tiny, and the tests run in as many processes as there are processors: its threads would only
# wait for each other, and they do it spinning.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some terminals export it, and what a command prints must not depend on them.
os.environ.pop("COLUMNS", None)
sys.dont_write_bytecode = False

# The gates judge a change by the same examples each time; to look for new ones: pytest --hypothesis-profile=explore
hypothesis.settings.register_profile("gates", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", max_examples=3000, deadline=None)
hypothesis.settings.load_profile("gates")

MIB = 1 << 20
_NUMBERS = itertools.count(1)


@contextmanager
def small_disk(path: Path, options: str) -> Iterator[Path]:
    """A disk of its own on `path`, made and bounded by mount(8)'s `options` of tmpfs (``size=12m``)."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed * 1_000_003 + size).randbytes(size)


def write_model(directory: Path, *, mib: int = 9, shards: int = 2, seed: int = 1) -> Path:
    """A model of `shards` real safetensors files of `mib` MiB each, with random weights, and small files."""
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(1, shards + 1):
        names = {
            f"layers.{shard}.{i}": {"dtype": "BF16", "shape": [MIB // 2], "data_offsets": [i * MIB, (i + 1) * MIB]}
            for i in range(mib)
        }
        header = json.dumps({"__metadata__": {"format": "pt"}, **names}).encode()
        path = directory / f"model-{shard:05}-of-{shards:05}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + random_bytes(mib * MIB, seed * 100 + shard))
    (directory / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], "seed": seed}))
    (directory / "empty.txt").write_bytes(b"")
    (directory / "sub").mkdir(exist_ok=True)
    (directory / "sub" / "notes.md").write_text("notes")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """All files under a directory but obsfs's own, by path."""
    files = (path for path in directory.rglob("*") if path.is_file() and ".obsfs" not in path.parts)
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


_STRESS = {"test_chaos.py", "test_fuzz.py", "test_s3fs_suite.py", "test_scale.py", "test_suites.py"}


def _layer(item: pytest.Item) -> str:
    """The layer of a test, by what it needs; see CONTRIBUTING.md."""
    directory, *_ = item.path.relative_to(Path(__file__).parent).parts
    fixtures = set(getattr(item, "fixturenames", ()))
    if item.path.name in _STRESS:
        return "stress"
    if directory == "trainer":
        return "train"
    if directory == "library":
        return "library"
    if directory == "fuse" or fixtures & {"mount", "limited"}:
        return "mount"
    if fixtures & {"server", "obsfs"} or item.get_closest_marker("slow"):
        return "store"
    return "unit"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # They import torch, which takes longer than all tests of some layers.
    other_layers = {"unit", "store", "mount", "library"}
    return (collection_path.name == "trainer" and config.getoption("markexpr") in other_layers) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(_layer(item))
    # Fast ones first: a mistake shows early. The longest of all comes before the other slow ones, not to be the last.
    items.sort(key=lambda item: (item.get_closest_marker("slow") is not None, "s3fs_suite" not in item.nodeid))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the credentials, settings, cache or state of whoever runs it."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "OBSFS_", "HUAWEICLOUD_")):
            monkeypatch.delenv(name)
    # A command that runs in this process changes these for its children, and would for those of the tests after it.
    for name in ("PYTHONSAFEPATH", "PYTHONPATH"):
        value = os.environ.get(name)
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("CACHE", "STATE", "CONFIG"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    if "server" in request.fixturenames:
        for name, value in request.getfixturevalue("server").environment.items():
            monkeypatch.setenv(name, value)


@dataclass
class Store:
    """A bucket of a real server."""

    server: EmbeddedServer
    name: str
    client: Any

    def __str__(self) -> str:
        return f"obs://{self.name}"

    def put(self, key: str, data: bytes) -> str:
        etag: str = self.client.put_object(Bucket=self.name, Key=key, Body=data)["ETag"]
        return etag


@contextmanager
def rclone_server(home: Path, *options: str) -> Iterator[tuple[str, Path]]:
    """``rclone serve s3`` with the keys ``key`` and ``secret``: its endpoint, and the directory of its buckets."""
    root, address = home / "rclone", home / "address"
    (root / "models").mkdir(parents=True)
    with address.open("wb") as output:
        command = [find_program("rclone", "test"), "serve", "s3", "--config", "/dev/null", "--addr", "127.0.0.1:0"]
        command += ["--auth-key", "key,secret", *options, str(root)]
        process = subprocess.Popen(command, stderr=output, stdout=output)
    try:
        wait_for(lambda: process.poll() is not None or "http://" in address.read_text())
        yield "http://" + address.read_text().split("http://")[1].split("/")[0], root
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def bucket(server: EmbeddedServer) -> Store:
    store = Store(server, f"test-{os.getpid()}-{next(_NUMBERS)}", server.client())
    store.client.create_bucket(Bucket=store.name)
    return store


@pytest.fixture(params=["native", "libfuse"])
def fuse_backend(request: pytest.FixtureRequest) -> str:
    """Both ways to serve a mount."""
    return str(request.param)


class Mounter:
    """Mounts by the same way as the command, and takes all of it down."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._mounted: list[tuple[Path, subprocess.Popen[bytes]]] = []

    def __call__(self, source: object, *, at: Path | None = None, **settings: Any) -> Path:
        path = at or self._home / f"mnt{len(self._mounted)}"
        if at is None and not os.path.lexists(path):  # a look at a dead mount would wait for its server
            path.mkdir()
        settings.setdefault("cache_dir", self._home / "blocks")
        process = mounts.start(str(source), path, Settings.load(**settings), lifeline=False)
        self._mounted.append((path, process))
        return path

    def process(self, path: Path) -> subprocess.Popen[bytes]:
        return next(process for mounted, process in reversed(self._mounted) if mounted == path)

    def kill(self, path: Path, *, wait: bool = True) -> None:
        """The server and its supervisor, so that neither can start the other. Waits for the processes that write for
        the server, too."""
        shown = mounts.status(path)
        server = psutil.Process(shown["pid"])
        pids = [server.pid, *(child.pid for child in server.children())]
        server.suspend()
        os.kill(shown["supervisor"], signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):
            server.kill()
        if self.process(path).pid == shown["supervisor"]:
            self.process(path).wait(10)
        if wait:
            wait_for(lambda: not any(map(is_running, pids)))

    def close(self) -> None:
        for path, process in self._mounted:
            with suppress(Exception):
                while mountinfo.mounted_at(path) is not None:
                    channel.unmount(path, lazy=True)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def is_running(pid: int) -> bool:
    """Whether there is such a process, and a thread of it that has not ended: then its descriptors are closed."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return any((task / "stat").read_text().rpartition(")")[2].split()[0] != "Z" for task in tasks)
    except OSError:
        return Path(f"/proc/{pid}").exists()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mounter]:
    mounter = Mounter(tmp_path)
    yield mounter
    mounter.close()


def status(path: Path) -> dict[str, Any]:
    return mounts.status(path)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate that nobody has signed, with its key, in one file."""
    key, cert, both = (tmp_path / name for name in ("key.pem", "cert.pem", "both.pem"))
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    both.write_bytes(key.read_bytes() + cert.read_bytes())
    return both


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    running = Nursery()
    yield running
    running.close()


def run_command(arguments: list[str], environment: dict[str, str], timeout: float) -> Result:
    """``python -m obsfs``, started as any program."""
    command = [sys.executable, "-m", "obsfs", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def obsfs(nursery: Nursery) -> Callable[..., Result]:
    """Run the command as a user does, in a process of its own."""

    def run(*arguments: object, timeout: float = 60, **changed: str) -> Result:
        words, environment = list(map(str, arguments)), {**os.environ, **changed}
        if not nursery.can_start(environment):
            return run_command(words, environment, timeout)
        code, *written = nursery.run(words, environment, timeout)
        return Result(code, *(io.TextIOWrapper(io.BytesIO(text)).read() for text in written))

    return run


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    yield
    home = tmp_path_factory.getbasetemp()
    found = {entry.mountpoint for entry in mountinfo.mounts() if entry.fs_type == mountinfo.FS_TYPE}
    left = {path for path in found if path.is_relative_to(home)}
    for path in left:
        channel.unmount(path, lazy=True)
    assert not left, f"tests left mounts behind: {left}"


def stop_group(process: subprocess.Popen[Any]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
