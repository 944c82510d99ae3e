"""A small hub of our own: the parts of the APIs of Hugging Face and of ModelScope that their libraries ask."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Serves the files of a directory as ``org/name``. `token`, if any, is asked for; `broken` bytes are sent wrong."""

    def __init__(self, directory: Path) -> None:
        hub = self
        self.token = ""
        self.is_wrong = False
        self.requests: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.requests.append(self.path)
                parts = urlsplit(self.path)
                path, query = unquote(parts.path), parse_qs(parts.query)
                if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self.answer(401, b'{"error": "who are you?"}')
                elif re.fullmatch(r"/api/models/org/name(/revision/[^/]+)?", path):
                    self.answer(200, hub.model_info(directory))
                elif found := re.fullmatch(rf"/org/name/resolve/{COMMIT}/(.+)", path):
                    self.redirect(f"/cdn/{found[1]}")
                elif path == "/api/v1/models/org/name/repo/files":
                    self.answer(200, hub.file_list(directory))
                elif path == "/api/v1/models/org/name/repo":
                    self.send_file(query["FilePath"][0])
                elif path.startswith("/cdn/"):
                    self.send_file(path.removeprefix("/cdn/"))
                else:
                    self.answer(404, b'{"error": "Repository not found"}')

            do_HEAD = do_GET

            def redirect(self, place: str) -> None:
                self.send_response(302)
                self.send_header("Location", place)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def send_file(self, name: str) -> None:
                data = (directory / name).read_bytes()
                if hub.is_wrong and name.endswith(".safetensors"):
                    data = data[:-1] + bytes([data[-1] ^ 1])
                first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()  # type: ignore[union-attr]
                self.answer(206, data[int(first) : int(last) + 1])

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @staticmethod
    def _files(directory: Path) -> list[tuple[str, int, str]]:
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        return [
            (path.relative_to(directory).as_posix(), path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in paths
        ]

    def model_info(self, directory: Path) -> bytes:
        siblings = []
        for path, size, sha256 in self._files(directory):
            entry: dict[str, object] = {"rfilename": path, "size": size, "blobId": sha256[:40]}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
            siblings.append(entry)
        return json.dumps({"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": siblings}).encode()

    def file_list(self, directory: Path) -> bytes:
        files: list[dict[str, object]] = [{"Path": "sub", "Name": "sub", "Type": "tree", "Size": 0}]
        for path, size, sha256 in self._files(directory):
            files.append({"Path": path, "Name": path, "Type": "blob", "Size": size, "Sha256": sha256})
        return json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode()

    def __enter__(self) -> LocalHub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
