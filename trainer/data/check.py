"""Check the data before the weights are loaded: pass a sample of it through the real template and tokenizer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from obsfs.plugin import UsageError, visible
from trainer.data import messages as chats
from trainer.data.formats import Record, is_conversation
from trainer.data.loading import SAMPLE, Loaded, RecordOrigins
from trainer.data.tokens import (
    IGNORED,
    Target,
    Tokenised,
    Tokeniser,
    check_vocabulary,
    common_length,
    refused_by_template,
    render,
)

_MORE = 256
"""The most kinds of records to check one record of, in addition to the sample."""
_PREFERENCE_LENGTH = 512
"""The default of max_length in TRL's ORPO and CPO."""
_TAIL = 40
_LENGTH = "length"
_UNLEARNED = "are not learned, only later ones: the chat template writes earlier answers in another way"


@dataclass
class Report:
    """What the check of some records found.

    Args:
        total: How many records there are; None if streamed.
        max_length: The limit of a record, in tokens.
        loss: What is learned, in words.
        looked: How many records were checked.
        longest: The length of the longest one, in tokens.
        cut: How many are longer than `max_length`.
        cut_tokens: By how many tokens in all.
        gone: How many have nothing left to learn.
        unfound: How many answers cannot be located, see :class:`trainer.data.tokens.Tokens`.
        example_cut: The name of the first record that is cut.
        example_gone: The name of the first record with nothing left to learn.
        left_out: What the chat template leaves out, and of how many records.
        notes: Further notes for users.
    """

    total: int | None
    max_length: int | None
    loss: str
    looked: int = 0
    longest: int = 0
    cut: int = 0
    cut_tokens: int = 0
    gone: int = 0
    unfound: int = 0
    example_cut: str = ""
    example_gone: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return the counts, for JSON."""
        return {
            "records_checked": self.looked,
            "records_cut": self.cut,
            "tokens_cut": self.cut_tokens,
            "records_without_answer": self.gone,
            "longest_tokens": self.longest,
        }

    def summary(self) -> str:
        """Return one line for people."""
        of = "the first ones" if self.total is None else f"{self.total:,}"
        which = f"all {of}" if self.looked == self.total else f"{self.looked:,} of {of}"
        return f"records checked: {which}, up to {self.longest:,} tokens; the loss covers {self.loss}"

    def rest(self, whole: Tokenised) -> list[str]:
        """Return what tokenising all records found beyond the sample, a line each."""
        found: list[str] = []
        if self.total is None or self.looked >= self.total:
            return found
        if whole.cut:
            found.append(f"{whole.cut:,} of all {self.total:,} records are longer than max_length {self.max_length}")
        if whole.unfound:
            found.append(f"{whole.unfound:,} answers of all records {_UNLEARNED}")
        return found

    def warnings(self) -> list[str]:
        """Return warnings for the user, a line each."""
        found = [visible(note) for note in self.notes]
        if self.cut:
            found.append(
                f"{self.cut:,} of {self.looked:,} records checked are longer than max_length {self.max_length} and are "
                f"truncated, by {self.cut_tokens / self.cut:,.0f} tokens on average ({visible(self.example_cut)})"
            )
        if self.gone:
            found.append(
                f"{self.gone:,} of {self.looked:,} records checked have no answer left within max_length "
                f"{self.max_length} and are dropped ({visible(self.example_gone)})"
            )
        if self.unfound:
            found.append(f"{self.unfound:,} answers of the records checked {_UNLEARNED}")
        for what, count in self.left_out.items():
            found.append(f"the chat template leaves out {visible(what)} of {count:,} records checked")
        return found


@dataclass(frozen=True)
class Limits:
    """How a run truncates records: its task, TRL's max_length in tokens, and whether the end of a record is kept."""

    task: str
    max_length: int | None
    keeps_end: bool = False

    @classmethod
    def of(cls, task: str, arguments: Any) -> Limits:
        """Return the limits in a config of TRL for the task."""
        length = getattr(arguments, "max_length", None)
        if length is None and task in ("orpo", "cpo", "simpo"):
            length = _PREFERENCE_LENGTH
        if getattr(arguments, "packing", False) and getattr(arguments, "packing_strategy", "") != "bfd":
            length = None  # the rest of a long record continues in the next sequence
        return cls(task, length, getattr(arguments, "truncation_mode", "") == "keep_end")


