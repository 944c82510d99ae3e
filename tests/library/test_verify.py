"""A flipped bit is found wherever it is: in the bucket, in the cache, on the disk."""

from __future__ import annotations

from pathlib import Path

from awscrt.checksums import crc32c

from tests.conftest import MIB, Mounter, Store, contents, write_model
from tests.library.test_push import Run

FILE = "model-00001-of-00002.safetensors"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_all_is_as_in_the_manifest(bucket: Store, obsfs: Run, tmp_path: Path, mount: Mounter) -> None:
    model = write_model(tmp_path / "m", mib=3)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    assert obsfs("pull", f"{bucket}/m@v1", tmp_path / "a").code == 0
    for arguments in ((f"{bucket}/m@v1",), (f"{bucket}/m@v1", "--in", "cache"), (tmp_path / "a",)):
        done = obsfs("verify", *arguments)
        assert (done.code, done.err) == (0, ""), done
        assert "5 files" in done.out or "4 files" in done.out  # the empty file is not in the cache
    path = mount(bucket)
    (path / "m@v1" / FILE).read_bytes()
    on_mount = obsfs("verify", path / "m@v1", "--json").json
    assert (on_mount["where"], on_mount["files"], on_mount["differences"]) == ("cache", 1, [])
    rest = sum(map(len, contents(model).values())) - (model / FILE).stat().st_size
    assert (on_mount["files_not_cached"], on_mount["files_partly_cached"]) == (3, 0)
    assert (on_mount["bytes"], on_mount["bytes_not_cached"]) == ((model / FILE).stat().st_size, rest)
    assert obsfs("verify", path / "m@v1", "--in", "bucket").code == 0


def test_a_bit_flipped_on_the_disk(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=3)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    assert obsfs("pull", f"{bucket}/m@v1", tmp_path / "a").code == 0
    flip(tmp_path / "a" / FILE, 2 * MIB)
    (tmp_path / "a" / "config.json").unlink()
    (tmp_path / "a" / "empty.txt").write_text("longer")
    done = obsfs("verify", tmp_path / "a")
    assert done.code == 1
    assert [line.split(":")[0] for line in done.out.splitlines()[:-1]] == ["config.json", "empty.txt", FILE]
    assert obsfs("pull", f"{bucket}/m@v1", tmp_path / "a", "--force").code == 0
    assert contents(tmp_path / "a") == contents(model)
    assert obsfs("verify", tmp_path / "a").code == 0


def test_a_bit_flipped_in_the_cache(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=3)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    assert obsfs("pull", f"{bucket}/m@v1", tmp_path / "a").code == 0
    size = (model / FILE).stat().st_size
    for path in (tmp_path / "cache").rglob("*.data"):
        if path.stat().st_size == size:
            flip(path, MIB + 7)
    done = obsfs("verify", f"{bucket}/m@v1", "--in", "cache", "--json")
    assert done.code == 1
    assert len(done.json["differences"]) == 2
    assert "damaged" in done.json["differences"][0]["reason"]
    assert obsfs("pull", f"{bucket}/m@v1", tmp_path / "b", "--json").json["bytes_fetched"] == 2 * MIB
    assert contents(tmp_path / "b") == contents(model)
    assert obsfs("verify", f"{bucket}/m@v1", "--in", "cache").code == 0


def replace_stored(bucket: Store, old: bytes, new: bytes, *, is_vouched: bool) -> None:
    """Change two objects in the files in which the server keeps them; with `is_vouched`, its checksums of them too."""
    found = 0
    for volume in bucket.server.directory.rglob(f"{bucket.name}_*.dat"):
        stored = volume.read_bytes()
        at = -1
        while (at := stored.find(old, at + 1)) >= 0:
            found += 1
            behind = at + len(old)
            with volume.open("r+b") as file:
                file.seek(at)
                file.write(new)
                if is_vouched:
                    file.seek(stored.index(crc32c(old).to_bytes(4, "big"), behind, behind + 512))
                    file.write(crc32c(new).to_bytes(4, "big"))
    assert found == 2


def test_a_bit_flipped_in_the_bucket(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    """Under the server, in the file in which it keeps the object; and by somebody who writes the object again."""
    model = write_model(tmp_path / "m", mib=3)
    data = (model / FILE).read_bytes()
    wrong = bytearray(data)
    wrong[2 * MIB] ^= 1
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    assert obsfs("push", model, f"{bucket}/n@v1").code == 0
    replace_stored(bucket, data, bytes(wrong), is_vouched=False)
    # A server that has checksums of its own may refuse to send it; this one tries again first, for longer than we wait.
    once = {"OBSFS_RETRY_TIMEOUT": "0", "OBSFS_REQUEST_TIMEOUT": "1"}
    done = obsfs("verify", f"{bucket}/n@v1", "--cache-dir", tmp_path / "none", **once)
    assert done.code in (1, 2), done
    assert FILE in done.out + done.err
    replace_stored(bucket, bytes(wrong), data, is_vouched=False)
    replace_stored(bucket, data, bytes(wrong), is_vouched=True)
    for name in ("m@v1", "n@v1"):
        done = obsfs("verify", f"{bucket}/{name}", "--cache-dir", tmp_path / "none", OBSFS_RETRY_TIMEOUT="2")
        assert done.code == 1, done
        *damaged, verdict = done.out.splitlines()
        assert [line.split(":")[0] for line in damaged] == [FILE]
        assert "1 of them differ" in verdict
    replace_stored(bucket, bytes(wrong), data, is_vouched=True)
    assert obsfs("verify", f"{bucket}/m@v1").code == 0
    bucket.put(f"m@v1/{FILE}", bytes(wrong))
    bucket.client.delete_object(Bucket=bucket.name, Key="m@v1/config.json")
    bucket.put("m@v1/more.txt", b"")
    done = obsfs("verify", f"{bucket}/m@v1")
    assert done.code == 1
    assert [line.split(":")[0] for line in done.out.splitlines()[:-1]] == ["config.json", FILE, "more.txt"]


def test_what_cannot_be_verified(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    bucket.put("raw/config.json", b"{}")
    assert "has no manifest" in obsfs("verify", f"{bucket}/raw").err
    assert "on no mount" in obsfs("verify", tmp_path).err


def test_what_a_cache_lacks_is_not_said_to_be_verified(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=9)
    assert obsfs("push", model, f"{bucket}/m@v1").code == 0
    size = sum(map(len, contents(model).values()))
    done = obsfs("verify", f"{bucket}/m@v1", "--in", "cache")
    assert (done.code, done.err) == (0, "")
    assert "0 files, 0 B: nothing to compare; not cached, and so not checked: 4 files (18.0 MiB)" in done.out
    assert obsfs("warm", f"{bucket}/m@v1", "--max-bytes", "12MiB").code == 0
    shown = obsfs("verify", f"{bucket}/m@v1", "--in", "cache")
    assert "not cached, and so not checked: parts of 1 file (" in shown.out
    found = obsfs("verify", f"{bucket}/m@v1", "--in", "cache", "--json").json
    assert found["files_partly_cached"] == 1
    assert found["bytes"] + found["bytes_not_cached"] == size
