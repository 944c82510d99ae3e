"""Hugging Face and ModelScope into the bucket, through their own libraries and a small hub of the same API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from obsfs.errors import UsageError
from obsfs.library.hub import parse_hub_name
from tests.conftest import Store, contents, write_model
from tests.library.hub import COMMIT, LocalHub
from tests.library.test_push import Run, published, verify_whole


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LocalHub, Path]]:
    model = write_model(tmp_path / "hub", mib=9)
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    with LocalHub(model) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", running.endpoint)
        yield running, model


@pytest.mark.parametrize("kind", ["hf", "ms"])
def test_import_streams_a_repository_into_the_bucket(
    bucket: Store, obsfs: Run, hub: tuple[LocalHub, Path], tmp_path: Path, kind: str
) -> None:
    _, model = hub
    done = obsfs("import", f"{kind}:org/name", f"{bucket}/models/mine@v1", "--json")
    assert done.code == 0, done.err
    assert done.json["source"] == f"{kind}:org/name"
    assert done.json["model"]["architecture"] == "Qwen2ForCausalLM"
    assert done.json["model"]["dtype"] == "bfloat16"
    verify_whole(bucket, model, "models/mine@v1")
    assert obsfs("import", f"{kind}:org/name", f"{bucket}/models/mine@v1", "--json").json["bytes_sent"] == 0
    assert not list(tmp_path.rglob("*.safetensors.incomplete"))
    assert [path for path in tmp_path.rglob("*.safetensors") if model not in path.parents] == []


def test_its_own_name_its_commit_and_the_hubs_cache(
    bucket: Store, obsfs: Run, hub: tuple[LocalHub, Path], tmp_path: Path
) -> None:
    _, model = hub
    library = {"OBSFS_LIBRARY": f"{bucket}/lib"}
    assert obsfs("import", "hf:org/name@main", "--exclude", "*.md", **library).code == 0
    manifest = published(bucket, "lib/name")
    assert (manifest["source"], manifest["revision"]) == ("hf:org/name", COMMIT)
    assert "sub/notes.md" not in [file["path"] for file in manifest["files"]]
    assert obsfs("pull", "name", "--to-hf-cache", "--as", "org/name", **library).code == 0
    place = tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / COMMIT
    assert set(contents(place)) == set(contents(model)) - {"sub/notes.md"}


def test_what_the_hub_sends_is_compared_with_what_it_says(
    bucket: Store, obsfs: Run, hub: tuple[LocalHub, Path]
) -> None:
    running, _ = hub
    running.is_wrong = True
    done = obsfs("import", "hf:org/name", f"{bucket}/m@v1")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "safetensors" in done.err
    assert "Contents" not in bucket.client.list_objects_v2(Bucket=bucket.name)


def test_mistakes(bucket: Store, obsfs: Run, hub: tuple[LocalHub, Path]) -> None:
    running, _ = hub
    for name in ("hf:", "gh:org/name", "org/name", "hf:a/b/c", "hf:../x"):
        with pytest.raises(UsageError):
            parse_hub_name(name)
    for name in ("hf:org/other", "ms:org/other"):
        unknown = obsfs("import", name, f"{bucket}/m")
        assert (unknown.code, unknown.err.count("\n")) == (2, 1), unknown.err
        assert "org/other" in unknown.err
    running.token = "a-planted-token"
    refused = obsfs("import", "hf:org/name", f"{bucket}/m")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "HF_TOKEN" in refused.err
    wrong = obsfs("import", "hf:org/name", f"{bucket}/m", HF_TOKEN="a-wrong-token")
    assert "a-wrong-token" not in wrong.err + wrong.out
    assert obsfs("import", "hf:org/name", f"{bucket}/m", HF_TOKEN="a-planted-token").code == 0
    assert "a-planted-token" not in json.dumps(published(bucket, "m"))


def test_what_a_hub_has_in_pieces_is_published_with_a_warning(
    bucket: Store, obsfs: Run, hub: tuple[LocalHub, Path]
) -> None:
    _, model = hub
    (model / "model-00002-of-00002.safetensors").unlink()
    (model / "config.json").write_text("{")
    done = obsfs("import", "hf:org/name", f"{bucket}/mine@v1")
    assert done.code == 0, done.err
    assert "warning: hf:org/name/config.json is not JSON" in done.err
    assert "warning: hf:org/name/model-00002-of-00002.safetensors is missing, and others of 2 are there" in done.err
    assert "warning" not in obsfs("import", "hf:org/name", f"{bucket}/mine@v1", "--no-check").err
