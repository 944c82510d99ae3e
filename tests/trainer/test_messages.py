"""Messages in the spellings that data sets use."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainer.data import messages

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
ASK = {"role": "user", "content": "hi"}


def call(value: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"from": "human", "value": "hi"}, {"from": "function_call", "value": value, **more}]


@pytest.mark.parametrize(
    ("word", "role"),
    [
        ("Human", "user"),
        ("USER", "user"),
        ("GPT", "assistant"),
        ("Assistant", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("System", "system"),
        ("developer", "system"),
        ("Observation", "tool"),
        ("function", "tool"),
        ("tool-response", "tool"),
    ],
)
def test_roles_by_any_name(word: str, role: str) -> None:
    assert messages.turns([{"from": word, "value": "x"}]) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    ("value", "calls"),
    [
        ('{"name": "f", "arguments": {"x": 1}}', [CALL]),
        ({"name": "f", "arguments": '{"x": 1}'}, [CALL]),
        ('[{"name": "f", "arguments": {"x": 1}}, {"name": "f", "parameters": {"x": 1}}]', [CALL, CALL]),
        ({"name": "g"}, [{"type": "function", "function": {"name": "g", "arguments": {}}}]),
    ],
)
def test_a_function_call_is_a_tool_call_of_the_assistant(value: Any, calls: list[Any]) -> None:
    assert messages.turns(call(value)) == [ASK, {"role": "assistant", "content": "", "tool_calls": calls}]


def test_calls_in_turns_of_their_own_are_one_answer() -> None:
    shared = [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "I look"},
        {"from": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "tool_response", "value": {"found": 3}},
    ]
    found = messages.turns(shared)
    assert found[1] == {"role": "assistant", "content": "I look", "tool_calls": [CALL, CALL]}
    assert found[2] == {"role": "tool", "content": '{"found": 3}'}


@pytest.mark.parametrize(
    "given",
    [
        {"tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"tool_calls": [{"id": "1", "name": "f", "arguments": {"x": 1}}]},
        {"tool_calls": json.dumps([{"id": "1", "name": "f", "arguments": {"x": 1}}])},
    ],
)
def test_arguments_are_objects(given: dict[str, Any]) -> None:
    found = messages.turns([ASK, {"role": "assistant", "content": None, **given}])[1]
    assert found == {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "1"}]}


def test_openais_old_function_call() -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    answer = {"role": "function", "name": "f", "content": "3"}
    found = messages.turns([ASK, turn, answer])
    assert found[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "f", "content": "3"},
    ]


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"train": False}, {"training": False}, {"loss": 0.0}])
def test_an_answer_that_is_not_learned(mark: dict[str, Any]) -> None:
    turns = [
        ASK,
        {"role": "assistant", "content": "a", **mark},
        ASK,
        {"role": "assistant", "content": "b", "loss": True},
    ]
    found = messages.turns(turns)
    assert messages.learned(found) == [3]
    assert messages.for_template(found)[1] == {"role": "assistant", "content": "a"}


def test_text_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image_url": None}]
    assert messages.turns([{"role": "user", "content": parts}])[0]["content"] == "ab"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "narrator", "value": "x"}, "message 2 has the role 'narrator'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "part of type image_url"),
        ({"role": "user", "content": 3}, "no text"),
        ({"role": "assistant", "content": ""}, "empty answer"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, "weight 0.5"),
        ({"role": "user", "content": "x", "train": True}, "only answers are learned"),
        ({"from": "function_call", "value": "call f"}, "no JSON"),
        ({"from": "function_call", "value": "[]"}, "without a name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x}"}}]}, "arguments of f"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}, "no object"),
        ({"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}, "only the assistant"),
        ("hello", "no object"),
        (None, "no object"),
    ],
)
def test_what_is_refused_is_named(turn: Any, reason: str) -> None:
    with pytest.raises(ValueError, match="message 2 .*" + reason.removeprefix("message 2 ")):
        messages.turns([ASK, turn])


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []),
        ("", []),
        ("[]", []),
        ([], []),
        ('[{"name": "f"}]', ["f"]),
        ([{"type": "function", "function": {"name": "g"}}], ["g"]),
        (['{"name": "f"}', '{"name": "g"}'], ["f", "g"]),
    ],
)
def test_tools(given: Any, names: list[str]) -> None:
    assert messages.tool_names(messages.tools(given)) == names
