from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsfs.errors import UsageError
from obsfs.library.manifest import File, Manifest, is_model, now, parse_manifest, summarize

FILE = {"path": "config.json", "size": 3, "etag": '"e"', "sha256": "0" * 64}


def document(**changes: object) -> bytes:
    return json.dumps(
        {"format": "obsfs-manifest-1", "name": "m", "created": "2026-01-01T00:00:00Z", "files": [FILE], **changes}
    ).encode()


def test_what_is_written_is_read_again() -> None:
    manifest = Manifest(name="m", version="v1", created=now(), files=(File(**FILE),))  # type: ignore[arg-type]
    assert parse_manifest(manifest.to_json(), "here") == manifest
    assert parse_manifest(document(unknown="later versions may say more"), "here").size == 3


_FIRST_IN_THREADS = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from obsfs.library.manifest import parse_manifest
sys.setswitchinterval(1e-6)
data, at_once = sys.stdin.buffer.read(), threading.Barrier(16)

def parse(_):
    at_once.wait()
    return parse_manifest(data, "here").size

with ThreadPoolExecutor(16) as pool:
    assert list(pool.map(parse, range(16))) == [3] * 16
"""


@pytest.mark.parametrize("turn", range(8))
def test_the_first_manifests_of_a_process_may_be_read_by_threads(turn: int) -> None:
    subprocess.run([sys.executable, "-c", _FIRST_IN_THREADS], input=document(), check=True, timeout=60)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff", document(files=[]), document(format="obsfs-manifest-9"),
     document(files=[{**FILE, "path": "../x"}]), document(files=[{**FILE, "path": "/etc/passwd"}]),
     document(files=[{**FILE, "path": ".obsfs/manifest.json"}]), document(files=[{**FILE, "size": -1}]),
     document(files=[{**FILE, "sha256": "short"}]), document(files=[FILE, FILE])],
)  # fmt: skip
def test_what_is_no_manifest_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(UsageError, match="obs://b/m") as caught:
        parse_manifest(data, "obs://b/m")
    assert "\n" not in str(caught.value)


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["format", "files", "path", "size", "name"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_nothing_else_comes_of_hostile_text(data: bytes) -> None:
    with pytest.raises(UsageError):
        parse_manifest(data, "there")


def test_content_is_the_same_whoever_published_it() -> None:
    one = parse_manifest(document(), "a")
    assert one.content == parse_manifest(document(author="somebody", version="v2"), "a").content
    assert one.content != parse_manifest(document(files=[{**FILE, "sha256": "1" * 64}]), "a").content


def test_what_a_model_is() -> None:
    header = {"a": {"dtype": "BF16", "shape": [10, 20]}, "b": {"dtype": "F32", "shape": [5]}}
    about = summarize(b'{"architectures": ["Qwen2ForCausalLM"]}', None, {"x": header})
    assert (about.architecture, about.parameters, about.dtype) == ("Qwen2ForCausalLM", 205, "bfloat16")
    assert summarize(None, b'{"peft_type": "LORA", "base_model_name_or_path": "q"}', {}).architecture == "LORA for q"
    assert summarize(b"no json", b"[]", {"x": {"a": {"shape": "?"}}}).architecture == ""
    assert is_model(iter(["x/model.safetensors"])) and not is_model(iter(["notes.txt"]))


@pytest.mark.parametrize(
    "size", ["1" + "0" * 400, "-1", str(1 << 64), str(1 << 63), "1e308", "NaN", "1.5", '"7"', "null", str(10**15)]
)
def test_a_size_that_no_object_has_is_refused(size: str) -> None:
    text = f'{{"name":"a","created":"2026-01-01T00:00:00Z","files":[{{"path":"a","size":{size},"etag":"e"}}]}}'
    with pytest.raises(UsageError, match="cannot be read"):
        parse_manifest(text.encode(), "here")


@pytest.mark.parametrize("created", ['"0000-01-01T00:00:00Z"', '"10000-01-01T00:00:00Z"', "1e400", '"now"', "-1"])
def test_a_date_that_is_none_is_refused(created: str) -> None:
    text = f'{{"name":"a","created":{created},"files":[{{"path":"a","size":1,"etag":"e"}}]}}'
    with pytest.raises(UsageError, match="cannot be read"):
        parse_manifest(text.encode(), "here")


@pytest.mark.parametrize("shape", [[10**400], [1 << 61, 1 << 61], [2] * 5000, [-1], [1e300], ["9" * 5000], [[1]], None])
def test_a_shape_that_no_tensor_has_counts_nothing(shape: object) -> None:
    header = {"a": {"dtype": "BF16", "shape": [3]}, "b": {"dtype": "x" * 10_000, "shape": shape}}
    about = summarize(None, None, {"w": header})
    assert about.parameters == 3
    assert len(about.dtype) <= 200
