"""One rule for all verbs: stdout has the result, stderr everything else (see `obsfs.cli.output`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from obsfs import cli
from obsfs.cli import main
from obsfs.cli.output import columns, facts
from tests.conftest import MIB, Mounter, Store, random_bytes, write_model

Said = Callable[..., tuple[int, str, str]]
_OF_THE_TRAINER = {"train", "merge", "chat", "serve"}
"""Tried in tests/trainer."""


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    """Run a verb here; its exit status, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return code, out, err

    return run


def test_results_are_on_stdout_and_nothing_else_is(
    bucket: Store, said: Said, mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, place = write_model(tmp_path / "m", mib=1), f"{bucket}/m@v1"
    path = mount(bucket)
    monkeypatch.chdir(tmp_path)
    results = {
        ("push", model, place): f"published {place}",
        ("models", str(bucket)): "1 model in",
        ("models", "show", place): "Qwen2ForCausalLM",
        ("verify", place): "all as in the manifest",
        ("warm", place, "--pin"): "pinned",
        ("unpin", place): "unpinned",
        ("cache", "info"): f"obs://{bucket.name}/m@v1/config.json",
        ("cache", "verify"): "all is well",
        ("cache", "clean", place): "freed in",
        ("status", path): str(bucket),
        ("refresh", path): "asks the bucket again",
        ("upgrade", path): "-> ",
    }
    for words, text in results.items():
        code, out, err = said(*words)
        assert (code, err) == (0, ""), (words, out, err)
        assert text in out, (words, out)
    code, out, err = said("pull", place, tmp_path / "there")
    assert (code, out) == (0, f"{tmp_path}/there\n")
    assert "fetched" in err  # a remark: the path stands alone
    silent = {"mount", "umount"}
    elsewhere = {"import", "bench", "demo"}  # tried where they are tested
    tried = {str(words[0]) for words in results} | {"pull"}
    assert set(cli._VERBS) == tried | silent | elsewhere, "a verb without a result of its own"
    assert set(cli._further()) >= _OF_THE_TRAINER


@pytest.mark.parametrize(
    "words",
    [("models", "{b}"), ("models", "show", "{b}/m"), ("verify", "{b}/m", "--in", "cache"), ("warm", "{b}/m"),
     ("cache", "info"), ("cache", "verify"), ("status",), ("pull", "{b}/m", "{d}")],
    ids=" ".join,
)  # fmt: skip
def test_json_is_one_document(bucket: Store, said: Said, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert said("push", write_model(tmp_path / "m", mib=1, shards=1), f"{bucket}/m")[0] == 0
    (tmp_path / "cache" / "obsfs").mkdir(parents=True, exist_ok=True, mode=0o700)
    code, out, err = said(*(word.format(b=bucket, d=tmp_path / "d") for word in words), "--json")
    # Other tests have mounts, some of them dead, which `status` says on stderr.
    assert (code, err) == (0, "") or words == ("status",)
    json.loads(out)


def test_bench_prints_its_table_and_remarks_where_the_report_is(said: Said, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(random_bytes(4 * MIB))
    code, out, err = said("bench", tmp_path, "--report", tmp_path / "r.html")
    assert code == 0
    assert "one reader, in sequence" in out
    assert err == f"written: {tmp_path}/r.html, {tmp_path}/r.json\n"


def test_a_damaged_model_is_a_row_with_its_state(bucket: Store, said: Said, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=1, shards=1)
    for name in ("good", "both@v1"):
        assert said("push", model, f"{bucket}/{name}")[0] == 0
    bucket.put("raw/config.json", b"{}")
    for name, data in (("both@v2", b"{"), ("aaa", b'{"format": "obsfs-manifest-9"}'), ("zzz@v1", b"")):
        bucket.put(f"{name}/.obsfs/manifest.json", data)
    code, out, err = said("models", bucket)
    rows = {line.split("  ")[0]: " ".join(line.split()[1:]) for line in out.splitlines()[1:-1]}
    assert code == 0
    assert list(rows) == ["aaa", "both", "good", "raw", "zzz"]
    assert rows["aaa"] == "- damaged"
    assert rows["zzz"] == "v1 damaged"
    assert rows["both"].startswith("v2, v1 published, v2 damaged Qwen2ForCausalLM")
    assert rows["good"].startswith("- published ")
    assert rows["raw"].startswith("- no manifest ")
    assert "5 models" in out
    assert err.count("cannot be read") == 3
    found = {one["url"]: one for one in json.loads(said("models", bucket, "--json")[1])["models"]}
    bad = found[f"{bucket}/aaa"]
    assert (bad["state"], bad["published"], bad["size"], bad["cached"]) == ("damaged", False, 0, 0)
    assert f"{bucket}/aaa/.obsfs/manifest.json cannot be read" in bad["error"]
    assert found[f"{bucket}/good"]["state"] == "published"
    assert "error" not in found[f"{bucket}/good"]
    assert set(found[f"{bucket}/good"]) <= set(bad)


def test_a_file_is_no_model_and_the_model_is_named(bucket: Store, said: Said, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=1, shards=1)
    assert said("push", model, f"{bucket}/org/m@v1")[0] == 0
    bucket.put("raw/config.json", b"{}")
    bucket.put("raw/sub/deep/a.txt", b"a")
    bucket.put("data/only.jsonl", b"{}")
    inside = f"give {bucket}/org/m@v1, the model that it is in"
    for words, remedy in (
        (("pull", f"{bucket}/org/m@v1/config.json", tmp_path / "x"), inside),
        (("models", "show", f"{bucket}/org/m@v1/sub/notes.md"), inside),
        (("warm", f"{bucket}/org/m@v1/config.json", "--for", "p"), inside),
        (("verify", f"{bucket}/org/m@v1/empty.txt"), inside),
        (("pull", f"{bucket}/raw/sub/deep/a.txt"), f"give {bucket}/raw, "),
        (("pull", f"{bucket}/data/only.jsonl"), "in no model"),
    ):
        code, out, err = said(*words)
        assert (code, out) == (2, "")
        assert err.startswith("obsfs: obs://")
        assert "is a file" in err and remedy in err, err
    assert said("warm", f"{bucket}/org/m@v1/config.json")[0] == 0
    assert "there is no model" in said("pull", f"{bucket}/org/m@v1/confik.json")[2]


def test_cleaning_takes_names_and_says_what_is_not_cached(
    bucket: Store, said: Said, mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m", mib=1, shards=1)
    for name in ("lib/one@v1", "lib/one@v2", "lib/two"):
        assert said("push", model, f"{bucket}/{name}")[0] == 0
        assert said("warm", f"{bucket}/{name}")[0] == 0
    for wrong in (f"{bucket}/lib/on@v1", f"{bucket}/lib/one@v1/sub", "obs://another/lib/one@v1"):
        code, out, err = said("cache", "clean", wrong)
        assert (code, err) == (0, "")
        assert out.startswith(f"nothing of {wrong} is cached in ") or wrong.endswith("sub")
    assert f"did you mean '{bucket}/lib/one@v1'?" in said("cache", "clean", f"{bucket}/lib/oen@v1")[1]
    assert "write obs://BUCKET/NAME" in said("cache", "clean", "one")[2]
    assert "MiB freed" in said("cache", "clean", "one@v2", "--library", f"{bucket}/lib")[1]
    monkeypatch.setenv("OBSFS_LIBRARY", f"{bucket}/lib")
    assert "nothing of" in said("cache", "clean", "one@v2")[1]
    assert "MiB freed" in said("cache", "clean", "one")[1]  # all its versions
    assert "MiB freed" in said("cache", "clean", "two")[1]
    path = mount(f"{bucket}/lib", cache_dir=tmp_path / "another")
    (path / "two" / "config.json").read_bytes()
    assert " freed in " in (out := said("cache", "clean", path / "two")[1])
    assert str(tmp_path / "another") in out  # the cache of that mount


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (("push", "obs://b/m", "."), "write obsfs push DIRECTORY obs://BUCKET/NAME[@VERSION]"),
        (("mount", ".", "obs://b"), "write obsfs mount obs://BUCKET[/PREFIX] MOUNTPOINT"),
        (("pull", "here", "obs://b/m"), "write obsfs pull obs://BUCKET/NAME[@VERSION] [DIRECTORY]"),
        (("push", "m@v1", "here"), "write obsfs push here m@v1"),
        (("push", "s3://b/org/m", "here"), "write obsfs push DIRECTORY "),
        (("import", "obs://b/m", "hf:o/m"), "write hf:ORG/NAME or ms:ORG/NAME, with @REVISION or not, first"),
    ],
)
def test_swapped_arguments_are_told_their_order(
    said: Said, words: tuple[str, ...], order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    code, out, err = said(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert order in err


@pytest.mark.parametrize("words", [("status",), ("status", "--json"), ("refresh", "/"), ("cache", "info")])
def test_every_verb_tells_once_of_a_mistyped_variable(
    said: Said, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OBSFS_CACHE_DIRR", "/x")
    assert said(*words)[2].count("the variable OBSFS_CACHE_DIRR is not used: did you mean OBSFS_CACHE_DIR?") == 1


def test_tables_fit_the_terminal_and_stay_whole_elsewhere(
    bucket: Store, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "long-" + "name-" * 20
    bucket.put(f"{name}/config.json", json.dumps({"architectures": ["a wide architecture " * 9]}).encode())
    bucket.put(f"{name}/two words.txt", b"")
    for words in (("models", bucket), ("models", "show", f"{bucket}/{name}")):
        monkeypatch.setenv("COLUMNS", "70")
        lines = said(*words)[1].splitlines()
        wide = [line for line in lines if len(line) > 70]
        assert all(name in line for line in wide), wide  # no word is broken, so that it can be copied
        monkeypatch.delenv("COLUMNS")
        assert any(("a wide architecture " * 9).strip() in line for line in said(*words)[1].splitlines())
    key = "k" * 1024
    assert key in "\n".join(columns(("object", ">size"), [(key, "1 B")]))
    assert [line.rstrip() for line in facts([("a", key)])] == [f"  a  {key}"]
