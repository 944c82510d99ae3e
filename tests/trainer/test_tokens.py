"""What is learned of a record, and what is found out before the weights are loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from obsfs import ObsfsError
from tests.trainer.conftest import CHOICES, ROWS, write_lines
from trainer import data
from trainer.data.tokens import IGNORED, Tokens

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] if loop.last or m['role'] != 'assistant' else"
    " m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Drops what earlier answers thought, as Qwen3's does."""
WITH_TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c | tojson }}{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "second"},
    {"role": "assistant", "content": "two"},
]


@pytest.fixture(scope="module")
def base_tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture
def target(base_tokenizer: Any) -> Any:
    """The tiny model, by the chat template that is asked for."""

    def make(template: str = CHATML, vocabulary: int = 1024) -> data.Target:
        tokenizer = copy.deepcopy(base_tokenizer)
        tokenizer.chat_template = template
        return data.Target(tokenizer, "tiny", vocabulary)

    return make


def tokens_of(target: data.Target, record: dict[str, Any], *, is_whole: bool = False) -> Tokens:
    return data.Tokeniser(target, is_whole=is_whole, where=lambda index: f"record {index + 1}").tokens(record, 0)


def learned(target: data.Target, made: Tokens) -> list[str]:
    """The texts that are learned, one for each run of labels."""
    runs: list[list[int]] = [[]]
    for token, label in zip(made.input_ids, made.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [target.tokenizer.decode(run).strip() for run in runs if run]


def test_the_demos_model_has_a_chat_template(base_tokenizer: Any) -> None:
    shown = base_tokenizer.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True)
    assert shown == "<|im_start|>user\nfirst<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", [CHATML, MARKED, PLAIN])
def test_only_answers_are_learned_whatever_the_template(target: Any, template: str) -> None:
    end = "" if template == PLAIN else "<|im_end|>"
    one = target(template)
    assert learned(one, tokens_of(one, {"messages": CHAT})) == [f"one{end}", f"two{end}"]
    skipped = [*CHAT[:2], {**CHAT[2], "loss": False}, *CHAT[3:]]
    assert learned(one, tokens_of(one, {"messages": skipped})) == [f"two{end}"]
    assert learned(one, tokens_of(one, {"prompt": CHAT[:4], "completion": CHAT[4:]})) == [f"two{end}"]
    made = tokens_of(one, {"messages": CHAT}, is_whole=True)
    assert made.labels == made.input_ids
    expected = one.tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    assert made.input_ids == expected == tokens_of(one, {"messages": skipped}).input_ids


def test_an_answer_that_comes_first_is_learned_without_what_begins_it(target: Any) -> None:
    for template in (CHATML, PLAIN):
        one = target(template)
        made = tokens_of(one, {"messages": [CHAT[2], *CHAT[1:3]]})
        assert [text.removesuffix("<|im_end|>") for text in learned(one, made)] == ["one", "one"]


def test_text_and_plain_prompts_end_with_the_end_token(target: Any) -> None:
    one = target()
    made = tokens_of(one, {"prompt": "2 + 2 =", "completion": " 4"})
    assert [text.strip() for text in learned(one, made)] == ["4<|im_end|>"]
    made = tokens_of(one, {"text": "all of it"})
    assert learned(one, made) == ["all of it<|im_end|>"]
    assert tokens_of(one, {"text": "all of it<|im_end|>"}) == made
    made = tokens_of(one, {"prompt": "2 + 2 =", "completion": " 4"}, is_whole=True)
    assert learned(one, made) == ["2 + 2 = 4<|im_end|>"]


def test_an_answer_that_the_template_writes_in_another_way_is_not_learned_and_counted(target: Any) -> None:
    one = target(FORGETS)
    chat = [CHAT[1], {"role": "assistant", "content": "<think>x</think>one"}, *CHAT[3:]]
    made = tokens_of(one, {"messages": chat})
    assert (learned(one, made), made.unfound) == (["two<|im_end|>"], 1)
    # No answer is found: the conversation ends with its last one, which is written as it is.
    made = tokens_of(one, {"messages": [*chat[:2], CHAT[3]]})
    assert (learned(one, made), made.unfound) == (["<think>x</think>one<|im_end|>"], 0)


