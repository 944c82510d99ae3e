"""An S3 server of one's own: SeaweedFS in a temporary directory, on free ports of the loopback interface."""

from __future__ import annotations

import glob
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from obsfs.demo import lifeline
from obsfs.errors import UnavailableError, UsageError
from obsfs.extras import remedy
from obsfs.store.session import new_session

_START_SECONDS = 60.0
_END_SECONDS = 10.0
_TRIES = 3
_GRPC = 10_000
"""SeaweedFS also takes each port plus this one."""
_GROWTH = "[master.volume_growth]\ncopy_1 = 1\n"
"""Each bucket takes one volume at a time, instead of seven at once."""
_SOCKETS = Path("/tmp")
"""Where SeaweedFS puts a unix socket for each of its ports, and leaves it."""


def program_path(name: str) -> str | None:
    """The path of a program that a Python package brought along, or that is on the PATH; None when it is missing."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def find_program(name: str, extra: str) -> str:
    """The path of a program that a Python package brought along. Raises UsageError, naming the `extra` that has it."""
    found = program_path(name)
    if found is None:
        raise UsageError(f"the program {name} is missing", remedy(extra))
    return found


class EmbeddedServer:
    """SeaweedFS, running while the object is open. Use it in a ``with`` statement.

    It ends with this process, also when that is killed. `endpoint` is its URL, `access_key` and `secret_key` are made
    for it, or given. Raises UsageError when the program is missing, UnavailableError when it does not start.
    """

    def __init__(
        self, directory: Path | None = None, *, access_key: str = "obsfs-demo", secret_key: str | None = None
    ) -> None:
        self._program = find_program("weed", "demo")
        self.directory = Path(tempfile.mkdtemp(prefix="obsfs-server-", dir=directory))
        self.access_key = access_key
        self.secret_key = secret_key or secrets.token_hex(20)
        for attempt in range(1, _TRIES + 1):
            try:
                self._start()
                return
            except UnavailableError:
                self.stop()
                if attempt == _TRIES:
                    shutil.rmtree(self.directory, ignore_errors=True)
                    raise
            except BaseException:
                self.close()
                raise

    def _start(self) -> None:
        ports = _free_ports(4)
        self.ports = {*ports, *(port + _GRPC for port in ports)}
        self.filer_port, self.port = ports[2:]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        config = self.directory / "s3.json"
        config.touch(mode=0o600)
        keys = {"accessKey": self.access_key, "secretKey": self.secret_key}
        identity = {"name": "demo", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
        config.write_text(json.dumps({"identities": [identity]}))
        (self.directory / "master.toml").write_text(_GROWTH)
        data = self.directory / "data"
        data.mkdir(exist_ok=True)
        arguments = [
            *(sys.executable, "-I", "-S", lifeline.__file__, glob.escape(str(self.directory))),
            *(self._program, f"-logdir={self.directory}", "server"),
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-filer",
            "-s3",
            f"-s3.config={config}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-master.port={ports[0]}",
            f"-volume.port={ports[1]}",
            f"-filer.port={ports[2]}",
            f"-s3.port={ports[3]}",
            "-volume.max=1000",
        ]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self.directory, start_new_session=True
            )
        self._wait()

    def _wait(self) -> None:
        client = self.client(connect_timeout=1, read_timeout=2)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                client.create_bucket(Bucket="obsfs-started")
                client.delete_bucket(Bucket="obsfs-started")
                return
            except (BotoCoreError, ClientError):
                time.sleep(0.1)
        raise UnavailableError(f"SeaweedFS did not start within {_START_SECONDS:.0f} s", "try again")

    def client(self, **config: Any) -> Any:
        """A botocore client for it; `config` goes to ``botocore.config.Config``."""
        config.setdefault("retries", {"total_max_attempts": 1})
        return new_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, **config),
        )

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which obsfs, or any other S3 client, finds it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def upload(self, directory: Path, bucket: str, prefix: str = "") -> int:
        """Put all files under a directory into a bucket (made if need be); the number of bytes."""
        client = self.client()
        if bucket not in [entry["Name"] for entry in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=bucket)
        total = 0
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                client.put_object(Bucket=bucket, Key=prefix + path.relative_to(directory).as_posix(), Body=file)
            total += path.stat().st_size
        return total

    def stop(self) -> None:
        """End the process; its data stays."""
        self.process.terminate()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def close(self) -> None:
        """End the process, at once, and remove its data."""
        if hasattr(self, "process"):
            assert self.process.stdin
            self.process.stdin.close()
            try:
                self.process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
        for port in getattr(self, "ports", ()):
            for path in _SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
                path.unlink(missing_ok=True)

    def __enter__(self) -> EmbeddedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free_ports(count: int) -> list[int]:
    """Ports that are free, as are those 10000 above them."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 50_000)
        if port not in found and _is_free(port) and _is_free(port + _GRPC):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
