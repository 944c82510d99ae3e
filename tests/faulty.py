"""A TCP proxy before a real server, for what a real server does not do on demand: stall, break off, refuse.

It also notes the range requests that pass.
"""

from __future__ import annotations

import http.client
import http.server
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from obsfs.store.memory import MemoryStore

_HEAD = re.compile(rb"GET (\S+) HTTP/1\.1\r\n(.*?)\r\n\r\n", re.DOTALL)
_HEAD_BYTES = 128 << 10
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_RANGE = re.compile(rb"\r?\n?range: bytes=(\d+)-(\d+)", re.IGNORECASE)


class FaultyLink:
    """Forwards to `port` of this machine. Set `stalled`, `stalled_listings` or `refusing` at any time, and have answers
    cut off. Requests that contain `stalled_text` wait while it is set.

    `bytes_per_second` is for each connection and direction, `delay` seconds for each piece of a
    request; `passed` counts the bytes of all answers, and `held` the requests that are kept waiting now.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.stalled = False
        self.stalled_listings = False
        self.stalled_text = b""
        self.refusing = False
        self.cut = threading.Event()
        self._left: int | None = None
        self._counting = threading.Lock()
        self.bytes_per_second: float | None = None
        self.ranges: list[tuple[int, int]] = []
        self.passed = 0
        self.held = 0
        self.delay = 0.0
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self._port))
            self._open |= {near, far}
            threading.Thread(target=self._requests, args=(near, far), daemon=True).start()
            threading.Thread(target=self._answers, args=(far, near), daemon=True).start()

    def _requests(self, near: socket.socket, far: socket.socket) -> None:
        seen = b""
        with suppress(OSError):
            while data := near.recv(65536):
                if self._is_stalled(data):
                    with self._counting:
                        self.held += 1
                    while self._is_stalled(data):
                        time.sleep(0.02)
                    with self._counting:
                        self.held -= 1
                if self.bytes_per_second:
                    time.sleep(len(data) / self.bytes_per_second)
                seen = (seen + data)[-_HEAD_BYTES:]
                while match := _HEAD.search(seen):
                    if (found := _RANGE.search(match[0])) is not None:
                        self.ranges.append((int(found[1]), int(found[2]) + 1))
                    seen = seen[match.end() :]
                time.sleep(self.delay)
                far.sendall(data)
        self._close(near, far)

    def _is_stalled(self, data: bytes) -> bool:
        is_text = bool(self.stalled_text) and self.stalled_text in data
        return self.stalled or is_text or (self.stalled_listings and b"list-type=2" in data)

    def _answers(self, far: socket.socket, near: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(65536):
                while self.stalled:
                    time.sleep(0.02)
                if self.bytes_per_second:
                    time.sleep(len(data) / self.bytes_per_second)
                near.sendall(passing := self._passing(data))
                self.passed += len(passing)
                if len(passing) < len(data):
                    break
        self._close(near, far)

    def cut_after(self, size: int) -> None:
        """Break off one answer, the one that passes byte number `size` from now; then set `cut`."""
        with self._counting:
            self._left = size
            self.cut.clear()

    def _passing(self, data: bytes) -> bytes:
        with self._counting:
            if self._left is None:
                return data
            if (left := self._left) < len(data):
                self._left = None
                self.cut.set()
                return data[:left]
            self._left -= len(data)
            return data

    def _close(self, *sockets: socket.socket) -> None:
        for end in sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
            self._open.discard(end)

    def break_all(self) -> None:
        """Every connection breaks off now."""
        self._close(*list(self._open))

    def __enter__(self) -> FaultyLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stalled = self.stalled_listings = False
        self.stalled_text = b""
        self._listener.close()
        self.break_all()


class FaultyServer:
    """An HTTP proxy before a real server: `choose` says, of each read by its number, what is wrong with it.

    ``500``, ``503``: refused so. ``reset``: the connection breaks off inside the body. ``short``: the body ends early.
    ``trailing``: something follows the body. ``shifted``: other bytes than were asked for, and says so. ``etag``: of
    another version. ``long``: more bytes than were asked for. ``flipped``: a bit of the body. ``stall``: silence inside
    the body. ``expired``: the token is over. With a `certificate` (and its key, in one PEM file) it speaks TLS.
    """

    def __init__(
        self,
        port: int,
        choose: Callable[[int, Any], str | None] = lambda number, headers: None,
        *,
        certificate: Path | None = None,
    ) -> None:
        faulty = self
        self.faults = dict[str, int]()
        self._count = 0
        self._counting = threading.Lock()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                is_read = self.command == "GET" and bool({"Range", "x-amz-checksum-mode"} & set(self.headers))
                with faulty._counting:
                    number = faulty._count
                    faulty._count += is_read
                fault = choose(number, self.headers) if is_read else None
                if fault is None and "expired" in (choose(-1, self.headers) or ""):
                    fault = "expired"
                if fault:
                    with faulty._counting:
                        faulty.faults[fault] = faulty.faults.get(fault, 0) + 1
                if fault in ("500", "503"):
                    self.refuse(int(fault), "InternalError" if fault == "500" else "SlowDown")
                elif fault == "expired":
                    self.refuse(403, "ExpiredToken")
                else:
                    self.forward(fault)

            do_HEAD = do_GET

            def refuse(self, status: int, code: str) -> None:
                body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body if self.command == "GET" else b"")

            def forward(self, fault: str | None) -> None:
                upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    upstream.putheader(name, value)
                upstream.endheaders()
                answer = upstream.getresponse()
                body = answer.read()
                upstream.close()
                headers = {name.lower(): value for name, value in answer.getheaders()}
                if fault == "etag":
                    headers["etag"] = '"00000000000000000000000000000000"'
                if fault == "shifted" and (said := _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))):
                    first, last, total = map(int, said.groups())
                    headers["content-range"] = f"bytes {first + 1}-{last + 1}/{total}"
                if fault == "long":
                    body += b"more"
                    headers["content-length"] = str(len(body))
                if fault == "flipped":
                    middle = len(body) // 2
                    body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
                self.send_response(answer.status)
                for name, value in headers.items():
                    if name not in ("connection", "transfer-encoding", "date", "server"):
                        self.send_header(name, value)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault in ("reset", "short", "stall"):
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    if fault == "stall":
                        faulty._over.wait(30)
                    if fault == "reset":
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.connection.close()
                    self.close_connection = True
                    return
                self.wfile.write(body + (b"HTTP/1.1 200 OK\r\n\r\n" if fault == "trailing" else b""))

            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def handle(self) -> None:
                with suppress(OSError, ValueError):
                    super().handle()

        self._over = threading.Event()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.endpoint = self.endpoint.replace("http:", "https:")
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> FaultyServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()


class ListedServer:
    """A server that lists a bucket in memory, of the given keys, as S3 does; each object is one byte long.

    For keys that SeaweedFS, itself a file system, does not take, and for more of them than it takes in a minute.
    `asked` has the prefix of each page that was asked for.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        listed = self
        self.asked: list[str] = []
        self._store = MemoryStore(dict.fromkeys(keys, b"1"))

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                given = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
                prefix, after = given.get("prefix", [""])[0], given.get("start-after", [""])[0]
                listed.asked.append(prefix)
                after = given.get("continuation-token", [after])[0]
                page = listed._store.page(prefix, after, int(given.get("max-keys", ["1000"])[0]))
                entry = "<Contents><Key>{}</Key><Size>1</Size><ETag>&quot;e&quot;</ETag></Contents>"
                below = "<CommonPrefixes><Prefix>{}</Prefix></CommonPrefixes>"
                body = "".join(entry.format(escape(info.key)) for info in page.objects)
                body += "".join(below.format(escape(name)) for name in page.prefixes)
                if not page.is_last:
                    body += f"<NextContinuationToken>{escape(page.last_name)}</NextContinuationToken>"
                state = f"<IsTruncated>{'false' if page.is_last else 'true'}</IsTruncated>"
                self._answer(200, f"<ListBucketResult>{state}{body}</ListBucketResult>".encode())

            def do_HEAD(self) -> None:
                key = unquote(urlsplit(self.path).path).split("/", 2)[2]
                self._answer(200 if key in listed._store else 404, b"1")

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", '"e"')
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> ListedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
