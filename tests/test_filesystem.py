"""fsspec, pandas and pyarrow by URL, through the same cache as the mount."""

from __future__ import annotations

import base64
import errno
import gc
import hashlib
import inspect
import multiprocessing
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas
import pyarrow.parquet
import pytest
from aiobotocore.httpsession import AIOHTTPSession
from botocore.awsrequest import AWSResponse
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from s3fs import S3FileSystem

import obsfs
from obsfs.errors import UsageError
from obsfs.filesystem import OBSFile, OBSFileSystem
from tests.conftest import MIB, Mounter, Store, random_bytes, status, wait_for
from tests.faulty import FaultyLink
from tests.odd import OddServer, Thing, refusal


def test_importing_obsfs_is_enough(bucket: Store) -> None:
    bucket.put("dir/config.json", b'{"a": 1}\n{"b": 2}\n')
    with fsspec.open(f"{bucket}/dir/config.json", "rt") as file:
        assert list(file) == ['{"a": 1}\n', '{"b": 2}\n']
    filesystem = fsspec.filesystem("obs")
    assert isinstance(filesystem, obsfs.OBSFileSystem)
    assert filesystem.ls(f"{bucket}/dir", detail=False) == [f"{bucket.name}/dir/config.json"]
    assert filesystem.info(f"{bucket}/dir/config.json")["size"] == 18


def test_pandas_and_pyarrow(bucket: Store, tmp_path: Path) -> None:
    frame = pandas.DataFrame({"a": range(10_000), "b": ["text"] * 10_000})
    frame.to_parquet(tmp_path / "f.parquet")
    frame.to_csv(tmp_path / "f.csv", index=False)
    for name in ("f.parquet", "f.csv"):
        bucket.put(name, (tmp_path / name).read_bytes())
    pandas.testing.assert_frame_equal(pandas.read_parquet(f"{bucket}/f.parquet"), frame)
    pandas.testing.assert_frame_equal(pandas.read_csv(f"{bucket}/f.csv"), frame)
    assert pyarrow.parquet.read_table(f"fsspec+{bucket}/f.parquet").num_rows == 10_000


