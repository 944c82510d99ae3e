"""An S3 server that is wrong in ways of which no real server has all: for answers, not for bytes.

It has objects in memory, lists them, and gives ranges of them. A test says what is odd about it.
"""

from __future__ import annotations

import hashlib
import http.server
import re
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

OLD = 1_700_000_000.0


@dataclass
class Thing:
    """An object. `etag` and `modified` are left out of answers where they are empty."""

    data: bytes
    modified: float = OLD
    has_etag: bool = True
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"' if self.has_etag else ""


@dataclass
class Request:
    method: str
    key: str
    query: dict[str, str]
    headers: Mapping[str, str] | Message


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    is_chunked: bool = False


def refusal(status: int, code: str = "", message: str = "no", **headers: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode() if code else b""
    found = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, body, {"Content-Type": "application/xml", **found})


class OddServer:
    """`choose` gives the answer to a request, or None for the usual one. `asked` has all requests.

    `is_v1`: it does not know ``list-type=2``. `page`: names in a page. `is_chunked`: bodies come without their length.
    `ignores_pins`: ``If-Match`` and ``If-Unmodified-Since`` do not count. `forgets`: ``etag``, ``last-modified``, which
    are left out of what GET and HEAD answer.
    """

    def __init__(
        self,
        things: Mapping[str, Thing] | None = None,
        choose: Callable[[Request], Answer | None] = lambda request: None,
        *,
        is_v1: bool = False,
        page: int = 1000,
        is_chunked: bool = False,
        ignores_pins: bool = False,
        forgets: tuple[str, ...] = (),
        certificate: Path | None = None,
    ) -> None:
        self.things = dict(things or {})
        self.asked: list[Request] = []
        self._choose = choose
        self._is_v1, self._page, self._is_chunked = is_v1, page, is_chunked
        self._ignores_pins, self._forgets = ignores_pins, forgets
        odd = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                url = urlsplit(self.path)
                key = unquote(url.path).lstrip("/").partition("/")[2]
                size = int(self.headers.get("Content-Length") or 0)
                if size:
                    self.rfile.read(size)
                request = Request(self.command, key, dict(parse_qsl(url.query, True)), self.headers)
                odd.asked.append(request)
                self.reply(odd._choose(request) or odd._answer(request))

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def reply(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                if answer.is_chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                elif "Content-Length" not in answer.headers:
                    self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                if answer.is_chunked:
                    for start in range(0, len(answer.body), 50_000):
                        piece = answer.body[start : start + 50_000]
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    self.wfile.write(b"0\r\n\r\n")
                else:
                    self.wfile.write(answer.body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self.endpoint = self.endpoint.replace("http:", "https:")
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def gets(self, key: str) -> list[Request]:
        return [request for request in self.asked if request.method == "GET" and request.key == key]

    def _answer(self, request: Request) -> Answer:
        if not request.key:
            return self._listing(request.query)
        thing = self.things.get(request.key)
        if thing is None:
            return refusal(404, "NoSuchKey" if request.method == "GET" else "")
        headers = {"Accept-Ranges": "bytes", **thing.headers}
        if thing.etag and "etag" not in self._forgets:
            headers["ETag"] = thing.etag
        if thing.modified and "last-modified" not in self._forgets:
            headers["Last-Modified"] = formatdate(thing.modified, usegmt=True)
        wanted = request.headers.get("If-Match", thing.etag)
        if wanted != thing.etag and not self._ignores_pins:
            return refusal(412, "PreconditionFailed")
        if request.method == "HEAD":
            return Answer(200, b"", {**headers, "Content-Length": str(len(thing.data))})
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        if span is None:
            return Answer(200, thing.data, headers, self._is_chunked)
        start, stop = int(span[1]), min(int(span[2]) + 1, len(thing.data))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(thing.data)}"
        return Answer(206, thing.data[start:stop], headers, self._is_chunked)

    def _listing(self, query: Mapping[str, str]) -> Answer:
        is_v2 = query.get("list-type") == "2" and not self._is_v1
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = (query.get("continuation-token") or query.get("start-after", "")) if is_v2 else query.get("marker", "")
        names = dict[str, bool]()
        for key in sorted(self.things):
            if key.startswith(prefix):
                head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key[len(prefix) :], "", "")
                names.setdefault(prefix + head + found, bool(found))
        left = [name for name in names if name > after]
        shown, is_cut = left[: self._page], len(left) > self._page
        body = f"<IsTruncated>{str(is_cut).lower()}</IsTruncated>"
        if is_cut and is_v2:
            body += f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>"
        for name in shown:
            if names[name]:
                body += f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
                continue
            thing = self.things[name]
            etag = f"<ETag>{escape(thing.etag)}</ETag>" if thing.etag else ""
            date = f"<LastModified>{formatdate(thing.modified, usegmt=True)}</LastModified>" if thing.modified else ""
            body += f"<Contents><Key>{escape(name)}</Key><Size>{len(thing.data)}</Size>{etag}{date}</Contents>"
        return Answer(200, f"<ListBucketResult>{body}</ListBucketResult>".encode(), {"Content-Type": "application/xml"})

    def __enter__(self) -> OddServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
