"""The process that writes to the kernel; here, to a socket."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import psutil
import pytest

from obsfs.fuse.kernel import wire
from obsfs.fuse.kernel.notifier import Notifier
from obsfs.fuse.kernel.pages import Pipe

NOTICE = wire.inval_entry(1, b"name")


@pytest.fixture
def ends() -> Iterator[tuple[Notifier, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.settimeout(10)
    with near, far:
        notifier = Notifier(far.fileno())
        yield notifier, near
        notifier.close()


def the_process() -> psutil.Process:
    (found,) = (child for child in psutil.Process().children() if child.cmdline()[-1].endswith("notifier.py"))
    return found


def test_messages_arrive(ends: tuple[Notifier, socket.socket]) -> None:
    notifier, near = ends
    messages = [wire.inval_entry(1, name) for name in (b"a", b"b" * 255)]
    notifier.write(messages)
    assert [near.recv(1000) for _ in messages] == messages
    pipe = Pipe()
    os.write(pipe._write_fd, b"more, by a pipe")
    notifier.splice(pipe.read_fd, 15)
    pipe.close()
    assert near.recv(1000) == b"more, by a pipe"


def test_an_error_is_told(ends: tuple[Notifier, socket.socket]) -> None:
    notifier, near = ends
    near.close()
    with pytest.raises(OSError) as raised:
        notifier.write([NOTICE])
    assert raised.value.errno == errno.EPIPE
    assert the_process().is_running()


def test_it_is_started_again_when_it_was_killed(ends: tuple[Notifier, socket.socket]) -> None:
    notifier, near = ends
    notifier.write([NOTICE])
    the_process().kill()
    with pytest.raises(OSError):
        notifier.write([NOTICE])
    notifier.write([NOTICE])
    assert [near.recv(1000) for _ in range(2)] == [NOTICE, NOTICE]


def test_one_that_cannot_start_is_not_tried_again(
    ends: tuple[Notifier, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    notifier, _ = ends
    monkeypatch.setattr("sys.executable", "/bin/false")
    for _ in range(2):
        with pytest.raises(OSError):
            notifier.write([NOTICE])
        monkeypatch.undo()


def test_it_has_no_environment_and_no_descriptor_of_ours(ends: tuple[Notifier, socket.socket]) -> None:
    notifier, _ = ends
    notifier.write([NOTICE])
    process = the_process()
    assert set(process.environ()) <= {"LD_LIBRARY_PATH"}
    assert sorted(os.listdir(f"/proc/{process.pid}/fd")) == ["0", "1", "2"]
    notifier.close()
    assert not process.is_running()
