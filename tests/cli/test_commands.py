"""The command line as a user meets it: what works, and that every mistake is one line, status 2, and no remains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import obsfs as package
from obsfs import cli, mountinfo
from obsfs.errors import UsageError
from obsfs.fuse.kernel import channel, server  # noqa: F401
from obsfs.service import mounts
from obsfs.service.serving import serve
from obsfs.service.stop import Stop
from obsfs.settings import Settings
from obsfs.store.address import parse_address
from obsfs.store.s3.store import S3Store
from tests.conftest import MIB, Mounter, Result, Store, random_bytes, wait_for
from tests.faulty import FaultyLink

Run = Callable[..., Result]


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def daemons(mountpoint: Path) -> list[int]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"obsfs.fuse.daemon" in arguments and os.fsencode(mountpoint) in arguments:
            found.append(int(directory.name))
    return found


def fails(result: Result, mountpoint: Path, *words: str) -> None:
    assert result.code == 2, result
    assert result.out == ""
    assert result.err.startswith("obsfs: ")
    assert result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err
    assert mountinfo.mounted_at(mountpoint) is None
    wait_for(lambda: not daemons(mountpoint))


def test_mount_status_umount(bucket: Store, obsfs: Run, mountpoint: Path, fuse_backend: str, tmp_path: Path) -> None:
    data = random_bytes(3 * MIB)
    bucket.put("file.bin", data)
    mounted = obsfs(
        "mount",
        bucket,
        mountpoint,
        "--fuse-backend",
        fuse_backend,
        "--cache-dir",
        tmp_path / "c",
        "--cache-size",
        "1GiB",
    )
    assert (mounted.code, mounted.out, mounted.err) == (0, "", "")
    assert (mountpoint / "file.bin").read_bytes() == data
    shown = obsfs("status", mountpoint, "--json").json
    assert shown["mountpoint"] == str(mountpoint)
    assert shown["source"] == str(bucket)
    assert shown["fuse_backend"] == fuse_backend
    assert shown["engine"] == {"libfuse": "fusepy"}.get(fuse_backend, fuse_backend), "the old key, for one version"
    assert shown["pid"] in daemons(mountpoint)
    assert shown["bytes_fetched"] == shown["bytes_read"] == len(data)
    assert shown["cache_bytes"] == len(data)
    assert shown["cache_limit"] == 1 << 30
    assert (shown["requests_in_flight"], shown["retries"], shown["errors"]) == (0, 0, 0)
    everything = obsfs("status", "--json").json
    assert str(mountpoint) in [entry["mountpoint"] for entry in everything]
    text = obsfs("status", mountpoint)
    assert text.code == 0
    assert str(bucket) in text.out
    again = obsfs("mount", bucket, mountpoint)
    assert again.code == 2
    assert "already mounted" in again.err
    assert obsfs("umount", mountpoint).code == 0
    assert mountinfo.mounted_at(mountpoint) is None
    assert daemons(mountpoint) == []
    assert os.listdir(mountpoint) == []


def test_s3_is_another_name(bucket: Store, obsfs: Run, mountpoint: Path) -> None:
    bucket.put("a", b"a")
    assert obsfs("mount", f"s3://{bucket.name}", mountpoint).code == 0
    assert os.listdir(mountpoint) == ["a"]
    assert obsfs("umount", mountpoint).code == 0


def test_mistakes_about_the_bucket(bucket: Store, obsfs: Run, mountpoint: Path) -> None:
    fails(obsfs("mount", "models", mountpoint), mountpoint, "models", "did you mean obs://models?")
    fails(obsfs("mount", "obs://no-such-bucket-here", mountpoint), mountpoint, "no-such-bucket-here")
    fails(obsfs("mount", f"{bucket}/no/such/prefix", mountpoint), mountpoint, "no/such/prefix")
    fails(obsfs("mount", bucket, mountpoint, "--endpoint-url", "http://127.0.0.1:1"), mountpoint, "cannot reach")
    wrong = obsfs("mount", bucket, mountpoint, AWS_SECRET_ACCESS_KEY="not-the-secret")
    fails(wrong, mountpoint, "denied", "credentials")
    assert "not-the-secret" not in wrong.err
    assert bucket.server.secret_key not in wrong.err


def test_no_credentials_at_all(obsfs: Run, mountpoint: Path) -> None:
    fails(obsfs("mount", "obs://any-bucket", mountpoint, "--region", "x"), mountpoint, "AWS_ACCESS_KEY_ID")
    fails(obsfs("mount", "obs://any-bucket", mountpoint), mountpoint, "--region cn-south-1")


def test_mistakes_about_the_mountpoint(bucket: Store, obsfs: Run, mountpoint: Path, tmp_path: Path) -> None:
    bucket.put("a", b"a")
    fails(obsfs("mount", bucket, tmp_path / "nowhere"), tmp_path / "nowhere", "does not exist", "mkdir -p")
    (tmp_path / "file").write_text("")
    fails(obsfs("mount", bucket, tmp_path / "file"), tmp_path / "file", "not a directory")
    (mountpoint / "something").write_text("")
    fails(obsfs("mount", bucket, mountpoint), mountpoint, "not empty")


def test_mistakes_about_settings(bucket: Store, obsfs: Run, mountpoint: Path, tmp_path: Path) -> None:
    fails(obsfs("mount", bucket, mountpoint, "--cache-size", "lots"), mountpoint, "--cache-size lots")
    fails(obsfs("mount", bucket, mountpoint, "--no-such-flag"), mountpoint, "--no-such-flag")
    fails(obsfs("mount", bucket), mountpoint, "MOUNTPOINT")
    (tmp_path / "file").write_text("")
    fails(obsfs("mount", bucket, mountpoint, "--cache-dir", tmp_path / "file"), mountpoint, "cache directory")
    fails(obsfs("mount", bucket, mountpoint, "--cache-dir", "/proc/obsfs"), mountpoint, "cache directory")


def test_no_device(bucket: Store, mountpoint: Path) -> None:
    """In a mount namespace of its own, /dev has no fuse."""
    bucket.put("a", b"a")
    hide = "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9"
    command = ["unshare", "-m", "sh", "-c", f"{hide} && exec {sys.executable} -m obsfs mount {bucket} {mountpoint}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    fails(Result(done.returncode, done.stdout, done.stderr), mountpoint, "/dev/fuse is missing")


def test_umount_and_status_of_what_is_not_mounted(obsfs: Run, mountpoint: Path) -> None:
    fails(obsfs("umount", mountpoint), mountpoint, "nothing is mounted")
    fails(obsfs("status", mountpoint), mountpoint, "no obsfs is mounted")
    assert obsfs("umount", "/proc").code == 2


def test_who_only_looks_does_not_keep_a_mount(bucket: Store, mount: Mounter) -> None:
    bucket.put("a", b"data")
    path = mount(bucket)
    file = (path / "a").open("rb")
    closing = threading.Timer(0.3, file.close)
    closing.start()
    mounts.unmount(path)
    closing.join()
    assert mountinfo.mounted_at(path) is None


def test_a_busy_mount(bucket: Store, obsfs: Run, mount: Mounter) -> None:
    bucket.put("a", b"data")
    path = mount(bucket)
    with (path / "a").open("rb") as file:
        busy = obsfs("umount", path)
        assert busy.code == 2
        assert "in use" in busy.err
        assert obsfs("umount", "--lazy", path).code == 0
        assert file.read() == b"data"
    assert mount.process(path).wait(20) == 0


def test_a_dead_mount_is_shown_and_cleared(bucket: Store, obsfs: Run, mount: Mounter) -> None:
    bucket.put("a", b"a")
    path = mount(bucket)
    mount.kill(path)
    (shown,) = [entry for entry in obsfs("status", "--json").json if entry["mountpoint"] == str(path)]
    assert shown["state"] == "dead"
    assert "dead" in obsfs("status").out
    assert obsfs("mount", bucket, path).code == 0
    assert (path / "a").read_bytes() == b"a"
    assert obsfs("umount", path).code == 0


def test_foreground(fuse_backend: str, bucket: Store, mountpoint: Path) -> None:
    bucket.put("a", b"a")
    command = [
        sys.executable,
        "-m",
        "obsfs",
        "mount",
        str(bucket),
        str(mountpoint),
        "--foreground",
        "--fuse-backend",
        fuse_backend,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert "Ctrl-C unmounts" in next(line for line in process.stderr if "is mounted" in line)
        assert os.listdir(mountpoint) == ["a"]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
    assert mountinfo.mounted_at(mountpoint) is None


_SIGNALLED_WHILE_IT_MOUNTS = """
import os, signal, sys
from obsfs.cli import main
from obsfs import mountinfo
from obsfs.fuse.kernel import channel

