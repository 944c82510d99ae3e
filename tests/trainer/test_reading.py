"""Text files of records, in the shapes that other programs leave them in."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from obsfs import ObsfsError
from trainer.data import reading

A, B = '{"text": "a"}', '{"text": "b"}'


def read(tmp_path: Path, name: str, content: str | bytes) -> list[dict[str, Any]]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [reading.parsed(one[reading.RECORD]) for one in reading.read_text([str(path)], {})]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("crlf.jsonl", f"{A}\r\n{B}\r\n"),
        ("bom.jsonl", f"\ufeff{A}\n{B}"),
        ("blank.jsonl", f"\n\n{A}\n  \n{B}\n\n"),
        ("array.jsonl", f"[{A},\n{B}]"),
        ("pretty.json", '{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n'),
        ("array.json", f" \n[{A}, {B}]"),
        ("two.jsonl.gz", gzip.compress(f"{A}\n".encode(), mtime=0) + gzip.compress(B.encode(), mtime=0)),
        ("x.jsonl.bz2", bz2.compress(f"{A}\n{B}".encode())),
        ("x.json.xz", lzma.compress(f"[{A},{B}]".encode())),
        ("x.jsonl.zst", pyarrow.compress(f"{A}\n{B}".encode(), codec="zstd", asbytes=True)),
        ("x.csv", "text\na\nb\n"),
        ("bom.csv", "\ufefftext\r\na\r\n\r\nb\r\n"),
        ("x.csv.gz", gzip.compress(b"text\na\nb\n", mtime=0)),
    ],
)
def test_two_records_whatever_the_file_is(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert read(tmp_path, name, content) == [{"text": "a"}, {"text": "b"}]


def test_values_stay_as_they_are_spelled(tmp_path: Path) -> None:
    rows = read(tmp_path, "a.csv", 'question,answer\n"one, ""two""\nthree",007\nNA,null\n')
    assert rows == [{"question": 'one, "two"\nthree', "answer": "007"}, {"question": "NA", "answer": "null"}]
    rows = [{"text": "a\u2028b\x85c\x00"}, {"text": 3, "more": {"x": None}}, {"text": "😀"}]
    assert read(tmp_path, "b.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:1])) == rows[:1]
    assert read(tmp_path, "c.jsonl", "\n".join(json.dumps(row) for row in rows)) == rows
    long = "x" * (1 << 20)
    assert read(tmp_path, "d.csv", f"text\n{long}\n") == [{"text": long}]


@pytest.mark.parametrize("content", ["", "\n\n", "[]", "\ufeff"])
def test_an_empty_file_has_no_records(tmp_path: Path, content: str) -> None:
    assert read(tmp_path, "a.jsonl", content) == read(tmp_path, "a.csv", content.replace("[]", "")) == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("comma.jsonl", f"{A},\n{B}", "line 1 is not JSON (Extra data at character 14)"),
        ("inner.jsonl", f'{A}\n{{"text": "b",}}', "line 2 is not JSON"),
        ("last.json", f"[{A},\n{B},\n]", "line 3 is not JSON"),
        ("pretty.json", '{\n "text": "a",\n "b": }', "line 3 is not JSON"),
        ("twice.jsonl", f'{A}\n{{"text": "a", "text": "b"}}', "line 2 is not JSON ('text' is given twice"),
        ("below.jsonl", '{"a": {"b": 1, "b": 2}}', "'b' is given twice"),
        ("number.jsonl", f"{A}\n3", "line 2 is no object, but 3"),
        ("texts.json", '["a", "b"]', 'value 1 is no object, but "a"'),
        ("deep.jsonl", '{"a": ' * 100_000, "nested too deeply"),
        ("digits.jsonl", f'{{"a": {"9" * 5000}}}', "line 1 is not JSON"),
        ("utf16.jsonl", A.encode("utf-16"), "save it as UTF-8"),
        ("latin.jsonl", f"{A}\n".encode() + b'{"text": "\xe9"}', "line 2 is not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(f"{A}\n".encode() * 9, mtime=0)[:-9], "cannot be read"),
        ("cut.jsonl.zst", pyarrow.compress(A.encode() * 9, codec="zstd", asbytes=True)[:-3], "cannot be read"),
        ("plain.jsonl.gz", A, "cannot be read (Not a gzipped file"),
        ("short.csv", "a,b\n1,2\n1\n", "line 3 has 1 values, and there are 2 columns"),
        ("twice.csv", "a,a\n1,2\n", "it has two columns 'a'"),
        ("open.csv", 'a,b\n"1,2\n', "cannot be read"),
    ],
)
def test_what_is_no_record_is_told_with_its_line(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    with pytest.raises(ObsfsError) as caught:
        read(tmp_path, name, content)
    assert reason in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        read(tmp_path, "a.jsonl", '{"text": "\\uD83D"}')
    assert read(tmp_path, "b.jsonl", '{"text": "\\uD83D\\uDE00"}') == [{"text": "😀"}]


def test_a_changed_file_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(A)
    before = reading.stamps([str(path)], {})
    assert reading.stamps([str(path)], {}) == before
    path.write_text(f"{A}\n{B}")
    assert reading.stamps([str(path)], {}) != before
