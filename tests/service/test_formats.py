"""Formats that cross processes and versions: those of earlier versions are read, later ones are refused in time.

``tests/fixtures/v0`` holds what version 0.1.0 wrote before formats had numbers: files, requests, messages, and the
supervisor itself.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import obsfs
from obsfs import mountinfo
from obsfs.cache.directory import Cache
from obsfs.errors import UsageError
from obsfs.fuse.kernel import channel, notify_helper
from obsfs.library import catalog_cache
from obsfs.library.manifest import parse_manifest
from obsfs.library.model_directory import ModelDirectory
from obsfs.library.resume import UploadResumeState
from obsfs.service import mounts, state, takeover_log
from obsfs.service.takeover import Takeover
from obsfs.service.takeover_log import TakeoverLog
from obsfs.settings import Settings
from obsfs.store.memory import MemoryStore
from obsfs.vfs.handles import Mode
from obsfs.vfs.inodes import ROOT
from obsfs.vfs.tree import Tree
from tests.conftest import MIB, Mounter, Result, Store, random_bytes, status, wait_for

V0 = Path(__file__).parents[1] / "fixtures" / "v0"
Run = Callable[..., Result]


def restored(records: list[list[object]], store: MemoryStore | None = None, **options: Any) -> tuple[Tree, int]:
    tree = Tree(store or MemoryStore(), "", 60, **options)
    return tree, tree.restore(records)


# what format 0 has left


def test_an_old_journal_is_read_and_its_nodes_are_kept() -> None:
    found = takeover_log.read(V0 / "journal")
    assert (found.format, found.damaged) == (0, 0)
    tree = Tree(MemoryStore(), "", 60, max_entries=2)
    assert tree.restore(found.records, is_counted=False) == 0
    files = {file.node: (file.buffered, file.passthrough, file.backing) for file in tree.handles.files()}
    assert files == {3: (1, 0, 0), 4: (0, 1, 2), 5: (1, 0, 0)}
    assert (tree.node(5).size, tree.node(2).is_dir) == (39, True)
    # Nobody counted how often the kernel has looked them up.
    tree.handles.release(tree.handles.handle_of(5, Mode.BUFFERED))
    tree.forget([(5, 1000)])
    assert tree.node(5).key == "m/config.json"
    assert not tree.over_limit
    again = Tree(MemoryStore(), "", 60)
    again.restore(list(tree.snapshot()))
    again.forget([(5, 1000)])
    assert again.node(5).version == tree.node(5).version


def test_an_old_request_is_read() -> None:
    request = json.loads((V0 / "takeover.json").read_text())
    taken = Takeover.parse(request["takeover"])
    assert (taken.lock, taken.fds, taken.direct, taken.restarts, taken.server) == (5, [6, 7, 8, 9], True, 1, 1)
    settings, notes = Settings.adopt(request["settings"])
    assert notes == []
    assert (settings.cache_size, settings.umask, settings.region) == (20 << 30, 0o027, "cn-south-1")
    assert Settings.parse(json.loads((V0 / "request.json").read_text())["settings"]) == settings


def test_an_old_cache_is_read(tmp_path: Path) -> None:
    shutil.copytree(V0 / "cache", tmp_path / "c")
    tmp_path.joinpath("c").chmod(0o700)
    cache = Cache(tmp_path / "c", 1 << 30)
    found = {entry.version.key: entry.version for entry in cache.entries()}
    assert {key: version.size for key, version in found.items()} == {
        "m/config.json": 39,
        "m/weights.bin": 2048,
        "m/gone.txt": 1,
    }
    cached = cache.open(found["m/weights.bin"])
    assert cached.ensure_verified(0)
    assert cached.read(0, 2048) == bytes(range(256)) * 8
    assert cache.pins.size() == 39


def test_old_notes_a_shelf_and_a_manifest_are_read(tmp_path: Path) -> None:
    shutil.copy(V0 / "notes.json", tmp_path / "notes.json")
    notes = UploadResumeState(tmp_path / "notes.json")
    assert notes.uploads == {"m@v1/weights.bin": "upload-1", "m@v1/other.bin": "upload-2"}
    notes.save()
    assert UploadResumeState(tmp_path / "notes.json").uploads == notes.uploads
    settings = Settings.load(cache_dir=tmp_path / "c")
    catalog_cache.save(settings, "obs://models", {"library": "", "endpoint": "", "models": [], "problems": []})
    (kept,) = (tmp_path / "c" / "library").glob("*.json")
    kept.write_bytes((V0 / "shelf.json").read_bytes())
    found = catalog_cache.load(settings, "obs://models")
    assert found and found["models"][0]["name"] == "m"
    assert parse_manifest((V0 / "manifest.json").read_bytes(), "m").files[0].path


@pytest.mark.parametrize("number", [None, 1, 2, "x"])
def test_what_an_earlier_version_has_pulled_is_not_hashed_again(tmp_path: Path, number: object) -> None:
    record = json.loads((V0 / "pulled.json").read_text())
    (tmp_path / ".obsfs").mkdir()
    if number is not None:
        record[".obsfs/format"] = number
    (tmp_path / ".obsfs" / "pulled.json").write_text(json.dumps(record))
    manifest = parse_manifest((V0 / "manifest.json").read_bytes(), "m")
    for file in manifest.files:
        (tmp_path / file.path).write_bytes(bytes(file.size))
        os.utime(tmp_path / file.path, ns=(record[file.path][1],) * 2)
    assert [ModelDirectory(tmp_path).has(file) for file in manifest.files] == [number in {None, 1}] * 2


@pytest.mark.parametrize(
    "text", ['{"format": 2, "uploads": {"a": "b"}}', "[]", '{"uploads": 5}', '{"uploads": {"a": 1}}']
)
def test_notes_that_cannot_be_read_are_not_gone_on_with(tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.json").write_text(text)
    assert UploadResumeState(tmp_path / "notes.json").uploads == {}


@pytest.mark.slow
def test_an_old_supervisor_starts_present_servers(bucket: Store, tmp_path: Path) -> None:
    data = random_bytes(3 * MIB)
    bucket.put("file.bin", data)
    path = tmp_path / "mnt"
    path.mkdir()
    settings = Settings.load(cache_dir=tmp_path / "blocks").to_json()
    with (
        supervised([str(V0 / "supervisor.py")], bucket, path, settings),
        (path / "file.bin").open("rb", buffering=0) as file,
    ):
        assert file.read(100) == data[:100]
        follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
        assert file.read() == data[100:]
        follow(path, lambda pid: os.kill(status(path)["supervisor"], signal.SIGHUP))
        assert os.pread(file.fileno(), 100, MIB) == data[MIB : MIB + 100]


class supervised:
    """A mount whose supervisor is started by hand."""

    def __init__(self, program: list[str], bucket: Store, path: Path, settings: dict[str, Any], **env: str) -> None:
        self._path = path
        self._process = subprocess.Popen(
            [sys.executable, "-P", *program, str(bucket), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **env},
        )
        assert self._process.stdin
        request = {"settings": settings, "lifeline": False, "is_temporary": False}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.close()

    def __enter__(self) -> None:
        assert self._process.stdout
        assert b"pid" in self._process.stdout.readline()

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        assert self._process.stdout
        self._process.stdout.close()
        while mountinfo.mounted_at(self._path) is not None:
            channel.unmount(self._path, lazy=True)


def follow(path: Path, act: Callable[[int], None]) -> None:
    """Do something to the server of a mount, and return when another one answers."""
    old = status(path)["pid"]
    act(old)

    def is_another() -> bool:
        with suppress(UsageError):  # it does not answer yet
            return bool(status(path)["pid"] != old)
        return False

    wait_for(is_another, 60)


# what does not fit


@pytest.mark.parametrize(
    ("values", "left_out"),
    [
        ({"warp_factor": 9, "umask": 0o027}, ["warp_factor"]),
        ({"engine": "quantum", "connections": 0, "umask": 0o027}, ["engine", "connections"]),
        ({"max_entries": None, "metadata_ttl": "soon", "umask": 0o027}, ["max_entries", "metadata_ttl"]),
    ],
)
def test_settings_of_another_version_fall_back(values: dict[str, Any], left_out: list[str]) -> None:
    settings, notes = Settings.adopt(values)
    assert settings == Settings(umask=0o027)
    assert [note.split()[1] for note in notes] == left_out


def some_objects() -> MemoryStore:
    return MemoryStore({f"f{n}": bytes([n]) * 10 for n in range(3)})


def some_records(store: MemoryStore | None = None) -> list[list[object]]:
    records: list[list[object]] = []
    tree = Tree(store or some_objects(), "", 60, lambda *changes: records.extend(changes))
    for n in range(3):
        tree.handles.open(tree.lookup(tree.node(ROOT), f"f{n}", unique=2 * n + 2).id, Mode.BUFFERED)
    return records


@pytest.mark.parametrize(
    "damage",
    [
        ["node", 3],
        ["node", "3", 1, "f1", "f1", '"1"', 10, 1.0],
        ["node", 3, 1, "f1", "f1", '"1"', -10, 1.0],
        ["node", 3, None, 5, {}, [], "x", "y"],
        [None, {}],
        ["node", 1, 1, "f1", "f1", '"1"', 10, 1.0],
    ],
)
def test_a_damaged_record_costs_what_it_is_about(damage: list[object]) -> None:
    records = [damage if record[:2] == ["node", 3] else record for record in some_records()]
    tree, lost = restored(records)
    assert lost <= 1
    assert {tree.node(file.node).key for file in tree.handles.files()} == {"f0", "f2"}
    assert tree.node(ROOT).is_dir


@pytest.mark.parametrize("line", [b"garbage\n", b"\x00\xff\n", b"{}\n", b'"text"\n', b"[]\n", b"[" * 100_000 + b"\n"])
def test_a_damaged_line_is_counted(tmp_path: Path, line: bytes) -> None:
    written = TakeoverLog(tmp_path / "j")
    written.record(["one", 1])
    with (tmp_path / "j").open("ab") as file:
        file.write(line)
    written.record(["two", 2], ["unknown kind", 3, "with", "more"])
    found = takeover_log.read(tmp_path / "j")
    assert (found.damaged, [record[0] for record in found.records]) == (1, ["one", "two", "unknown kind"])


def test_ids_of_lost_nodes_are_not_given_again() -> None:
    records = [record for record in some_records() if record[1] != 4]
    tree, _ = restored(records, MemoryStore({"new": b"n"}), server=1)
    assert tree.lookup(tree.node(ROOT), "new").id > 1 << 40


def test_a_lookup_that_was_not_answered_is_counted_once() -> None:
    bucket = some_objects()
    tree, _ = restored(some_records(bucket), bucket)
    tree.take_back(4)  # the request that looked up f1: it is sent again
    node = tree.lookup(tree.node(ROOT), "f1", unique=4)
    assert (node.id, node.lookups) == (3, 1)
    tree.take_back(4)
    tree.take_back(4)
    assert node.lookups == 0


def test_a_full_disk_fails_nobody_and_is_told(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=True)
    try:
        told: list[bool] = []
        written = TakeoverLog(small / "j", lambda: [["all", 1]], on_whole=told.append)
        (small / "filler").write_bytes(bytes(8192))
        for n in range(2000):
            written.record(["one", n])
        assert (told, written.is_whole) == ([False], False)
        (small / "filler").unlink()
        (small / "j").stat()
        time.sleep(1.0)
        written.record(["one", 1])
        assert (told, written.is_whole) == ([False, True], True)
        assert takeover_log.read(small / "j").records == [["all", 1]]
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_successor_begins_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    monkeypatch.setattr(takeover_log, "_MEND_SECONDS", 0.0)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=True)
    try:
        TakeoverLog(small / "j").record(["one", 1])
        with suppress(OSError):
            (small / "filler").write_bytes(bytes(1 << 20))
        told: list[bool] = []
        follower = TakeoverLog(small / "j", lambda: [["all", 1]], keep=True, on_whole=told.append)
        follower.renew()
        assert (told, follower.is_whole) == ([False], False)
        assert takeover_log.read(small / "j").records == [["one", 1]]
        (small / "filler").unlink()
        follower.record(["two", 1])
        assert (told, follower.is_whole) == ([False, True], True)
        assert takeover_log.read(small / "j").records == [["all", 1]]
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_notify_helper_of_another_format_ends_at_once() -> None:
    done = subprocess.run(
        [sys.executable, notify_helper.__file__, "2"], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert (done.returncode, b"format 2" in done.stderr) == (1, True)


# upgrades


def test_what_cannot_be_read_refuses_an_upgrade_and_nothing_is_touched(
    bucket: Store, mount: Mounter, obsfs: Run
) -> None:
    data = random_bytes(2 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket)
    before = status(path)["pid"]
    file = state.file_path(path, "journal")
    with (path / "file.bin").open("rb", buffering=0) as reading:
        assert reading.read(10) == data[:10]
        with file.open("r+b") as written:
            assert written.readline() == b'["obsfs-journal", 1]\n'
            written.seek(0)
            written.write(b'["obsfs-journal", 9]\n')
        done = obsfs("upgrade", path)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "later version" in done.err
        assert status(path)["pid"] == before
        assert reading.read(10) == data[10:20]
        with file.open("r+b") as written:
            written.write(b'["obsfs-journal", 1]\n')
        assert obsfs("upgrade", path).code == 0
        assert reading.read(10) == data[20:30]
    assert status(path)["pid"] != before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "is_refused"),
    [
        ("raise ImportError('half installed')", True),
        ("import sys\nif sys.argv[1:2] != ['--probe']: sys.exit(3)", False),
        ("import os, sys\nif sys.argv[1:2] != ['--probe']: os.abort()", False),
    ],
)
def test_a_program_that_cannot_follow_costs_nothing(
    bucket: Store, tmp_path: Path, fault: str, is_refused: bool
) -> None:
    """It fails when it is asked, or only when it should serve: then the program that served before follows."""
    data = random_bytes(2 * MIB)
    bucket.put("file.bin", data)
    package = Path(obsfs.__file__).parent
    for name in ("good", "bad"):
        shutil.copytree(package, tmp_path / name / "obsfs", ignore=shutil.ignore_patterns("__pycache__"))
    daemon = tmp_path / "bad" / "obsfs" / "fuse" / "daemon.py"
    daemon.write_text(daemon.read_text().replace("import logging\n", f"{fault}\nimport logging\n", 1))
    (tmp_path / "current").symlink_to("good")
    path = tmp_path / "mnt"
    path.mkdir()
    settings = Settings.load(cache_dir=tmp_path / "blocks").to_json()
    program = ["-m", "obsfs.fuse.supervisor"]
    with (
        supervised(program, bucket, path, settings, PYTHONPATH=str(tmp_path / "current")),
        (path / "file.bin").open("rb", buffering=0) as file,
    ):
        assert file.read(10) == data[:10]
        shown = status(path)
        (tmp_path / "current").unlink()
        (tmp_path / "current").symlink_to("bad")
        if is_refused:
            os.kill(shown["supervisor"], signal.SIGHUP)
            wait_for(lambda: "upgrade_refused" in status(path))
            assert "half installed" in status(path)["upgrade_refused"]["reason"]
            assert status(path)["pid"] == shown["pid"]
        else:
            follow(path, lambda pid: os.kill(shown["supervisor"], signal.SIGHUP))
        assert file.read(10) == data[10:20]
        follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
        assert file.read(10) == data[20:30]


@pytest.mark.parametrize("kind", ["node", "looked"])
def test_what_cannot_be_restored_costs_that_file(bucket: Store, mount: Mounter, kind: str) -> None:
    data = random_bytes(2 * MIB)
    for name in ("lost.bin", "kept.bin"):
        bucket.put(name, data)
    path = mount(bucket)
    with (path / "lost.bin").open("rb", buffering=0) as lost, (path / "kept.bin").open("rb", buffering=0) as kept:
        assert lost.read(10) == kept.read(10) == data[:10]
        file = state.file_path(path, "journal")
        lines = file.read_bytes().splitlines(keepends=True)
        (at, *_) = (n for n, line in enumerate(lines) if line.startswith(f'["{kind}"'.encode()))
        lines[at] = b"x" * (len(lines[at]) - 1) + b"\n"
        with file.open("r+b") as written:  # in place: the server goes on with the same file
            written.write(b"".join(lines))
        follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
        assert kept.read() == data[10:]
        if kind == "node":
            with pytest.raises(OSError, match="Stale"):
                os.pread(lost.fileno(), 10, MIB)
        else:
            assert os.pread(lost.fileno(), 10, MIB) == data[MIB : MIB + 10]
        assert (path / "lost.bin").read_bytes() == data
    wait_for(lambda: status(path)["open_files"] == 0)


@pytest.mark.slow
def test_a_snapshot_outlives_its_manifest(bucket: Store, mount: Mounter, obsfs: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": name}))
        (tmp_path / name / "w.bin").write_bytes(random_bytes(MIB, ord(name)))
        assert obsfs("push", tmp_path / name, f"{bucket}/{name}", "--endpoint-url", bucket.server.endpoint).code == 0
    time.sleep(1.1)  # manifests count in seconds
    path = mount(bucket, snapshot="now")
    data = random_bytes(MIB, ord("a"))
    with (path / "a" / "w.bin").open("rb", buffering=0) as file:
        assert file.read() == data
        time.sleep(1.1)
        (tmp_path / "a" / "w.bin").write_bytes(random_bytes(MIB, 9))
        assert obsfs("push", tmp_path / "a", f"{bucket}/a", "--endpoint-url", bucket.server.endpoint).code == 0
        for _ in range(2):
            follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
            assert sorted(os.listdir(path)) == ["a", "b"]
            assert os.pread(file.fileno(), MIB, 0) == data
            assert (path / "a" / "w.bin").read_bytes() == data
            assert (path / "b" / "w.bin").read_bytes() == random_bytes(MIB, ord("b"))
    kept = state.file_path(path, "snapshot")
    assert kept.stat().st_mode & 0o077 == 0
    mounts.unmount(path)
    assert not kept.exists()
