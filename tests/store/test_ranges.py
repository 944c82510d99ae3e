"""The body of a range request on its way out of the socket."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPResponse
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from obsfs.store.s3.ranges import RangeBody
from tests.conftest import MIB, random_bytes

KIB = 1 << 10
_RECORD = 16 * KIB
_SO_RCVBUFFORCE = 33


class TornTLS:
    """A TLS server on one connection: sends an HTTP answer in records of its own choice, and stops within one."""

    def __init__(self, certificate: Path) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self.go_on = threading.Event()

    def answer(self, records: list[bytes], torn: int, missing: int) -> None:
        """Send the records up to number `torn`, but the last `missing` bytes of that; and the rest when told to."""
        peer, _ = self._listener.accept()
        came, going = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = self._context.wrap_bio(came, going, server_side=True)
        with peer:
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    peer.sendall(going.read())
                    came.write(peer.recv(1 << 16))
            for record in records[: torn + 1]:
                tls.write(record)
            start = going.read()
            for record in records[torn + 1 :]:
                tls.write(record)
            peer.sendall(start[:-missing])
            assert self.go_on.wait(20)
            peer.sendall(start[-missing:] + going.read())
            peer.recv(1)

    def close(self) -> None:
        self.go_on.set()
        self._listener.close()


@pytest.fixture
def torn(certificate: Path) -> Iterator[TornTLS]:
    with closing(TornTLS(certificate)) as server:
        yield server


@pytest.mark.parametrize("tail", [_RECORD, 256 * KIB, 768 * KIB, 780 * KIB, MIB, 2 * MIB])
def test_no_wake_up_waits_for_bytes_that_tls_holds_back(torn: TornTLS, tail: int) -> None:
    """A record across the end of a block is torn on its way: most of what is behind the block has left the socket."""
    data = random_bytes(2 * MIB + tail)
    starts = [0, *range(_RECORD - 1 * KIB, len(data), _RECORD), len(data)]  # one begins 1 KiB before each block's end
    records = [_head(data), *(data[start:stop] for start, stop in pairwise(starts) if stop > start)]
    torn_one = next(n for n in range(len(records)) if sum(map(len, records[1 : n + 1])) > 2 * MIB)
    threading.Thread(target=torn.answer, args=(records, torn_one, 100), daemon=True).start()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection(torn.address)
    # A window that is nearly full wakes a reader too, and with a small buffer it soon is.
    plain.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 * MIB)
    with context.wrap_socket(plain) as connection:
        connection.settimeout(5)
        body = _body(connection, len(data))
        assert _take(body, MIB) == data[:MIB]
        threading.Timer(0.3, torn.go_on.set).start()
        assert _take(body, MIB) == data[MIB : 2 * MIB]
        assert _take(body, tail) == data[2 * MIB :]


def test_a_slow_connection_is_not_taken_for_a_silent_one() -> None:
    """It brings far less than a wake-up's worth within the timeout, but never nothing."""
    data = random_bytes(2 * MIB)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        ours.settimeout(0.5)

        def trickle() -> None:
            with suppress(OSError):  # it is closed before all has come
                theirs.sendall(_head(data))
                for start in range(0, len(data), 20 * KIB):
                    theirs.sendall(data[start : start + 20 * KIB])
                    time.sleep(0.02)

        threading.Thread(target=trickle, daemon=True).start()
        body = _body(ours, len(data))
        for start in range(0, MIB, 512 * KIB):
            assert _take(body, 512 * KIB) == data[start : start + 512 * KIB]


def _head(data: bytes) -> bytes:
    return b"HTTP/1.1 206 Partial Content\r\nContent-Length: %d\r\n\r\n" % len(data)


def _body(connection: socket.socket, length: int) -> RangeBody:
    answer = HTTPResponse(connection)
    answer.begin()
    return RangeBody(SimpleNamespace(_fp=answer, connection=SimpleNamespace(sock=connection)), length)


def _take(body: RangeBody, size: int) -> bytes:
    buffer = bytearray(size)
    body.readinto(memoryview(buffer))
    return bytes(buffer)


def test_the_headers_of_an_answer_are_acknowledged_at_once() -> None:
    """Else a server that sends headers and body apart waits for the kernel's delayed acknowledgement."""
    told: list[tuple[int, int, int]] = []
    connection = SimpleNamespace(setsockopt=lambda *option: told.append(option))
    RangeBody(SimpleNamespace(readinto=None, connection=SimpleNamespace(sock=connection)), 10)
    assert told == [(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)]
