"""A link like the one to OBS, on one machine: latency to the first byte, a limit per connection, and one in all.

A network namespace behind a veth pair, each way of which is shaped by tc's token bucket; in it nginx as a reverse proxy
to SeaweedFS's unix socket, which waits before it answers and limits each connection. What a server computes to send
large files (SeaweedFS and nginx: 5.7 CPU seconds for 2 GiB) is nowhere else taken from its clients' processors,
so nginx sends them by itself, with sendfile(2) (0.4 CPU seconds). Needs root, Debian's ``iproute2``, ``nginx-light``
and ``libnginx-mod-http-lua``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn

from obsfs.demo.server import EmbeddedServer
from obsfs.errors import UsageError

_RELOAD_SECONDS = 1.0
_PACKAGES = "apt-get install iproute2 nginx-light libnginx-mod-http-lua"
_CONFIG = """
daemon off;
user root;
worker_processes 1;
pid {home}/nginx.pid;
error_log {home}/error.log;
include /etc/nginx/modules-enabled/*.conf;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {home}/body;
  proxy_temp_path {home}/proxy;
  client_max_body_size 0;
  keepalive_requests 1000000;
  upstream store {{ server unix:{socket}; keepalive 64; }}
  init_by_lua_block {{ etags = {{ {etags} }} }}
  server {{
    listen {address}:80 backlog=1024;
    {limit}
    location / {{
      access_by_lua_block {{
        ngx.sleep({latency})
        if etags[ngx.var.uri] and ngx.req.get_method() == "GET" then
          ngx.req.clear_header("If-Match")
          return ngx.exec("/files" .. ngx.var.uri)
        end
      }}
      proxy_pass http://store;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host {address}:80;
      proxy_request_buffering off;
      proxy_buffering on;
      proxy_buffers 64 64k;
      proxy_max_temp_file_size 0;
    }}
    location /files/ {{
      internal;
      root {home};
      etag off;
      sendfile on;
      tcp_nopush on;
      default_type application/octet-stream;
      header_filter_by_lua_block {{ ngx.header["ETag"] = etags[ngx.var.uri:sub(7)] }}
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Profile:
    """`latency` in seconds to the first byte, `per_connection` and `total` in 10^6 bytes per second (0: no limit)."""

    latency: float = 0.0
    per_connection: int = 0
    total: int = 0


PROFILES = {
    "lan": Profile(),
    "obs": Profile(0.030, 80, 400),
    "far": Profile(0.120, 20, 400),
    "waits": Profile(0.200),
}
"""`lan` is the server itself, and both cores are busy; `waits` is latency alone, so that waits can be counted."""


class SentFile(NamedTuple):
    """An object that nginx sends: ``/BUCKET/KEY``, its ETag with the quotes, and the file with the same bytes."""

    place: str
    etag: str
    path: Path


class Link:
    """The way to a server, shaped. Use it in a ``with`` statement; `endpoint` is its near end.

    What `sent` has is sent by nginx, unsigned and to whichever If-Match: it must not change.
    """

    _nginx: subprocess.Popen[bytes] | None = None

    def __init__(self, server: EmbeddedServer, profile: Profile, sent: Iterable[SentFile] = ()) -> None:
        if os.geteuid() != 0:
            raise UsageError("the emulated link needs root", "run as root")
        missing = [name for name in ("ip", "tc", "nginx") if shutil.which(name) is None]
        if missing:
            raise UsageError(f"the emulated link needs {', '.join(missing)}", _PACKAGES)
        self._name = f"obsfs{os.getpid() % 100000}"
        self._near, self._far = f"{self._name}a"[:15], f"{self._name}b"[:15]
        third = os.getpid() % 250 + 1
        self._home = Path(tempfile.mkdtemp(prefix="obsfs-link-"))
        address = f"10.213.{third}.2"
        self.endpoint = f"http://{address}:80"
        self._config = partial(
            _CONFIG.format,
            home=self._home,
            socket=f"/tmp/seaweedfs-s3-{server.port}.sock",
            address=address,
            latency=profile.latency,
            limit=f"limit_rate {profile.per_connection * 1000}k;" if profile.per_connection else "",
        )
        self._etags: list[str] = []
        self.send(*sent)
        try:
            self._build(profile, f"10.213.{third}")
        except BaseException:
            self.close()
            raise

    def send(self, *files: SentFile) -> None:
        """Have nginx send these as well."""
        for file in files:
            shown = self._home / "files" / file.place.lstrip("/")
            shown.parent.mkdir(parents=True, exist_ok=True)
            shown.symlink_to(file.path)
            self._etags.append(f"[ [[{file.place}]] ] = [[{file.etag}]],")
        (self._home / "nginx.conf").write_text(self._config(etags=" ".join(self._etags)))
        if self._nginx is not None:
            self._nginx.send_signal(signal.SIGHUP)
            time.sleep(_RELOAD_SECONDS)

    def _build(self, profile: Profile, network: str) -> None:
        _run("ip", "netns", "add", self._name)
        _run("ip", "link", "add", self._near, "type", "veth", "peer", "name", self._far, "netns", self._name)
        _run("ip", "addr", "add", f"{network}.1/24", "dev", self._near)
        _run("ip", "link", "set", self._near, "up")
        inside = ("ip", "netns", "exec", self._name)
        _run(*inside, "ip", "addr", "add", f"{network}.2/24", "dev", self._far)
        _run(*inside, "ip", "link", "set", self._far, "up")
        if profile.total:
            rate = f"{profile.total * 8}mbit"
            shape = ("root", "tbf", "rate", rate, "burst", "4mb", "latency", "50ms")
            _run(*inside, "tc", "qdisc", "replace", "dev", self._far, *shape)
            _run("tc", "qdisc", "replace", "dev", self._near, *shape)
        self._nginx = subprocess.Popen([*inside, "nginx", "-c", str(self._home / "nginx.conf")])
        deadline = time.monotonic() + 10
        while not (self._home / "nginx.pid").exists():
            if self._nginx.poll() is not None or time.monotonic() > deadline:
                self._fail()
            time.sleep(0.05)

    @property
    def received(self) -> int:
        """Bytes that came over the link so far, with the headers of every layer."""
        return int(Path(f"/sys/class/net/{self._near}/statistics/rx_bytes").read_text())

    def _fail(self) -> NoReturn:
        log = self._home / "error.log"
        said = log.read_text()[-300:] if log.exists() else ""
        raise UsageError(f"nginx did not start: {said}", _PACKAGES)

    def close(self) -> None:
        """Take everything down."""
        if self._nginx is not None:
            self._nginx.terminate()
            self._nginx.wait(10)
        subprocess.run(["ip", "netns", "del", self._name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._near], capture_output=True, check=False)
        shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _run(*arguments: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"`{' '.join(arguments)}` failed: {done.stderr.strip()}", _PACKAGES)