@pytest.mark.parametrize(
    ("record", "options", "expected"),
    [
        ({"messages": []}, {}, (False, "the answers only")),
        ({"messages": []}, {"assistant_only_loss": True}, (False, "the answers only")),
        (
            {"messages": []},
            {"assistant_only_loss": False},
            (True, "questions and answers (assistant_only_loss: false)"),
        ),
        (
            {"prompt": ""},
            {"completion_only_loss": False},
            (True, "questions and answers (completion_only_loss: false)"),
        ),
        ({"prompt": ""}, {}, (False, "the answers only")),
        ({"text": ""}, {}, (True, "all of the text")),
    ],
)
def test_what_the_loss_covers_is_said(record: dict[str, Any], options: dict[str, Any], expected: Any) -> None:
    assert data.what_is_learned(record, options) == expected


@pytest.mark.parametrize(
    ("record", "name"), [({"text": ""}, "assistant_only_loss"), ({"messages": []}, "completion_only_loss")]
)
def test_a_loss_that_does_not_fit_the_data_is_refused(record: dict[str, Any], name: str) -> None:
    with pytest.raises(ObsfsError, match=f"{name} does not fit"):
        data.what_is_learned(record, {name: True})


def look(target: data.Target, path: Path, task: str = "sft", length: int | None = 32, **given: Any) -> data.Report:
    """What is found in a file, by the way that a run takes."""
    loaded = data.load_all([str(path)], task, split="train", settings={}, chat=True, **{"streaming": False, **given})
    limits = data.Limits.of(task, SimpleNamespace(max_length=length))
    tokeniser = data.Tokeniser(target, is_whole=False, where=loaded.places.where) if task == "sft" else None
    return data.look(loaded, tokeniser, target, limits, "the answers only")


LONG = {"instruction": "word " * 60, "output": "ok"}
CUT = {"instruction": "a", "output": "word " * 60}


@pytest.mark.parametrize("streaming", [False, True])
def test_records_that_are_cut_and_that_lose_their_answer_are_counted(
    target: Any, tmp_path: Path, streaming: bool
) -> None:
    path = write_lines(tmp_path / "d.jsonl", [ROWS[0], LONG, CUT, LONG, ROWS[1]])
    report = look(target(), path, streaming=streaming)
    assert (report.looked, report.total, report.cut, report.gone) == (5, None if streaming else 5, 3, 2)
    cut, gone = report.warnings()
    assert "3 of 5 records checked are longer than max_length 32" in cut
    assert f"(record 2 of {path})" in gone
    assert report.figures()["records_without_answer"] == 2
    assert look(target(), path, length=None).warnings() == []


@pytest.mark.parametrize("task", ["dpo", "kto", "orpo"])
def test_preferences_are_counted_too(target: Any, tmp_path: Path, task: str) -> None:
    long = {**CHOICES[0], "instruction": "word " * 60}
    report = look(target(), write_lines(tmp_path / "d.jsonl", [*CHOICES[:3], long]), task)
    assert (report.looked, report.cut, report.gone) == (4, 1, 1)


def test_a_sample_is_spread_over_a_large_set_and_has_every_sequence_of_roles(target: Any, tmp_path: Path) -> None:
    rows = [{"messages": CHAT[1:3]} for _ in range(1000)]
    rows[6] = {"messages": CHAT}
    rows[999] = {"messages": [CHAT[1], {"role": "assistant", "content": "word " * 60}]}
    path = write_lines(tmp_path / "d.jsonl", rows)
    report = look(target(), path, length=64)
    assert (report.looked, report.total, report.cut) == (257, 1000, 1)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    with pytest.raises(ObsfsError, match=rf"does not take record 7 of {path} \(System role not supported\)") as caught:
        look(target(refusing + CHATML), path)
    assert "take the system prompts out" in str(caught.value)


def test_a_set_whose_answers_are_all_cut_off_is_refused(target: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "d.jsonl", [LONG] * 3)
    with pytest.raises(ObsfsError, match="none of the 3 records checked has an answer left within max_length 32"):
        look(target(), path)


def test_roles_that_must_take_turns(target: Any, tmp_path: Path) -> None:
    alternating = (
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}"
    )
    rows = [{"messages": CHAT[1:]}, {"messages": [CHAT[1], CHAT[1], CHAT[2]]}]
    path = write_lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(ObsfsError, match=f"record 2 of {path}.*take turns"):
        look(target(alternating + CHATML), path)
    assert look(target(), path).looked == 2


