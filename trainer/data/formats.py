"""Recognise the format of data by the columns of a record, and convert records to those that TRL takes. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from obsfs.plugin import UsageError, visible
from trainer.data import messages as chats

Record = dict[str, Any]

_SHOWN = 300
_TALKS = ("messages", "conversations", "conversation")
_ASKS = ("prompt", "instruction", "query", "question", "input")
_ANSWERS = ("completion", "output", "response", "answer")
_MORE = ("input", "context")
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_REJECTED = ("rejected", "rejected_response")
_LABELS = ("label", "kto_tag")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_HISTORY = "history"
_NEVER_LEFT = (*_SYSTEM, _HISTORY, *_TOOLS, "chosen", *_REJECTED)
"""Columns that change what is learned: a record with one that its format cannot use is refused."""
_PREFERENCE = ("dpo", "orpo", "cpo", "simpo", "kto")
_WITHOUT_TOOLS = ("orpo", "cpo", "simpo")
_KNOWN = (
    "messages or conversations",
    "prompt, completion",
    "instruction, output",
    "query, response",
    "question, answer",
    "text",
)


class Shape(NamedTuple):
    """What all records of a source become. (A table has one type per column, so they are all alike.)

    Args:
        is_chat: The model has a chat template.
        is_plain: Questions and answers stay text.
        can_have_tools: The format and the task allow tools.
        has_tools: Some record has tools.
    """

    is_chat: bool
    is_plain: bool
    can_have_tools: bool
    has_tools: bool


class Made(NamedTuple):
    """A record of TRL, the columns that were not used, and the keys of messages that few templates show."""

    record: Record
    columns: list[str]
    keys: list[str]


class Held:
    """The values of a record. The conversion takes each one, or it is reported to the user, or refused."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.left = {name: value for name, value in record.items() if not _is_empty(value)}

    def __contains__(self, name: object) -> bool:
        return name in self.left

    def take(self, name: str | None) -> Any:
        """Return a value, None if it is empty, and count it as used."""
        return self.left.pop(name, None) if name else None

    def text(self, names: Iterable[str]) -> str:
        """Take several values, all of which must be text, as one text."""
        parts = []
        for name in names:
            if (value := self.take(name)) is not None:
                if not isinstance(value, str):
                    raise ValueError(f"{name} is no text")
                parts.append(value)
        return "\n\n".join(parts)

    def filled(self, name: str) -> Any:
        """Take a value that must not be empty."""
        if name not in self:
            raise ValueError(f"{name} is empty")
        return self.take(name)

    def same(self, names: Iterable[str], read: Callable[[Any], Any]) -> Any:
        """Take a value that may have one of several names. Under two names, it must be the same."""
        given = {name: read(self.take(name)) for name in names if name in self}
        values = [value for value in given.values() if value]
        if any(value != values[0] for value in values):
            raise ValueError(f"{' and '.join(given)} differ: keep one of them")
        return next(iter(values), None)


class Format(NamedTuple):
    """The format of a record.

    Args:
        kind: The kind of format, a key of ``_CONVERT``.
        columns: The columns that identify it.
        tasks: The tasks that can learn from it.
        talk: The column of a conversation, if any.
        ask: The column of a question, if any.
        answer: The column of its answer, if any.
        rejected: The column of a rejected answer, if any.
    """

    kind: str
    columns: tuple[str, ...]
    tasks: tuple[str, ...]
    talk: str | None = None
    ask: str | None = None
    answer: str | None = None
    rejected: str | None = None

    @property
    def name(self) -> str:
        """The columns, as a name for users."""
        return ", ".join(self.columns)

    def shape(self, record: Record, columns: Collection[str], is_chat: bool) -> Shape:
        """Return what the records of a source become, given the first one and the columns that any of them has."""
        others = (*_SYSTEM, *_TOOLS, *_MORE, _HISTORY)
        own = self.ask in (None, "prompt") and self.answer in (None, "completion", "chosen")
        asked_is_text = not self.talk and (self.ask is None or isinstance(record.get(self.ask), str))
        is_text = asked_is_text and all(
            isinstance(record.get(name), str) for name in (self.answer, self.rejected) if name
        )
        is_plain = is_text and (not is_chat or (own and not any(name in columns for name in others)))
        can = not is_plain and self.kind != "text"
        return Shape(is_chat, is_plain, can, can and any(name in columns for name in _TOOLS))

    def convert(self, record: Record, is_chat: bool) -> Record:
        """Convert a single record. Raises ValueError with the reason."""
        return self.make(record, self.shape(record, held_columns(record), is_chat)).record

    def make(self, record: Record, shape: Shape) -> Made:
        """Convert a record, and return what is not in the result. Raises ValueError with the reason."""
        held = Held(record)
        made = _CONVERT[self.kind](self, held, shape)
        offered = held.same(_TOOLS, chats.tools) if self.kind != "text" else None
        if offered and not is_conversation(made):
            raise ValueError("it has tools, and only conversations can have them")
        _refuse(self, held)
        if shape.has_tools or offered:
            made["tools"] = offered
        messages = [one for side in made.values() if isinstance(side, list) for one in side]
        return Made(made, list(held.left), sorted(chats.other_keys(messages)))


