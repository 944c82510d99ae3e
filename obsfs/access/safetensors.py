"""What lies where in a safetensors file, and in which order loaders read it. Pure.

The format: https://github.com/huggingface/safetensors#format - eight bytes with the length of a JSON header (little
endian), the header, the tensors.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

SUFFIX = ".safetensors"
_LENGTH = 8
_DIGITS = frozenset("0123456789")
MIN_BYTES = _LENGTH
"""Bytes that a file has at least, if it is one."""
_MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""


_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of each number of a dtype (safetensors 0.8, ``tensor.rs``); of a dtype that is not here, lengths are not compared."""
MAX_PARAMETERS = 1 << 62
_MAX_DIMENSIONS = 64


class Extent(NamedTuple):
    """The bytes ``[start, stop)`` of one tensor in the file."""

    name: str
    start: int
    stop: int


Read = Callable[[int, int], bytes | None]
"""Bytes ``[offset, offset + size)``, or None when they are not at hand."""


def header(size: int, read: Read) -> tuple[int, dict[str, Any]] | None:
    """Where the tensors begin in a file of `size` bytes, and its header: ``{name: {dtype, shape, data_offsets}}``.

    None when it is not at hand. A file that is no safetensors file has an empty header.
    """
    length_field = read(0, _LENGTH)
    if length_field is None:
        return None
    length = int.from_bytes(length_field, "little")
    base = _LENGTH + length
    if length > _MAX_HEADER or base > size:
        return base, {}
    data = read(_LENGTH, length)
    if data is None:
        return None
    try:
        entries = json.loads(data)
    except (ValueError, RecursionError):
        return base, {}
    if not isinstance(entries, dict):
        return base, {}
    return base, {name: entry for name, entry in entries.items() if name != "__metadata__"}


def checked_header(size: int, read: Callable[[int, int], bytes]) -> dict[str, Any]:
    """Return the header of a file of `size` bytes, as :func:`header`, if it is one that the safetensors library opens.

    Raises:
        ValueError: It is not; says why, as the end of a sentence that begins with the file.
    """
    length = int.from_bytes(read(0, min(size, _LENGTH)), "little")
    base = _LENGTH + length
    if size < _LENGTH:
        raise ValueError(f"is cut off: it has {size} bytes, too few for a header")
    if length > _MAX_HEADER:
        raise ValueError("is no safetensors file")
    if base > size:
        raise ValueError(f"is cut off inside its header: it has {size} bytes of {base}")
    try:
        entries = json.loads(read(_LENGTH, length).decode())
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise ValueError("is no safetensors file: its header is not JSON")
    said = entries.pop("__metadata__", None) or {}
    if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
        raise ValueError("is no safetensors file: its metadata are not text")
    _check_layout(entries, size - base)
    return entries


def _check_layout(entries: Mapping[str, Any], size: int) -> None:
    """See that tensors lie one after the other, without gaps, and to the end of the `size` bytes behind the header."""
    spans: list[tuple[int, int]] = []
    try:
        for entry in entries.values():
            start, stop = entry["data_offsets"]
            numbers = [start, stop, *entry["shape"]]
            # Bounded, since the product of what a hostile header has would take hours.
            if not all(type(number) is int and 0 <= number <= MAX_PARAMETERS for number in numbers):
                raise ValueError
            if len(numbers) > _MAX_DIMENSIONS:
                raise ValueError
            bits = _BITS.get(entry["dtype"])
            if bits is not None and math.prod(entry["shape"]) * bits != (stop - start) * 8:
                raise ValueError
            spans.append((start, stop))
        end = 0
        for start, stop in sorted(spans):
            if start != end or stop < start:
                raise ValueError
            end = stop
    except (ValueError, TypeError, KeyError):
        raise ValueError("is damaged: its header does not say where each tensor lies") from None
    if end > size:
        raise ValueError(f"is cut off: {end - size} bytes of its tensors are missing")
    if end < size:
        raise ValueError(f"has {size - end} bytes behind its last tensor")


def extents(size: int, read: Read) -> list[Extent] | None:
    """The tensors of a file of `size` bytes, in the order of the file; None when its header is not at hand.

    A file that is no safetensors file has no tensors.
    """
    found_header = header(size, read)
    if found_header is None:
        return None
    base, entries = found_header
    try:
        found = [
            Extent(name, base + int(entry["data_offsets"][0]), base + int(entry["data_offsets"][1]))
            for name, entry in entries.items()
        ]
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        return []
    found.sort(key=lambda extent: extent.start)
    if any(not base <= extent.start <= extent.stop <= size for extent in found):
        return []
    return [extent for extent in found if extent.stop > extent.start]


def parameters(entries: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    """How many numbers a header's tensors have together, and how many of each dtype (``BF16``)."""
    dtypes: dict[str, int] = {}
    for entry in entries.values():
        try:
            lengths = [int(length) for length in entry["shape"]]
            # Of one of the bounds first: the product of what a hostile header has would take hours.
            if not all(0 <= length <= MAX_PARAMETERS for length in lengths) or len(lengths) > _MAX_DIMENSIONS:
                continue
            count = math.prod(lengths)
            if count > MAX_PARAMETERS:
                continue
            dtypes[str(entry["dtype"])] = dtypes.get(str(entry["dtype"]), 0) + count
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
    return sum(dtypes.values()), dtypes


def natural_sort_key(name: str) -> list[tuple[int, int, str]]:
    """A sort key by which ``layers.2`` comes before ``layers.10``, as loaders visit tensors."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    numbers = [part.lstrip("0") if part[0] in _DIGITS else None for part in parts]
    # By their lengths and then their digits, since int() takes no more than a few thousand of them.
    return [
        (1, 0, part) if number is None else (0, len(number), number)
        for part, number in zip(parts, numbers, strict=True)
    ]


def extent_ends(found: list[Extent], block: int) -> list[int]:
    """The block after each extent's last, ascending."""
    return sorted({-(-extent.stop // block) for extent in found})


def load_order(files: Mapping[str, Sequence[Extent]], block: int) -> tuple[list[tuple[str, int]], list[int]]:
    """The blocks of a model's files in the order in which a loader wants them, each a file's name and a number; and
    the positions in it after each extent's last block.

    A block that several extents share stands where the first of them is.
    """
    order: dict[tuple[str, int], None] = {}
    ends: list[int] = []
    found = [(natural_sort_key(extent.name), file, extent) for file, extents in files.items() for extent in extents]
    for _, file, extent in sorted(found):
        for number in range(extent.start // block, -(-extent.stop // block)):
            order.setdefault((file, number))
        if not ends or ends[-1] != len(order):
            ends.append(len(order))
    return list(order), ends