def test_what_a_template_leaves_out(target: Any, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look_up", "arguments": '{"x": 1}'}]}
    chat = [CHAT[1], call, {"role": "tool", "content": "3"}, CHAT[4]]
    path = write_lines(tmp_path / "d.jsonl", [{"messages": chat, "tools": [{"name": "look_up"}]}])
    with pytest.raises(ObsfsError, match="leaves out the call of look_up in message 2 of record 1"):
        look(target(), path)
    assert look(target(WITH_TOOLS), path, length=200).gone == 0
    silent = CHATML.replace("messages %}", "messages if m['role'] != 'system' %}", 1)
    path = write_lines(tmp_path / "e.jsonl", [{"messages": CHAT}])
    with pytest.raises(ObsfsError, match=r"leaves out message 1 \(system\)"):
        look(target(silent), path)
    thinking = [CHAT[1], {**CHAT[2], "reasoning_content": "hm, let me see", "mood": "good"}]
    report = look(target(), write_lines(tmp_path / "f.jsonl", [{"messages": thinking}]))
    assert list(report.left_out) == ["the key reasoning_content of messages"]
    assert report.warnings()[0].endswith("f.jsonl: the chat template leaves out mood of messages")


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_token_that_the_model_does_not_know_is_named(target: Any, tmp_path: Path, task: str) -> None:
    one = target()
    one.tokenizer.add_tokens(["<|new|>"])
    rows = (
        [*CHOICES[:2], {**CHOICES[2], "chosen": "say <|new|>"}]
        if task == "dpo"
        else [ROWS[0], ROWS[1], ROWS[2] | {"output": "<|new|>"}]
    )
    path = write_lines(tmp_path / "d.jsonl", rows)
    with pytest.raises(
        ObsfsError, match=rf"record 3 of {path} has the token '<\|new\|>' \(1024\), and tiny knows 1024"
    ):
        look(one, path, task)


def test_the_tokenizer_is_looked_at_as_trl_will_change_it(target: Any, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(PLAIN)
    tokenizer = target().tokenizer
    changed = data.tokenizer_for(
        tokenizer, SimpleNamespace(chat_template_path=str(template), eos_token="<|endoftext|>")
    )
    assert (changed.chat_template, changed.eos_token) == (PLAIN, "<|endoftext|>")
    assert (tokenizer.chat_template, tokenizer.eos_token) == (CHATML, "<|im_end|>")
    with pytest.raises(ObsfsError, match="pad_token: '<nothing>' is not in the vocabulary"):
        data.tokenizer_for(tokenizer, SimpleNamespace(pad_token="<nothing>"))


def test_what_is_cut_is_counted_in_all_records(target: Any, tmp_path: Path) -> None:
    one = target(FORGETS)
    chat = [CHAT[1], {"role": "assistant", "content": "<think>x</think>one"}, *CHAT[3:]]
    rows = [{"messages": CHAT[1:3]}] * 1000
    rows[500] = {"messages": [CHAT[1], {"role": "assistant", "content": "word " * 60}]}
    rows[502] = {"messages": chat}
    path = write_lines(tmp_path / "d.jsonl", rows)
    loaded = data.load_all([str(path)], "sft", split="train", settings={}, chat=True, streaming=False)
    tokeniser = data.Tokeniser(one, is_whole=False, where=loaded.places.where)
    report = data.look(loaded, tokeniser, one, data.Limits("sft", 64), "the answers only")
    made = data.tokenise(loaded.records, tokeniser, 64)
    assert (made.cut, made.unfound, made.records.column_names) == (1, 1, ["input_ids", "labels"])
    cut, unfound = report.rest(made)
    assert cut == "1 of all 1,000 records are longer than max_length 64"
    assert unfound.startswith("1 answers of all records are not learned")


@pytest.mark.parametrize("task", ["dpo", "kto", "simpo"])
def test_what_is_cut_is_counted_in_all_records_of_every_task(target: Any, tmp_path: Path, task: str) -> None:
    one, long = target(), "word " * 60
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 1000
    rows[500], rows[502], rows[503] = (
        {**rows[0], "chosen": long},
        {**rows[0], "rejected": long},
        {**rows[0], "prompt": long},
    )
    if task == "kto":
        written: list[dict[str, Any]] = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows
        ]
    else:
        written = list(rows)
    path = write_lines(tmp_path / "d.jsonl", written)
    loaded = data.load_all([str(path)], task, split="train", settings={}, chat=True, streaming=False)
    limits = data.Limits(task, 64)
    report = data.look(loaded, None, one, limits, "the answers only")
    assert (report.looked, report.cut) == (256, 0)
    made = data.measure(loaded, report, one, limits)
    assert made.records is loaded.records
    count = 2 if task == "kto" else 3
    assert report.rest(made) == [f"{count} of all 1,000 records are longer than max_length 64"]
    assert not data.measure(loaded, report, one, data.Limits(task, None)).cut
