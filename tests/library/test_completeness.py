"""Whether a model is whole: what loaders would stumble over is found, and what they take is not complained of."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from obsfs import check_model
from obsfs.errors import UsageError
from obsfs.library import completeness
from tests.conftest import Result, Store, write_model

Run = Callable[..., Result]


def tensors(**sizes: int) -> bytes:
    """A safetensors file with tensors of so many bytes."""
    header, end = dict[str, Any](), 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\1" * end


def archive() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(30_000)}, file)
    return file.getvalue()


def problems(files: dict[str, bytes], *, every_loader: bool = True) -> list[str]:
    def reader(data: bytes) -> completeness.Read:
        return lambda offset, size: data[offset : offset + size]

    found = completeness.inspect_files(
        {path: (len(data), reader(data)) for path, data in files.items()}, every_loader=every_loader
    )
    return [f"{path} {reason}" for path, reason in found.problems]


def index(**shards: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": shards}).encode()


SHARDS = {"m-00001-of-00002.safetensors": tensors(a=5), "m-00002-of-00002.safetensors": tensors(b=6)}


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors": tensors(a=5, b=0), "config.json": b'{"x": NaN}'},
        {"model.safetensors": tensors()},
        {**SHARDS, "model.safetensors.index.json": index(a="m-00001-of-00002.safetensors")},
        {**SHARDS, "model.safetensors.index.fp16.json": index(b="m-00002-of-00002.safetensors")},
        SHARDS,
        {"x-00000-of-00002.safetensors": tensors(a=5), "x-00001-of-00002.safetensors": tensors(a=5)},
        {"unet/config.json": b"{}", "unet/model.safetensors": tensors(a=5), "data.json": b"[1,", "n.jsonl": b"{"},
        {"model.safetensors": tensors(a=5), "model.safetensors.index.json": index(a="model.safetensors")},
        {
            **SHARDS,
            "model.safetensors": tensors(a=5),
            "model.safetensors.index.json": index(a="m-00001-of-00002.safetensors"),
        },
        {
            "consolidated.safetensors.index.json": b'{"weight_map": {"a": "c.safetensors"}}',
            "c.safetensors": tensors(a=5),
        },
        # What nobody reads: an index of weights in a format that comes second.
        {"model.safetensors": tensors(a=5), "pytorch_model.bin.index.json": index(a="gone.bin")},
        {"pytorch_model.bin": archive(), "training_args.bin": b"\x80\x04.", "config.json": b"{}"},
        {"a-00001-of-00002.parquet": b"x", "empty.txt": b""},
    ],
)
def test_what_loaders_take_is_whole(files: dict[str, bytes]) -> None:
    assert problems(files) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"m.safetensors": tensors(a=500)[:-1]}, "m.safetensors is cut off: 1 bytes of its tensors are missing"),
        ({"m.safetensors": tensors(a=500)[:20]}, "m.safetensors is cut off inside its header: it has 20 bytes of 72"),
        ({"m.safetensors": tensors(a=5)[:3]}, "m.safetensors is cut off: it has 3 bytes, too few for a header"),
        ({"m.safetensors": b""}, "m.safetensors is empty"),
        ({"m.safetensors": tensors(a=5) + b"x"}, "m.safetensors has 1 bytes behind its last tensor"),
        ({"m.safetensors": b"<html>" * 50}, "m.safetensors is not a safetensors file"),
        (
            {"m.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"},
            "m.safetensors is a pointer of Git LFS, not the file: git lfs pull fetches it",
        ),
        ({"model.bin": archive()[:-1000]}, "model.bin is cut off: the directory at its end is missing"),
        ({"model.gguf": b""}, "model.gguf is empty"),
        ({"config.json": b""}, "config.json is empty"),
        ({"sub/config.json": b'{"a": 1,}'}, "sub/config.json is not JSON"),
        ({"tokenizer.json": b'{"a": "\xe4"}'}, "tokenizer.json is not JSON"),
        ({"adapter_config.json": b"[]"}, "adapter_config.json is no JSON object"),
        ({"config.json": b'{"a":' * 100_000}, "config.json is not JSON (it is nested too deep)"),
        ({"model.safetensors.index.json": index()}, "model.safetensors.index.json names no shards (weight_map)"),
        ({"model.safetensors.index.json": b"{}"}, "model.safetensors.index.json names no shards (weight_map)"),
        (
            {"sub/model.safetensors.index.json": index(a="1.safetensors", b="2.safetensors"), "1.safetensors": b"x"},
            "sub/2.safetensors is missing, and model.safetensors.index.json names it",
        ),
        (
            {**SHARDS, "model.safetensors.index.json": index(b="m-00001-of-00002.safetensors")},
            "m-00001-of-00002.safetensors has no tensor 'b', where model.safetensors.index.json says it is",
        ),
        (
            {"pytorch_model.bin.index.json": index(a="1.bin"), "2.bin": b"x"},
            "1.bin is missing, and pytorch_model.bin.index.json names it",
        ),
        (
            {"q-00001-of-00003.gguf": b"GGUF", "q-00003-of-00003.gguf": b"GGUF"},
            "q-00002-of-00003.gguf is missing, and others of 3 are there",
        ),
    ],
)
def test_what_loaders_stumble_over_is_named(files: dict[str, bytes], said: str) -> None:
    assert said in "\n".join(problems(files))


@pytest.mark.parametrize(
    ("whole_file", "listed", "said"),
    [
        ("model.safetensors", index(a="gone.safetensors"), "gone.safetensors is missing"),
        ("model.safetensors", index(a="model.safetensors", b="model.safetensors"), "has no tensor 'b'"),
        ("model.safetensors", b"{}", "names no shards"),
        ("sub/model.safetensors", index(a="x.safetensors", b="y.safetensors"), "x.safetensors is missing"),
        ("pytorch_model.bin", index(a="1.bin"), "1.bin is missing"),
    ],
)
def test_an_index_beside_the_whole_file_stops_loaders_that_read_it(whole_file: str, listed: bytes, said: str) -> None:
    """vLLM takes only files that the index names; transformers and diffusers take the whole file and read no index."""
    data = tensors(a=5) if whole_file.endswith("safetensors") else archive()
    files = {whole_file: data, f"{whole_file}.index.json": listed}
    (first, *_) = problems(files)
    assert said in first
    assert f"remove {Path(whole_file).name}.index.json" in first
    assert problems(files, every_loader=False) == []


@pytest.mark.parametrize("rest", [{}, {"metadata": None}, {"metadata": [1]}])
@pytest.mark.parametrize("start", ["model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_an_index_without_metadata_cannot_be_loaded(start: str, rest: dict[str, Any]) -> None:
    files = {"x.safetensors": tensors(a=5), "x.bin": archive()}
    shard = "x.bin" if start.endswith("bin") else "x.safetensors"
    if shard == "x.bin":
        del files["x.safetensors"]
    name = f"{start}.index.json"
    found = problems({**files, name: json.dumps({**rest, "weight_map": {"a": shard}}).encode()}, every_loader=False)
    assert found == [f"{name} has no metadata, which transformers and diffusers read"]


def test_a_push_of_what_is_not_whole_sends_nothing(bucket: Store, obsfs: Run, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", mib=1, shards=1)
    (shard,) = model.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    done = obsfs("push", model, f"{bucket}/m@v1")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"{shard} is cut off: 100 bytes of its tensors are missing: the model is not whole" in done.err
    assert "--no-check" in done.err
    assert "Contents" not in bucket.client.list_objects_v2(Bucket=bucket.name)
    with pytest.raises(UsageError, match="is cut off"):
        check_model(model)
    assert obsfs("push", model, f"{bucket}/m@v1", "--no-check").code == 0