mount = channel.mount

def mount_and_be_told(*arguments, **more):
    fd = mount(*arguments, **more)
    os.kill(os.getpid(), int(sys.argv[1]))
    return fd

channel.mount = mount_and_be_told
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("number", "closed"), [(signal.SIGINT, ""), (signal.SIGTERM, "2>&-"), (signal.SIGHUP, "")])
def test_a_signal_while_it_mounts_unmounts(bucket: Store, mountpoint: Path, number: int, closed: str) -> None:
    """Between mount(2) and the first answer nobody serves the mount yet: it must not be left there, dead."""
    bucket.put("a", b"a")
    script = f'exec "$@" {closed}'
    python = [sys.executable, "-c", _SIGNALLED_WHILE_IT_MOUNTS, str(int(number))]
    command = ["sh", "-c", script, "sh", *python, "mount", str(bucket), str(mountpoint), "--foreground"]
    done = subprocess.run(command, capture_output=True, timeout=30, text=True, check=False)
    assert mountinfo.mounted_at(mountpoint) is None
    assert done.returncode == 0, done.stderr
    assert ("is mounted" in done.stderr) is not bool(closed)


def test_an_interrupt_before_it_mounts_is_one_also_when_nobody_reads_of_it(bucket: Store, mountpoint: Path) -> None:
    with FaultyLink(bucket.server.port) as link:
        link.stalled = True
        command = [sys.executable, "-m", "obsfs", "mount", str(bucket), str(mountpoint), "--foreground"]
        read, write = os.pipe()
        process = subprocess.Popen([*command, "--endpoint-url", link.endpoint], stderr=write)
        os.close(read)
        os.close(write)
        try:
            wait_for(lambda: link.held > 0)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 130
        finally:
            process.kill()
    assert mountinfo.mounted_at(mountpoint) is None


