"""Formats of data, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest

from obsfs import ObsfsError
from tests.conftest import Mounter, Store
from tests.trainer.conftest import CHOICES, JUDGED, ROWS, write_lines
from trainer import data
from trainer.config import TASKS

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARED = [{"from": "system", "value": "be"}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


def load(place: object, task: str = "sft", *, chat: bool = True, streaming: bool = False, **settings: Any) -> Any:
    return data.load([str(place)], task, split="train", streaming=streaming, chat=chat, settings=settings)


@pytest.mark.parametrize(
    ("record", "task", "expected"),
    [
        ({"messages": TURNS, "id": 1}, "sft", {"messages": TURNS}),
        (
            {"conversations": SHARED},
            "sft",
            {"messages": [{"role": "system", "content": "be"}, *TURNS]},
        ),
        ({"prompt": "a", "completion": "b", "x": 1}, "sft", {"prompt": "a", "completion": "b"}),
        (
            {"instruction": "do", "input": "this", "output": "done", "system": "be"},
            "sft",
            {
                "prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "do\n\nthis"}],
                "completion": [{"role": "assistant", "content": "done"}],
            },
        ),
        ({"query": "a", "response": "b"}, "sft", None),
        ({"question": "a", "answer": "b"}, "sft", None),
        ({"text": "words"}, "sft", {"text": "words"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo", {"prompt": "a", "chosen": "b", "rejected": "c"}),
        ({"chosen": TURNS, "rejected": TURNS}, "simpo", {"chosen": TURNS, "rejected": TURNS}),
        ({"prompt": "a", "completion": "b", "label": 1}, "kto", {"prompt": "a", "completion": "b", "label": True}),
    ],
)
def test_formats(record: dict[str, Any], task: str, expected: dict[str, Any] | None) -> None:
    form = data.recognise(record, task, "here")
    found = form.convert(record, True)
    if expected is not None:
        assert found == expected
    else:
        assert found["completion"] == [{"role": "assistant", "content": "b"}]


def test_without_a_template_instructions_stay_text() -> None:
    form = data.recognise(ROWS[0], "sft", "here")
    assert form.convert(ROWS[0], False) == {"prompt": "name 0\n\n", "completion": "it is module 0"}


@pytest.mark.parametrize("task", TASKS)
def test_what_is_not_recognised_is_shown(task: str) -> None:
    with pytest.raises(ObsfsError) as caught:
        data.recognise({"frage": "was?"}, task, "d.jsonl")
    assert '{"frage": "was?"}' in str(caught.value)
    assert task in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"messages": []}, "no list of messages"),
        ({"messages": [{"role": "user", "content": None}]}, "no content"),
        ({"messages": [{"role": None, "content": "x"}]}, "no role"),
    ],
)
def test_a_bad_record_is_shown_with_its_number(bad: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"messages": TURNS}, {"messages": TURNS}, bad])
    with pytest.raises(ObsfsError) as caught:
        load(path)
    assert f"record 3 of {path}" in str(caught.value)
    assert reason in str(caught.value)


def test_every_kind_of_file_from_every_place(bucket: Store, mount: Mounter, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    write_lines(files / "a.jsonl", ROWS)
    (files / "b.json").write_text(json.dumps(ROWS))
    pandas.DataFrame(ROWS).to_csv(files / "c.csv", index=False)
    pandas.DataFrame(ROWS).to_parquet(files / "d.parquet")
    for path in files.iterdir():
        bucket.put(f"data/{path.name}", path.read_bytes())
        bucket.put(f"only-{path.suffix[1:]}/part-1{path.suffix}", path.read_bytes())
    mounted = mount(bucket)
    expected = [data.recognise(row, "sft", "").convert(row, True) for row in ROWS]
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet"):
        for place in (files / name, mounted / "data" / name, f"{bucket}/data/{name}"):
            assert list(load(place)) == expected, place
        assert list(load(f"{bucket}/data/{name}", streaming=True)) == expected
        assert list(load(f"{bucket}/only-{name[2:]}")) == expected
    both = data.load(
        [str(files / "a.jsonl"), f"{bucket}/data/d.parquet"],
        "sft",
        split="train",
        streaming=False,
        chat=True,
        settings={},
    )
    assert len(both) == 2 * len(ROWS)


def test_short_names_stand_for_the_users_bucket_first(bucket: Store, tmp_path: Path) -> None:
    bucket.put("lib/datasets/alpaca-en/train.jsonl", write_lines(tmp_path / "a", ROWS).read_bytes())
    bucket.put("lib/datasets/ultrafeedback.jsonl", write_lines(tmp_path / "b", CHOICES).read_bytes())
    library = f"{bucket}/lib"
    assert len(load("alpaca-en", library=library)) == len(ROWS)
    assert len(load("ultrafeedback", "dpo", library=library)) == len(CHOICES)
    assert data.find("alpaca-zh", {"library": library}) == ("shibing624/alpaca-zh", {})
    assert data.find("alpaca-en", {}) == ("yahma/alpaca-cleaned", {})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "different formats"),
        ({"prompt": "x", "completion": "y"}, "different formats"),
        ({"prompt": [{"role": "user", "content": 1}], "completion": [{"role": "assistant", "content": 2}]}, "together"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_formats_are_not_mixed(tmp_path: Path, record: dict[str, Any], message: str, streaming: bool) -> None:
    places = [str(write_lines(tmp_path / "a.jsonl", ROWS)), str(write_lines(tmp_path / "b.jsonl", [record]))]
    with pytest.raises(ObsfsError, match=message):
        data.load(places, "sft", split="train", streaming=streaming, chat=True, settings={})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "there is no data"),
        ("cut.jsonl", '{"text": "x"}\n{"text": ', "cannot be read"),
        ("empty.jsonl", "", "cannot be read|is empty"),
        ("odd.xyz", "x", "has no data that can be read"),
    ],
)
def test_what_cannot_be_read_is_told(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ObsfsError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_not_in_the_bucket_is_told(bucket: Store) -> None:
    with pytest.raises(ObsfsError, match="there is no data at obs://"):
        load(f"{bucket}/nothing.jsonl")


def test_labels() -> None:
    form = data.recognise(JUDGED[1], "kto", "")
    assert form.convert(JUDGED[1], True)["label"] is True
    with pytest.raises(ValueError, match="neither"):
        form.convert({**JUDGED[1], "label": "yes"}, True)
