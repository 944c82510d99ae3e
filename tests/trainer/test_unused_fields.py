"""Nothing that a record holds is left out without a word, wherever in the data it stands."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obsfs import ObsfsError
from tests.trainer.conftest import write_lines
from trainer import data
from trainer.data.formats import held_columns, recognise

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
U, A, S = "user", "assistant", "system"
CORES: dict[str, list[dict[str, Any]]] = {
    "sft": [
        {"messages": [U, A]},
        {"conversations": [S, U, A, U, A]},
        {"prompt": "text", "completion": "text"},
        {"prompt": [S, U], "completion": [A]},
        {"instruction": "text", "input": "text", "output": "text"},
        {"query": "text", "response": [A], "history": "pairs"},
        {"input": "text", "output": "text", "system": "text"},
        {"text": "text"},
    ],
    "kto": [{"messages": [U, A], "label": True}, {"prompt": "text", "completion": "text", "kto_tag": True}],
    "dpo": [
        {"prompt": "text", "chosen": "text", "rejected": "text"},
        {"chosen": "text", "rejected": "text"},
        {"chosen": ["same", A], "rejected": ["same", A], "messages": ["same", A]},
        {"prompt": [U], "chosen": [A], "rejected": [A]},
        {"conversations": [U], "chosen": [A], "rejected": [A]},
        {"messages": [U, A], "rejected_response": "text"},
    ],
}
ODD_COLUMNS: dict[str, Any] = {
    "system": "text", "system_prompt": "text", "input": "text", "context": "text", "prompt": "text", "id": "text",
    "history": "pairs", "tools": "tools", "functions": "tools", "images": "text", "messages": [U, A], "chosen": "text",
    "rejected_response": "text", "text": "text", "label": "text", "conversation": [U, A], "output": "text",
}  # fmt: skip
ODD_KEYS: dict[str, Any] = {
    "name": "text", "mood": "text", "thinking": "text", "from": U, "value": "text", "weight": 1, "loss": "text",
    "tool_calls": "calls", "function_call": "call", "content": "parts",
}  # fmt: skip


class _Maker:
    """Makes values of a description, and gives each text a number of its own."""

    def __init__(self, seed: int) -> None:
        self.random, self._count = random.Random(seed), 0

    def odd(self, names: dict[str, Any], most: int) -> dict[str, Any]:
        chosen = self.random.sample(sorted(names), min(self.random.randint(0, most), len(names)))
        return {name: self.made(names[name]) for name in chosen}

    def text(self) -> str:
        self._count += 1
        return f"<{self._count}>"

    def made(self, what: Any) -> Any:
        if isinstance(what, list):
            turns = [self.turn(role) for role in what]
            turns[self.random.randrange(len(turns))] |= self.odd(ODD_KEYS, 1)
            return turns
        makers: dict[Any, Callable[[], Any]] = {
            "text": self.text,
            "pairs": lambda: [[self.text(), self.text()]],
            "tools": lambda: [{"name": self.text(), "parameters": {"x": self.text()}}],
            "parts": lambda: [{"type": "text", "text": self.text(), **self.odd({"cited": "text"}, 1)}],
            "call": self.call,
            "calls": lambda: [self.call(), {"type": "function", "function": self.call(), "cost": self.text()}],
        }
        return makers.get(what, lambda: what)()

    def call(self) -> dict[str, Any]:
        odd = self.odd({"id": "text", "parameters": "text"}, 1)
        return {"name": self.text(), "arguments": {"x": self.text()}, **odd}

    def turn(self, role: str) -> dict[str, Any]:
        return {"role": U, "content": "<same>"} if role == "same" else {"role": role, "content": self.text()}


def drawn(seed: int) -> tuple[str, dict[str, Any]]:
    """A task, and a record of it that may have odd columns and keys."""
    maker = _Maker(seed)
    task = maker.random.choice(sorted(CORES))
    core = maker.random.choice(CORES[task])
    return task, {name: maker.made(one) for name, one in core.items()} | maker.odd(ODD_COLUMNS, 2)


def texts(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, one in value.items():
            yield from texts(one, name)
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)
    elif isinstance(value, str) and key not in ("role", "from", "type"):
        yield value


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32), st.booleans())
def test_each_text_of_a_record_is_used_or_told_or_the_record_is_refused(seed: int, is_chat: bool) -> None:
    task, record = drawn(seed)
    try:
        form = recognise(record, task, "here")
        made = form.make(record, form.shape(record, held_columns(record), is_chat))
    except (ObsfsError, ValueError):
        return
    used = json.dumps(made.record)
    held = [(text, column) for column, one in record.items() for text in texts(one)]
    lost = [(text, column) for text, column in held if text not in used and column not in made.columns]
    assert not lost, f"{record} becomes {made}"


LATE = 300
"""The index of an odd record: behind those that are looked at."""


def load(path: Path, *, streaming: bool, task: str = "sft", **more: Any) -> data.Loaded:
    return data.load_all([str(path)], task, split="train", streaming=streaming, chat=True, settings={}, **more)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("late", "told"),
    [
        ({"messages": TURNS, "score": 3}, "column score is not used"),
        ({"messages": [TURNS[0], {**TURNS[1], "mood": "good"}]}, "mood of messages"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"name": "f", "cost": 3}]}]}, "cost of tool calls"),
        ({"messages": TURNS, "images": ["a.png"]}, "record 301 of .*it has images"),
        ({"messages": TURNS, "history": [["a", "b"]]}, "record 301 of .*history cannot be used"),
        ({"prompt": "a", "completion": "b"}, "record 301 of .*it is prompt, completion, and the first is messages"),
        ({"messages": "hi"}, "record 301 of .*no JSON"),
    ],
)
def test_what_only_a_late_record_holds(
    late: dict[str, Any], told: str, streaming: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"messages": TURNS}] * LATE + [late])
    if told.startswith("record"):
        with pytest.raises(ObsfsError, match=told):
            list(load(path, streaming=streaming).records)
        return
    loaded = load(path, streaming=streaming)
    for account in loaded.accounts:
        account.go_live()  # as the look before a run does
    capsys.readouterr()
    assert len(list(loaded.records)) == LATE + 1
    said = [*loaded.notes, *loaded.accounts[0].keys]
    assert any(line.endswith(told) for line in said)
    assert (told in capsys.readouterr().err) is streaming


@pytest.mark.parametrize("streaming", [False, True])
def test_tools_and_system_of_a_late_record_are_honoured(streaming: bool, tmp_path: Path) -> None:
    late = {"messages": TURNS, "system": "be brief", "tools": [{"name": "f"}]}
    path = write_lines(tmp_path / "d.jsonl", [{"messages": TURNS}] * LATE + [late])
    *_, last = load(path, streaming=streaming).records
    assert last["messages"] == [{"role": "system", "content": "be brief"}, *TURNS]
    assert json.loads(last["tools"])[0]["function"]["name"] == "f"


def test_all_records_become_conversations_where_one_has_a_system_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] * LATE + [{"prompt": "a", "completion": "b", "system": "be brief"}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    first, *_, last = load(path, streaming=False).records
    assert first["prompt"] == [{"role": "user", "content": "a"}]
    assert last["prompt"][0] == {"role": "system", "content": "be brief"}
    with pytest.raises(ObsfsError, match=r"record 301 of .*system cannot be used beside prompt, completion"):
        list(load(path, streaming=True).records)


def test_a_second_load_takes_the_account_from_the_cache_too(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"messages": TURNS, "score": 3}])
    notes = [load(path, streaming=False).notes for _ in range(2)]
    assert notes == [[f"{path}: column score is not used"]] * 2


def test_columns_of_a_table_that_hold_nothing_are_not_told(tmp_path: Path) -> None:
    rows = [
        {"messages": TURNS, "images": None, "id": None, "extra": {"a": None}},
        {"messages": [*TURNS, {"role": "user", "content": "bye", "name": "x"}], "images": None, "id": None,
         "extra": {"a": None}},
    ]  # fmt: skip
    pandas.DataFrame(rows).to_parquet(tmp_path / "d.parquet")
    loaded = load(tmp_path / "d.parquet", streaming=False)
    assert loaded.notes == []
    assert loaded.accounts[0].keys == ["name of messages"]
    assert loaded.records[0] == {"messages": TURNS}


def test_many_columns_are_told_in_one_short_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [{"messages": TURNS, **{f"c{n}": n for n in range(200)}}])
    (note,) = load(path, streaming=False).notes
    assert note.endswith("c18, c19 and 180 more are not used")


def test_files_of_a_directory_that_are_not_read_are_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "b.csv.gz").write_bytes(b"")
    (tmp_path / "README.md").write_text("")
    assert load(tmp_path, streaming=False).notes == [f"{tmp_path}: only *.jsonl is read, not b.csv.gz"]
