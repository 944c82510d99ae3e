from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.errors import UsageError
from obsfs.library.names import is_safe_path, matches_patterns, oldest_first, parse_model, suggest_names


def test_a_model_has_a_library_a_name_and_perhaps_a_version() -> None:
    name = parse_model("obs://bucket/team/models/Qwen2-7B@v1.2")
    assert (name.bucket, name.library, name.name, name.version) == ("bucket", "team/models/", "Qwen2-7B", "v1.2")
    assert name.prefix == "team/models/Qwen2-7B@v1.2/"
    assert name.manifest_key == "team/models/Qwen2-7B@v1.2/.obsfs/manifest.json"
    assert str(name) == "obs://bucket/team/models/Qwen2-7B@v1.2"
    assert parse_model("obs://bucket/Qwen2") == parse_model("Qwen2", "obs://bucket")
    assert parse_model("org/Qwen2@v1", "obs://bucket/models").prefix == "models/org/Qwen2@v1/"


@pytest.mark.parametrize(
    "text",
    ["obs://bucket", "obs://bucket/", "obs://bucket/a@", "obs://bucket/@v1", "obs://bucket/a@b@c",
     "obs://bucket/../a", "obs://bucket/a/../b", "obs://bucket/a@.hidden", "obs://bucket/.obsfs", "Qwen2", "http://b/a"],
)  # fmt: skip
def test_what_names_no_model_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_model(text)


@given(st.text())
def test_no_text_makes_a_name_that_leaves_its_library(text: str) -> None:
    try:
        name = parse_model(f"obs://bucket/models/{text}")
    except UsageError:
        return
    parts = name.prefix.rstrip("/").split("/")
    assert parts[0] == "models"
    assert not {"", ".", ".."} & set(parts)


@given(st.text())
def test_a_safe_path_stays_inside_and_is_not_ours(path: str) -> None:
    if is_safe_path(path):
        parts = path.split("/")
        assert not {"", ".", "..", "\0"} & set(parts)
        assert parts[0] != ".obsfs"


def test_patterns_are_the_hubs() -> None:
    assert matches_patterns("a/b.json", (), ())
    assert matches_patterns("a/b.json", ("*.json",), ())
    assert not matches_patterns("a/b.bin", ("*.json",), ())
    assert not matches_patterns("a/b.json", ("*.json",), ("a/",))


def test_versions_in_order_and_the_nearest() -> None:
    assert oldest_first([(2.0, "a"), (1.0, "v10"), (1.0, "v2")]) == ["v2", "v10", "a"]
    assert "Qwen2-7B" in suggest_names("Qwen2-7b", ["Qwen2-7B", "Llama"])
    assert suggest_names("x", []) == "there is none yet"
    assert suggest_names("unlike", ["Qwen2", "Llama"]) == "there is Qwen2, and 1 other"
    assert suggest_names("unlike", ["Qwen2"]) == "there is only Qwen2"


@pytest.mark.parametrize("text", ["x@v/1", "org/x@v1/2", "x@/y"])
def test_a_version_with_a_slash_is_no_name_without_a_version(text: str) -> None:
    with pytest.raises(UsageError, match="a version has no '/'"):
        parse_model(text, "obs://models")
