"""The control socket: who may use it, what it refuses, and that it outlives servers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from obsfs import mountinfo
from obsfs.errors import UsageError
from obsfs.service import asking, control, mounts, state
from obsfs.service.asking import Answer, Question, ask
from obsfs.service.control import ControlServer
from tests.conftest import Mounter, Result, Store, is_running, status, wait_for
from tests.faulty import FaultyLink
from tests.service.impostor import NOBODY, Impostor
from tests.service.test_formats import follow

Run = Callable[..., Result]


def socket_of(path: Path) -> Path:
    """Where the control socket of a mount is."""
    entry = mountinfo.mounted_at(path)
    assert entry is not None
    return state.control_path(entry.minor)


def send(path: Path, data: bytes, seconds: float = 15.0) -> bytes:
    """Send bytes to a socket, and return everything that comes back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(seconds)
        client.connect(str(path))
        with suppress(BrokenPipeError):
            client.sendall(data)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    said = bytearray()
    with suppress(ConnectionResetError):
        while piece := client.recv(1 << 16):
            said += piece
    return bytes(said)


def asked_by_attribute(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that are asked through the file system from now on."""
    calls: list[str] = []
    original = asking._by_attribute

    def by_attribute(question: Question) -> Any:
        calls.append(question.call)
        return original(question)

    monkeypatch.setattr(asking, "_by_attribute", by_attribute)
    return calls


@pytest.fixture
def short() -> Iterator[Path]:
    """A private directory whose name fits into the address of a socket."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def serve_calls(short: Path) -> Iterator[Callable[..., Path]]:
    """Serves calls on a socket in this process."""
    servers: list[ControlServer] = []

    def make(stop: Callable[[], None] = lambda: None, **calls: control.Call) -> Path:
        made = ControlServer({"echo": lambda path: {"path": path}, **calls}, stop=stop)
        made.open(short / "socket")
        servers.append(made)
        return short / "socket"

    yield make
    for made in servers:
        made.close()


# a mount is asked over its socket


def test_every_call_goes_over_the_socket(
    bucket: Store, mount: Mounter, fuse_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("m/sub/a.bin", b"1")
    path = mount(bucket, fuse_backend=fuse_backend)
    by_attribute = asked_by_attribute(monkeypatch)
    name = socket_of(path)
    found = name.lstat()
    assert (stat.S_ISSOCK(found.st_mode), stat.S_IMODE(found.st_mode), found.st_uid) == (True, 0o600, os.geteuid())
    assert status(path)["pid"]
    assert [info.state for info in mounts.find_mounts(path)] == ["mounted"]
    for place, refreshed in (("", ""), ("m", "m"), ("m/sub/a.bin", "m/sub/a.bin"), ("m/x/y", "m"), ("x", "")):
        assert mounts.refresh(path / place) == [path / refreshed]
    if fuse_backend == "native":
        before, after = mounts.replace_server(path)
        assert before["pid"] != after["pid"]
        assert "upgrade" not in by_attribute

        def answers_over_the_socket() -> bool:
            by_attribute.clear()  # what was asked while no server was there, or before it had its socket
            return bool(mounts.status(path)["pid"]) and not by_attribute

        wait_for(answers_over_the_socket)
        assert stat.S_IMODE(name.lstat().st_mode) == 0o600
    mounts.stop(path)
    assert mountinfo.mounted_at(path) is None
    wait_for(lambda: not os.path.lexists(name))
    assert by_attribute == []


def test_a_refresh_over_the_socket_shows_what_is_new(bucket: Store, mount: Mounter) -> None:
    bucket.put("m/a", b"1")
    path = mount(bucket, metadata_ttl="1h")
    assert os.listdir(path / "m") == ["a"]
    assert not (path / "m" / "b").exists()
    for key in ("m/b", "m/sub/c"):
        bucket.put(key, b"22")
    assert mounts.refresh(path / "m" / "sub" / "c") == [path / "m"]
    assert sorted(os.listdir(path / "m")) == ["a", "b", "sub"]
    assert (path / "m" / "b").read_bytes() == b"22"


def test_it_outlives_the_server(bucket: Store, mount: Mounter, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("a", b"1")
    path = mount(bucket)
    name = socket_of(path)
    for _ in range(2):
        follow(path, lambda pid: os.kill(pid, signal.SIGKILL))
        wait_for(lambda: json.loads(send_call(name, "status"))["result"]["pid"] == status(path)["pid"])
    by_attribute = asked_by_attribute(monkeypatch)
    assert mounts.refresh(path / "a") == [path / "a"]
    assert by_attribute == []
    assert [file.name for file in name.parent.glob("*.new")] == []


def send_call(name: Path, call: str, **keys: object) -> bytes:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(15)
        fd = os.open(name, os.O_PATH)
        try:
            client.connect(f"/proc/self/fd/{fd}")
        except ConnectionRefusedError:
            return b'{"result": {"pid": 0}}'
        finally:
            os.close(fd)
        client.sendall(json.dumps({"format": 1, "call": call, **keys}).encode() + b"\n")
        return read_all(client)


def test_it_answers_while_the_bucket_is_silent_and_every_worker_waits(bucket: Store, mount: Mounter) -> None:
    bucket.put("m/a", b"1")
    with FaultyLink(bucket.server.port) as link:
        path = mount(bucket, endpoint_url=link.endpoint, metadata_ttl=0, retry_timeout="30s")
        link.stalled = True
        link.break_all()
        waiting = [
            subprocess.Popen(["ls", path / f"d{n}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for n in range(12)
        ]
        try:
            assert status(path)["pid"]
            # Its names cannot be looked up now: the directory above is refreshed.
            assert mounts.refresh(path / "m" / "a") == [path]
        finally:
            link.stalled = False
            link.break_all()
            for process in waiting:
                process.kill()
                process.wait(20)


def test_a_mount_in_use_ends_by_a_stop(bucket: Store, mount: Mounter) -> None:
    bucket.put("a", b"1")
    path = mount(bucket)
    shown = status(path)
    with (path / "a").open("rb") as file:
        assert file.read() == b"1"
        mounts.stop(path)
        assert mountinfo.mounted_at(path) is None
    wait_for(lambda: not is_running(shown["pid"]) and not is_running(shown["supervisor"]))


# a mount without a socket


@pytest.mark.parametrize("fault", ["missing", "stale", "symlink", "file", "another user's"])
def test_a_mount_whose_socket_is_not_there_is_asked_as_before(
    fault: str, bucket: Store, mount: Mounter, monkeypatch: pytest.MonkeyPatch, short: Path, obsfs: Run
) -> None:
    bucket.put("a", b"1")
    path = mount(bucket)
    name = socket_of(path)
    other = ControlServer({"status": lambda _: {"pid": -1}, "refresh": lambda _: {}}, stop=lambda: None)
    name.unlink()
    if fault == "stale":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
            gone.bind(str(short / "s"))
        (short / "s").rename(name) if name.parent.stat().st_dev == short.stat().st_dev else name.touch()
    elif fault == "symlink":
        other.open(short / "s")
        name.symlink_to(short / "s")
    elif fault == "file":
        name.write_text("{}")
    elif fault == "another user's":
        other.open(name)
        os.chown(name, NOBODY, NOBODY)
    by_attribute = asked_by_attribute(monkeypatch)
    server = status(path)["pid"]
    assert server > 0
    assert mounts.refresh(path / "a") == [path / "a"]
    _, after = mounts.replace_server(path)
    assert by_attribute[:3] == ["status", "refresh", "status"] and "upgrade" in by_attribute
    # The successor has put its own socket there.
    wait_for(lambda: name.exists() and json.loads(send_call(name, "status"))["result"]["pid"] == after["pid"])
    other.close()
    assert stat.S_ISSOCK(name.lstat().st_mode) and name.lstat().st_uid == os.geteuid()
    assert obsfs("umount", path).code == 0
    assert not os.path.lexists(name)


def test_a_stop_needs_the_socket(bucket: Store, mount: Mounter) -> None:
    path = mount(bucket)
    socket_of(path).unlink()
    with pytest.raises(UsageError, match=f"the mount {path} has no control socket: .* `?obsfs umount --lazy {path}"):
        mounts.stop(path)
    with pytest.raises(UsageError, match="no obsfs is mounted on"):
        mounts.stop(path.parent)


def test_the_socket_of_a_mount_of_another_user_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    other = Impostor(tmp_path / "m", user=NOBODY, status={"pid": 1})
    asked: list[str] = []
    impostor = ControlServer({"status": lambda path: {"pid": asked.append(path)}}, stop=lambda: None)
    impostor.open(state.control_path(other.entry.minor))
    try:
        assert [info.state for info in mounts.find_mounts(other.path)] == ["another user's"]
        assert mounts.refresh(other.path) == []
        for call in (mounts.status, mounts.stop, mounts.replace_server):
            with pytest.raises(UsageError, match="another user's"):
                call(other.path)
        assert (asked, other.asked) == ([], 0)
    finally:
        impostor.close()
        other.close()


def test_a_server_that_is_stopped_is_not_waited_for(
    bucket: Store, mount: Mounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, well = mount(bucket), mount(bucket)
    monkeypatch.setattr(asking, "ASK_SECONDS", 2.0)
    pid = status(stopped)["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        states = {info.entry.mountpoint: info.state for info in mounts.find_mounts()}
        assert (states[stopped], states[well]) == ("not answering", "mounted")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: mounts.find_mounts(stopped)[0].state == "mounted")


# who may ask, and what is refused


def test_another_user_is_refused_even_where_the_socket_can_be_reached(serve_calls: Callable[..., Path]) -> None:
    path = serve_calls()
    path.parent.chmod(0o755)
    path.chmod(0o666)
    code = (
        "import socket, sys\n"
        "client = socket.socket(socket.AF_UNIX)\n"
        "client.settimeout(10)\n"
        "client.connect(sys.argv[1])\n"
        'try:\n    client.sendall(b\'{"call": "echo"}\\n\')\n    print(client.recv(100))\n'
        "except OSError as error:\n    print(b'')\n"
    )
    command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable, "-I", "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "b''\n"
    assert json.loads(send(path, b'{"call": "echo"}\n'))["result"] == {"path": ""}


def test_a_socket_that_another_user_serves_is_not_believed(short: Path) -> None:
    """It has our name on it, and another user's process behind it."""
    short.chmod(0o777)
    code = (
        "import os, socket, sys\n"
        "listener = socket.socket(socket.AF_UNIX)\n"
        "listener.bind(sys.argv[1])\n"
        "listener.listen()\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = ["setpriv", f"--reuid={NOBODY}", "--clear-groups", sys.executable, "-I", "-c", code, str(short / "s")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"\n"
        os.chown(short / "s", os.geteuid(), os.getegid())
        with pytest.raises(PermissionError, match="another user serves"):
            control.connect(short / "s")
        assert process.stdin
        process.stdin.close()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"x" * (10 << 20), "not one JSON object on one line"),
        (b"\n", "not one JSON object"),
        (b"\x00\xff\xfe\n", "not one JSON object"),
        (b"[" * 60_000 + b"\n", "not one JSON object"),
        (b'["status"]\n', "not one JSON object"),
        (b'{"call": "status"}\n{"call": "status"}\n', "not one JSON object"),
        (b"{}\n", "names no call"),
        (b'{"call": 5}\n', "names no call"),
        (b'{"call": "echo", "path": ["a"]}\n', "names no call"),
        (b'{"call": "format_disk"}\n', "does not know that call"),
        (b'{"format": 2, "call": "echo"}\n', "reads requests up to format 1"),
        (b'{"format": "x", "call": "echo"}\n', "reads requests up to format 1"),
        (b'{"call": "fail"}\n', "internal error: ZeroDivisionError"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_what_is_not_a_request_is_refused_in_one_sentence(
    data: bytes, reason: str, serve_calls: Callable[..., Path]
) -> None:
    path = serve_calls(fail=lambda path: {"path": 1 // 0})
    answer = send(path, data)
    assert answer.count(b"\n") == 1
    message = json.loads(answer)
    assert message["format"] == 1 and "result" not in message
    assert reason in message["error"]["message"] and "\n" not in message["error"]["message"]
    with pytest.raises(UsageError, match=reason):
        control.parse_answer(answer)
    assert json.loads(send(path, b'{"call": "echo", "path": "a", "later": [1]}\n'))["result"] == {"path": "a"}


def test_a_client_that_sends_nothing_holds_nobody_up(
    serve_calls: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "CALL_SECONDS", 0.5)
    path = serve_calls()
    silent = [socket.socket(socket.AF_UNIX) for _ in range(control._MAX_CLIENTS)]
    try:
        for number, client in enumerate(silent):
            client.settimeout(20)
            client.connect(str(path))
            if number % 2:
                client.sendall(b'{"call": ')
        for client in silent:
            assert read_all(client) == b""
        assert json.loads(send(path, b'{"call": "echo"}\n'))["result"] == {"path": ""}
    finally:
        for client in silent:
            client.close()


def test_a_client_that_does_not_read_its_answer_is_left(
    serve_calls: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "CALL_SECONDS", 0.5)
    ended = threading.Event()
    path = serve_calls(stop=ended.set, long=lambda _: {"text": "x" * (8 << 20)})
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        client.sendall(b'{"call": "long"}\n')
        time.sleep(1.0)
        assert len(read_all(client)) < 8 << 20
    assert not ended.is_set()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b'{"format": 2, "result": {}}\n', "served by a later version"),
        (b'{"format": 1}\n', "without a result"),
        (b'{"format": 1, "result": 5}\n', "without a result"),
        (b"x" * (control.MAX_ANSWER_BYTES + 100), "not one JSON object"),
        (b'{"error": {"message": "no", "remedy": "go"}}\n', "^no: go$"),
    ],
    ids=lambda value: str(value[:20]),
)
def test_an_answer_that_is_none_is_an_error(
    answer: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    liar = Impostor(tmp_path / "m")
    listener = socket.socket(socket.AF_UNIX)
    monkeypatch.setenv("XDG_STATE_HOME", home := tempfile.mkdtemp(dir="/tmp"))
    try:
        listener.bind(str(state.control_path(liar.entry.minor)))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client, suppress(OSError):
                client.recv(1 << 16)
                client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        (outcome,) = ask([Question(liar.entry, "status")])
        assert isinstance(outcome, UsageError)
        with pytest.raises(UsageError, match=reason):
            raise outcome
        assert liar.asked == 0
    finally:
        listener.close()
        liar.close()
        shutil.rmtree(home)


def test_a_socket_that_is_replaced_stays(short: Path) -> None:
    """A successor may have put its own there when a server ends."""
    first, second = (ControlServer({"echo": lambda _: {"n": 0}}, stop=lambda: None) for _ in range(2))
    first.open(short / "s")
    second.open(short / "s")
    first.close()
    assert json.loads(send(short / "s", b'{"call": "echo"}\n'))["result"] == {"n": 0}
    second.close()
    assert list(short.iterdir()) == []
    with pytest.raises(OSError) as caught:
        control.connect(short / "s")
    assert caught.value.errno == errno.ENOENT


def test_paths_come_back_as_they_were(bucket: Store, mount: Mounter) -> None:
    names = ("a b", "a\nb", "模型", 'q"', "a'b")
    for name in names:
        bucket.put(f"{name}/x", b"1")
    path = mount(bucket)
    entry = mountinfo.mounted_at(path)
    assert entry is not None
    questions = [Question(entry, "refresh", Path(name, "x")) for name in names]
    assert ask(questions) == [Answer(Path(name, "x"), {"path": f"{name}/x"}) for name in names]
    for bad in ("../x", "a b/../../x"):
        (outcome,) = ask([Question(entry, "refresh", Path(bad))])
        assert isinstance(outcome, UsageError)
    (outcome,) = ask([Question(entry, "refresh", Path("a\udcff"))])
    assert isinstance(outcome, Answer) and outcome.path == Path()
