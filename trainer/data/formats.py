"""Formats of data, told apart by what a record holds, and made into the records that TRL takes. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from obsfs.errors import UsageError
from trainer.data import messages as chats

Record = dict[str, Any]

_SHOWN = 300
_TALKS = ("messages", "conversations", "conversation")
_ASKS = ("prompt", "instruction", "query", "question")
_ANSWERS = ("completion", "output", "response", "answer")
_MORE = ("input", "context")
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_REJECTED = ("rejected", "rejected_response")
_LABELS = ("label", "kto_tag")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_HISTORY = "history"
_NEVER_LEFT = (*_SYSTEM, _HISTORY, *_TOOLS, "chosen", *_REJECTED)
"""Columns that change what is learned: a record that holds one which its format cannot use is refused."""
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


class Format(NamedTuple):
    """What a record is: its kind, the columns that make it so, and the tasks that learn from it.

    `talk`, `ask` and `answer` are the columns of a conversation, a question and its answer, if it has them.
    """

    kind: str
    columns: tuple[str, ...]
    tasks: tuple[str, ...]
    talk: str | None = None
    ask: str | None = None
    answer: str | None = None

    @property
    def name(self) -> str:
        """For people: its columns."""
        return ", ".join(self.columns)

    @property
    def used(self) -> set[str]:
        """The columns that a conversion looks at."""
        more = {*_SYSTEM, *_TOOLS, *_MEDIA, *_REJECTED, "chosen"}
        if self.ask and not self.talk:
            more |= {*_MORE, _HISTORY}
        return {*self.columns, *more}

    def convert(self, record: Record, is_chat: bool) -> Record:
        """Return TRL's record. With `is_chat`, instructions become conversations. Raises ValueError with the reason."""
        _refuse_unused(self, record)
        made = _CONVERT[self.kind](self, record, is_chat)
        offered = chats.tools(_first(record, _TOOLS))
        if _column(record, _TOOLS):
            if offered and not is_conversation(made):
                raise ValueError("it has tools, and only conversations can have them")
            made["tools"] = offered
        return made


def recognise(record: Record, task: str, where: str) -> Format:
    """Return the format that a record is in. Raises UsageError, which shows the record."""
    found = _format(record, task)
    if found is not None and task in found.tasks:
        return found
    if found is None:
        what, remedy = "", _wanted(task)
    else:
        what = f" (it is {found.name})"
        remedy = f"{_wanted(task)}; or choose task {' or '.join(found.tasks)}"
    raise UsageError(f"{where} is in no format for task {task}{what}: its first record is {shown(record)}", remedy)


