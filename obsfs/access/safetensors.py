"""Find what lies where in a safetensors file, and in which order loaders read it. Pure.

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
"""The smallest safetensors file has so many bytes."""
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
"""Bits of one number of each dtype (safetensors 0.8, ``tensor.rs``). Others are not compared with their lengths."""
MAX_PARAMETERS = 1 << 62
_MAX_DIMENSIONS = 64


class Extent(NamedTuple):
    """The bytes ``[start, stop)`` of one tensor in the file."""

    name: str
    start: int
    stop: int


Read = Callable[[int, int], bytes | None]
"""Return bytes ``[offset, offset + size)``, or None if they are not in the cache."""


def header(size: int, read: Read) -> tuple[int, dict[str, Any]] | None:
    """Read a header, without checking it.

    Args:
        size: Bytes of the file.
        read: Reads from it.

    Returns:
        Where the tensors begin, and ``{name: {dtype, shape, data_offsets}}``, empty if it is not a safetensors file.
        None when `read` returned None.
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
    """Read a header, and check it as the safetensors library does.

    Args:
        size: Bytes of the file.
        read: Reads from it.

    Returns:
        ``{name: {dtype, shape, data_offsets}}``.

    Raises:
        ValueError: The library would not open this file. The text ends a sentence that begins with the file's name.
    """
    length = int.from_bytes(read(0, min(size, _LENGTH)), "little")
    base = _LENGTH + length
    if size < _LENGTH:
        raise ValueError(f"is cut off: it has {size} bytes, too few for a header")
    if length > _MAX_HEADER:
        raise ValueError("is not a safetensors file")
    if base > size:
        raise ValueError(f"is cut off inside its header: it has {size} bytes of {base}")
    try:
        entries = json.loads(read(_LENGTH, length).decode())
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise ValueError("is not a safetensors file: its header is not JSON")
    said = entries.pop("__metadata__", None) or {}
    if not isinstance(said, dict) or not all(isinstance(text, str) for text in said.values()):
        raise ValueError("is not a safetensors file: its metadata are not text")
    _check_layout(entries, size - base)
    return entries


def _check_layout(entries: Mapping[str, Any], size: int) -> None:
    """Check that the tensors fill the `size` bytes behind the header, one after the other, without gaps."""
    spans: list[tuple[int, int]] = []
    try:
        for entry in entries.values():
            start, stop = entry["data_offsets"]
            numbers = [start, stop, *entry["shape"]]
            # Bounded, because the product of a hostile header's numbers would take hours.
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
    """Return the tensors of a file, in the order of the file.

    Args:
        size: Bytes of the file.
        read: Reads from it.

    Returns:
        The tensors, none if it is not a safetensors file. None when `read` returned None.
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
    """Count the numbers in a header's tensors: of all together, and of each dtype (``BF16``)."""
    dtypes: dict[str, int] = {}
    for entry in entries.values():
        try:
            lengths = [int(length) for length in entry["shape"]]
            # Bounds first: the product of a hostile header's numbers would take hours.
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
    """Return a sort key by which ``layers.2`` comes before ``layers.10``, as loaders visit tensors."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    numbers = [part.lstrip("0") if part[0] in _DIGITS else None for part in parts]
    # By their lengths and then their digits: int() takes only a few thousand digits.
    return [
        (1, 0, part) if number is None else (0, len(number), number)
        for part, number in zip(parts, numbers, strict=True)
    ]


def extent_ends(found: list[Extent], block: int) -> list[int]:
    """Return the block after each extent's last, ascending. `block` is in bytes."""
    return sorted({-(-extent.stop // block) for extent in found})


def load_order(files: Mapping[str, Sequence[Extent]], block: int) -> tuple[list[tuple[str, int]], list[int]]:
    """Put the blocks of a model's files in the order in which a loader reads them.

    Args:
        files: The tensors of each file.
        block: Bytes of a block.

    Returns:
        ``(file, number)`` of each block, once: a block that several tensors share stands where the first of them is;
        and the positions after each tensor's last block.
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
