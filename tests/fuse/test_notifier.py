"""The process that writes to the kernel; here, to a socket."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from obsfs.fuse.kernel import notify_helper, wire
from obsfs.fuse.kernel.notifier import Notifier
from tests.conftest import random_bytes

NOTICE = wire.inval_entry(1, b"name")


@pytest.fixture
def ends() -> Iterator[tuple[Notifier, socket.socket]]:
    near, far = socket.socketpair()
    near.settimeout(10)
    with near, far:
        notifier = Notifier(far.fileno())
        yield notifier, near
        notifier.close()


def the_process() -> psutil.Process:
    (found,) = (child for child in psutil.Process().children() if child.cmdline()[-1:] == [notify_helper.FORMAT])
    return found


def received(near: socket.socket, size: int) -> bytes:
    return near.recv(size, socket.MSG_WAITALL)


def test_messages_arrive(ends: tuple[Notifier, socket.socket]) -> None:
    notifier, near = ends
    messages = [wire.inval_entry(1, name) for name in (b"a", b"b" * 255)]
    notifier.write(messages)
    assert received(near, len(b"".join(messages))) == b"".join(messages)


def test_bytes_are_stored_unless_they_have_gone_meanwhile(ends: tuple[Notifier, socket.socket], tmp_path: Path) -> None:
    notifier, near = ends
    data = random_bytes(20_000)
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "places").write_bytes(struct.pack("3Q", 0, 77, 0))
    with (tmp_path / "data").open("rb") as file, (tmp_path / "places").open("rb") as places:
        # What cannot be read at all, as from a bad disk, leaves the process as it is.
        directory = os.open(tmp_path, os.O_RDONLY)
        assert notifier.store(5, directory, 0, 10_000, (places.fileno(), 8, 77))
        os.close(directory)
        for word, start in ((77, 4096), (78, 0), (77, 8192)):
            assert notifier.store(5, file.fileno(), start, 10_000, (places.fileno(), 8, word))
        for start in (4096, 8192):
            expected = wire.store(5, start, 10_000) + data[start : start + 10_000]
            assert received(near, len(expected)) == expected
    notifier.write([NOTICE])
    assert received(near, len(NOTICE)) == NOTICE


def test_what_is_to_be_stored_does_not_wait(ends: tuple[Notifier, socket.socket], tmp_path: Path) -> None:
    notifier, near = ends
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    with (tmp_path / "data").open("r+b") as file:
        took = [notifier.store(5, file.fileno(), 0, 1 << 20, (file.fileno(), 0, 0)) for _ in range(2000)]
    assert took[0] and not took[-1]
    near.close()


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
    assert received(near, 2 * len(NOTICE)) == 2 * NOTICE


def test_one_that_cannot_start_is_not_tried_for_ever(
    ends: tuple[Notifier, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    notifier, _ = ends
    monkeypatch.setattr("sys.executable", "/bin/false")
    for _ in range(10):
        with pytest.raises(OSError):
            notifier.write([NOTICE])
    monkeypatch.undo()
    with pytest.raises(OSError):
        notifier.write([NOTICE])


def test_it_has_no_environment_and_no_descriptor_of_ours(ends: tuple[Notifier, socket.socket]) -> None:
    notifier, _ = ends
    notifier.write([NOTICE])
    process = the_process()
    assert set(process.environ()) <= {"LD_LIBRARY_PATH"}
    files = [path.readlink() for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert {str(name).partition(":")[0] for name in files} == {"socket", "pipe", "/dev/null", "/memfd"}  # its program
    notifier.close()
    assert not process.is_running()
