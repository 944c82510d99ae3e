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
        (
            {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "no"}]},
            "simpo",
            {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "no"}]},
        ),
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
        assert list(load(f"{bucket}/data/{name}", streaming=True)) == [{**one, "tools": None} for one in expected]
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
    assert data.find("alpaca-zh", {"library": library}).builder == "shibing624/alpaca-zh"
    assert data.find("alpaca-en", {}).builder == "yahma/alpaca-cleaned"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "different formats"),
        ({"prompt": "x", "completion": "y"}, "different formats"),
        ({"prompt": [{"role": "user", "content": 1}], "completion": [{"role": "assistant", "content": 2}]}, "no text"),
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
        ("empty.jsonl", "", "is empty"),
        ("empty.csv", "a,b\n", "is empty"),
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


def said(record: dict[str, Any], task: str = "sft") -> Any:
    """What a record becomes, as a conversation where it can be one."""
    return data.recognise(record, task, "here").convert(record, True)


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
NO = {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.mark.parametrize(
    ("record", "task", "expected"),
    [
        ({"conversations": SHARED[1:], "system": "be brief"}, "sft", {"messages": [SYSTEM, USER, ANSWER]}),
        ({"messages": TURNS, "system": "be brief"}, "sft", {"messages": [SYSTEM, USER, ANSWER]}),
        ({"messages": [SYSTEM, *TURNS], "system": "be brief"}, "sft", {"messages": [SYSTEM, USER, ANSWER]}),
        ({"messages": TURNS, "system": None, "images": []}, "sft", {"messages": TURNS}),
        ({"messages": TURNS, "images": [None], "video": {"path": None}}, "sft", {"messages": TURNS}),
        ({"messages": [{"role": "system", "content": ""}, *TURNS], "system": "be brief"}, "sft",
         {"messages": [SYSTEM, *TURNS]}),
        ({"messages": TURNS, "tools": "[]", "functions": "[]"}, "sft", {"messages": TURNS, "tools": None}),
        ({"input": "hi", "output": "ho"}, "sft", {"prompt": [USER], "completion": [ANSWER]}),
        ({"conversations": TURNS, "chosen": "", "rejected": []}, "sft", {"messages": TURNS}),
        ({"messages": [], "prompt": "hi", "response": "ho"}, "sft", {"prompt": [USER], "completion": [ANSWER]}),
        (
            {"conversations": [USER, NO, USER], "chosen": [USER, ANSWER], "rejected": [USER, NO]},
            "dpo",
            {"prompt": [USER, NO, USER], "chosen": [ANSWER], "rejected": [NO]},
        ),
        ({"prompt": "hi", "completion": "ho", "label": "false"}, "kto",
         {"prompt": "hi", "completion": "ho", "label": False}),
        ({"prompt": "hi", "completion": "ho", "kto_tag": 1.0}, "kto",
         {"prompt": "hi", "completion": "ho", "label": True}),
        ({"messages": json.dumps(TURNS)}, "sft", {"messages": TURNS}),
        (
            {"prompt": "hi", "completion": "ho", "system": "be brief"},
            "sft",
            {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        ),
        (
            {"instruction": "hi", "output": "ho", "history": [["a", "b"]], "system": "be brief"},
            "sft",
            {
                "prompt": [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER],
                "completion": [ANSWER],
            },
        ),
        (
            {"query": "hi", "response": "ho", "history": [["a", "b"], ["c", "d"]]},
            "sft",
            {
                "prompt": [
                    *[{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate("abcd")],
                    USER,
                ],
                "completion": [ANSWER],
            },
        ),
        ({"instruction": "sum", "context": "up", "response": "ho"}, "sft", None),
        (
            {"conversations": SHARED[1:2], "chosen": SHARED[2], "rejected": {"from": "gpt", "value": "no"}},
            "dpo",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [NO]},
        ),
        (
            {"messages": TURNS, "rejected_response": "no", "system": "be brief"},
            "orpo",
            {"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [NO]},
        ),
        (
            {"prompt": "hi", "messages": TURNS, "chosen": TURNS, "rejected": [USER, NO]},
            "dpo",
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [NO]},
        ),
        (
            {"conversations": SHARED[1:], "kto_tag": True},
            "kto",
            {"prompt": [USER], "completion": [ANSWER], "label": True},
        ),
        ({"prompt": "hi", "messages": TURNS}, "sft", {"messages": TURNS}),
    ],
)  # fmt: skip
def test_nothing_that_a_record_holds_is_lost(record: dict[str, Any], task: str, expected: Any) -> None:
    found = said(record, task)
    if expected is None:
        assert found["prompt"] == [{"role": "user", "content": "sum\n\nup"}]
    else:
        assert found == expected


def test_without_a_template_system_and_history_stay_in_the_text() -> None:
    record = {"instruction": "hi", "output": "ho", "system": "be brief", "history": [["a", "b"]]}
    made = data.recognise(record, "sft", "here").convert(record, False)
    assert made == {"prompt": "be brief\n\na\n\nb\n\nhi\n\n", "completion": "ho"}


@pytest.mark.parametrize(
    ("record", "task", "message"),
    [
        ({"messages": TURNS, "images": ["x.png"]}, "sft", "it has images"),
        ({"messages": TURNS, "videos": ["x.mp4"]}, "sft", "it has videos"),
        ({"prompt": "a", "completion": "b", "audio": {"path": "x"}}, "sft", "it has audio"),
        ({"messages": [SYSTEM, *TURNS], "system": "other"}, "sft", "two different system prompts"),
        ({"messages": TURNS, "history": [["a", "b"]]}, "sft", "history cannot be used beside messages"),
        ({"text": "x", "system": "be"}, "sft", "system cannot be used beside text"),
        ({"text": "x", "tools": [{"name": "f"}]}, "sft", "tools cannot be used"),
        ({"instruction": "a", "output": "b", "history": ["a"]}, "sft", "pairs"),
        ({"messages": TURNS[:1]}, "sft", "no message of the assistant"),
        ({"messages": [USER, {**ANSWER, "loss": False}]}, "sft", "every answer in it has loss: false"),
        ({"prompt": "a", "chosen": [{**ANSWER, "weight": 0}], "rejected": "b"}, "dpo", "loss: false"),
        ({"messages": TURNS, "tools": "[{]"}, "sft", "no JSON"),
        (
            {"messages": TURNS, "tools": [{"name": "f"}], "functions": [{"name": "g"}]},
            "sft",
            "tools and functions differ",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "rejected_response": "d"},
            "dpo",
            "rejected_response cannot be",
        ),
        ({"instruction": "a", "output": 4}, "sft", "output is no text"),
        (
            {
                "conversations": [USER, ANSWER, {**USER, "content": "else"}],
                "chosen": [USER, ANSWER],
                "rejected": [USER, NO],
            },
            "dpo",
            "conversations is not what chosen begins with",
        ),
        ({"chosen": TURNS, "rejected": [{"role": "user", "content": "x"}, ANSWER]}, "dpo", "same question"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(record: dict[str, Any], task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        said(record, task)


@pytest.mark.parametrize(
    ("record", "task", "remedy"),
    [
        ({"conversations": SHARED, "chosen": SHARED[2], "rejected": SHARED[2]}, "sft", "choose task dpo"),
        ({"messages": TURNS, "label": False}, "sft", "choose task kto"),
        ({"instruction": "a", "output": "b"}, "dpo", "choose task sft"),
        ({"messages": TURNS}, "kto", "a label"),
    ],
)
def test_formats_are_told_apart_by_what_they_hold(record: dict[str, Any], task: str, remedy: str) -> None:
    with pytest.raises(ObsfsError, match=f"is in no format for task {task}") as caught:
        data.recognise(record, task, "here")
    assert remedy in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_objects_keep_their_own_keys(kind: str, streaming: bool, tmp_path: Path) -> None:
    def calling(name: str, **arguments: Any) -> dict[str, Any]:
        call = {"id": name, "type": "function", "function": {"name": name, "arguments": arguments}}
        return {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, ANSWER], "system": None}

    rows = [calling("f", city="2020-01-01"), calling("g", days=3, unit=None), {"messages": TURNS, "system": "123"}]
    path = tmp_path / f"d.{kind}"
    path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    expected = [
        *({"messages": row["messages"]} for row in rows[:2]),
        {"messages": [{"role": "system", "content": "123"}, *TURNS]},
    ]
    # Streamed data may have tools later on.
    assert list(load(path, streaming=streaming)) == [one | ({"tools": None} if streaming else {}) for one in expected]


def test_nulls_that_a_table_fills_in_are_left_out(tmp_path: Path) -> None:
    calls = [[{"name": "f", "arguments": {"city": "x"}}], [{"name": "g", "arguments": {"days": 3}}]]
    rows = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": one}, ANSWER]} for one in calls]
    pandas.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
    found = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in load(tmp_path / "d.parquet")]
    assert found == [{"city": "x"}, {"days": 3}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TURNS}, "it is messages, and the first is instruction, output"),
        ({"instruction": "a"}, "output is empty"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({}, "it is empty"),
        ({"instruction": None, "output": None}, "it is empty"),
    ],
)
def test_records_that_differ_from_the_first_are_told_by_number(
    row: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "d.jsonl", [*ROWS[:2], row])
    with pytest.raises(ObsfsError, match=rf"record 3 of {path} does not fit \({reason}"):
        load(path)


def load_all(*places: Path, task: str = "sft", **given: Any) -> data.Loaded:
    options: dict[str, Any] = {"split": "train", "streaming": False, "chat": True, "settings": {}, **given}
    return data.load_all([str(place) for place in places], task, **options)


def test_columns_that_are_not_used_are_named_and_others_can_be_given_up(tmp_path: Path) -> None:
    rows = [{**row, "id": n, "score": 0.5} for n, row in enumerate(ROWS)]
    path = write_lines(tmp_path / "d.jsonl", rows)
    assert load_all(path).notes == [f"{path}: columns id, score are not used"]
    path = write_lines(tmp_path / "e.jsonl", [{**ROWS[0], "images": ["x"]}])
    with pytest.raises(ObsfsError, match="ignore_columns: images"):
        load_all(path)
    assert load_all(path, ignored=["images"]).records.num_rows == 1


def test_a_record_is_called_by_its_place(tmp_path: Path) -> None:
    places = [write_lines(tmp_path / f"{n}.jsonl", ROWS[:n]) for n in (2, 3)]
    found = load_all(*places)
    names = [f"record 1 of {places[0]}", f"record 2 of {places[0]}", f"record 1 of {places[1]}"]
    assert [found.places.where(index) for index in range(3)] == names
    with pytest.raises(IndexError):
        found.places.where(5)


def test_tools_that_only_one_place_has(tmp_path: Path) -> None:
    with_tools = [{"messages": TURNS, "tools": [{"name": "f", "parameters": {}}]}]
    places = [write_lines(tmp_path / "a.jsonl", [{"messages": TURNS}]), write_lines(tmp_path / "b.jsonl", with_tools)]
    first, second = load_all(*places).records
    assert first["tools"] is None
    wrapped = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert json.loads(second["tools"]) == [wrapped]
    bad = write_lines(tmp_path / "c.jsonl", [{**CHOICES[0], "tools": '[{"name": "f"}]'}])
    with pytest.raises(ObsfsError, match="TRL leaves out in task orpo"):
        load_all(bad, task="orpo")


def test_labels() -> None:
    form = data.recognise(JUDGED[1], "kto", "")
    assert form.convert(JUDGED[1], True)["label"] is True
    with pytest.raises(ValueError, match="neither"):
        form.convert({**JUDGED[1], "label": "yes"}, True)
