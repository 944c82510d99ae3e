from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import MIB, Store, contents, write_model
from tests.library.test_push import Run


def test_the_library_as_a_table(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=2)
    for name in ("lib/qwen@v1", "lib/qwen@v2", "lib/org/other"):
        assert obsfs("push", model, f"{bucket}/{name}").code == 0
    for path, data in contents(model).items():
        bucket.put(f"lib/raw/{path}", data)
    bucket.put("lib/damaged/.obsfs/manifest.json", b"{")
    bucket.put("lib/notes/readme.txt", b"no model")
    assert obsfs("pull", f"{bucket}/lib/qwen@v1", tmp_path / "a").code == 0
    shown = obsfs("models", f"{bucket}/lib")
    assert shown.code == 0
    assert shown.err.count("\n") == 1
    assert "damaged" in shown.err
    lines = {line.split()[0]: line for line in shown.out.splitlines()}
    assert "v1, v2" in lines["qwen"]
    assert "Qwen2ForCausalLM" in lines["qwen"] and "2.1M" in lines["qwen"] and "bfloat16" in lines["qwen"]
    assert "4.0 MiB" in lines["qwen"]
    assert "2.1M" in lines["raw"] and "bfloat16" in lines["raw"]
    assert "org/other" in lines
    assert "notes" not in lines
    document = obsfs("models", f"{bucket}/lib", "--json").json
    by_url = {entry["url"]: entry for entry in document["models"]}
    assert by_url[f"{bucket}/lib/qwen@v1"]["cached"] == sum(map(len, contents(model).values()))
    assert by_url[f"{bucket}/lib/qwen@v2"]["cached"] == 0
    assert by_url[f"{bucket}/lib/raw"]["published"] is False
    assert by_url[f"{bucket}/lib/raw"]["parameters"] == 4 * MIB // 2


def test_what_was_just_asked_is_not_asked_again(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=1)
    assert obsfs("push", model, f"{bucket}/one").code == 0
    assert "1 model in" in obsfs("models", bucket).out
    elsewhere = {"OBSFS_CACHE_DIR": str(tmp_path / "elsewhere")}
    assert obsfs("push", model, f"{bucket}/two", **elsewhere).code == 0
    assert "1 model in" in obsfs("models", bucket).out
    assert "2 models" in obsfs("models", bucket, "--fresh").out
    assert obsfs("push", model, f"{bucket}/three").code == 0
    assert "3 models" in obsfs("models", bucket).out
    assert obsfs("push", model, f"{bucket}/four", **elsewhere).code == 0
    assert "4 models" in obsfs("models", bucket, "--metadata-ttl", "0").out
    away = obsfs("models", bucket, AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert away.code == 2  # another endpoint, another library


def test_one_model(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=1)
    assert obsfs("push", model, f"{bucket}/qwen@v1", "--revision", "abc").code == 0
    shown = obsfs("models", "show", "qwen", OBSFS_LIBRARY=str(bucket))
    assert shown.code == 0
    for text in (f"{bucket}/qwen@v1", "Qwen2ForCausalLM", "abc", "model-00001-of-00002.safetensors", "sub/notes.md"):
        assert text in shown.out
    document = obsfs("models", "show", f"{bucket}/qwen", "--json").json
    assert document["versions"] == ["v1"]
    assert {file["path"] for file in document["files"]} == set(contents(model))
    assert json.dumps(document)
    missing = obsfs("models", "show", f"{bucket}/qwem")
    assert (missing.code, missing.err.count("\n")) == (2, 1)
    assert "qwen@v1" in missing.err


def test_mistakes(bucket: Store, obsfs: Run) -> None:
    for arguments, word in (
        (("models",), "OBSFS_LIBRARY"),
        (("models", "obs://no-such-bucket"), "no-such-bucket"),
    ):
        done = obsfs(*arguments)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert word in done.err
    assert "0 models" in obsfs("models", bucket).out
    assert "show" in obsfs("models", "--help").out


def test_models_without_a_manifest_and_names_that_are_not_there(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    for key in ("raw@v2/config.json", "raw@v10/config.json", "org/qwen@v3/config.json", "papers/a.txt"):
        bucket.put(f"lib/{key}", b"{}")
    document = obsfs("models", "show", f"{bucket}/lib/raw", "--json").json
    assert document["url"] == f"{bucket}/lib/raw@v10"
    assert document["versions"] == ["v2", "v10"]
    for name, near in (("raw@v9", "raw@v10"), ("qwen", "there is org/qwen@v3"), ("organ", "there is org/qwen@v3")):
        done = obsfs("models", "show", f"{bucket}/lib/{name}")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert near in done.err
    assert "papers" not in obsfs("models", "show", f"{bucket}/lib/paper").err
    for place in (f"{bucket}/lib/papers", f"{bucket}/lib/org/qwen@v3"):
        done = obsfs("models", place)
        assert (done.code, done.out) == (0, f"0 models in {place}: obsfs push makes one\n")
    done = obsfs("models", f"{bucket}/libs")
    assert (done.code, done.err) == (2, f"obsfs: there is nothing in {bucket}/libs: there is lib\n")


def test_what_is_cached_is_of_the_version_whose_size_is_shown(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    for version, mib in (("v1", 3), ("v2", 1)):
        assert obsfs("push", write_model(tmp_path / version, mib=mib), f"{bucket}/m@{version}").code == 0
        if version == "v1":
            assert obsfs("pull", f"{bucket}/m@v1", tmp_path / "here").code == 0
    row = obsfs("models", bucket).out.splitlines()[1].split()
    assert row[-2:] == ["2.0", "MiB"]  # the size, and nothing of it cached
    assert obsfs("pull", f"{bucket}/m@v2", tmp_path / "there").code == 0
    assert obsfs("models", bucket).out.splitlines()[1].split()[-1] == "all"