def look(loaded: Loaded, tokeniser: Tokeniser | None, target: Target, limits: Limits, loss: str) -> Report:
    """Check a sample of the records.

    Args:
        loaded: The records.
        tokeniser: Makes tokens for task sft; None for other tasks, whose tokens are counted as TRL makes them.
        target: The model.
        limits: How records are truncated.
        loss: What is learned, in words.

    Raises:
        UsageError: The template refuses or leaves out a record, the model does not know a token, or every answer is
            cut off.
    """
    records = loaded.records
    total = len(records) if hasattr(records, "__len__") else None
    report = Report(total, limits.max_length, loss)
    extra = len(target.tokenizer) - target.vocabulary if target.vocabulary else 0
    if extra > 0:
        # Check every record: the first batch with such a token would end the run.
        report.notes.append(
            f"{target.name} does not know {extra:,} tokens of its tokenizer: records must not have them"
        )
    for index, record in _sample(loaded, total, is_whole=extra > 0):
        where = loaded.places.where(index)
        if is_conversation(record):
            _check_template(report, record, target, where)
        if tokeniser is not None:
            made = tokeniser.tokens(record, index)
            labels = made.labels
            report.unfound += made.unfound
            sizes = [(len(made.input_ids), _has_label(labels, limits))]
        else:
            sizes = list(_sizes(record, target, limits, where))
        _count(report, sizes, where)
    report.notes += [*loaded.notes, *_keys_left_out(loaded, str(target.tokenizer.chat_template), report)]
    for account in loaded.accounts:
        account.go_live()
    if report.looked and report.gone == report.looked:
        raise UsageError(
            f"none of the {report.looked:,} records checked has an answer left within max_length {limits.max_length} "
            f"(the longest has {report.longest:,} tokens)",
            "raise max_length, or shorten the records",
        )
    return report


def measure(loaded: Loaded, report: Report, target: Target, limits: Limits) -> Tokenised:
    """Count the truncated records among all records, for tasks where TRL makes the tokens and does not report it.

    It counts nothing if the report covers all records already, or if the data is streamed. Raises UsageError, which
    names the record.
    """
    records = loaded.records
    if limits.max_length is None or report.total is None or report.looked >= report.total:
        return Tokenised(records)
    from datasets import Features, Value

    measurer = _Measurer(target, limits, loaded.places)
    features = Features({_LENGTH: Value("int64")})
    made = records.map(measurer, with_indices=True, remove_columns=records.column_names, features=features)
    lengths = made.with_format("numpy")[_LENGTH][:]
    return Tokenised(records, cut=int((lengths > limits.max_length).sum()))


class _Measurer:
    """Returns the length of a record in tokens, for ``Dataset.map``."""

    def __init__(self, target: Target, limits: Limits, places: RecordOrigins) -> None:
        self._target, self._limits, self._places = target, limits, places

    def __call__(self, record: Record, index: int) -> dict[str, int]:
        sizes = _sizes(record, self._target, self._limits, self._places.where(index))
        return {_LENGTH: max(size for size, _ in sizes)}


