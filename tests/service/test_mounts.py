"""Mounts as commands see them: whose they are, what a path lies on, who may be believed, asked and signalled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from obsfs import mountinfo, private
from obsfs.cli import main
from obsfs.cli.places import locate
from obsfs.errors import UsageError
from obsfs.service import asking, mounts, state
from obsfs.settings import Settings
from tests.conftest import Mounter, Result, Store, status, wait_for
from tests.service.impostor import NOBODY, Impostor

_ELSEWHERE = {"endpoint": "http://evil.example", "endpoints": [], "cache_dir": "/evil"}
_ODD_NAMES = (
    "a b",
    "a\tb",
    "a\nb",
    "a\\b",
    "a#b",
    "a\fb",
    "a\x0bb",
    "a\x1cb",
    "a\x85b",
    "a\u2028b",
    "a - b",
    "a\udcffb",
)

Impostors = Callable[..., Impostor]


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[Impostors]:
    made: list[Impostor] = []

    def make(name: str = "impostor", **options: Any) -> Impostor:
        path = tmp_path / name
        if mountinfo.mounted_at(path) is None:
            path.mkdir(exist_ok=True)
        made.append(Impostor(path, **options))
        return made[-1]

    yield make
    for one in reversed(made):
        one.close()


def _state_of(path: Path) -> str:
    return mounts.find_mounts(path)[-1].state


def _see(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    code = main(["status", *map(str, arguments)])
    said = capsys.readouterr()
    return Result(code, said.out, said.err)


# whose it is


def test_another_users_mount_is_never_asked(impostor: Impostors, capsys: pytest.CaptureFixture[str]) -> None:
    other = impostor(user=NOBODY, status=_ELSEWHERE)
    place = other.path / "model"
    assert mounts.on_mount(place) is None
    assert mounts.refresh(place) == mounts.refresh("obs://impostors/model") == []
    for ask in (mounts.status, mounts.replace_server):
        with pytest.raises(UsageError, match="another user's"):
            ask(other.path)
    with pytest.raises(UsageError, match=r"is already mounted \(obsfs, by nobody \(uid 65534\)\): mount on another"):
        mounts.prepare(other.path, Settings())
    shown = _see(capsys, other.path, "--json")
    assert (shown.code, shown.json["state"]) == (0, "another user's")
    assert "another user's" in _see(capsys, other.path).out
    assert other.asked == 0


def test_what_root_has_mounted_is_another_users_for_the_others(bucket: Store, mount: Mounter) -> None:
    bucket.put("a", b"1")
    path = mount(bucket, allow_other=True)
    code = (
        "from obsfs.service import mounts\n"
        f"print([one.state for one in mounts.find_mounts(mounts.Path({str(path)!r}))])"
    )
    done = subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable, "-c", code],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.stdout.strip() == '["another user\'s"]', done.stderr


# which mount a path lies on


def test_a_mount_speaks_only_for_what_lies_on_it(impostor: Impostors, tmp_path: Path) -> None:
    ours = tmp_path / "models"
    (ours / "m").mkdir(parents=True)
    said = {**_ELSEWHERE, "mountpoint": str(ours), "source": "obs://evil"}
    liar = impostor(status=said)
    assert mounts.on_mount(ours / "m") is None
    assert liar.asked == 0
    found = mounts.on_mount(liar.path / "m")
    assert found is not None
    assert (found.url, found.mountpoint) == ("obs://impostors/m", liar.path)
    assert mounts.status(liar.path)["mountpoint"] == str(liar.path)
    (tmp_path / "link").symlink_to(liar.path)
    for path in (tmp_path / "link" / "m", ours / ".." / "impostor" / "m"):
        assert mounts.on_mount(path) == found


def test_the_mount_on_top_is_the_one_that_counts(impostor: Impostors, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    below = impostor("a/b", status=_ELSEWHERE)
    assert mountinfo.mount_of(below.path / "x") == below.entry
    above = impostor("a", user=NOBODY, status=_ELSEWHERE)
    assert _state_of(below.path) == "covered"
    assert mounts.on_mount(below.path / "x") is None
    above.close()
    same = impostor("a/b", user=NOBODY, status=_ELSEWHERE)
    assert [one.state for one in mounts.find_mounts(same.path)] == ["covered", "another user's"]
    assert mounts.on_mount(same.path) is None
    assert below.asked == above.asked == same.asked == 0


@pytest.mark.parametrize("name", _ODD_NAMES)
def test_a_mountpoint_may_have_any_name(name: str, impostor: Impostors) -> None:
    odd = impostor(name, status=_ELSEWHERE, source="obs://impostors/a b#c\\d")
    assert odd.entry.source == "obs://impostors/a b#c\\d"
    found = mounts.on_mount(odd.path / name)
    assert found is not None
    assert found.url == f"obs://impostors/a b#c\\d/{name}"
    assert _state_of(odd.path) == "mounted"


@pytest.mark.parametrize("name", ["模" * 85, "m" * 255, "é" * 127, "a\udcff" * 100, "模型"], ids=lambda name: name[:2])
def test_what_a_mount_keeps_has_a_name_that_fits(name: str, tmp_path: Path) -> None:
    mountpoint, other = tmp_path / name, tmp_path / "x" / name
    mountpoint.mkdir()
    files = [
        state.file_path(one, suffix) for one in (mountpoint, other) for suffix in ("lock", "journal", "snapshot", "log")
    ]
    for file in files:
        private.write_file(file, b"1")
    assert len(set(files)) == 8
    if len(os.fsencode(name)) < 200:
        assert files[0].name.startswith(f"{name[:100]}-")


def test_lines_of_mountinfo_that_cannot_be_read_are_left_out() -> None:
    lines = [
        b"1 1 0:2 / / rw - rootfs rootfs rw",
        b"22 1 0:9 / /a\\040b\x0c\xe2\x80\xa8 rw shared:1 master:2 - fuse.obsfs obs://b\\134 ro,user_id=7,group_id=0",
        b"nonsense",
        b"",
        b"23 22 0:10 / /\xff rw - tmpfs  rw",
    ]
    root, ours, last = mountinfo.parse_mountinfo(b"\n".join(lines))
    assert (root.number, root.parent, root.user) == (1, 1, None)
    expected = ("/a b\f\u2028", "fuse.obsfs", "obs://b\\", 9, 7)
    assert (str(ours.mountpoint), ours.fs_type, ours.source, ours.minor, ours.user) == expected
    assert (str(last.mountpoint), last.source) == ("/\udcff", "")
    assert mountinfo.mount_of(Path("/elsewhere"), [root, ours, last]) == root


# one that hangs


def test_all_mounts_are_asked_at_the_same_time(impostor: Impostors) -> None:
    gate = threading.Barrier(3)  # none answers before all are asked
    made = [impostor(f"mnt{number}", status=_ELSEWHERE, gate=gate) for number in range(3)]
    states = {one.entry.mountpoint: one.state for one in mounts.find_mounts()}
    assert [states[one.path] for one in made] == ["mounted"] * 3


def test_a_hung_mount_holds_up_nothing_else(
    impostor: Impostors, bucket: Store, mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("a/b", b"1")
    path = mount(bucket)
    hung = impostor()
    assert mounts.on_mount(path / "a") is not None
    assert mounts.on_mount(tmp_path) is None
    assert mounts.status(path)["pid"]
    assert mounts.refresh(path / "a") == [path / "a"]
    assert locate(str(path / "a"), {})[0] == f"{bucket}/a"
    assert hung.asked == 0
    monkeypatch.setattr(asking, "ASK_SECONDS", 4.0)
    with pytest.raises(UsageError, match="does not answer"):
        mounts.on_mount(hung.path / "a")
    assert hung.asked == 1


def test_a_process_that_has_asked_a_hung_mount_can_end(impostor: Impostors) -> None:
    hung = impostor()
    code = (
        "from obsfs.service import asking, mounts\n"
        "asking.ASK_SECONDS = 0.5\n"
        "print([one.state for one in mounts.find_mounts()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert "not answering" in done.stdout, done.stderr
    assert hung.asked == 1  # it was taken, so that no signal frees who waits for the answer


@pytest.mark.parametrize("end", ["dead", "not answering"])
def test_the_exit_status_tells_of_a_mount_that_is_lost(
    end: str, impostor: Impostors, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(asking, "ASK_SECONDS", 1.0)
    lost = impostor("a\x1b[31mb")
    log = state.file_path(lost.path, "log")
    log.write_text("")
    if end == "dead":
        lost.die()
    for arguments in ((), (lost.path,)):
        shown = _see(capsys, *arguments)
        assert shown.code == 1
        assert end in shown.out
        assert f"a\\x1b[31mb is {end}" in shown.err
        assert "\x1b" not in shown.out + shown.err
        assert log.stem.rpartition("-")[2] in shown.out
    shown = _see(capsys, lost.path, "--json")
    assert shown.code == 1
    assert shown.json == {"mountpoint": str(lost.path), "source": "obs://impostors", "state": end, "log": str(log)}
    with pytest.raises(UsageError):
        mounts.on_mount(lost.path / "a")


# who is signalled


def test_no_process_is_signalled_because_a_mount_names_it(impostor: Impostors) -> None:
    with subprocess.Popen(["sleep", "60"]) as victim:
        said = {**_ELSEWHERE, "supervisor": victim.pid, "pid": victim.pid, "can_be_followed": True}
        liar = impostor(status=said)
        lock = state.file_path(liar.path, "lock")
        for content in (None, f"{victim.pid}", f"{victim.pid} {state.start_ticks(victim.pid)}", "-1 1", "0", "x"):
            if content is not None:
                lock.write_text(content)
            with pytest.raises(UsageError, match="cannot be proven"):
                mounts.replace_server(liar.path)
        assert victim.poll() is None
        victim.kill()


def test_the_server_of_a_mount_is_proven(bucket: Store, mount: Mounter) -> None:
    bucket.put("a", b"1")
    path = mount(bucket)
    lock = state.file_path(path, "lock")
    noted = lock.read_text()
    for content in (noted, noted.split()[0]):  # as it is now, and as the first versions wrote it
        lock.write_text(content)
        pidfd = state.open_supervisor(path)
        try:
            assert f"Pid:\t{mount.process(path).pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        finally:
            os.close(pidfd)
        assert not state.is_abandoned(path)
    lock.write_text(f"{noted.split()[0]} 1")  # the pid of one that has ended, which another process has now
    assert state.is_abandoned(path)


# where a mount may be


@pytest.mark.parametrize(
    ("cache", "home"),
    [("mnt", ""), ("mnt/cache", ""), ("link/cache/x", ""), ("bound/cache", ""), ("c", "mnt/state"), (".", "")],
)
def test_a_server_never_needs_its_own_mount(
    cache: str, home: str, bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "bound").mkdir()
    subprocess.run(["mount", "--bind", path, tmp_path / "bound"], check=True)
    try:
        if home:
            monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / home))
        with pytest.raises(UsageError, match="lies in"):
            mounts.start(str(bucket), path, Settings.load(cache_dir=tmp_path / cache), lifeline=False)
        assert mountinfo.mounted_at(path) is None
        assert not list(path.iterdir())
    finally:
        subprocess.run(["umount", "-l", tmp_path / "bound"], check=True)


def test_a_server_never_needs_another_mount(impostor: Impostors, tmp_path: Path) -> None:
    other = impostor(user=NOBODY)
    path = tmp_path / "mnt"
    path.mkdir()
    with pytest.raises(UsageError, match=r"the cache directory .* lies on a mount of obsfs"):
        mounts.prepare(path, Settings.load(cache_dir=other.path / "cache"))
    with pytest.raises(UsageError, match="lies on a mount of obsfs"):
        mounts.prepare(other.path / "mnt", Settings.load(cache_dir=tmp_path / "c"))
    assert other.asked == 0


# what a mount logs


def test_the_log_of_a_mount(bucket: Store, mount: Mounter, capsys: pytest.CaptureFixture[str]) -> None:
    bucket.put("a", b"1")
    path = mount(bucket)
    first = status(path)
    log = Path(first["log"])
    assert log == state.file_path(path, "log")
    assert log.stat().st_mode & 0o777 == 0o600
    assert f"serving {bucket} on {path} (pid {first['pid']}," in log.read_text()
    os.kill(first["pid"], 9)
    assert (path / "a").read_bytes() == b"1"
    after = status(path)
    wait_for(lambda: f"took over {path} from a server that died (pid {after['pid']}," in log.read_text())
    _, last = mounts.replace_server(path)
    wait_for(lambda: f"took over {path} from a server that was upgraded (pid {last['pid']}," in log.read_text())
    assert (last["restarts"], last["upgrades"]) == (1, 1)
    shown = _see(capsys, path)
    assert shown.code == 0
    assert str(log) in "".join(shown.out.split())
    mounts.unmount(path)
    mount.process(path).wait(20)
    assert log.read_text().rstrip().endswith(f"unmounted {path}")


def test_the_log_says_why_a_mount_did_not_begin(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    path = tmp_path / "mnt"
    path.mkdir()
    with pytest.raises(UsageError, match="nothing under"):
        mount(f"{bucket}/absent", at=path)
    assert (
        f"ERROR obsfs.service.daemon: {path} ended: there is nothing under" in state.file_path(path, "log").read_text()
    )


def test_a_line_of_the_log_stays_a_line(tmp_path: Path) -> None:
    code = """if True:
        import logging, sys
        from obsfs.service.daemon import log, log_to
        log_to(logging.FileHandler(sys.argv[1]), "info")
        log.warning("%s", "a\\n2026-01-01 WARNING forged\\x1b[31m\\x9b")
        try:
            raise ValueError("b\\x1b\\x85")
        except ValueError:
            log.exception("c")
    """
    path = tmp_path / "log"
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)
    lines = path.read_text().split("\n")
    assert lines[0].endswith(r"obsfs.service.daemon: a\n2026-01-01 WARNING forged\x1b[31m\x9b")
    assert any(line.endswith(r"ValueError: b\x1b\x85") for line in lines)
    assert all(line.isprintable() for line in lines)


def test_json_of_all_mounts_is_a_list(impostor: Impostors, capsys: pytest.CaptureFixture[str]) -> None:
    other = impostor(user=NOBODY)
    found = [one for one in json.loads(_see(capsys, "--json").out) if one["mountpoint"] == str(other.path)]
    assert found == [{"mountpoint": str(other.path), "source": "obs://impostors", "state": "another user's"}]


# a bind mount, as a container has it, of a part of a mount


@pytest.mark.parametrize("part", ["m/sub", "m/sub/a b.txt"])
def test_a_bind_mount_stands_for_what_it_shows(part: str, bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    bucket.put("lib/m/sub/a b.txt", b"1")
    path = mount(f"{bucket}/lib")
    bound, what = tmp_path / "bound", path / part
    bound.mkdir() if what.is_dir() else bound.touch()
    subprocess.run(["mount", "--bind", what, bound], check=True)
    try:
        url = f"{bucket}/lib/{part}"
        found = mounts.on_mount(bound)
        assert found is not None
        assert (found.url, found.mountpoint) == (url, bound)
        if what.is_dir():
            inside = mounts.on_mount(bound / "x")
            assert inside is not None
            assert inside.url == f"{url}/x"
        assert mounts.status(bound)["source"] == url
        assert _state_of(bound) == "mounted"
        assert mounts.refresh(bound) == [bound]
        if part == "m/sub":
            assert set(mounts.refresh(f"{bucket}/lib/m/sub/a b.txt")) == {path / "m/sub/a b.txt", bound / "a b.txt"}
            assert mounts.refresh(f"{bucket}/lib/m/other") == [path / "m"]
    finally:
        mounts.unmount(bound)
    assert status(path)["source"] == f"{bucket}/lib"


# what is said of a mount that cannot be unmounted, refreshed or mounted over


def _as_nobody(*arguments: object) -> str:
    """What a command says to the user nobody."""
    done = subprocess.run(
        ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable, "-m", "obsfs", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "HOME": "/nonexistent", "XDG_CONFIG_HOME": "/nonexistent"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    return done.stderr


@pytest.fixture
def for_all() -> Iterator[Path]:
    """A directory that every user reaches: those that pytest makes are its own user's."""
    with tempfile.TemporaryDirectory() as name:
        (path := Path(name)).chmod(0o755)
        yield path


