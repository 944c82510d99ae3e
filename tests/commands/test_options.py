"""Settings as mount(8) gives them, and verbs that are mistyped."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from obsfs.commands import main
from obsfs.commands.options import parse_mount_options
from obsfs.errors import UsageError
from obsfs.fuse import mounts
from obsfs.fuse.kernel import channel
from tests.conftest import Result, Store


def test_settings_among_the_options_of_mount() -> None:
    text = "ro,dev,suid,_netdev,nofail,x-systemd.automount,region=cn-south-1,cache-dir=/ssd,allow_other,no_passthrough"
    assert parse_mount_options(text) == {
        "region": "cn-south-1",
        "cache_dir": "/ssd",
        "allow_other": True,
        "passthrough": False,
    }


def test_an_option_that_takes_several_values_has_them_all() -> None:
    assert parse_mount_options("endpoint_url=http://a,endpoint_url=http://b")["endpoint_url"] == [
        "http://a",
        "http://b",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cache_dirr=/ssd", "-o cache_dirr: there is no such option: did you mean 'cache_dir'?"),
        ("noexec", "-o noexec: there is no such option"),
        ("region", "-o region needs a value: write region=REGION"),
        ("no_region", "-o no_region needs a value"),
        ("sync=1,_netdevv", "-o sync: there is no such option"),
    ],
)
def test_an_option_that_has_no_effect_is_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_mount_options(text)
    assert str(caught.value).startswith(said)


def test_called_as_mount_calls_it(bucket: Store, obsfs: Callable[..., Result], tmp_path: Path) -> None:
    bucket.put("a.txt", b"a")
    directory = tmp_path / "mnt"
    directory.mkdir()
    done = obsfs(bucket, directory, "-o", f"ro,dev,suid,cache_dir={tmp_path / 'blocks'}", "-o", "metadata_ttl=5s")
    try:
        assert done.code == 0, done
        assert (directory / "a.txt").read_bytes() == b"a"
        assert (tmp_path / "blocks").is_dir()
    finally:
        channel.unmount(directory, lazy=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["moutn"], "No such command 'moutn': did you mean 'mount'?"),
        (["pul"], "No such command 'pul': did you mean 'pull'?"),
        (["trian"], "No such command 'trian': did you mean 'train'?"),
        (["cache", "inof"], "No such command 'inof': did you mean 'info'?"),
        (["models", "shwo", "x"], "No such command 'shwo': did you mean 'show'?"),
        (["xyzzy\x1b"], r"No such command 'xyzzy\x1b' (see `obsfs --help`)"),
    ],
)
def test_a_mistyped_verb_is_told_the_nearest(arguments: list[str], said: str, obsfs: Callable[..., Result]) -> None:
    done = obsfs(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"obsfs: {said}")
    assert done.err.count("\n") == 1


def test_a_setting_that_has_no_effect_is_one_line_and_stops_nothing(obsfs: Callable[..., Result]) -> None:
    done = obsfs("cache", "info", "--cache-dir", "/nowhere", OBSFS_CACHE_DIRR="/ssd")
    assert done.err.splitlines() == [
        "obsfs: warning: the variable OBSFS_CACHE_DIRR is not used: did you mean OBSFS_CACHE_DIR?",
        "obsfs: there is no cache at /nowhere: choose --cache-dir",
    ]
    assert done.code == 2


def test_in_python_it_is_a_warning_of_python() -> None:
    program = (
        "import os; os.environ['OBSFS_REGOIN'] = 'x'; from obsfs import Settings; Settings.load(); print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "went on\n"
    assert "SettingWarning: the variable OBSFS_REGOIN is not used: did you mean OBSFS_REGION?" in done.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x\x1b"), r"/x\x1b: Permission denied: you may not"),
        (OSError(errno.ENOTCONN, "Transport endpoint is not connected", b"/mnt"), "/mnt: Transport endpoint is not"),
        (
            OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
            "Transport endpoint is not connected: the mount",
        ),
        (OSError(errno.EIO, "Input/output error", "/disk"), "/disk: Input/output error: check that path"),
    ],
)
def test_what_the_system_refuses_is_one_line_and_not_our_mistake(
    error: OSError, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(mounts, "find", fail)
    assert main(["status"]) == 2
    assert capsys.readouterr().err.startswith(f"obsfs: {said}")


def test_an_error_of_ours_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(mounts, "find", fail)
    assert main(["status"]) == 1
    assert "internal error: OSError" in capsys.readouterr().err