def recognise(record: Record, task: str, where: str) -> Format:
    """Return the format of a record. Raises UsageError, which shows the record, if it fits no format of the task."""
    found = _format(record, task)
    if found is not None and task in found.tasks:
        return found
    if found is None:
        what, remedy = "", _wanted(task)
    else:
        what = f" (it is {found.name})"
        remedy = f"{_wanted(task)}; or choose task {' or '.join(found.tasks)}"
    raise UsageError(f"{where} is in no format for task {task}{what}: its first record is {shown(record)}", remedy)


def held_columns(record: Mapping[str, Any]) -> list[str]:
    """Return the names of the columns in which a record has a value."""
    return list(Held(record).left)


def shown(record: Mapping[str, Any]) -> str:
    """Return a record as text for an error, cut short."""
    return visible(json.dumps(dict(record), ensure_ascii=False, default=str), _SHOWN)


def is_conversation(record: Record) -> bool:
    """Return whether a record of TRL is a conversation, which needs a chat template."""
    return "messages" in record or any(isinstance(record.get(name), list) for name in ("prompt", "chosen"))


def refuse_other(form: Format, record: Record, task: str) -> None:
    """Raise ValueError, with the reason, for a record that is not in the format of its source."""
    other = _format(record, task)
    if other == form:
        return
    if all(_is_empty(value) for value in record.values()):
        raise ValueError("it is empty")
    lacking = [name for name in form.columns if _is_empty(record.get(name))]
    if lacking and (other is None or set(other.columns) <= set(form.columns)):
        raise ValueError(f"{lacking[0]} is empty")
    raise ValueError(f"it is {other.name if other else 'in no format'}, and the first is {form.name}")


def can_have_tools(task: str) -> bool:
    """Return whether TRL passes tools to the chat template."""
    return task not in _WITHOUT_TOOLS


def refuse_tools(made: Record, task: str) -> None:
    """Raise ValueError for a record with tools if TRL would leave them out."""
    if not can_have_tools(task) and (made.get("tools") or _calls(made)):
        raise ValueError(f"it has tools or calls them, which TRL leaves out in task {task}: dpo shows them")