def test_a_mount_of_another_user_is_named_with_its_owner(for_all: Path, impostor: Impostors) -> None:
    one = impostor(str(for_all / "impostor"), status=_ELSEWHERE)
    assert _as_nobody("umount", one.path) == (
        f"obsfs: the mount on {one.path} was made by root (uid 0): only that user, or root, can unmount it\n"
    )
    assert f"{one.path} is already mounted (obsfs, by root (uid 0))" in _as_nobody("mount", "obs://bbb", one.path)
    for place in (one.path / "x", "obs://impostors/x"):
        assert f"{place}: the mount {one.path} was made by root (uid 0)" in _as_nobody("refresh", place)
    assert mountinfo.mounted_at(one.path)
    assert one.asked == 0


def _said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_dead_mount_is_told_as_dead(impostor: Impostors, capsys: pytest.CaptureFixture[str]) -> None:
    dead = impostor()
    dead.die()
    for place in (dead.path, dead.path / "a" / "b", "obs://impostors", "obs://impostors/a"):
        assert f"{place}: the server of {dead.path} has died: mount it again" in _said(capsys, "refresh", place)
    assert f"lies on the mount {dead.path}: obsfs umount {dead.path}" in _said(capsys, "umount", dead.path / "a")
    assert "no mount of obsfs shows obs://impostor" in _said(capsys, "refresh", "obs://impostor")
    assert main(["umount", str(dead.path)]) == 0
    assert mountinfo.mounted_at(dead.path) is None


def test_a_mount_that_never_answers_is_told_as_that(
    impostor: Impostors, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "ASK_SECONDS", 0.5)
    hung = impostor()
    assert f"does not answer: `obsfs umount --lazy {hung.path}`" in _said(capsys, "refresh", hung.path)
    assert f"lies on the mount {hung.path}" in _said(capsys, "umount", hung.path / "x")


def test_what_is_no_mount_of_obsfs_is_told_as_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert f"{tmp_path} lies on no mount of obsfs" in _said(capsys, "refresh", tmp_path)
    assert "cannot be followed (Too many levels" in _said(capsys, "umount", tmp_path / "loop")
    assert "/proc is already mounted (proc): mount on another directory" in _said(capsys, "mount", "obs://bbb", "/proc")
    assert "what is mounted on /proc is no obsfs (proc): use umount(8)" in _said(capsys, "umount", "/proc")