def shown(record: Mapping[str, Any]) -> str:
    """Return a record for an error, cut short."""
    text = json.dumps(dict(record), ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def is_conversation(record: Record) -> bool:
    """Return whether a record (as TRL takes it) is made of messages, which a tokenizer needs a chat template for."""
    return "messages" in record or any(isinstance(record.get(name), list) for name in ("prompt", "chosen"))


def unused(form: Format, columns: Iterable[str]) -> list[str]:
    """Return the columns that nothing is made of."""
    return [name for name in columns if name not in form.used]


class Converter:
    """Makes TRL's records of the records of one place, for ``Dataset.map``.

    `form` is what its first record is in; `nested` are the columns that a table keeps as structs, in which it has
    filled in nulls; `ignored` are columns that the user gave up.
    """

    def __init__(
        self,
        form: Format,
        task: str,
        where: str,
        *,
        is_chat: bool,
        has_tools: bool = False,
        nested: Collection[str] = (),
        ignored: Collection[str] = (),
    ) -> None:
        self._form, self._task, self._where, self._is_chat = form, task, where, is_chat
        self._has_tools, self._nested, self._ignored = has_tools, frozenset(nested), frozenset(ignored)

    def __call__(self, record: Record, number: int) -> Record:
        """Raises UsageError, which shows the record that does not fit and its number, counted from 1."""
        try:
            made = self._convert(record)
        except ValueError as error:
            raise UsageError(
                f"record {number + 1} of {self._where} does not fit ({error}): {shown(record)}",
                "correct it, or take it out",
            ) from None
        if self._has_tools:
            made.setdefault("tools", None)
        return made

    def _convert(self, record: Record) -> Record:
        record = {
            name: _without_nulls(value) if name in self._nested else value
            for name, value in record.items()
            if name not in self._ignored
        }
        other = _format(record, self._task)
        if other is None or other != self._form:
            if all(_is_empty(value) for value in record.values()):
                raise ValueError("it is empty")
            lacking = [name for name in self._form.columns if record.get(name) is None]
            if lacking and (other is None or set(other.columns) < set(self._form.columns)):
                raise ValueError(f"{lacking[0]} is empty")
            raise ValueError(f"it is {other.name if other else 'in no format'}, and the first is {self._form.name}")
        made = self._form.convert(record, self._is_chat)
        if self._task in _WITHOUT_TOOLS and (made.get("tools") or _calls(made)):
            raise ValueError(f"it has tools or calls them, which TRL leaves out in task {self._task}: dpo shows them")
        return made


def _calls(made: Record) -> bool:
    sides = [made[name] for name in ("prompt", "chosen", "rejected") if isinstance(made.get(name), list)]
    return any(one.get("tool_calls") for side in sides for one in side)


def _format(record: Record, task: str) -> Format | None:
    """By what a record holds: columns without a value do not count."""
    talk, ask, answer = (_column_held(record, names) for names in (_TALKS, _ASKS, _ANSWERS))
    asked = (talk,) if talk else (ask,) if ask else ()
    rejected = _column_held(record, _REJECTED)
    has_chosen = record.get("chosen") is not None
    if rejected and (has_chosen or (rejected == "rejected_response" and (talk or (ask and answer)))):
        said = ("chosen",) if has_chosen else () if talk else (str(answer),)
        return Format("choice", (*asked, *said, rejected), _PREFERENCE, talk, ask, None if has_chosen else answer)
    label = _column_held(record, _LABELS)
    if talk:
        if label and _judges(record[label], task):
            return Format("judged", (talk, label), ("kto",), talk)
        return Format("talk", (talk,), ("sft",), talk)
    if ask and answer:
        if label and _judges(record[label], task):
            return Format("judged", (ask, answer, label), ("kto",), None, ask, answer)
        return Format("answer", (ask, answer), ("sft",), None, ask, answer)
    return Format("text", ("text",), ("sft",)) if record.get("text") is not None else None


def _judges(label: object, task: str) -> bool:
    return isinstance(label, bool) or task == "kto"


def _wanted(task: str) -> str:
    if task == "sft":
        return f"it needs the columns of one of: {'; '.join(_KNOWN)}"
    if task == "kto":
        return "it needs chosen and rejected, or a question, an answer and a label (true or false)"
    return "it needs chosen and rejected answers: prompt, chosen, rejected"


def _column(record: Record, names: Iterable[str]) -> str | None:
    return next((name for name in names if name in record), None)


def _column_held(record: Record, names: Iterable[str]) -> str | None:
    return next((name for name in names if record.get(name) is not None), None)


def _first(record: Record, names: Iterable[str]) -> Any:
    """The value of the first of some columns that is not empty."""
    return next((record[name] for name in names if not _is_empty(record.get(name))), None)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _refuse_unused(form: Format, record: Record) -> None:
    for name in _MEDIA:
        if not _is_empty(record.get(name)):
            raise ValueError(f"it has {name}, and training is on text only: ignore_columns: {name} trains without")
    able = {*form.columns, *_SYSTEM, *_TOOLS} | ({_HISTORY} if form.ask and not form.talk else set())
    if form.kind == "text":
        able = set(form.columns)
    for name in _NEVER_LEFT:
        if name not in able and not _is_empty(record.get(name)):
            raise ValueError(f"{name} cannot be used beside {form.name}: ignore_columns: {name} trains without")
    given = [name for name in _SYSTEM if not _is_empty(record.get(name))]
    if len({record[name] for name in given if isinstance(record[name], str)}) > 1:
        raise ValueError(f"{' and '.join(given)} differ: keep one of them")


def _text(record: Record, names: Iterable[str]) -> str:
    parts = []
    for name in names:
        value = record.get(name)
        if _is_empty(value):
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name} is no text")
        parts.append(value)
    return "\n\n".join(parts)


def _filled(record: Record, name: str) -> Any:
    if _is_empty(record.get(name)):
        raise ValueError(f"{name} is empty")
    return record[name]


def _system(record: Record) -> str:
    name = next((one for one in _SYSTEM if not _is_empty(record.get(one))), None)
    return _text(record, (name,)) if name else ""


def _label(record: Record) -> bool:
    value = _first(record, _LABELS)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise ValueError("label is neither true nor false")
    return bool(value)