def without_nulls(value: Any) -> Any:
    """Return a value without the keys that a table filled with nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def _calls(made: Record) -> bool:
    sides = [made[name] for name in ("prompt", "chosen", "rejected") if isinstance(made.get(name), list)]
    return any(one.get("tool_calls") for side in sides for one in side)


def _format(record: Record, task: str) -> Format | None:
    """Return the format of a record. Columns without a value count only if no other columns decide."""
    return _format_by(_column_held, record, task) or _format_by(_column_given, record, task)


def _format_by(column: Callable[[Record, Iterable[str]], str | None], record: Record, task: str) -> Format | None:
    talk, answer, label = (column(record, names) for names in (_TALKS, _ANSWERS, _LABELS))
    # Alpaca's question may be in its input alone.
    ask = _column_held(record, _ASKS[:-1]) or _column_given(record, _ASKS[:-1]) or column(record, _ASKS[-1:])
    asked = (talk,) if talk else (ask,) if ask else ()
    rejected, chosen = column(record, _REJECTED), column(record, ("chosen",))
    if rejected and (chosen or (rejected == "rejected_response" and (talk or (ask and answer)))):
        answer = chosen or (None if talk else answer)
        columns = (*asked, *([answer] if answer else []), rejected)
        return Format("choice", columns, _PREFERENCE, talk, None if talk else ask, answer, rejected)
    if talk:
        if label and _judges(record[label], task):
            return Format("judged", (talk, label), ("kto",), talk)
        return Format("talk", (talk,), ("sft",), talk)
    if ask and answer:
        if label and _judges(record[label], task):
            return Format("judged", (ask, answer, label), ("kto",), None, ask, answer)
        return Format("answer", (ask, answer), ("sft",), None, ask, answer)
    return Format("text", ("text",), ("sft",)) if column(record, ("text",)) else None


def _judges(label: object, task: str) -> bool:
    return isinstance(label, bool) or task == "kto"


def _wanted(task: str) -> str:
    if task == "sft":
        return f"it needs the columns of one of: {'; '.join(_KNOWN)}"
    if task == "kto":
        return "it needs chosen and rejected, or a question, an answer and a label (true or false)"
    return "it needs chosen and rejected answers: prompt, chosen, rejected"


def _column_given(record: Record, names: Iterable[str]) -> str | None:
    return next((name for name in names if record.get(name) is not None), None)


def _column_held(record: Record, names: Iterable[str]) -> str | None:
    return next((name for name in names if not _is_empty(record.get(name))), None)


def _is_empty(value: Any) -> bool:
    """Return whether a value is empty, even if a table made a list of nulls of it."""
    if isinstance(value, list):
        return all(_is_empty(one) for one in value)
    if isinstance(value, dict):
        return all(_is_empty(one) for one in value.values())
    return value is None or value == ""


def _refuse(form: Format, held: Held) -> None:
    """Raise ValueError if an unused value of a record would change what is learned."""
    for name in _MEDIA:
        if name in held:
            raise ValueError(
                f"it has {name}, and training is on text only, also of a model of vision: "
                f"ignore_columns: {name} trains without, and TRL's own command `trl sft` trains with images"
            )
    for name in (*_NEVER_LEFT, *(_MORE if form.ask else ())):
        if name in held:
            raise ValueError(f"{name} cannot be used beside {form.name}: ignore_columns: {name} trains without")


def _system(held: Held) -> str:
    def read(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("system is no text")
        return value

    return held.same(_SYSTEM, read) or ""


def _label(value: Any) -> bool:
    text = value.strip().casefold() if isinstance(value, str) else value
    if text in ("true", "1") or (isinstance(value, bool | int | float) and value == 1):
        return True
    if text in ("false", "0") or (isinstance(value, bool | int | float) and value == 0):
        return False
    raise ValueError("label is neither true nor false")


def _said(value: Any, name: str) -> list[chats.Message]:
    """Return an answer as messages: it may be a text, one message, or several."""
    if _is_empty(value):
        raise ValueError(f"{name} is empty")
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if not isinstance(value, list | dict):
        raise ValueError(f"{name} is no text")
    try:
        return chats.turns([value] if isinstance(value, dict) else value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _question(form: Format, held: Held) -> list[chats.Message]:
    """Return the question as messages: system prompt, earlier turns, question."""
    ask = form.ask or ""
    past = held.take(_HISTORY)
    turns = chats.history(past) if past is not None else []
    if isinstance(held.left.get(ask), list):
        turns = [*turns, *chats.turns(held.take(ask))]
    else:
        question = held.text(dict.fromkeys((ask, *_MORE)))
        if not question:
            raise ValueError(f"{ask} is empty")
        turns = [*turns, {"role": "user", "content": question}]
    return chats.with_system(turns, _system(held))


def _question_text(form: Format, held: Held, shape: Shape) -> str:
    """Return the question as text: everything before the answer."""
    if shape.is_chat:
        return str(_filled_text(held, form.ask or ""))
    turns = _question(form, held)
    is_bare = len(turns) == 1 and form.ask == "prompt"
    return str(turns[0]["content"]) if is_bare else "".join(f"{one['content']}\n\n" for one in turns)


def _filled_text(held: Held, name: str) -> str:
    value = held.filled(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is no text")
    return value


def _of_talk(form: Format, held: Held, shape: Shape) -> Record:
    turns = chats.with_system(chats.turns(_talk(form, held)), _system(held))
    if not any(one["role"] == "assistant" for one in turns):
        raise ValueError("it has no message of the assistant")
    if not chats.learned(turns):
        raise ValueError("every answer in it has loss: false")
    return {"messages": turns}


def _talk(form: Format, held: Held) -> Any:
    """Take a conversation. An empty one is refused by its reader."""
    return held.take(form.talk) or []


def _of_answer(form: Format, held: Held, shape: Shape) -> Record:
    ask, answer = form.ask or "", form.answer or ""
    if shape.is_plain:
        if ask not in held and ask == "prompt":
            raise ValueError(f"{ask} is empty")
        return {"prompt": _question_text(form, held, shape), "completion": _filled_text(held, answer)}
    said = _said(held.filled(answer), answer)
    if not chats.learned(said):
        raise ValueError("every answer in it has loss: false" if said else f"{answer} is empty")
    return {"prompt": _question(form, held), "completion": said}


def _of_text(form: Format, held: Held, shape: Shape) -> Record:
    return {"text": _filled_text(held, "text")}


def _of_judged(form: Format, held: Held, shape: Shape) -> Record:
    label = _label(held.take(form.columns[-1]))
    if not form.talk:
        return {**_all_learned(_of_answer(form, held, shape)), "label": label}
    turns = chats.with_system(chats.turns(_talk(form, held)), _system(held))
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError("its last message, which the label is for, is not the assistant's")
    return {**_all_learned({"prompt": turns[:-1], "completion": turns[-1:]}), "label": label}


def _of_choice(form: Format, held: Held, shape: Shape) -> Record:
    bad, good = form.rejected or "", form.answer or ""
    if not good:
        turns = chats.turns(_talk(form, held))
        if turns[-1]["role"] != "assistant":
            raise ValueError("its last message, which was chosen, is not the assistant's")
        return _choice(held, turns[:-1], turns[-1:], _said(held.filled(bad), bad))
    if shape.is_plain:
        asked = {"prompt": _question_text(form, held, shape)} if form.ask else {}
        return {**asked, "chosen": _filled_text(held, good), "rejected": _filled_text(held, bad)}
    chosen, rejected = (_said(held.filled(name), name) for name in (good, bad))
    if form.talk:
        asked_turns = chats.turns(_talk(form, held))
        # Some sets repeat the chosen conversation in a column of its own.
        asked_turns = [] if asked_turns == chosen else asked_turns
    else:
        asked_turns = _question(form, held) if form.ask else []
    if chosen[0]["role"] in ("system", "user"):
        asked_turns, chosen, rejected = _without_shared(form, asked_turns, chosen, rejected)
    return _choice(held, asked_turns, chosen, rejected)


def _without_shared(
    form: Format, asked: list[chats.Message], chosen: list[chats.Message], rejected: list[chats.Message]
) -> tuple[list[chats.Message], list[chats.Message], list[chats.Message]]:
    """Split off the prompt that two whole conversations share; a column of its own may repeat it."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if not shared:
        raise ValueError("chosen and rejected do not begin with the same question")
    if asked[-len(shared) :] == shared:
        return asked, chosen[len(shared) :], rejected[len(shared) :]
    systems = [one for one in asked[:1] if one["role"] == "system" and shared[0]["role"] != "system"]
    if any(not any(one.items() <= other.items() for other in shared) for one in asked[len(systems) :]):
        raise ValueError(f"{form.talk or form.ask} is not what chosen begins with: keep one of them")
    cut = len(shared)
    return [*systems, *shared], chosen[cut:], rejected[cut:]


def _choice(
    held: Held, asked: list[chats.Message], chosen: list[chats.Message], rejected: list[chats.Message]
) -> Record:
    if not asked:
        raise ValueError("it has no question")
    for name, said in (("chosen", chosen), ("rejected", rejected)):
        if not said or said[-1]["role"] != "assistant":
            raise ValueError(f"{name} does not end with an answer of the assistant")
    return _all_learned({"prompt": chats.with_system(asked, _system(held)), "chosen": chosen, "rejected": rejected})


def _all_learned(made: Record) -> Record:
    """Refuse an answer that must not be learned: preferences are learned whole. For a question it does not matter."""
    for name in ("completion", "chosen", "rejected"):
        if isinstance(made.get(name), list) and any(chats.LOSS in one for one in made[name]):
            raise ValueError(f"{name} has loss: false, which only task sft can honour")
    if isinstance(made.get("prompt"), list):
        made["prompt"] = chats.for_template(made["prompt"])
    return made


_CONVERT: dict[str, Callable[[Format, Held, Shape], Record]] = {
    "talk": _of_talk,
    "answer": _of_answer,
    "text": _of_text,
    "judged": _of_judged,
    "choice": _of_choice,
}
