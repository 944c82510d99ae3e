"""The mount as programs see it: the same bytes as the bucket, by every way of reading, over both engines."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import mmap
import os
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from obsfs.service import mounts
from tests.conftest import MIB, Mounter, Store, random_bytes, status, wait_for
from tests.faulty import ListedServer

SIZES = (0, 1, 4095, 4096, MIB - 1, MIB, MIB + 1, 5 * MIB + 12345, 20 * MIB + 7)


@pytest.fixture
def files(bucket: Store) -> dict[str, bytes]:
    files = {f"dir/size-{size}.bin": random_bytes(size) for size in SIZES} | {"top.txt": b"hello\n"}
    for key, data in files.items():
        bucket.put(key, data)
    return files


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_programs_read_what_the_bucket_holds(
    bucket: Store, files: dict[str, bytes], mount: Mounter, fuse_backend: str, tmp_path: Path
) -> None:
    path = mount(bucket, fuse_backend=fuse_backend)
    found = run("find", path, "-type", "f", "-printf", "%P %s\n").split("\n")
    assert sorted(filter(None, found)) == sorted(f"{key} {len(data)}" for key, data in files.items())
    run("cp", "-r", path / "dir", tmp_path / "copy")
    for key, data in files.items():
        assert run("sha256sum", path / key).split()[0] == hashlib.sha256(data).hexdigest()
        if key.startswith("dir/"):
            assert (tmp_path / "copy" / key[4:]).read_bytes() == data
    assert run("cat", path / "top.txt") == "hello\n"
    assert status(path)["bytes_fetched"] == sum(map(len, files.values()))
    assert status(path)["errors"] == 0


def test_random_reads_and_maps(bucket: Store, mount: Mounter, fuse_backend: str) -> None:
    data = random_bytes(24 * MIB + 99)
    bucket.put("data.bin", data)
    path = mount(bucket, fuse_backend=fuse_backend) / "data.bin"
    rng = random.Random(1)
    with path.open("rb", buffering=0) as file:
        for _ in range(100):
            offset, size = rng.randrange(len(data)), rng.choice((1, 100, 4096, 70_000, 3 * MIB))
            assert os.pread(file.fileno(), size, offset) == data[offset : offset + size]
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for _ in range(100):
                offset = rng.randrange(len(data))
                assert mapped[offset : offset + 5000] == data[offset : offset + 5000]
    array = np.memmap(path, dtype=np.uint8, mode="r")
    assert hashlib.sha256(array.tobytes()).digest() == hashlib.sha256(data).digest()


def test_many_readers_of_one_file_fetch_it_once(bucket: Store, mount: Mounter, fuse_backend: str) -> None:
    data = random_bytes(32 * MIB + 5)
    bucket.put("shared.bin", data)
    path = mount(bucket, fuse_backend=fuse_backend) / "shared.bin"
    processes = [subprocess.Popen(["sha256sum", path], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    digests = {process.communicate(timeout=60)[0].split()[0] for process in processes}
    assert digests == {hashlib.sha256(data).hexdigest()}
    assert status(path.parent)["bytes_fetched"] == len(data)


def test_threads_share_a_descriptor(bucket: Store, mount: Mounter, fuse_backend: str) -> None:
    data = random_bytes(32 * MIB)
    bucket.put("shared.bin", data)
    path = mount(bucket, fuse_backend=fuse_backend) / "shared.bin"
    with path.open("rb", buffering=0) as file, concurrent.futures.ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda part: os.pread(file.fileno(), 4 * MIB, part * 4 * MIB), range(8))
        assert b"".join(parts) == data
    assert status(path.parent)["bytes_fetched"] == len(data)


def test_a_second_mount_reads_from_the_cache(
    bucket: Store, files: dict[str, bytes], mount: Mounter, fuse_backend: str
) -> None:
    first = mount(bucket, fuse_backend=fuse_backend)
    run("sh", "-c", f"cat {first}/dir/* > /dev/null")
    mount.process(first).terminate()
    assert mount.process(first).wait(20) == 0
    second = mount(bucket, fuse_backend=fuse_backend)
    for key, data in files.items():
        if key.startswith("dir/"):
            assert (second / key).read_bytes() == data
    assert status(second)["bytes_fetched"] == 0


def test_it_is_read_only(bucket: Store, files: dict[str, bytes], mount: Mounter, fuse_backend: str) -> None:
    path = mount(bucket, fuse_backend=fuse_backend)
    for attempt in (
        lambda: (path / "new").write_bytes(b"x"),
        lambda: (path / "top.txt").write_bytes(b"x"),
        lambda: (path / "newdir").mkdir(),
        lambda: (path / "top.txt").unlink(),
        lambda: (path / "top.txt").rename(path / "other"),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS


def test_names_that_are_not_there(bucket: Store, files: dict[str, bytes], mount: Mounter, fuse_backend: str) -> None:
    path = mount(bucket, fuse_backend=fuse_backend)
    for name in ("missing", "dir/missing", "missing/deeper", "top.txt/below", "x" * 300):
        assert not os.path.lexists(path / name)
    with pytest.raises(NotADirectoryError):
        os.listdir(path / "top.txt")
    with pytest.raises(IsADirectoryError):
        (path / "dir").open("rb")


def test_attributes(bucket: Store, files: dict[str, bytes], mount: Mounter, fuse_backend: str) -> None:
    path = mount(bucket, fuse_backend=fuse_backend, uid=1234, gid=567, umask="027")
    info = (path / "top.txt").stat()
    assert (info.st_size, info.st_uid, info.st_gid, info.st_mode) == (6, 1234, 567, 0o100440)
    head = bucket.client.head_object(Bucket=bucket.name, Key="top.txt")
    assert info.st_mtime == head["LastModified"].timestamp()
    assert (path / "dir").stat().st_mode == 0o040550
    assert os.getxattr(path / "top.txt", "user.obsfs.etag").decode() == head["ETag"]
    assert os.statvfs(path).f_namemax == 255
    with pytest.raises(OSError) as caught:
        os.getxattr(path / "top.txt", "user.unknown")
    assert caught.value.errno == errno.ENODATA
    with pytest.raises(OSError) as caught:
        os.getxattr(path / "top.txt", "security.selinux")
    assert caught.value.errno == errno.EOPNOTSUPP, "so that `ls -l` does not ask for every file"


def test_attributes_that_stay_true_of_a_copy_are_listed(
    bucket: Store, files: dict[str, bytes], mount: Mounter, fuse_backend: str, tmp_path: Path
) -> None:
    path = mount(bucket, fuse_backend=fuse_backend)
    assert sorted(os.listxattr(path / "top.txt")) == ["user.obsfs.etag", "user.obsfs.key"]
    assert os.listxattr(path) == os.listxattr(path / "dir") == []
    shutil.copy2(path / "top.txt", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == files["top.txt"]


def test_keys_that_no_directory_can_show(mount: Mounter, fuse_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    keys = ["../up", "./here", "//double", "both", "both/below.txt", "folder/", "ok.txt", "sub/ok.txt", "x" * 256]
    with ListedServer(keys) as listed:
        path = mount("obs://any", fuse_backend=fuse_backend, endpoint_url=listed.endpoint)
        assert sorted(os.listdir(path)) == ["both", "folder", "ok.txt", "sub"]
        assert os.listdir(path / "folder") == []
        assert os.listdir(path / "both") == ["below.txt"]
        assert status(path)["hidden_keys"] == 5


def test_a_prefix_is_the_root(bucket: Store, files: dict[str, bytes], mount: Mounter, fuse_backend: str) -> None:
    path = mount(f"{bucket}/dir", fuse_backend=fuse_backend)
    assert sorted(os.listdir(path)) == sorted(key[4:] for key in files if key.startswith("dir/"))
    assert (path / "size-4096.bin").read_bytes() == files["dir/size-4096.bin"]


@pytest.mark.slow
def test_a_long_directory(bucket: Store, mount: Mounter, fuse_backend: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: bucket.put(f"many/file-{n:05}", b"%d" % n), range(2500)))
    path = mount(bucket, fuse_backend=fuse_backend)
    assert (path / "many" / "file-02499").read_bytes() == b"2499"
    assert not (path / "many" / "file-99999").exists()
    assert sorted(os.listdir(path / "many")) == [f"file-{n:05}" for n in range(2500)]
    assert len(run("ls", "-l", path / "many").splitlines()) == 2501


def test_a_replaced_object_is_never_mixed(bucket: Store, mount: Mounter, fuse_backend: str) -> None:
    old, new = random_bytes(24 * MIB, 1), random_bytes(24 * MIB, 2)
    bucket.put("model.bin", old)
    path = mount(bucket, fuse_backend=fuse_backend, metadata_ttl="0.5s", read_ahead=0) / "model.bin"
    with path.open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 1000, 0) == old[:1000]
        bucket.put("model.bin", new)
        with pytest.raises(OSError) as caught:
            os.pread(file.fileno(), MIB, 20 * MIB)
        assert caught.value.errno == errno.ESTALE
        wait_for(lambda: path.open("rb").read(1000) == new[:1000], 10)
        with pytest.raises(OSError) as caught:
            os.pread(file.fileno(), MIB, 16 * MIB)
        assert caught.value.errno == errno.ESTALE
        assert path.read_bytes() == new
    assert path.read_bytes() == new


def test_new_and_deleted_objects_are_seen_when_the_lifetime_is_over(
    bucket: Store, mount: Mounter, fuse_backend: str
) -> None:
    bucket.put("a.txt", b"a")
    path = mount(bucket, fuse_backend=fuse_backend, metadata_ttl="0.5s")
    assert os.listdir(path) == ["a.txt"]
    assert not (path / "b.txt").exists()
    bucket.put("b.txt", b"b")
    bucket.client.delete_object(Bucket=bucket.name, Key="a.txt")
    wait_for(lambda: os.listdir(path) == ["b.txt"], 10)
    wait_for(lambda: (path / "b.txt").exists() and not (path / "a.txt").exists(), 10)


def test_refresh_shows_at_once_what_has_changed(bucket: Store, mount: Mounter, fuse_backend: str) -> None:
    for name in ("a/old.txt", "a/same/file.txt", "a/new.txt"):
        bucket.put(name, b"1")
    path = mount(bucket, fuse_backend=fuse_backend)
    inside = mount(f"{bucket}/a", fuse_backend=fuse_backend)

    def look() -> tuple[list[str], bytes, bool]:
        absent = (path / "a" / "more" / "file.txt").exists()
        return sorted(os.listdir(path / "a")), (path / "a" / "new.txt").read_bytes(), absent

    assert look() == (["new.txt", "old.txt", "same"], b"1", False)
    with (path / "a" / "new.txt").open("rb") as file:
        bucket.client.delete_object(Bucket=bucket.name, Key="a/old.txt")
        bucket.put("a/new.txt", b"22")
        bucket.put("a/more/file.txt", b"1")
        assert look() == (["new.txt", "old.txt", "same"], b"1", False)
        assert mounts.refresh(path / "a" / "more" / "file.txt") == [path / "a"]
        # By way of libfuse the kernel keeps names for another second.
        wait_for(lambda: look() == (["more", "new.txt", "same"], b"22", True), 0.1 if fuse_backend == "native" else 3)
        if (
            fuse_backend == "native"
        ):  # libfuse refuses the old version while the new one is open: its close is not waited for
            assert file.read() == b"1"
    bucket.put("a/more/again.txt", b"1")
    assert mounts.refresh(f"{bucket}/a/more") == [path / "a" / "more", inside / "more"]
    assert mounts.refresh(f"{bucket}/b") == [path]
    assert mounts.refresh(str(bucket)) == [path, inside]
    assert mounts.refresh(path.parent) == mounts.refresh("obs://another") == []
    wait_for(lambda: (path / "a" / "more" / "again.txt").exists(), 3)


def test_which_way_a_file_is_served(bucket: Store, mount: Mounter, fuse_backend: str) -> None:
    bucket.put("file.bin", random_bytes(9 * MIB))
    path = mount(bucket, fuse_backend=fuse_backend) / "file.bin"
    direct = status(path.parent)["passthrough"]
    assert os.getxattr(path, "user.obsfs.served_by") == (b"splice" if fuse_backend == "native" else b"copy")
    path.read_bytes()
    after = b"copy" if fuse_backend == "libfuse" else b"passthrough" if direct else b"splice"
    wait_for(lambda: os.getxattr(path, "user.obsfs.served_by") == after)


@pytest.mark.parametrize("how", ["replaced", "deleted", "a directory", "put back"])
def test_who_opens_a_name_again_after_estale_sees_what_is_there(
    bucket: Store, mount: Mounter, fuse_backend: str, how: str
) -> None:
    """Also long before its lifetime is over: the server knows already that what it has of the name is wrong."""
    old, new = random_bytes(6 * MIB, 1), random_bytes(6 * MIB, 2)
    for name in ("m/a.bin", "m/other.bin"):
        bucket.put(name, old)
    directory = mount(bucket, fuse_backend=fuse_backend, metadata_ttl="1h", read_ahead=0) / "m"
    path = directory / "a.bin"
    assert os.listdir(directory) == ["a.bin", "other.bin"]
    with path.open("rb", buffering=0) as file:
        assert file.read(1000) == old[:1000]
        bucket.client.delete_object(Bucket=bucket.name, Key="m/a.bin")
        if how == "a directory":
            bucket.put("m/a.bin/inside", b"inside")
        elif how != "deleted":
            bucket.put("m/a.bin", new)
        with pytest.raises(OSError) as caught:
            os.pread(file.fileno(), 1000, 5 * MIB)
        assert caught.value.errno == errno.ESTALE
        if how == "put back":
            bucket.put("m/a.bin", old)
        if how == "deleted":
            with pytest.raises(FileNotFoundError):
                path.open("rb")
        elif how == "a directory":
            file.close()  # libfuse has one inode for a path, which is a file while it is open
            wait_for((path / "inside").exists)  # the kernel is told, and need not ask for a path below
            assert (path / "inside").read_bytes() == b"inside"
        else:
            assert path.read_bytes() == (new if how == "replaced" else old)
        assert (directory / "other.bin").read_bytes() == old


def test_libfuse_knows_one_version_below_a_directory_as_one(bucket: Store, mount: Mounter) -> None:
    """Opened again, and mapped, while it is open: no reader of the same version is refused."""
    data = random_bytes(6 * MIB)
    bucket.put("a/b/file", data)
    path = mount(bucket, fuse_backend="libfuse") / "a" / "b" / "file"
    with path.open("rb", buffering=0) as first:
        assert first.read(16) == data[:16]
        for _ in range(2):
            with path.open("rb", buffering=0) as second:
                second.seek(4 * MIB)
                assert second.read(16) == data[4 * MIB : 4 * MIB + 16]
                with mmap.mmap(second.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as pages:
                    assert pages[5 * MIB : 5 * MIB + 16] == data[5 * MIB : 5 * MIB + 16]
            first.seek(3 * MIB)
            assert first.read(16) == data[3 * MIB : 3 * MIB + 16]


@pytest.mark.parametrize("key", ["file", "a/file"])
def test_libfuse_opens_no_version_by_the_size_of_another(bucket: Store, mount: Mounter, key: str) -> None:
    """The kernel believes the size of a path for a second; a reader of the new version must not end there."""
    root = mount(bucket, fuse_backend="libfuse")
    path = root / key
    for data in (b"1" * 1000, b"2" * 300_000, b"3" * 10):
        bucket.put(key, data)
        os.getxattr(root, "user.obsfs.refresh")
        assert path.read_bytes() == data
        assert path.stat().st_size == len(data)


@pytest.mark.parametrize("size", [3 * MIB, 3 * MIB + 1])
def test_after_an_estale_of_an_older_version_the_bucket_is_asked(bucket: Store, mount: Mounter, size: int) -> None:
    """Which libfuse's server gives because another one is open: that one may be gone by then, too."""
    bucket.put("file.bin", random_bytes(3 * MIB, 1))
    path = mount(bucket, fuse_backend="libfuse", metadata_ttl="1h", read_ahead=0, kernel_read_ahead=0) / "file.bin"
    with path.open("rb", buffering=0) as first:
        assert first.read(10) == random_bytes(3 * MIB, 1)[:10]
        bucket.put("file.bin", random_bytes(size, 2))
        mounts.refresh(path)
        with path.open("rb", buffering=0) as second:
            assert second.read(10) == random_bytes(size, 2)[:10]
            bucket.put("file.bin", random_bytes(2 * MIB, 3))
            with pytest.raises(OSError) as caught:
                os.pread(first.fileno(), 10, 2 * MIB + 5)
            assert caught.value.errno == errno.ESTALE
            assert path.read_bytes() == random_bytes(2 * MIB, 3)
