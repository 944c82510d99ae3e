"""One library behind two real servers, of which one is stopped in mid-read, lags, or is far away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from obsfs.demo.server import EmbeddedServer
from tests.conftest import MIB, Mounter, Store, random_bytes, status
from tests.faulty import FaultyLink
from tests.library.test_push import Run


@pytest.fixture
def replica(bucket: Store, tmp_path: Path) -> Iterator[Store]:
    """The same bucket, and nothing in it yet, on a server of its own with the same keys."""
    with EmbeddedServer(tmp_path, access_key=bucket.server.access_key, secret_key=bucket.server.secret_key) as server:
        store = Store(server, bucket.name, server.client())
        store.client.create_bucket(Bucket=store.name)
        yield store


def both(first: Store, second: Store, key: str, data: bytes) -> None:
    assert first.put(key, data) == second.put(key, data)


@pytest.mark.slow
def test_a_replica_takes_over_in_mid_read(bucket: Store, replica: Store, mount: Mounter) -> None:
    data = random_bytes(60 * MIB)
    both(bucket, replica, "big.bin", data)
    both(bucket, replica, "dir/small.txt", b"small")
    with FaultyLink(replica.server.port) as near, FaultyLink(bucket.server.port) as far:
        near.bytes_per_second = 10e6
        far.delay = 0.2

        def die() -> None:
            assert near.cut.wait(60)
            near.refusing = True
            near.break_all()
            replica.server.process.kill()

        path = mount(bucket, endpoint_url=[near.endpoint, far.endpoint], connections=4)
        near.cut_after(20 * MIB)
        dying = threading.Thread(target=die)
        dying.start()
        read: list[bytes] = []
        longest = 0.0
        with (path / "big.bin").open("rb", buffering=0) as file:
            started = time.monotonic()
            while piece := file.read(MIB):
                read.append(piece)
                longest = max(longest, time.monotonic() - started)
                started = time.monotonic()
        dying.join()
        assert b"".join(read) == data
        assert longest < 10
        assert near.passed > 19 * MIB
        assert (path / "dir" / "small.txt").read_bytes() == b"small"
        shown = {site["endpoint"]: site for site in status(path)["endpoints"]}
        assert shown[near.endpoint]["failures"] >= 1
        assert shown[far.endpoint]["latency"] is not None
        assert status(path)["errors"] == 0


@pytest.mark.slow
def test_the_nearest_serves(bucket: Store, replica: Store, mount: Mounter) -> None:
    both(bucket, replica, "big.bin", random_bytes(60 * MIB))
    with FaultyLink(bucket.server.port) as far, FaultyLink(replica.server.port) as near:
        far.delay = 0.2
        path = mount(bucket, endpoint_url=[far.endpoint, near.endpoint])
        (path / "big.bin").read_bytes()
        assert near.passed > 3 * far.passed


@pytest.mark.slow
def test_a_replica_that_lags_is_noticed_and_never_mixed(
    bucket: Store, replica: Store, mount: Mounter, obsfs: Run
) -> None:
    old, new = random_bytes(9 * MIB, 1), random_bytes(9 * MIB, 2)
    replica.put("a.bin", old)
    bucket.put("a.bin", new)
    with FaultyLink(replica.server.port) as link:
        path = mount(bucket, endpoint_url=[bucket.server.endpoint, link.endpoint], retry_timeout=5)
        found = (path / "a.bin").read_bytes()
        assert found in (old, new)  # whichever listed it
        lagging = [site["lagging"] for site in status(path)["endpoints"]]
        assert sum(lagging) >= 1
        assert "lagged" in obsfs("status", path).out


@pytest.mark.slow
def test_what_is_written_goes_to_the_first_and_mistakes_are_told(
    bucket: Store, replica: Store, obsfs: Run, tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    endpoints = ("--endpoint-url", bucket.server.endpoint, "--endpoint-url", replica.server.endpoint)
    assert obsfs("push", tmp_path / "m", f"{bucket}/m@v1", *endpoints).code == 0
    assert "Contents" not in replica.client.list_objects_v2(Bucket=replica.name)
    assert obsfs("pull", f"{bucket}/m@v1", tmp_path / "a", *endpoints).code == 0
    (tmp_path / "m" / "config.json").write_text('{"other": 1}')
    for _ in range(3):  # whichever endpoint might be asked first
        refused = obsfs("push", tmp_path / "m", f"{bucket}/m@v1", *endpoints)
        assert (refused.code, "published already" in refused.err) == (2, True)
    assert obsfs("verify", f"{bucket}/m@v1", *endpoints).code == 0
    joined = f"{bucket.server.endpoint},{replica.server.endpoint}"
    assert obsfs("models", bucket, OBSFS_ENDPOINT_URL=joined).code == 0
    dead = ("--endpoint-url", "http://127.0.0.1:1", "--endpoint-url", "http://127.0.0.1:2")
    done = obsfs("models", bucket, *dead)
    assert (done.code, done.err.count("\n")) == (2, 1)
    wrong = obsfs("models", bucket, "--endpoint-url", "nonsense", "--endpoint-url", "http://127.0.0.1:2")
    assert "no http://" in wrong.err
