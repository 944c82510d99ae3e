"""Publishing: whole or not at all, resumed, and by one publisher at a time. Real processes, really killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from obsfs.errors import (
    ExistsError,
    ForbiddenError,
    NotFoundError,
    RefusedError,
    UnsupportedError,
    UsageError,
    VersionChangedError,
)
from obsfs.library import catalog, lease, resume, upload
from obsfs.library.download import snapshot_download
from obsfs.library.names import parse_model
from obsfs.library.push import find_files, push
from obsfs.library.resume import resume_state_file
from obsfs.settings import Settings
from obsfs.store.parts import PART
from obsfs.store.s3.store import S3Store
from obsfs.store.types import ObjectVersion, PutResult
from tests.conftest import MIB, Mounter, Result, Store, contents, rclone_server, stop_group, wait_for, write_model
from tests.faulty import FaultyLink

Run = Callable[..., Result]


def keys(store: Store, prefix: str = "") -> dict[str, int]:
    answer = store.client.list_objects_v2(Bucket=store.name, Prefix=prefix)
    return {entry["Key"]: entry["Size"] for entry in answer.get("Contents", ())}


def published(store: Store, key: str) -> dict[str, Any]:
    body = store.client.get_object(Bucket=store.name, Key=f"{key}/.obsfs/manifest.json")["Body"].read()
    manifest: dict[str, Any] = json.loads(body)
    return manifest


def uploads_of(store: Store, prefix: str = "") -> list[dict[str, Any]]:
    answer = store.client.list_multipart_uploads(Bucket=store.name, Prefix=prefix)
    return list(answer.get("Uploads", ()))


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "obsfs", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_push_publishes_all_files_and_says_what_they_are(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "tuned")
    done = obsfs("push", model, f"{bucket}/models/tuned@v1", "--revision", "abc")
    assert done.code == 0, done.err
    assert f"published {bucket}/models/tuned@v1: 5 files" in done.out
    manifest = published(bucket, "models/tuned@v1")
    local = contents(model)
    assert {file["path"]: file["size"] for file in manifest["files"]} == {p: len(data) for p, data in local.items()}
    assert manifest["version"] == "v1"
    assert manifest["revision"] == "abc"
    assert manifest["source"] == "tuned"
    assert manifest["model"] == {"architecture": "Qwen2ForCausalLM", "parameters": 18 * MIB // 2, "dtype": "bfloat16"}
    for path, data in local.items():
        answer = bucket.client.get_object(Bucket=bucket.name, Key=f"models/tuned@v1/{path}")
        assert answer["Body"].read() == data
        assert answer["ETag"] == next(file["etag"] for file in manifest["files"] if file["path"] == path)
    assert set(keys(bucket)) == {f"models/tuned@v1/{path}" for path in [*local, ".obsfs/manifest.json"]}


def test_what_is_pushed_is_seen_on_the_mounts_of_the_machine(
    bucket: Store, obsfs: Run, mount: Mounter, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "tuned")
    bucket.put("models/other/file", b"")
    bucket.put("models/other/kept", b"")
    path = mount(bucket)
    assert not (path / "models" / "tuned@v1").exists()
    assert obsfs("push", model, f"{bucket}/models/tuned@v1").code == 0
    assert {file.name for file in (path / "models" / "tuned@v1").iterdir()} >= {file.name for file in model.iterdir()}
    assert (path / "models" / "other" / "file").exists()
    bucket.client.delete_object(Bucket=bucket.name, Key="models/other/file")
    done = obsfs("refresh", path / "models")
    assert (done.code, done.out) == (0, f"{path}/models: asks the bucket again\n")
    assert os.listdir(path / "models" / "other") == ["kept"]
    wrong = obsfs("refresh", tmp_path)
    assert (wrong.code, wrong.out, wrong.err.count("\n")) == (2, "", 1)


def test_what_is_there_is_not_sent_again(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    size = sum(map(len, contents(model).values()))
    assert obsfs("push", model, f"{bucket}/m@v1", "--json").json["bytes_sent"] == size
    assert obsfs("push", model, f"{bucket}/m@v1", "--json").json["bytes_sent"] == 0
    (model / "config.json").write_text('{"model_type": "other"}')
    second = obsfs("push", model, f"{bucket}/m@v2", "--json").json
    assert second["bytes_sent"] == len('{"model_type": "other"}')
    assert keys(bucket)["m@v2/model-00001-of-00002.safetensors"] > 9 * MIB
    refused = obsfs("push", model, f"{bucket}/m@v1")
    assert refused.code == 2
    assert "published already" in refused.err
    assert published(bucket, "m@v1")["model"]["architecture"] == "Qwen2ForCausalLM"


def test_large_files_of_another_version_are_copied_in_parts(
    bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request lasts as long as a whole file takes the server, and all is there before anything appears."""
    model = write_model(tmp_path / "m")

    def publish_as(version: str, advance: Callable[[int], None] = lambda size: None) -> int:
        settings = Settings.load(retry_timeout="5s")
        name = parse_model(f"{bucket}/m@{version}")
        return push(model, name, settings, files=find_files(model), advance=advance)[1]

    publish_as("v1")
    spans: list[range] = []
    copied, visible = S3Store.upload_part_copy, set[str]()

    def watched(self: S3Store, key: str, upload: str, number: int, source: ObjectVersion, span: range) -> str:
        spans.append(span)
        visible.update(keys(bucket, "m@v2/"))
        return copied(self, key, upload, number, source, span)

    monkeypatch.setattr(S3Store, "upload_part_copy", watched)
    monkeypatch.setattr(upload, "COPY_PART", 5 * MIB)
    seen: list[int] = []
    assert publish_as("v2", seen.append) == 0
    # And one byte of a version that nobody has: whether the server would copy that.
    assert sorted(map(len, spans))[:-4] in ([], [1])
    assert max(map(len, spans)) <= PART
    assert not visible
    local = contents(model)
    assert sum(seen) == sum(map(len, local.values()))
    for path, data in local.items():
        assert bucket.client.get_object(Bucket=bucket.name, Key=f"m@v2/{path}")["Body"].read() == data
    # What it is a copy of is replaced meanwhile: told, and nothing is published.
    monkeypatch.setattr(S3Store, "upload_part_copy", lambda self, key, upload, number, source, span: copied(
        self, key, upload, number, dataclasses.replace(source, etag='"other"'), span))  # fmt: skip
    with pytest.raises(UsageError, match="was replaced just now"):
        publish_as("v3")
    assert not keys(bucket, "m@v3/")


