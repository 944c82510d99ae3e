"""A server that says what no S3 server would: for faults that none can be brought to show."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class Answer(NamedTuple):
    """`body` is sent in chunks, without a length, when it is an iterable of pieces."""

    status: int = 200
    body: bytes | Iterable[bytes] = b""
    headers: Mapping[str, str] = {}


def entry(
    key: str, size: object = 1, *, etag: str = '"e"', modified: str = "2026-01-01T00:00:00Z", more: str = ""
) -> str:
    """One object of a listing."""
    return (
        f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified><ETag>{escape(etag)}</ETag>"
        f"<Size>{size}</Size>{more}</Contents>"
    )


def listing(*entries: str, token: str | None = None, is_truncated: bool = False) -> Answer:
    """A page of objects."""
    next_token = f"<NextContinuationToken>{token}</NextContinuationToken>" if token is not None else ""
    last = str(is_truncated or token is not None).lower()
    body = f"<ListBucketResult><IsTruncated>{last}</IsTruncated>{next_token}{''.join(entries)}</ListBucketResult>"
    return Answer(200, body.encode(), {"Content-Type": "application/xml"})


def endless(piece: bytes = b" " * (1 << 20)) -> Iterable[bytes]:
    """A body without end: who reads it all fills this machine's memory."""
    while True:
        yield piece


class HostileServer:
    """Answers each request by `answer(method, key, query)`; what it returns None for is not there."""

    def __init__(self, answer: Callable[[str, str, dict[str, str]], Answer | None]) -> None:
        self.requests: list[tuple[str, str]] = []
        self.sent = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
                key = unquote(url.path).lstrip("/").partition("/")[2]
                outer.requests.append((self.command, key))
                missing = Answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
                self._reply(answer(self.command, key, query) or missing)

            do_HEAD = do_GET

            def _reply(self, found: Answer) -> None:
                self.send_response(found.status)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                if isinstance(found.body, bytes):
                    if "Content-Length" not in found.headers:
                        self.send_header("Content-Length", str(len(found.body)))
                    self.end_headers()
                    if self.command != "HEAD":
                        self.wfile.write(found.body)
                    return
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                try:
                    for piece in found.body:
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                        outer.sent += len(piece)
                    self.wfile.write(b"0\r\n\r\n")
                except OSError:
                    self.close_connection = True

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HostileServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