def test_no_secret_is_left_anywhere(bucket: Store, obsfs: Run, mountpoint: Path, tmp_path: Path) -> None:
    bucket.put("a", b"data")
    assert obsfs("mount", bucket, mountpoint, "--log-level", "debug").code == 0
    assert (mountpoint / "a").read_bytes() == b"data"
    (pid,) = daemons(mountpoint)
    secret = bucket.server.secret_key
    assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert secret not in obsfs("status", "--json").out
    assert obsfs("umount", mountpoint).code == 0
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_cache_info_and_clean(bucket: Store, obsfs: Run, mount: Mounter, tmp_path: Path) -> None:
    for name in ("models/one.bin", "models/two.bin", "other.bin"):
        bucket.put(name, random_bytes(2 * MIB))
    path = mount(bucket, cache_dir=tmp_path / "c")
    for name in ("models/one.bin", "models/two.bin", "other.bin"):
        (path / name).read_bytes()
    where = ("--cache-dir", tmp_path / "c")
    shown = obsfs("cache", "info", *where, "--json").json
    assert shown["cache_bytes"] == 6 * MIB
    assert {entry["key"] for entry in shown["objects"]} == {"models/one.bin", "models/two.bin", "other.bin"}
    assert f"obs://{bucket.name}/other.bin" in obsfs("cache", "info", *where).out.replace("\n", "")
    assert "0 B freed" in obsfs("cache", "clean", "--older-than", "7d", *where).out
    assert "2.0 MiB freed" in obsfs("cache", "clean", path / "models" / "one.bin", *where).out
    assert "2.0 MiB freed" in obsfs("cache", "clean", f"{bucket}/models", *where).out
    assert "2.0 MiB freed" in obsfs("cache", "clean", *where).out
    assert obsfs("cache", "clean", "--older-than", "soon", *where).code == 2
    assert obsfs("cache", "clean", "/nowhere/else", *where).code == 2
    assert obsfs("cache", "info", "--cache-dir", tmp_path / "none").code == 2
    assert (path / "other.bin").read_bytes() == random_bytes(2 * MIB)


def test_help_has_examples(obsfs: Run) -> None:
    for verb in ("mount", "umount", "status", "cache clean", "demo"):
        shown = obsfs(*verb.split(), "--help")
        assert shown.code == 0
        assert "xample" in shown.out
    assert obsfs("--version").out.split()[-1] == package.__version__
    assert obsfs("mout").code == 2


def test_the_python_face(bucket: Store, mountpoint: Path, tmp_path: Path) -> None:
    bucket.put("a", b"data")
    with package.mount(str(bucket), mountpoint, cache_dir=tmp_path / "c") as mount:
        assert (mount.path / "a").read_bytes() == b"data"
        assert mount.status()["supervisor"] == mount.pid
    assert mountinfo.mounted_at(mountpoint) is None
    with pytest.raises(package.ObsfsError, match="no-such-bucket"):
        package.mount("obs://no-such-bucket", mountpoint)


