"""Read text files of records so that each record keeps exactly what it has.

A record is passed on as JSON text, with the names of its columns. A table would give it the keys of other records, and
lose keys that appear late, the spelling of its numbers, and one of two equal keys.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import IO, Any

import fsspec

from obsfs.plugin import UsageError, first_line, visible
from trainer.data.formats import held_columns
from trainer.data.strict_json import NotJson, decoded, decoded_at

RECORD, COLUMNS = "a record, as JSON", "its columns, as JSON"
"""The columns of what :func:`read_text` makes: a record, and the names of those columns in which it has something, both
as JSON text."""
JSON_SUFFIXES, CSV_SUFFIXES = (".jsonl", ".json"), (".csv",)
_BUFFER_BYTES = 1 << 20
_OPENERS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_COMPRESSIONS = (*_OPENERS, ".zst")
_SPACE = re.compile(r"\s*")
_BOM = b"\xef\xbb\xbf"
_CSV_FIELD_BYTES = sys.maxsize >> 1
"""Python's csv refuses fields of more than 128 KiB, and a conversation may be longer."""


def bare(name: str) -> str:
    """Return the name of a file without the suffix of its compression."""
    return next((name.removesuffix(one) for one in _COMPRESSIONS if name.endswith(one)), name)


def stamps(files: Sequence[str], storage_options: Mapping[str, Any]) -> list[str]:
    """Return, for each file, a text that changes when the file does."""
    found = []
    for file in files:
        fs, path = fsspec.url_to_fs(file, **(storage_options if "://" in file else {}))
        found.append(str(fs.ukey(path)))
    return found


def read_text(files: Sequence[str], storage_options: Mapping[str, Any], **_: Any) -> Iterator[dict[str, str]]:
    """Read JSON Lines, JSON and CSV files, each named so, compressed or not, for ``Dataset.from_generator``.

    Raises UsageError, which names the file and the line, if something is not a record.
    """
    for file in files:
        number = 0
        try:
            with _open(file, storage_options) as opened:
                source = _csv(opened) if bare(file).endswith(CSV_SUFFIXES) else _json(opened)
                for number, (text, columns) in source:  # noqa: B007
                    yield {RECORD: text, COLUMNS: json.dumps(columns)}
        except (EOFError, OSError, lzma.LZMAError, UnicodeDecodeError, csv.Error) as error:
            after = f" after line {number}" if number else ""
            raise UsageError(
                f"data {visible(file)} cannot be read{after} ({first_line(error)})", "correct it, or name another"
            ) from None
        except ValueError as error:
            raise UsageError(f"data {visible(file)} cannot be read: {error}", "correct it, or name another") from None


def _open(file: str, storage_options: Mapping[str, Any]) -> IO[bytes]:
    raw: Any = fsspec.open(file, "rb", **(storage_options if "://" in file else {})).open()
    for suffix, opener in _OPENERS.items():
        if file.endswith(suffix):
            raw = opener(raw)
    if file.endswith(".zst"):
        import pyarrow

        raw = pyarrow.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(raw, _BUFFER_BYTES)


_Found = tuple[int, tuple[str, list[str]]]
"""A line, counted from 1, and its record: JSON text, and the names of its columns."""


def _json(file: IO[bytes]) -> Iterator[_Found]:
    """Read an object per line, or else one JSON text: an array of objects, or objects over several lines."""
    lines = enumerate(_lines(file), 1)
    first = next(((n, line) for n, line in lines if line.strip()), None)
    if first is None:
        return
    try:
        is_line = isinstance(decoded(_text(first[1], first[0])), dict)
        reason = ""
    except NotJson as error:
        is_line, reason = False, str(error)
    if is_line:
        for number, line in chain([first], lines):
            if line.strip():
                text = _text(line, number)
                try:
                    record = decoded(text)
                except NotJson as error:
                    raise ValueError(f"line {number} is not JSON ({error})") from None
                yield number, (text, _columns(record, f"line {number}"))
        return
    whole = _text(first[1] + b"".join(line for _, line in lines), first[0])
    try:
        values = list(_values(whole))
    except NotJson as error:
        # For the first line alone, the reader of single lines says more.
        told = reason if reason and error.line == 1 else str(error)
        raise ValueError(f"line {first[0] + error.line - 1} is not JSON ({told})") from None
    for number, record in enumerate(values, 1):
        yield number, (json.dumps(record), _columns(record, f"value {number}"))


def _lines(file: IO[bytes]) -> Iterable[bytes]:
    first = file.readline()
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16: save it as UTF-8")
    return chain([first.removeprefix(_BOM)], iter(file.readline, b""))


def _text(line: bytes, number: int) -> str:
    try:
        return line.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _values(text: str) -> Iterator[Any]:
    """Yield the values of a JSON text, and the items of its arrays."""
    place = 0
    while place < len(text):
        value, place = decoded_at(text, place)
        yield from value if isinstance(value, list) else [value]
        place = _SPACE.match(text, place).end()  # type: ignore[union-attr]


def _columns(record: Any, where: str) -> list[str]:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is no object, but {visible(json.dumps(record), 60)}")
    return held_columns(record)


def _csv(file: IO[bytes]) -> Iterator[_Found]:
    """Read CSV. Every value stays text."""
    csv.field_size_limit(_CSV_FIELD_BYTES)
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    columns = next(reader, [])
    if twice := [name for name in columns if columns.count(name) > 1]:
        raise ValueError(f"it has two columns {visible(twice[0])!r}")
    for values in reader:
        if not values:
            continue
        if len(values) != len(columns):
            raise ValueError(f"line {reader.line_num} has {len(values)} values, and there are {len(columns)} columns")
        record = dict(zip(columns, values, strict=True))
        yield reader.line_num, (json.dumps(record), held_columns(record))


def parsed(text: str) -> dict[str, Any]:
    """Return a record that :func:`read_text` read. Raises ValueError for text that cannot be encoded."""
    found: dict[str, Any] = json.loads(text)
    if "\\ud" in text.casefold():
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half of a character (a lone surrogate, \\ud800 to \\udfff)") from None
    return found
