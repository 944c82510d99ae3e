"""Settings as mount(8) gives them, and verbs that are mistyped."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from obsfs.cli import main
from obsfs.cli import obsfs as program
from obsfs.cli.options import parse_mount_options
from obsfs.errors import UsageError
from obsfs.fuse.kernel import channel
from obsfs.service import mounts
from tests.cli.test_help import verbs
from tests.conftest import Result, Store


def test_settings_among_the_options_of_mount() -> None:
    text = "ro,dev,suid,_netdev,nofail,x-systemd.automount,region=cn-south-1,cache-dir=/ssd,allow_other,no_passthrough"
    assert {name: written.value for name, written in parse_mount_options(text).items()} == {
        "region": "cn-south-1",
        "cache_dir": "/ssd",
        "allow_other": True,
        "passthrough": False,
    }


def test_an_option_that_takes_several_values_has_them_all() -> None:
    found = parse_mount_options("endpoint_url=http://a,endpoint-url=http://b")["endpoint_url"]
    assert found == ("-o endpoint-url=", ["http://a", "http://b"])


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

    monkeypatch.setattr(mounts, "find_mounts", fail)
    assert main(["status"]) == 2
    assert capsys.readouterr().err.startswith(f"obsfs: {said}")


@pytest.mark.parametrize(("name", "code"), [("rich.console", 2), ("obsfs.nowhere", 1), (None, 1)])
def test_a_package_that_is_missing_is_named(
    name: str | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named {name}", name=name)

    monkeypatch.setattr(mounts, "find_mounts", fail)
    assert main(["status"]) == code
    said = "the Python package 'rich' is missing" if code == 2 else "internal error: ModuleNotFoundError"
    assert capsys.readouterr().err.startswith(f"obsfs: {said}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x\n", r"x\n does not exist: check the name"),
        ("a b", "a b does not exist: mkdir -p '{d}/a b'"),
        ("x", "x does not exist: mkdir -p {d}/x"),
    ],
)
def test_a_mountpoint_that_is_not_there_is_shown_whole(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mount", "obs://models", f"{tmp_path}/{name}"]) == 2
    assert capsys.readouterr().err == f"obsfs: mountpoint {tmp_path}/{said.replace('{d}', str(tmp_path))}\n"


def test_an_error_of_ours_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(mounts, "find_mounts", fail)
    assert main(["status"]) == 1
    assert "internal error: OSError" in capsys.readouterr().err


def _parameters() -> Iterator[tuple[click.Command, click.Parameter]]:
    """Every argument, and every option with a value, of every verb."""
    for words in verbs(program):
        verb: click.Command = program
        for word in words:
            assert isinstance(verb, click.Group)
            verb = verb.get_command(click.Context(verb), word) or verb
        if not isinstance(verb, click.Group):
            yield from ((verb, one) for one in verb.params if not (isinstance(one, click.Option) and one.is_flag))


def _refusal(verb: click.Command, parameter: click.Parameter, text: str) -> str:
    """What a verb says when it is given this text there."""
    if isinstance(parameter, click.Option):
        words = [parameter.opts[-1], text]
    else:
        arguments: list[click.Parameter] = [one for one in verb.params if isinstance(one, click.Argument)]
        words = [*("x" for _ in range(arguments.index(parameter))), text]
    with pytest.raises(click.UsageError) as caught:
        verb.make_context("verb", words)
    return caught.value.message


def test_no_verb_takes_an_empty_word() -> None:
    tried = list(_parameters())
    assert len(tried) > 100
    for number, (verb, parameter) in enumerate(tried):
        said = _refusal(verb, parameter, ("", " ", "\t\n")[number % 3])
        assert re.match(r"\S.* is empty: give it a value", said), (verb.name, parameter.name, said)
        if isinstance(parameter, click.Option):
            assert parameter.opts[-1] in said


def test_no_two_parameters_of_a_verb_are_one() -> None:
    named = [(id(verb), verb.name, one.name) for verb, one in _parameters()]
    assert [one for one in named if named.count(one) > 1] == []


def test_a_url_is_no_path_of_this_machine() -> None:
    tried = [(verb, one) for verb, one in _parameters() if one.type.name in ("Path", "path", "file", "directory")]
    assert {verb.name for verb, _ in tried} >= {"mount", "umount", "push", "pull"}
    for verb, parameter in tried:
        assert _refusal(verb, parameter, "obs://models/x").startswith("'obs://models/x' is a URL, and ")


def test_in_python_no_mountpoint_is_empty() -> None:
    for place in ("", "  ", "\n"):
        with pytest.raises(UsageError, match="the mountpoint is empty"):
            mounts.mount("obs://models", place)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mount", "--cashe-dir", "x"], "No such option '--cashe-dir': did you mean '--cache-dir'? (see `obsfs mount"),
        (["status", "--jsn"], "No such option '--jsn': did you mean '--json'? (see `obsfs status --help`)"),
        (["--vresion"], "No such option '--vresion': did you mean '--version'? (see `obsfs --help`)"),
        (["umount", "--xyzzy\x1b"], r"No such option '--xyzzy\x1b' (see `obsfs umount --help`)"),
        (["mount", "-o", "allow-other=maybe", "obs://b", "/m"], "-o allow-other=maybe: 'maybe' is neither on nor off"),
        (["mount", "-o", "cache_dir= ,ro", "obs://b", "/m"], "-o cache_dir is empty"),
        (["mount", "-o", "fuse_backend=warp", "obs://b", "/m"], "-o fuse_backend=warp: choose from native, libfuse"),
    ],
)
def test_an_option_is_named_as_it_was_written(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"obsfs: {said}")