def test_a_python_mount_without_a_directory(bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bucket.put("a", b"data")
    with package.mount(str(bucket), cache_dir=tmp_path / "c") as mount:
        assert mount.path.parent == tmp_path
        assert (mount.path / "a").read_bytes() == b"data"
    for wrong in ("obs://no-such-bucket", "no address"):
        with pytest.raises(package.ObsfsError):
            package.mount(wrong)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("obsfs-mount-")]


@pytest.mark.parametrize("is_temporary", [False, True])
def test_a_python_mount_ends_with_its_process(bucket: Store, mountpoint: Path, is_temporary: bool) -> None:
    bucket.put("a", b"data")
    program = "import obsfs,sys,time; m=obsfs.mount(*sys.argv[1:]); print(m.path,flush=True); time.sleep(60)"
    arguments = [str(bucket), *([] if is_temporary else [str(mountpoint)])]
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    assert mountinfo.mounted_at(path) is not None
    process.kill()
    process.wait(10)
    wait_for(lambda: mountinfo.mounted_at(path) is None)
    wait_for(lambda: path.exists() != is_temporary)


def test_a_user_who_may_not_open_the_device(mountpoint: Path) -> None:
    mode = channel.DEVICE.stat().st_mode
    channel.DEVICE.chmod(0o600)
    try:
        pid = os.fork()
        if not pid:
            try:
                os.setgroups([])
                os.setuid(65534)
                channel.mount("obs://models", mountpoint, allow_other=False)
            except UsageError as error:
                print(error, file=sys.stderr)
                os._exit(3 if "chmod 666 /dev/fuse" in str(error) else 4)
            finally:
                os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    finally:
        channel.DEVICE.chmod(mode)


def test_a_user_without_rights(
    bucket: Store, mountpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may not mount(2) mounts by fusermount3, and is served by splice."""
    bucket.put("a", b"data")
    for path in (mountpoint, *mountpoint.parents):
        if path != Path("/"):
            path.chmod(path.stat().st_mode | 0o711)
    home = tmp_path / "home"
    home.mkdir()
    for path in (mountpoint, home):
        os.chown(path, 65534, 65534)
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    # Every distribution lets users open it; a bare machine may not.
    mode = channel.DEVICE.stat().st_mode
    channel.DEVICE.chmod(mode | 0o666)
    # Forked rather than started: the interpreter may lie where only root may look. So all is imported before.
    S3Store(parse_address(str(bucket)), Settings.load()).check()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            serve(str(bucket), mountpoint, Settings.load(cache_dir=home / "cache"), lambda: None, Stop())
        except BaseException as error:
            print(f"serving failed: {error!r}", file=sys.stderr)
        finally:
            os._exit(0)
    try:
        wait_for(lambda: mountinfo.mounted_at(mountpoint) is not None)
        program = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        read = subprocess.run([*program, "cat", mountpoint / "a"], capture_output=True, timeout=20, check=True)
        assert read.stdout == b"data"
        ask = "import os,sys; os.setgid(65534); os.setuid(65534)\nprint(os.getxattr(*sys.argv[1:]).decode())"
        command = [sys.executable, "-c", ask, str(mountpoint), "user.obsfs.status"]
        asked = subprocess.run(command, capture_output=True, timeout=20, check=True)
        shown = json.loads(asked.stdout)
        assert shown["passthrough"] is False
        assert shown["data_path"] == "splice"
        subprocess.run([*program, "fusermount3", "-u", mountpoint], timeout=20, check=True)
        assert os.waitpid(pid, 0)[0] == pid
        pid = 0
    finally:
        channel.DEVICE.chmod(mode)
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            subprocess.run(["umount", "-l", mountpoint], check=False)
    assert mountinfo.mounted_at(mountpoint) is None


def test_a_third_partys_verb_that_is_broken_does_not_break_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point = EntryPoint("theirs", "no_such_module:verb", "obsfs.commands")
    monkeypatch.setattr(cli, "_further", lambda: {"theirs": point})
    assert cli.main(["--help"]) == 0
    assert "mount" in capsys.readouterr().out
    assert cli.main(["theirs", "--some", "words"]) == 2
    error = capsys.readouterr().err
    assert "no_such_module" in error and error.count("\n") == 1