def test_every_way_of_reading(bucket: Store, tmp_path: Path) -> None:
    data = random_bytes(11 * MIB + 7)
    bucket.put("file.bin", data)
    filesystem = fsspec.filesystem("obs")
    path = f"{bucket.name}/file.bin"
    assert filesystem.cat_file(path) == data
    assert filesystem.cat_file(path, start=5, end=-5) == data[5:-5]
    assert filesystem.cat_ranges([path, path], [0, MIB], [10, MIB + 10]) == [data[:10], data[MIB : MIB + 10]]
    filesystem.get(path, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == data
    with filesystem.open(path) as file:
        file.seek(-100, os.SEEK_END)
        assert file.read() == data[-100:]
        assert file.seek(3 * MIB) == 3 * MIB
        assert file.read(2 * MIB) == data[3 * MIB : 5 * MIB]
    with pytest.raises(FileNotFoundError):
        filesystem.open(f"{bucket.name}/missing")
    with pytest.raises(FileNotFoundError):
        filesystem.cat_file(f"{bucket.name}/missing")


def test_one_cache_with_the_mount(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    data = random_bytes(20 * MIB)
    bucket.put("file.bin", data)
    path = mount(bucket)
    assert (path / "file.bin").read_bytes() == data
    filesystem = fsspec.filesystem("obs", cache_dir=tmp_path / "blocks", skip_instance_cache=True)
    assert filesystem.cat_file(f"{bucket.name}/file.bin") == data
    assert filesystem.engine.fetcher.stats.bytes_fetched == 0
    assert status(path)["bytes_fetched"] == len(data)


def test_a_model_that_is_opened_is_fetched_ahead_of_its_loader(bucket: Store) -> None:
    """As on a mount: the small files and headers with the config, the first weights with the index."""
    bucket.put("m/config.json", b"{}")
    bucket.put("m/model.safetensors.index.json", b"{}")
    bucket.put("m/model-00001-of-00002.safetensors", random_bytes(9 * MIB, 1))
    bucket.put("m/model-00002-of-00002.safetensors", random_bytes(9 * MIB, 2))
    bucket.put("m/other.bin", random_bytes(9 * MIB, 3))

    def cached(filesystem: OBSFileSystem) -> dict[str, list[int]]:
        versions = [
            filesystem._version(entry["name"], entry) for entry in filesystem.ls(f"{bucket.name}/m", detail=True)
        ]
        found = {
            version.key.rpartition("/")[2]: filesystem.engine.cache.present_blocks(version) for version in versions
        }
        return {name: sorted(blocks) for name, blocks in found.items() if blocks}

    filesystem = fsspec.filesystem("obs", skip_instance_cache=True)
    filesystem.open(f"{bucket.name}/m/config.json").close()
    assert not filesystem.dircache, "nothing is listed for the sake of a hint"
    filesystem.ls(f"{bucket.name}/m")
    with filesystem.open(f"{bucket.name}/m/config.json"):
        wait_for(lambda: len(cached(filesystem)) == 4)
        first = cached(filesystem)
        assert first["model-00001-of-00002.safetensors"] == first["model-00002-of-00002.safetensors"] == [0]
        with filesystem.open(f"{bucket.name}/m/model.safetensors.index.json"):
            wait_for(lambda: len(cached(filesystem)["model-00001-of-00002.safetensors"]) == 9)
    assert "other.bin" not in cached(filesystem)


def test_a_file_that_nobody_closed_is_given_back_without_waiting(bucket: Store) -> None:
    """Garbage is collected in any thread, also in one that holds the engine's lock."""
    bucket.put("file.bin", random_bytes(MIB))
    filesystem = fsspec.filesystem("obs")
    file = filesystem.open(f"{bucket.name}/file.bin")
    assert file.read(10)
    reader = file._reader
    with filesystem.engine._guard:
        del file
        gc.collect()
        assert reader.users  # the look of each second may be one more
    wait_for(lambda: not reader.users)


def test_a_replaced_object_is_never_mixed(bucket: Store) -> None:
    bucket.put("file.bin", random_bytes(30 * MIB, 1))
    filesystem = fsspec.filesystem("obs", read_ahead=0, skip_instance_cache=True)
    with filesystem.open(f"{bucket.name}/file.bin") as file:
        assert file.read(10) == random_bytes(30 * MIB, 1)[:10]
        bucket.put("file.bin", random_bytes(30 * MIB, 2))
        file.seek(25 * MIB)
        with pytest.raises(OSError) as caught:
            file.read(10)
        assert caught.value.errno == errno.ESTALE


def test_writing_is_s3fs_s(bucket: Store) -> None:
    filesystem = fsspec.filesystem("obs", skip_instance_cache=True)
    with filesystem.open(f"{bucket.name}/new.txt", "wb") as file:
        file.write(b"written")
    assert filesystem.cat_file(f"{bucket.name}/new.txt") == b"written"


def test_it_can_be_pickled_and_forked(bucket: Store) -> None:
    bucket.put("file.bin", random_bytes(2 * MIB))
    filesystem = fsspec.filesystem("obs")
    path = f"{bucket.name}/file.bin"
    digest = hashlib.sha256(filesystem.cat_file(path)).digest()
    assert hashlib.sha256(pickle.loads(pickle.dumps(filesystem)).cat_file(path)).digest() == digest
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_digest, (filesystem, path)) == digest


def _digest(filesystem: obsfs.OBSFileSystem, path: str) -> bytes:
    with filesystem.open(path) as file:
        return hashlib.sha256(file.read()).digest()


@pytest.mark.parametrize("seconds", [1.5, 60.0])
def test_a_name_that_does_not_resolve(bucket: Store, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """For a while, which nobody notices, or longer than anybody waits. None fails on demand, but this."""
    bucket.put("a.bin", data := random_bytes(3 * MIB))
    resolve, asked = socket.getaddrinfo, list[float]()

    def fail(*arguments: Any, **options: Any) -> Any:
        asked.append(time.monotonic())
        if asked[-1] < asked[0] + seconds:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(*arguments, **options)

    with FaultyLink(bucket.server.port) as link:
        filesystem = obsfs.OBSFileSystem(endpoint_url=link.endpoint, retry_timeout="5s", skip_instance_cache=True)
        with filesystem.open(f"{bucket.name}/a.bin") as file:
            link.break_all()
            monkeypatch.setattr(socket, "getaddrinfo", fail)
            if seconds < 5:
                assert file.read() == data
            else:
                with pytest.raises(OSError, match="cannot reach"):
                    file.read()
                assert asked[-1] - asked[0] < 15
    assert len(asked) > 1


def test_keys_given_as_s3fs_takes_them(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("a", b"a")
    server = bucket.server
    for name in server.environment:
        monkeypatch.delenv(name)
    filesystem = fsspec.filesystem(
        "obs",
        key=server.access_key,
        secret=server.secret_key,
        client_kwargs={"endpoint_url": server.endpoint},
        skip_instance_cache=True,
    )
    assert filesystem.cat_file(f"{bucket.name}/a") == b"a"


def test_copying_is_s3fs_s(bucket: Store) -> None:
    filesystem = fsspec.filesystem("obs")
    filesystem.pipe({f"{bucket.name}/from/{name}": name.encode() for name in "abc"})
    filesystem.copy(f"{bucket.name}/from/", f"{bucket.name}/to/", recursive=True, batch_size=2)
    assert filesystem.cat([f"{bucket.name}/to/{name}" for name in "abc"]) == {
        f"{bucket.name}/to/{name}": name.encode() for name in "abc"
    }
    filesystem.mv(f"{bucket.name}/to/a", f"{bucket.name}/to/d")
    assert filesystem.ls(f"{bucket.name}/to", detail=False, refresh=True) == [
        f"{bucket.name}/to/{name}" for name in "bcd"
    ]


def test_nothing_that_fsspec_awaits_is_hidden_by_another_thing() -> None:
    for name, own in vars(obsfs.OBSFileSystem).items():
        inherited = getattr(S3FileSystem, name, None)
        assert inspect.iscoroutinefunction(own) == inspect.iscoroutinefunction(inherited) or inherited is None, name


@pytest.fixture(scope="module")
def amazon() -> Iterator[str]:
    """A server as strict about regions as Amazon."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.mark.parametrize("region", [None, "us-east-1", "eu-west-2"])
def test_a_bucket_is_made_in_any_region(region: str | None, amazon: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    filesystem = obsfs.OBSFileSystem(endpoint_url=amazon, region=region, skip_instance_cache=True)
    filesystem.mkdir(f"bucket-{region}")
    filesystem.makedirs(f"bucket-{region}/dir", exist_ok=True)
    filesystem.mkdir(f"given-{region}", region_name="us-east-1" if region != "eu-west-2" else "eu-west-2")
    assert {f"bucket-{region}", f"given-{region}"} <= set(filesystem.ls("", detail=False))
    place = filesystem.call_s3("get_bucket_location", Bucket=f"bucket-{region}")["LocationConstraint"]
    assert place == (region if region == "eu-west-2" else None)


def test_a_bulk_delete_carries_what_obs_asks_for(bucket: Store) -> None:
    filesystem = fsspec.filesystem("obs", skip_instance_cache=True)
    filesystem.pipe({f"{bucket.name}/dir/{name}": b"x" for name in "abc"})
    sent: list[Any] = []
    filesystem.s3.meta.events.register("before-send.s3.DeleteObjects", lambda request, **_: sent.append(request))
    filesystem.rm(f"{bucket.name}/dir", recursive=True)
    (request,) = sent
    body = request.body if isinstance(request.body, bytes) else request.body.encode()
    names = {name.lower(): value for name, value in request.headers.items()}
    md5 = names["content-md5"]
    assert base64.b64decode(md5) == hashlib.md5(body).digest()
    assert not [name for name in names if "checksum" in name]
    assert "Contents" not in bucket.client.list_objects_v2(Bucket=bucket.name)


def test_an_open_file_offers_what_s3fs_s_does(bucket: Store) -> None:
    filesystem = fsspec.filesystem("obs", skip_instance_cache=True, default_cache_type="bytes", default_block_size=MIB)
    path = f"{bucket.name}/x"
    filesystem.pipe_file(path, random_bytes(3 * MIB))
    with filesystem.open(path) as file:
        file.setxattr(color="blue")
        assert file.getxattr("color") == "blue"
        assert file.metadata()["color"] == "blue"
        assert bucket.name in file.url()
        assert (file.version_id, file.blocksize, file.cache.name) == (None, MIB, "bytes")
    with filesystem.open(path, size=100, cache_type="none", block_size=77) as file:
        assert (file.size, file.blocksize, file.cache.name) == (100, 77, "none")
        assert file.read() == random_bytes(3 * MIB)[:100]
        again = pickle.loads(pickle.dumps(file))
        assert (again.tell(), again.size, again.cache.name) == (100, 100, "none")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cach_dir": "/x"}, "OBSFileSystem has no option 'cach_dir': did you mean 'cache_dir'?"),
        ({"endpoint": "http://x"}, "OBSFileSystem has no option 'endpoint': did you mean 'endpoint_url'?"),
        ({"max_concurency": 3}, "OBSFileSystem has no option 'max_concurency': did you mean 'max_concurrency'?"),
        ({"key": "k"}, "secret is not given: key and secret go together"),
        ({"client_kwargs": {"aws_secret_access_key": "s"}}, "key is not given: key and secret go together"),
        ({"key": "k", "username": "u", "secret": "s"}, "key is given twice, with two values: give it once"),
        ({"cache_size": "lots"}, "cache_size=lots: "),
    ],
)
def test_a_wrong_option_is_one_error_of_ours(options: dict[str, Any], said: str) -> None:
    with pytest.raises(obsfs.ObsfsError) as caught:
        fsspec.filesystem("obs", region="cn-south-1", skip_instance_cache=True, **options)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_keys_in_client_kwargs_are_the_engine_s_too(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("a", b"a")
    server = bucket.server
    for name in server.environment:
        monkeypatch.delenv(name)
    keys = {"aws_access_key_id": server.access_key, "aws_secret_access_key": server.secret_key}
    filesystem = obsfs.OBSFileSystem(client_kwargs={"endpoint_url": server.endpoint, **keys}, skip_instance_cache=True)
    assert filesystem.cat_file(f"{bucket.name}/a") == b"a"


def test_keys_that_expire_are_replaced_in_s3fs_s_requests_too(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is over: SeaweedFS has none that end, so that botocore is told the server's answer by a hook."""
    bucket.put("a", b"a")
    server = bucket.server
    monkeypatch.setenv("OBSFS_ACCESS_KEY_ID", "over")
    monkeypatch.setenv("OBSFS_SECRET_ACCESS_KEY", "over")
    filesystem = obsfs.OBSFileSystem(skip_instance_cache=True)

    def answer(**_: Any) -> Any:
        refused = {"Error": {"Code": "ExpiredToken", "Message": "The provided token has expired."}}
        return AWSResponse(bucket.server.endpoint, 400, {}, None), refused

    filesystem.s3.meta.events.register("before-call.s3", answer)
    monkeypatch.setenv("OBSFS_ACCESS_KEY_ID", server.access_key)
    monkeypatch.setenv("OBSFS_SECRET_ACCESS_KEY", server.secret_key)
    assert filesystem.ls(bucket.name, detail=False) == [f"{bucket.name}/a"]
    assert filesystem.key == server.access_key


def test_what_the_cache_cannot_read_s3fs_reads(bucket: Store) -> None:
    bucket.put("a", b"a")
    filesystem = fsspec.filesystem("obs", skip_instance_cache=True)
    with filesystem.open(f"{bucket.name}/a", requester_pays=True) as file:
        assert not isinstance(file, OBSFile)
        assert file.read() == b"a"
    assert isinstance(filesystem.open(f"s3://{bucket.name}/a"), OBSFile)


@pytest.mark.parametrize("status", [301, 307])
def test_nothing_is_sent_where_a_server_points(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither keys, nor a session token, nor what is written; and no answer is taken from there."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "t")
    with OddServer({"a": Thing(b"theirs")}) as other:
        place = {"Location": f"{other.endpoint}/b/a", "x_amz_bucket_region": "elsewhere-1"}
        moved = refusal(status, "PermanentRedirect", **place)
        with OddServer({}, lambda request: moved) as asked:
            filesystem = obsfs.OBSFileSystem(endpoint_url=asked.endpoint, retry_timeout="1s", skip_instance_cache=True)
            requests: tuple[Callable[[], object], ...] = (
                lambda: filesystem.ls("b"),
                lambda: filesystem.info("b/a"),
                lambda: filesystem.cat_file("b/a"),
                lambda: filesystem.pipe_file("b/a", b"ours"),
                lambda: filesystem.rm_file("b/a"),
                lambda: filesystem.cp_file("b/a", "b/c"),
                lambda: filesystem.open("b/a", requester_pays=True).read(),
            )
            for request in requests:
                with pytest.raises(OSError):
                    request()
        assert asked.asked
        assert other.asked == []


@pytest.mark.parametrize("cache_type", ["all", "background", "blockcache", "bytes", "first", "mmap", "none"])
def test_every_cache_of_fsspec_fits(cache_type: str, bucket: Store) -> None:
    filesystem = fsspec.filesystem("obs", skip_instance_cache=True)
    filesystem.pipe({f"{bucket.name}/a": b"0123456789", f"{bucket.name}/empty": b""})
    with filesystem.open(f"{bucket.name}/a", cache_type=cache_type, block_size=4) as file:
        assert file.read(3) == b"012"
        assert pickle.loads(pickle.dumps(file)).read() == b"3456789"
        file.after_fork()
        assert file.read() == b"3456789"
    assert filesystem.open(f"{bucket.name}/empty", cache_type=cache_type).read() == b""


def test_a_key_that_ends_in_a_slash_is_another_than_the_one_without(bucket: Store) -> None:
    bucket.put("a", b"a")
    filesystem = fsspec.filesystem("obs", skip_instance_cache=True)
    for path in (f"{bucket.name}/a/", f"{bucket.name}/none/"):
        with pytest.raises(FileNotFoundError):
            filesystem.cat_file(path)


def test_what_a_listing_remembers_of_a_file_that_was_replaced_is_not_in_the_way(bucket: Store, tmp_path: Path) -> None:
    filesystem = fsspec.filesystem("obs", skip_instance_cache=True)
    path = f"{bucket.name}/dir/a"

    def replace(text: bytes) -> None:
        bucket.put("dir/a", b"never read, nor cached: " + text)
        filesystem.ls(f"{bucket.name}/dir", refresh=True)
        bucket.put("dir/a", text)

    reads: tuple[Callable[[], object], ...] = (
        lambda: filesystem.cat_file(path),
        lambda: filesystem.cat_file(path, start=0, end=100),
        lambda: filesystem.get_file(path, str(tmp_path / "a")) or (tmp_path / "a").read_bytes(),
    )
    for number, read in enumerate(reads):
        replace(text := b"text" * (number + 1))
        assert read() == text
    replace(b"the last")
    with filesystem.open(path) as file, pytest.raises(OSError) as caught:
        file.read()
    assert caught.value.errno == errno.ESTALE
    assert filesystem.open(path).read() == b"the last"


def test_ranges_of_one_call_are_of_one_version(bucket: Store) -> None:
    """The second range is asked for when the object has been replaced."""
    old, new = random_bytes(6 * MIB, 1), random_bytes(6 * MIB, 2)
    bucket.put("a", old)
    filesystem = fsspec.filesystem("obs", read_ahead=0, skip_instance_cache=True)
    path = f"{bucket.name}/a"
    assert filesystem.cat_file(path, start=0, end=10) == old[:10]
    read, count = filesystem._read, iter(range(9))

    def replace_before_the_second(version: Any, start: int, stop: int) -> bytes:
        if start and next(count) == 0:
            bucket.put("a", new)
        data: bytes = read(version, start, stop)
        return data

    filesystem._read = replace_before_the_second
    first, second = filesystem.cat_ranges([path, path], [0, 5 * MIB], [10, 6 * MIB], batch_size=1)
    assert first == old[:10]
    assert isinstance(second, OSError)
    assert second.errno == errno.ESTALE
    assert filesystem.cat_ranges([path, path], [0, 5 * MIB], [10, 6 * MIB]) == [new[:10], new[5 * MIB :]]


def test_credentials_that_expire_are_asked_for_by_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program (credential_process): each asking gives other keys, which are over at once."""
    program = tmp_path / "keys.py"
    program.write_text(
        "import datetime, json, time\n"
        "until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': f'K{time.time_ns()}', 'SecretAccessKey': 's',\n"
        "                  'SessionToken': 't', 'Expiration': until.isoformat()}))\n"
    )
    config = tmp_path / "profiles"
    config.write_text(f"[profile short]\ncredential_process = {sys.executable} -P {program}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))

    def keys(server: OddServer, method: str) -> list[str]:
        found = [one.headers["Authorization"] for one in server.asked if one.method == method]
        return [text.split("Credential=")[1].split("/")[0] for text in found]

    with OddServer({f"{number}": Thing(f"{number}".encode()) for number in range(3)}) as server:
        filesystem = obsfs.OBSFileSystem(endpoint_url=server.endpoint, profile="short", skip_instance_cache=True)
        for number in range(3):
            time.sleep(0.6)
            assert filesystem.cat_file(f"b/{number}") == f"{number}".encode()
        for method in ("HEAD", "GET"):  # s3fs's, and the engine's
            assert len(set(keys(server, method))) > 1, method


def test_an_aiobotocore_that_would_follow_redirects_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(AIOHTTPSession, "_get_session")
    with pytest.raises(UsageError, match="follow redirects"):
        fsspec.filesystem("obs", endpoint_url="http://127.0.0.1:1", key="k", secret="s", skip_instance_cache=True).ls(
            "models"
        )