def _sample(loaded: Loaded, total: int | None, *, is_whole: bool) -> Iterator[tuple[int, Record]]:
    """Yield a sample, with the first record of each kind that a template may refuse."""
    records = loaded.records
    if total is None:
        yield from enumerate(records.take(SAMPLE))
        return
    if is_whole or total <= SAMPLE:
        yield from enumerate(records)
        return
    chosen = {i * (total - 1) // (SAMPLE - 1) for i in range(SAMPLE)} | set(loaded.kinds[:_MORE])
    for index in sorted(chosen):
        yield index, records[index]


def _count(report: Report, sizes: list[tuple[int, bool]], where: str) -> None:
    report.looked += 1
    length = max(size for size, _ in sizes)
    report.longest = max(report.longest, length)
    if report.max_length is not None and length > report.max_length:
        report.cut += 1
        report.cut_tokens += length - report.max_length
        report.example_cut = report.example_cut or where
    if not all(is_left for _, is_left in sizes):
        report.gone += 1
        report.example_gone = report.example_gone or where


def _has_label(labels: list[int], limits: Limits) -> bool:
    if limits.max_length is not None:
        labels = labels[-limits.max_length :] if limits.keeps_end else labels[: limits.max_length]
    return any(label != IGNORED for label in labels)


def _sizes(record: Record, target: Target, limits: Limits, where: str) -> Iterator[tuple[int, bool]]:
    """Yield the length of a question with each of its answers, and whether TRL keeps anything of that answer."""
    tokenizer = target.tokenizer
    prompt, tools = record.get("prompt", ""), record.get("tools")
    is_chat = isinstance(prompt, list)

    def ids_of(value: Any, **options: Any) -> list[int]:
        if not is_chat:
            return list(tokenizer(value)["input_ids"])
        try:
            text = render(tokenizer, value, tools, **options)
        except ValueError as error:
            raise refused_by_template(target, where, record, str(error)) from None
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    asked = ids_of(prompt, add_generation_prompt=True) if is_chat or prompt else []
    for name in ("completion", "chosen", "rejected"):
        if name in record:
            ids = ids_of(prompt + record[name])
            check_vocabulary(ids, target, lambda: where)
            start = common_length(asked, ids)
            length = len(ids) + (0 if is_chat else 1)  # TRL appends the end token to a text
            yield length, limits.max_length is None or limits.keeps_end or start < limits.max_length


def _check_template(report: Report, record: Record, target: Target, where: str) -> None:
    """Raise UsageError if the template leaves out an essential part of the record."""
    for messages in _conversations(record):
        try:
            text = render(target.tokenizer, messages, record.get("tools"))
        except ValueError as error:
            raise refused_by_template(target, where, record, str(error)) from None
        lost, missed = _left_out(text, messages, record.get("tools"))
        if lost:
            raise UsageError(
                f"the chat template of {target.name} leaves out {lost} of {where}",
                "give a template that shows it with chat_template_path: FILE.jinja, or take it out of the record",
            )
        report.left_out.update(missed)


def _keys_left_out(loaded: Loaded, template: str, report: Report) -> Iterator[str]:
    """Yield a note on the keys of messages, in any record, that the chat template does not mention."""
    for account in loaded.accounts:
        names = [one for one in account.keys if one.partition(" ")[0] not in template]
        if names := [one for one in names if f"the key {one}" not in report.left_out]:
            yield f"{account.place}: the chat template leaves out {', '.join(names)}"


def _conversations(record: Record) -> list[list[chats.Message]]:
    if "messages" in record:
        return [record["messages"]]
    prompt = record["prompt"] if isinstance(record.get("prompt"), list) else []
    sides = [record[name] for name in ("completion", "chosen", "rejected") if isinstance(record.get(name), list)]
    return [[*prompt, *side] for side in sides]


def _left_out(text: str, messages: list[chats.Message], tools: str | None) -> tuple[str, set[str]]:
    """Return the essential part that is missing from the text, if any, and what else is missing."""
    missed: set[str] = set()
    for number, one in enumerate(messages, 1):
        if not _shows(text, one["content"]):
            if one["role"] in ("system", "tool"):
                return f"message {number} ({one['role']})", missed
            missed.add(f"a message of the {one['role']}")
        for call in one.get("tool_calls", []):
            name = call["function"]["name"]
            if name not in text:
                return f"the call of {name} in message {number}", missed
    for name in chats.tool_names(tools):
        if name not in text:
            return f"the tool {name}", missed
    for key in chats.THOUGHTS:
        thoughts = [one[key] for one in messages if isinstance(one.get(key), str)]
        if thoughts and not any(_shows(text, one) for one in thoughts):
            missed.add(f"the key {key} of messages")
    return "", missed


def _shows(text: str, content: str) -> bool:
    tail = content.strip()[-_TAIL:].strip()
    spellings = (tail, json.dumps(tail)[1:-1], json.dumps(tail, ensure_ascii=False)[1:-1])
    return any(one in text for one in spellings)