@pytest.fixture(params=["rclone", "rclone without ETags", "moto"])
def other(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket ``models`` of a real server that copies otherwise, or not at all, or has no ETags."""
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    if request.param == "moto":
        from moto.server import ThreadedMotoServer

        server = ThreadedMotoServer("127.0.0.1", port=0)
        server.start()
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        botocore.session.Session().create_client("s3").create_bucket(Bucket="models")
        yield "obs://models"
        server.stop()
        return
    options = ["--etag-hash", ""] if "without" in request.param else []
    with rclone_server(tmp_path, *options) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield "obs://models"


def test_what_is_published_can_be_pulled_from_every_server(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    model = write_model(tmp_path / "m", mib=9, shards=1)
    for version in ("v1", "v2"):
        push(model, parse_model(f"{other}/m@{version}"), Settings.load(retry_timeout=5), files=find_files(model))
        settings = Settings.load(cache_dir=tmp_path / f"cache-{version}", retry_timeout=5)
        target = tmp_path / f"pulled-{version}"
        snapshot_download(f"{other}/m@{version}", local_dir=target, cache_dir=settings.cache_dir)
        assert contents(target) == contents(model)


def unsupported(self: S3Store, *_: object) -> PutResult:
    raise UnsupportedError("501 NotImplemented")


def refused(self: S3Store, *_: object) -> PutResult:
    raise ForbiddenError("the source may not be read")


@pytest.mark.parametrize("kind", ["unsupported", "refused", "silent", "other bytes", "whichever version"])
def test_what_the_server_does_not_copy_right_is_sent(
    kind: str, bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m", mib=9, shards=1)
    publish_as = partial(push, model, settings=Settings.load(retry_timeout="2s"), files=find_files(model))
    publish_as(name=parse_model(f"{bucket}/m@v1"))
    copy, copy_part = S3Store.copy, S3Store.upload_part_copy
    shard = "m@v1/model-00001-of-00001.safetensors"
    other = bucket.client.put_object(Bucket=bucket.name, Key="other", Body=bytes(keys(bucket)[shard]))["ETag"]
    if kind in ("unsupported", "refused"):
        monkeypatch.setattr(S3Store, "copy", unsupported if kind == "unsupported" else refused)
        monkeypatch.setattr(S3Store, "upload_part_copy", unsupported if kind == "unsupported" else refused)
    elif kind == "silent":
        # As servers that take a request for another one, and do something.
        monkeypatch.setattr(S3Store, "copy", lambda self, source, key: self.put(key, b"")._replace(etag=""))
        monkeypatch.setattr(S3Store, "upload_part_copy", lambda *_: "")
    else:

        def wrong(source: ObjectVersion) -> ObjectVersion:
            if kind == "other bytes":
                return dataclasses.replace(source, key="other", etag=other)
            return dataclasses.replace(
                source, etag=bucket.client.head_object(Bucket=bucket.name, Key=source.key)["ETag"]
            )

        monkeypatch.setattr(S3Store, "copy", lambda self, source, key: copy(self, wrong(source), key))
        monkeypatch.setattr(
            S3Store,
            "upload_part_copy",
            lambda self, key, upload, number, source, span: copy_part(self, key, upload, number, wrong(source), span),
        )
        if kind == "whichever version":
            bucket.put(shard, bytes(keys(bucket)[shard]))
    seen: list[int] = []
    publish_as(name=parse_model(f"{bucket}/m@v2"), advance=seen.append)
    verify_whole(bucket, model, "m@v2")
    assert sum(seen) == sum(map(len, contents(model).values()))
    assert not uploads_of(bucket)


def test_a_copy_with_another_md5_is_not_believed(
    bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a server that refuses to copy other versions: its ETags are known to be MD5s."""
    model = write_model(tmp_path / "m", mib=1, shards=1)
    push(model, parse_model(f"{bucket}/m@v1"), Settings.load(), files=find_files(model))

    def copy(self: S3Store, source: ObjectVersion, key: str) -> PutResult:
        if source.etag.strip('"') == "0" * 32:
            raise VersionChangedError("it is another")
        return self.put(key, bytes(source.size))

    monkeypatch.setattr(S3Store, "copy", copy)
    push(model, parse_model(f"{bucket}/m@v2"), Settings.load(), files=find_files(model))
    verify_whole(bucket, model, "m@v2")


def test_what_the_server_has_not_kept_whole_is_not_published(
    bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m", mib=1, shards=1)
    put = S3Store.put

    def cut(self: S3Store, key: str, data: bytes, *, new: bool = False) -> PutResult:
        return put(self, key, data[: 1 << 10] if key.endswith(".safetensors") else data, new=new)

    monkeypatch.setattr(S3Store, "put", cut)
    with pytest.raises(RefusedError, match="1024 bytes of model-00001"):
        push(model, parse_model(f"{bucket}/m@v1"), Settings.load(), files=find_files(model))
    assert keys(bucket) == {}  # nor does it look like a model without a manifest


def test_a_server_without_uploads_in_parts_is_sent_whole_files(
    bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m", mib=9, shards=1)
    monkeypatch.setattr(S3Store, "create_upload", unsupported)
    seen: list[int] = []
    name = parse_model(f"{bucket}/m@v1")
    push(model, name, Settings.load(), files=find_files(model), advance=seen.append)
    verify_whole(bucket, model, "m@v1")
    assert sum(seen) == sum(map(len, contents(model).values()))
    (shard,) = model.glob("*.safetensors")
    etag = bucket.client.head_object(Bucket=bucket.name, Key=f"m@v1/{shard.name}")["ETag"]
    assert etag.strip('"') == hashlib.md5(shard.read_bytes()).hexdigest()


def test_a_server_that_lists_no_etags_is_asked_for_them(
    bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m", mib=1, shards=1)
    publish_again = partial(
        push, model, parse_model(f"{bucket}/m@v1"), Settings.load(), files=find_files(model), check=False
    )
    publish_again()
    walk = S3Store.walk
    monkeypatch.setattr(S3Store, "walk", lambda self, prefix: (info._replace(etag="") for info in walk(self, prefix)))
    _, sent = publish_again()
    assert sent == 0


def test_what_a_killed_publisher_left_is_no_model(bucket: Store) -> None:
    bucket.put("m@v1/config.json", b"{}")
    found = S3Store(parse_model(f"{bucket}/m@v1").address, Settings.load())
    assert catalog.resolve(found, parse_model(f"{bucket}/m")).name.version == "v1"
    bucket.put("m@v1/.obsfs/claim.json", b"{}")
    for name in ("m@v1", "m"):
        with pytest.raises(NotFoundError):
            catalog.resolve(found, parse_model(f"{bucket}/{name}"))


def test_a_server_without_conditional_writes(bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m", mib=1, shards=1)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    put = S3Store.put

    def unconditional(self: S3Store, key: str, data: bytes, *, new: bool = False) -> PutResult:
        if new:
            raise UnsupportedError("501 NotImplemented")
        return put(self, key, data)

    monkeypatch.setattr(S3Store, "put", unconditional)
    push(model, parse_model(f"{bucket}/m@v1"), Settings.load(), files=find_files(model))
    verify_whole(bucket, model, "m@v1")
    assert "m@v1/.obsfs/claim.json" not in keys(bucket)
    (model / "config.json").write_text("{}")
    with pytest.raises(ExistsError, match="published already"):
        push(model, parse_model(f"{bucket}/m@v1"), Settings.load(), files=find_files(model))


def test_a_name_without_a_version_is_replaced_in_place(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m")
    assert obsfs("push", model, f"{bucket}/m").code == 0
    bucket.put("m/theirs.txt", b"not ours")
    (model / "sub" / "notes.md").unlink()
    (model / "config.json").write_text("{}")
    assert obsfs("push", model, f"{bucket}/m", "--json").json["bytes_sent"] == 2
    assert "m/sub/notes.md" not in keys(bucket)
    assert keys(bucket)["m/theirs.txt"] == 8  # what obsfs did not put there stays
    assert {file["path"] for file in published(bucket, "m")["files"]} == set(contents(model))


def test_mistakes(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    (tmp_path / "nothing").mkdir()
    for arguments, words in (
        ((tmp_path / "nowhere", f"{bucket}/m"), ("nowhere",)),
        ((tmp_path / "notes", f"{bucket}/m"), ("no model", "--any")),
        ((tmp_path / "nothing", f"{bucket}/m"), ("nothing in",)),
        ((model, f"{bucket}/../m"), ("prefix",)),
        ((model, f"{bucket}/m@.."), ("names no model",)),
        ((model, "m@v1"), ("OBSFS_LIBRARY",)),
        ((model, "obs://no-such-bucket-here/m"), ("no-such-bucket-here",)),
    ):
        done = obsfs("push", *arguments)
        assert done.code == 2, (arguments, done)
        assert done.err.count("\n") == 1, done.err
        for word in words:
            assert word in done.err, done.err
    assert not keys(bucket)
    (model / "dangling").symlink_to("nowhere")
    assert "dangling" in obsfs("push", model, f"{bucket}/m").err
    assert obsfs("push", tmp_path / "notes", f"{bucket}/notes", "--any").code == 0


def test_a_bucket_that_cannot_be_written(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=1)
    done = obsfs("push", model, f"{bucket}/m", AWS_SECRET_ACCESS_KEY="wrong")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "denied" in done.err
    assert not keys(bucket)


def test_a_directory_whose_name_is_not_utf_8(bucket: Store, tmp_path: Path) -> None:
    directory = tmp_path / os.fsdecode(b"m\xff")
    directory.mkdir()
    (directory / "config.json").write_bytes(b"{}")
    model = parse_model(f"{bucket}/m")
    done = push(directory, model, Settings.load(), files=find_files(directory), check=False)
    assert done[0].source == r"m\udcff"
    assert published(bucket, "m")["source"] == r"m\udcff"


def test_a_file_that_changes_meanwhile_is_noticed(bucket: Store, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=1)
    files = find_files(model)
    (model / "config.json").write_text("changed")
    with pytest.raises(UsageError, match="changed while it was pushed"):
        push(model, parse_model(f"{bucket}/m@v1"), Settings.load(retry_timeout=2), files=files)
    assert (
        catalog.read_model(
            S3Store(parse_model(f"{bucket}/m@v1").address, Settings.load()), parse_model(f"{bucket}/m@v1")
        )
        is None
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_at_any_moment_nothing_is_half_published_and_it_goes_on(bucket: Store, tmp_path: Path) -> None:
    """Kill -9, twenty times, at random; each version ends whole, with most of it sent once."""
    rng = random.Random(4)
    sent = size = kills = 0
    with FaultyLink(bucket.server.port) as link:
        link.bytes_per_second = 20e6
        for number in range(5):
            model = write_model(tmp_path / "m", mib=20, seed=number)
            name = f"{bucket}/m@v{number}"
            for delay in (*(rng.uniform(0.4, 2.2) for _ in range(4)), 120):
                process = start("push", model, name, "--json", "--connections", "4", AWS_ENDPOINT_URL=link.endpoint)
                try:
                    out, err = process.communicate(timeout=delay)
                except subprocess.TimeoutExpired:
                    stop_group(process)
                    kills += 1
                    if f"m@v{number}/.obsfs/manifest.json" in keys(bucket):
                        verify_whole(bucket, model, f"m@v{number}")
                    continue
                assert process.returncode == 0, err
                sent += json.loads(out)["bytes_sent"]
                size += json.loads(out)["bytes_sent"] and sum(map(len, contents(model).values()))
                break
            verify_whole(bucket, model, f"m@v{number}")
            assert not uploads_of(bucket, f"m@v{number}/")
    assert kills >= 10
    assert sent < size  # the last try had not to begin anew


def verify_whole(store: Store, model: Path, key: str) -> None:
    there = {path.removeprefix(f"{key}/") for path in keys(store, f"{key}/")} - {
        ".obsfs/manifest.json",
        ".obsfs/claim.json",
    }
    assert there == set(contents(model))
    for path, data in contents(model).items():
        assert store.client.get_object(Bucket=store.name, Key=f"{key}/{path}")["Body"].read() == data
    assert published(store, key)["files"]


@pytest.mark.slow
def test_of_two_who_publish_one_version_one_wins_whole(bucket: Store, tmp_path: Path) -> None:
    models = [write_model(tmp_path / f"m{n}", seed=n) for n in range(2)]
    for round_ in range(4):
        processes = [
            start("push", model, f"{bucket}/m@v{round_}", XDG_STATE_HOME=str(tmp_path / f"state{n}"))
            for n, model in enumerate(models)
        ]
        errors = [process.communicate(timeout=60)[1] for process in processes]
        codes = [process.returncode for process in processes]
        assert sorted(codes) == [0, 2], errors
        verify_whole(bucket, models[codes.index(0)], f"m@v{round_}")
        assert errors[codes.index(2)].count("\n") == 1
        assert f"m@v{round_}" in errors[codes.index(2)]
        assert f"m@v{round_}/.obsfs/claim.json" not in keys(bucket)
    assert not uploads_of(bucket)


def test_uploads_that_nobody_goes_on_with_are_dropped(bucket: Store, tmp_path: Path) -> None:
    """Of a run that was killed before it could note them, and of one with other files; those of other models stay."""
    killed, noted, other = "m@v1/model-00001-of-00002.safetensors", "m@v1/else.bin", "m/model.safetensors"
    uploads = {key: bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)["UploadId"]
               for key in (killed, noted, other)}  # fmt: skip
    model, name, settings = write_model(tmp_path / "m", mib=20), parse_model(f"{bucket}/m@v1"), Settings.load()
    with resume_state_file(f"{S3Store(name.address, settings).endpoint} {name} {model}", str(name)) as notes:
        resume.UploadResumeState(notes).record(noted, uploads[noted])
    push(model, name, settings, files=find_files(model))
    assert [upload["Key"] for upload in uploads_of(bucket)] == [other]


@pytest.mark.slow
def test_who_stages_while_another_publishes_is_told(bucket: Store, tmp_path: Path) -> None:
    models = [write_model(tmp_path / f"m{n}", mib=40, seed=n) for n in range(2)]
    with FaultyLink(bucket.server.port) as link:
        link.bytes_per_second = 4e6
        slow = start("push", models[0], f"{bucket}/m@v1", "--connections", "2", AWS_ENDPOINT_URL=link.endpoint)
        wait_for(lambda: bool(uploads_of(bucket)))
        push(models[1], parse_model(f"{bucket}/m@v1"), Settings.load(), files=find_files(models[1]))
        error = slow.communicate(timeout=60)[1]
    assert (slow.returncode, error.count("\n")) == (2, 1)
    assert "m@v1" in error
    verify_whole(bucket, models[1], "m@v1")
    assert not uploads_of(bucket)


def test_whose_upload_was_ended_leaves_no_other(bucket: Store, tmp_path: Path) -> None:
    """One who publishes first ends the uploads that it sees; one that began just after it had looked has to go, too."""
    model = write_model(tmp_path / "m", mib=40)
    with FaultyLink(bucket.server.port) as link:
        link.bytes_per_second = 4e6
        process = start("push", model, f"{bucket}/m@v1", "--connections", "2", AWS_ENDPOINT_URL=link.endpoint)
        wait_for(lambda: len(uploads_of(bucket)) == 2)
        ended = uploads_of(bucket)[0]
        bucket.client.abort_multipart_upload(Bucket=bucket.name, Key=ended["Key"], UploadId=ended["UploadId"])
        error = process.communicate(timeout=60)[1]
    assert (process.returncode, error.count("\n")) == (2, 1)
    assert "is gone" in error
    assert not uploads_of(bucket)


def test_a_claim_is_respected_until_it_is_old(bucket: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m", mib=1)
    name = parse_model(f"{bucket}/m@v1")
    bucket.put("m@v1/.obsfs/claim.json", json.dumps({"author": "ann@far", "nonce": "hers"}).encode())
    with pytest.raises(ExistsError, match="ann@far"):
        push(model, name, Settings.load(), files=find_files(model))
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    time.sleep(2.1)
    push(model, name, Settings.load(), files=find_files(model))
    verify_whole(bucket, model, "m@v1")


def test_a_torn_claim_is_nobodys(bucket: Store, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=1)
    bucket.put("m@v1/.obsfs/claim.json", b"")
    push(model, parse_model(f"{bucket}/m@v1"), Settings.load(), files=find_files(model))
    verify_whole(bucket, model, "m@v1")


def test_a_server_that_knows_no_conditional_writes(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OBS: then the claim is written and looked at again."""
    name = parse_model(f"{bucket}/m@v1")
    store = S3Store(name.address, Settings.load())
    put = S3Store.put
    monkeypatch.setattr(S3Store, "put", lambda self, key, data, new=False: put(self, key, data))
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.1)
    with lease.PublishLease(store, name, "me", "mine"):
        with pytest.raises(ExistsError), lease.PublishLease(store, name, "you", "yours"):
            pass
        assert "m@v1/.obsfs/claim.json" in keys(bucket)
    assert not keys(bucket)


@pytest.mark.slow
def test_ctrl_c_ends_a_push_and_leaves_nothing_visible(bucket: Store, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=20)
    with FaultyLink(bucket.server.port) as link:
        link.bytes_per_second = 5e6
        process = start("push", model, f"{bucket}/m@v1", AWS_ENDPOINT_URL=link.endpoint)
        wait_for(lambda: link.passed > 0)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err.strip()) == (130, "", "obsfs: interrupted")
    assert not keys(bucket)


@pytest.mark.slow
def test_a_server_that_is_away_for_a_moment_costs_nothing(bucket: Store, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=20)
    with FaultyLink(bucket.server.port) as link:
        link.bytes_per_second = 10e6
        process = start("push", model, f"{bucket}/m@v1", "--connections", "4", AWS_ENDPOINT_URL=link.endpoint)
        wait_for(lambda: link.passed > 0)  # a server that has never answered is not waited for
        time.sleep(0.5)
        link.refusing = True
        link.break_all()
        time.sleep(1.5)
        link.refusing = False
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    verify_whole(bucket, model, "m@v1")


def test_a_push_leaves_no_lock_and_removes_those_of_killed_ones(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "obsfs" / "push"
    with resume_state_file("what", "a name") as notes:
        with pytest.raises(UsageError, match="by another process"), resume_state_file("what", "a name"):
            raise AssertionError
        (directory / "killed.lock").touch(mode=0o600)
        with resume_state_file("another", "another name"):
            assert sorted(path.name for path in directory.iterdir())[-1] != "killed.lock"
            assert len(list(directory.iterdir())) == 2
        notes.touch(mode=0o600)
    assert list(directory.iterdir()) == [notes]  # kept for the next push of the same


def test_a_lock_is_of_one_process_at_a_time(tmp_path: Path) -> None:
    """Also while those who had it remove it."""
    inside, most, done = [0], [0], list[int]()

    def take(_: int) -> None:
        with suppress(UsageError), resume_state_file("what", "a name"):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            done.append(1)
            inside[0] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(take, range(300)))
    assert most == [1]
    assert len(done) > 1
