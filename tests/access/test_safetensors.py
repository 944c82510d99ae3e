from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from obsfs.access import safetensors
from obsfs.access.safetensors import Extent


def file_of(header: object, size: int = 1000) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def extents_of(data: bytes) -> list[Extent] | None:
    return safetensors.extents(len(data), lambda offset, size: data[offset : offset + size])


def test_tensors_in_the_order_of_the_file() -> None:
    data = file_of(
        {
            "__metadata__": {"format": "pt"},
            "b": {"dtype": "U8", "shape": [30], "data_offsets": [0, 30]},
            "a": {"dtype": "U8", "shape": [70], "data_offsets": [30, 100]},
            "empty": {"dtype": "U8", "shape": [0], "data_offsets": [100, 100]},
        }
    )
    base = len(data) - 1000
    assert extents_of(data) == [Extent("b", base, base + 30), Extent("a", base + 30, base + 100)]


def test_a_header_that_is_not_here_yet() -> None:
    assert safetensors.extents(100, lambda offset, size: None) is None
    assert safetensors.extents(100, lambda offset, size: b"\x10" + bytes(7) if offset == 0 else None) is None


@given(st.binary(max_size=200))
def test_what_is_no_safetensors_file_has_no_tensors(data: bytes) -> None:
    assert extents_of(data) in ([], None)


def test_offsets_beyond_the_file_are_not_believed() -> None:
    assert extents_of(file_of({"a": {"data_offsets": [0, 5000]}})) == []
    assert extents_of(file_of({"a": {"data_offsets": ["x", 3]}})) == []
    assert extents_of(file_of(["a"])) == []


def test_loaders_count_as_people_do() -> None:
    names = ["layers.10.w", "layers.2.w", "embed", "layers.1.w"]
    assert sorted(names, key=safetensors.natural_sort_key) == ["embed", "layers.1.w", "layers.2.w", "layers.10.w"]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.permutations(range(40)))
def test_the_load_order_has_every_block_once(sizes: list[int], names: list[int]) -> None:
    found, at = [], 37
    for size, name in zip(sizes, names, strict=False):
        found.append(Extent(f"layer.{name}", at, at + size))
        at += size
    order, ends = safetensors.load_order({"b": found, "a": found}, 64)
    blocks = range(37 // 64, -(-at // 64))
    assert sorted(order) == [(file, block) for file in "ab" for block in blocks]
    assert ends == sorted(set(ends))
    assert ends[-1] == len(order)