def _said(value: Any, name: str) -> list[chats.Message]:
    """An answer as messages: from a text, one message, or several."""
    if _is_empty(value):
        raise ValueError(f"{name} is empty")
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    try:
        return chats.turns([value] if isinstance(value, dict) else value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _is_plain(form: Format, record: Record, is_chat: bool) -> bool:
    """Whether question and answers stay text: when they are TRL's own columns, or there is no chat template."""
    if form.talk or (form.ask and not isinstance(record[form.ask], str)):
        return False
    if not is_chat:
        return True
    own = form.ask in (None, "prompt") and form.answer in (None, "completion")
    return own and not any(name in record for name in (*_SYSTEM, *_TOOLS, *_MORE, _HISTORY))


def _question(form: Format, record: Record) -> list[chats.Message]:
    """What is asked, as messages: system prompt, earlier turns, question."""
    ask = form.ask or ""
    past = record.get(_HISTORY)
    turns = [] if _is_empty(past) else chats.history(past)
    if isinstance(record[ask], list):
        turns = [*turns, *chats.turns(record[ask])]
        if more := _text(record, _MORE):
            raise ValueError(f"{ask} is messages, and there is {_MORE[0]} beside it ({more[:20]!r})")
    else:
        question = _text(record, (ask, *_MORE))
        if not question:
            raise ValueError(f"{ask} is empty")
        turns = [*turns, {"role": "user", "content": question}]
    return chats.with_system(turns, _system(record))


def _question_text(form: Format, record: Record) -> str:
    """What is asked, for a model without a chat template: everything in front of the answer."""
    turns = _question(form, record)
    is_bare = len(turns) == 1 and form.ask == "prompt"
    return str(turns[0]["content"]) if is_bare else "".join(f"{one['content']}\n\n" for one in turns)


def _of_talk(form: Format, record: Record, is_chat: bool) -> Record:
    turns = chats.with_system(chats.turns(record[form.talk or ""]), _system(record))
    if not any(one["role"] == "assistant" for one in turns):
        raise ValueError("it has no message of the assistant")
    if not chats.learned(turns):
        raise ValueError("every answer in it has loss: false")
    return {"messages": turns}


def _of_answer(form: Format, record: Record, is_chat: bool) -> Record:
    ask, answer = form.ask or "", form.answer or ""
    if _is_plain(form, record, is_chat) and isinstance(record[answer], str):
        _filled(record, ask)
        return {"prompt": _question_text(form, record), "completion": _filled(record, answer)}
    said = _said(record[answer], answer)
    if not chats.learned(said):
        raise ValueError("every answer in it has loss: false" if said else f"{answer} is empty")
    return {"prompt": _question(form, record), "completion": said}


def _of_text(form: Format, record: Record, is_chat: bool) -> Record:
    if not isinstance(_filled(record, "text"), str):
        raise ValueError("text is no text")
    return {"text": record["text"]}


def _of_judged(form: Format, record: Record, is_chat: bool) -> Record:
    label = _label(record)
    if not form.talk:
        return {**_all_learned(_of_answer(form, record, is_chat)), "label": label}
    turns = chats.with_system(chats.turns(record[form.talk]), _system(record))
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError("its last message, which the label is for, is not the assistant's")
    return {**_all_learned({"prompt": turns[:-1], "completion": turns[-1:]}), "label": label}


def _of_choice(form: Format, record: Record, is_chat: bool) -> Record:
    names = (form.answer or "chosen", _REJECTED[0] if record.get(_REJECTED[0]) is not None else _REJECTED[1])
    if form.talk and record.get("chosen") is None:
        turns = chats.turns(record[form.talk])
        if turns[-1]["role"] != "assistant":
            raise ValueError("its last message, which was chosen, is not the assistant's")
        return _choice(record, turns[:-1], turns[-1:], _said(record[names[1]], names[1]))
    if _is_plain(form, record, is_chat) and all(isinstance(record[name], str) for name in names):
        asked = {"prompt": _question_text(form, record)} if form.ask else {}
        if not form.ask and _system(record):
            raise ValueError("system cannot be used without a prompt")
        return {**asked, "chosen": _filled(record, names[0]), "rejected": _filled(record, names[1])}
    chosen, rejected = (_said(record[name], name) for name in names)
    if form.talk:
        asked_turns = chats.turns(record[form.talk])
        # Some sets repeat the chosen conversation in a column of its own.
        asked_turns = [] if asked_turns == chosen else asked_turns
    else:
        asked_turns = _question(form, record) if form.ask else []
    if chosen[0]["role"] in ("system", "user"):
        # The whole conversation twice: what they share is the prompt, which may also stand in a column of its own.
        shared = [
            one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
        ]
        if not shared:
            raise ValueError("chosen and rejected do not begin with the same question")
        last_asked = asked_turns[-1]["content"] if asked_turns else shared[-1]["content"]
        if last_asked not in [one["content"] for one in shared]:
            raise ValueError(f"{form.talk or form.ask} is not what chosen begins with: keep one of them")
        systems = [one for one in asked_turns[:1] if one["role"] == "system" and shared[0]["role"] != "system"]
        cut = len(shared)
        asked_turns, chosen, rejected = [*systems, *shared], chosen[cut:], rejected[cut:]
    return _choice(record, list(asked_turns), chosen, rejected)


def _choice(
    record: Record, asked: list[chats.Message], chosen: list[chats.Message], rejected: list[chats.Message]
) -> Record:
    if not asked:
        raise ValueError("it has no question")
    for name, said in (("chosen", chosen), ("rejected", rejected)):
        if not said or said[-1]["role"] != "assistant":
            raise ValueError(f"{name} does not end with an answer of the assistant")
    return _all_learned({"prompt": chats.with_system(asked, _system(record)), "chosen": chosen, "rejected": rejected})


def _all_learned(made: Record) -> Record:
    """Preferences are learned whole: an answer that should not be is refused; of the question it does not matter."""
    for name in ("completion", "chosen", "rejected"):
        if isinstance(made.get(name), list) and any(chats.LOSS in one for one in made[name]):
            raise ValueError(f"{name} has loss: false, which only task sft can honour")
    if isinstance(made.get("prompt"), list):
        made["prompt"] = chats.for_template(made["prompt"])
    return made


_CONVERT: dict[str, Callable[[Format, Record, bool], Record]] = {
    "talk": _of_talk,
    "answer": _of_answer,
    "text": _of_text,
    "judged": _of_judged,
    "choice": _of_choice,
}
