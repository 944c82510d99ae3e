"""One damaged model costs that model, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Store
from tests.library.test_push import Run


@pytest.fixture
def library(bucket: Store, obsfs: Run, tmp_path: Path) -> Store:
    """With the model ``good`` and its version ``good@v1``."""
    (tmp_path / "config.json").write_text('{"architectures": ["A"]}')
    (tmp_path / "m").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "m" / "config.json")
    for name in ("good", "good@v1", "other@v1"):
        assert obsfs("push", tmp_path / "m", f"{bucket}/{name}").code == 0
    return bucket


@pytest.mark.parametrize("size", ["1" + "0" * 400, "-1", str(1 << 64), "1e308"])
def test_a_damaged_manifest_is_told_and_the_others_are_shown(library: Store, obsfs: Run, size: str) -> None:
    text = f'{{"name":"bad","created":"2026-01-01T00:00:00Z","files":[{{"path":"a","size":{size},"etag":"e"}}]}}'
    library.put("bad/.obsfs/manifest.json", text.encode())
    done = obsfs("models", str(library), "--json")
    assert done.code == 0, done.err
    states = [(model["name"], model["state"]) for model in done.json["models"]]
    assert states == [("bad", "damaged"), ("good", "published"), ("good", "published"), ("other", "published")]
    (problem,) = done.json["problems"]
    assert "bad/.obsfs/manifest.json cannot be read" in problem


def test_a_manifest_that_is_too_large_is_told(library: Store, obsfs: Run) -> None:
    library.put("huge/.obsfs/manifest.json", b" " * ((64 << 20) + 1))
    done = obsfs("models", str(library), "--json")
    assert [model["name"] for model in done.json["models"] if model["state"] == "published"] == [
        "good",
        "good",
        "other",
    ]
    assert "too large" in done.json["problems"][0]


def test_a_damaged_version_costs_that_version(library: Store, obsfs: Run) -> None:
    library.put("other@v2/.obsfs/manifest.json", b"{")
    done = obsfs("models", "show", f"{library}/other", "--json")
    assert done.code == 0, done.err
    assert done.json["versions"] == ["v1"]
    refused = obsfs("models", "show", f"{library}/other@v2")
    assert refused.code == 2
    assert "cannot be read" in refused.err


def test_a_profile_of_odd_ranges_names_only_blocks_that_are_there(library: Store, obsfs: Run) -> None:
    size = len('{"architectures": ["A"]}')
    for name, ranges in {"a": [[-5, 10**30], [0, 1]], "b": [[0, 1]] * 1000, "c": [[10**30, -1]]}.items():
        library.put(f"good/.obsfs/profiles/{name}.json", json.dumps({"config.json": ranges}).encode())
        done = obsfs("warm", f"{library}/good", "--for", name, "--json")
        assert done.code == 0, done.err
        assert done.json[0]["bytes"] == (0 if name == "c" else size)
