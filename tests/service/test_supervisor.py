"""The supervisor of a mount: killed, told to end while nobody serves, and with another program in place of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import obsfs as package
from obsfs import mountinfo
from obsfs.service import mounts, program_copy, state
from obsfs.settings import Settings
from tests.conftest import MIB, Mounter, Result, Store, is_running, random_bytes, status, wait_for
from tests.service.test_formats import follow, supervised

Run = Callable[..., Result]


def test_it_is_small() -> None:
    code = (
        "import sys, obsfs.service.supervisor; print(any(m in sys.modules for m in ('botocore', 'msgspec', 'click')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def kill_supervisor(path: Path) -> dict[str, Any]:
    """Kill it, and return the status with the next one."""
    before = status(path)
    os.kill(before["supervisor"], signal.SIGKILL)
    wait_for(lambda: status(path)["supervisor"] not in (None, before["supervisor"]), 60)
    return status(path)


def test_another_one_takes_the_place_of_one_that_is_killed(bucket: Store, mount: Mounter, obsfs: Run) -> None:
    data = random_bytes(9 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket, read_ahead=0)
    before = status(path)
    with (path / "file.bin").open("rb", buffering=0) as file:
        assert file.read(100) == data[:100]
        for _ in range(2):
            shown = kill_supervisor(path)
            assert (shown["pid"], shown["restarts"], shown["can_be_followed"]) == (before["pid"], 0, True)
            assert os.pread(file.fileno(), 100, 5 * MIB) == data[5 * MIB : 5 * MIB + 100]
        follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
        assert os.pread(file.fileno(), 100, 8 * MIB) == data[8 * MIB : 8 * MIB + 100]
        assert obsfs("upgrade", path).code == 0
        assert file.read() == data[100:]
    shown = status(path)
    assert (shown["restarts"], shown["upgrades"]) == (1, 1)
    kept = [str(fd.readlink()) for fd in Path(f"/proc/{shown['supervisor']}/fd").iterdir()]
    assert not [name for name in kept if "obsfs-said" in name], "what a server says is kept only until it serves"
    logged = state.file_path(path, "log").read_text()
    assert logged.count(f"the supervisor (pid {before['supervisor']}) was killed") == 1
    assert f"another supervisor is there (pid {shown['supervisor']})" in logged
    assert obsfs("umount", path).code == 0
    wait_for(lambda: not is_running(shown["supervisor"]))


def test_a_server_of_libfuse_goes_on_without_it(bucket: Store, mount: Mounter, obsfs: Run) -> None:
    bucket.put("file.bin", b"data")
    path = mount(bucket, fuse_backend="libfuse")
    before = status(path)
    with (path / "file.bin").open("rb", buffering=0) as file:
        os.kill(before["supervisor"], signal.SIGKILL)
        wait_for(lambda: status(path)["supervisor"] is None)
        assert file.read() == b"data"
    assert status(path)["pid"] == before["pid"]
    assert os.listdir(path) == ["file.bin"]
    assert obsfs("umount", path).code == 0
    wait_for(lambda: not is_running(before["pid"]))


def test_a_server_of_libfuse_ends_with_it_when_a_program_has_made_the_mount(bucket: Store, tmp_path: Path) -> None:
    bucket.put("file.bin", b"data")
    (path := tmp_path / "mnt").mkdir()
    with package.mount(str(bucket), path, fuse_backend="libfuse", cache_dir=tmp_path / "blocks") as made:
        before = made.status()
        os.kill(made.pid, signal.SIGKILL)
        wait_for(lambda: mountinfo.mounted_at(path) is None and not is_running(before["pid"]))


@pytest.mark.parametrize("pause", [0.0, 0.1, 0.3])
def test_an_upgrade_that_is_asked_for_while_nobody_serves_comes_afterwards(
    bucket: Store, mount: Mounter, pause: float
) -> None:
    bucket.put("file.bin", b"data")
    path = mount(bucket)
    before = status(path)
    os.kill(before["pid"], signal.SIGKILL)
    time.sleep(pause)
    os.kill(before["supervisor"], signal.SIGHUP)
    wait_for(lambda: bool(status(path).get("upgrades")), 60)
    assert status(path)["pid"] != before["pid"]
    assert (path / "file.bin").read_bytes() == b"data"


@pytest.mark.parametrize("how", ["umount", "SIGTERM"])
def test_a_mount_ends_by_its_second_supervisor_too(bucket: Store, mount: Mounter, how: str) -> None:
    path = mount(bucket)
    shown = kill_supervisor(path)
    if how == "umount":
        mounts.unmount(path)
    else:
        os.kill(shown["supervisor"], signal.SIGTERM)
    wait_for(lambda: not is_running(shown["supervisor"]) and not is_running(shown["pid"]))
    assert mountinfo.mounted_at(path) is None


def test_a_direct_reader_keeps_its_file_under_another_supervisor(bucket: Store, mount: Mounter) -> None:
    data = random_bytes(6 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket)
    (path / "file.bin").read_bytes()
    wait_for(lambda: os.getxattr(path / "file.bin", "user.obsfs.served_by") == b"passthrough")
    with (path / "file.bin").open("rb", buffering=0) as file:
        shown = kill_supervisor(path)
        locks = [str(fd.readlink()) for fd in Path(f"/proc/{shown['supervisor']}/fd").iterdir()]
        assert sum(str(path.parent / "blocks") in lock for lock in locks) == 1
        follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
        assert file.read() == data
        assert os.getxattr(path / "file.bin", "user.obsfs.served_by") == b"passthrough"


def test_a_supervisor_that_is_stopped_holds_up_no_reader(bucket: Store, mount: Mounter) -> None:
    """It takes no more than some hundred messages then, and each open by passthrough is one, as is each close."""
    data = random_bytes(MIB)
    bucket.put("file.bin", data)
    path = mount(bucket)
    file = path / "file.bin"
    file.read_bytes()
    wait_for(lambda: os.getxattr(file, "user.obsfs.served_by") == b"passthrough")
    supervisor, server = (int(status(path)[name]) for name in ("supervisor", "pid"))
    descriptors = len(os.listdir(f"/proc/{server}/fd"))
    code = "import os, sys\nfor _ in range(400): os.close(os.open(sys.argv[1], os.O_RDONLY))"
    os.kill(supervisor, signal.SIGSTOP)
    try:
        reader = subprocess.Popen([sys.executable, "-c", code, file])
        assert reader.wait(20) == 0
        held = file.open("rb", buffering=0)
        # The last word about each file waits, and no more.
        assert len(os.listdir(f"/proc/{server}/fd")) <= descriptors + 4
    finally:
        os.kill(supervisor, signal.SIGCONT)
    with held:
        assert held.read(100) == data[:100]
        wait_for(lambda: any(".map" in str(fd.readlink()) for fd in Path(f"/proc/{supervisor}/fd").iterdir()))
        follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
        assert held.read() == data[100:]
        assert os.getxattr(file, "user.obsfs.served_by") == b"passthrough"


def test_the_mount_of_a_program_ends_with_its_supervisor(bucket: Store, tmp_path: Path) -> None:
    """Nobody would see the end of the program."""
    bucket.put("a", b"a")
    with mounts.mount(str(bucket), cache_dir=str(tmp_path / "blocks")) as mounted:
        shown = mounted.status()
        os.kill(shown["supervisor"], signal.SIGKILL)
        wait_for(lambda: not is_running(shown["pid"]), 60)
        assert mountinfo.mounted_at(mounted.path) is None
    assert not mounted.path.exists()


# another program in its place


class Installed:
    """A copy of the package, from which a mount is served, to be written over."""

    def __init__(self, tmp_path: Path, bucket: Store, path: Path, fault: str = "") -> None:
        self.place = tmp_path / "installed"
        shutil.copytree(Path(package.__file__).parent, self.place / "obsfs", ignore=shutil.ignore_patterns("*.pyc"))
        self.daemon = self.place / "obsfs" / "fuse" / "daemon.py"
        self.break_by(fault)
        settings = Settings.load(cache_dir=tmp_path / "blocks").to_json()
        time.sleep(0.02)  # a tick: what was written after the start of a process is not what it has loaded
        self.mount = supervised(["-m", "obsfs.fuse.supervisor"], bucket, path, settings, PYTHONPATH=str(self.place))

    def break_by(self, fault: str) -> None:
        self.daemon.write_text(self.daemon.read_text().replace("import logging\n", f"import logging\n{fault}\n", 1))


def keeps_a_copy(path: Path) -> bool:
    fds = Path(f"/proc/{status(path)['supervisor']}/fd").iterdir()
    return any("obsfs-program" in str(fd.readlink()) for fd in fds)


@pytest.mark.slow
def test_another_version_in_the_same_place_that_fails_costs_nothing(bucket: Store, tmp_path: Path) -> None:
    data = random_bytes(2 * MIB)
    bucket.put("file.bin", data)
    path = tmp_path / "mnt"
    path.mkdir()
    installed = Installed(tmp_path, bucket, path)
    with installed.mount, (path / "file.bin").open("rb", buffering=0) as file:
        assert file.read(10) == data[:10]
        wait_for(lambda: keeps_a_copy(path))
        installed.break_by("raise ImportError('half installed')")
        for start in (10, 20):  # the one that runs from the copy has the same successor
            follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
            assert file.read(10) == data[start : start + 10]
        assert "did not start: ImportError: half installed" in state.file_path(path, "log").read_text()
        (installed.place / "obsfs" / "fuse" / "supervisor.py").write_text("raise ImportError")
        kill_supervisor(path)
        follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
        assert file.read(10) == data[30:40]
        shutil.copy(Path(package.__file__).parent / "fuse" / "daemon.py", installed.daemon)
        follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
        assert file.read(10) == data[40:50]


def test_a_copy_is_whole_and_sealed_and_of_nothing_that_was_changed(tmp_path: Path) -> None:
    (tmp_path / "p" / "sub").mkdir(parents=True)
    (tmp_path / "p" / "__init__.py").write_text("")
    (tmp_path / "p" / "sub" / "a.py").write_text("print('ran')")
    kept: list[int] = []
    for _ in program_copy.copy_in_steps(program_copy.process_start(), kept.append, tmp_path / "p"):
        pass
    assert kept == []  # it was written after this process had started
    for _ in program_copy.copy_in_steps(time.time() + 1, kept.append, tmp_path / "p"):
        pass
    (fd,) = kept
    with zipfile.ZipFile(f"/proc/self/fd/{fd}") as copy:
        assert sorted(copy.namelist()) == ["p/__init__.py", "p/sub/a.py"]
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)


# told to end while nobody serves


@pytest.mark.parametrize(
    ("fault", "how"), [("sys.exit(3)", "SIGTERM"), ("time.sleep(600)", "SIGTERM"), ("time.sleep(600)", "umount")]
)
def test_it_ends_at_once_while_no_server_can_follow(bucket: Store, tmp_path: Path, fault: str, how: str) -> None:
    path, broken = tmp_path / "mnt", tmp_path / "broken"
    path.mkdir()
    fault = f"import os, sys, time\nos.path.exists({str(broken)!r}) and {fault}"
    installed = Installed(tmp_path, bucket, path, fault)
    with installed.mount:
        shown = status(path)
        broken.touch()
        os.kill(shown["pid"], signal.SIGKILL)
        wait_for(lambda: not is_running(shown["pid"]))
        if how == "SIGTERM":
            os.kill(shown["supervisor"], signal.SIGTERM)
        else:
            mounts.unmount(path)
        wait_for(lambda: not is_running(shown["supervisor"]), 10)
        assert mountinfo.mounted_at(path) is None


def test_killed_while_a_successor_starts(bucket: Store, mount: Mounter) -> None:
    """It has all that it takes to serve, and appoints another supervisor."""
    data = random_bytes(MIB)
    bucket.put("file", data)
    path = mount(bucket)
    with (path / "file").open("rb", buffering=0) as file:
        before = status(path)
        supervisor = psutil.Process(before["supervisor"])
        os.kill(before["pid"], signal.SIGKILL)
        started: list[psutil.Process] = []

        def has_begun() -> bool:
            """Whether the successor has its journal open, which it has before it serves."""
            for child in supervisor.children():
                with suppress(OSError, psutil.Error):
                    fds = Path(f"/proc/{child.pid}/fd").iterdir()
                    if child.pid != before["pid"] and any(fd.readlink().suffix == ".journal" for fd in fds):
                        child.suspend()
                        started[:] = [child]
            return bool(started)

        wait_for(has_begun)
        supervisor.kill()
        wait_for(lambda: not is_running(supervisor.pid))
        started[0].resume()
        assert file.read() == data
        wait_for(lambda: status(path)["can_be_followed"])
        after = status(path)
        assert after["pid"] == started[0].pid
        assert after["supervisor"] not in (before["supervisor"], os.getpid())
        os.kill(after["pid"], signal.SIGKILL)
        assert (path / "file").read_bytes() == data
