"""Data for a run: found, loaded by `datasets`, recognised by its columns, and put into the form that TRL takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import obsfs
from obsfs.errors import UsageError, first_line

BUILTIN = {
    "alpaca-en": "yahma/alpaca-cleaned",
    "alpaca-zh": "shibing624/alpaca-zh",
    "capybara": "trl-lib/Capybara",
    "ultrafeedback": "trl-lib/ultrafeedback_binarized",
    "kto-mix": "trl-lib/kto-mix-14k",
}
"""Short names of common data sets: ``LIBRARY/datasets/NAME`` in the bucket if it is there, else this on the hub."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SHOWN = 300
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
Record = dict[str, Any]


class Format(NamedTuple):
    """A form of data: its columns, and what makes TRL's record of one (of a record, and whether to write chats)."""

    name: str
    tasks: str
    columns: tuple[str, ...]
    convert: Callable[[Record, bool], Record]


def _text(record: Record, *names: str) -> str:
    parts = [record[name] for name in names if record.get(name)]
    for part in parts:
        if not isinstance(part, str):
            raise ValueError(f"{names[0]} is no text")
    return "\n\n".join(parts)


def _filled(record: Record, name: str) -> Any:
    if record[name] in (None, "", []):
        raise ValueError(f"{name} is empty")
    return record[name]


def _turns(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError("the conversation is no list of messages")
    turns = []
    for turn in value:
        if not isinstance(turn, dict):
            raise ValueError("a message is no object")
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if not isinstance(role, str) or (content is None and not turn.get("tool_calls")):
            raise ValueError("a message has no role or no content")
        extra = {key: turn[key] for key in turn if key not in ("role", "content", "from", "value")}
        turns.append({"role": _ROLES.get(role, role), "content": content, **extra})
    return turns


def _asked(record: Record, is_chat: bool, *names: str) -> Any:
    question = _text(record, *names)
    if not question:
        raise ValueError(f"{names[0]} is empty")
    if not is_chat:
        return question + "\n\n"
    system = _text(record, "system")
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": question}]


def _said(record: Record, is_chat: bool, name: str) -> Any:
    answer = _text(record, name)
    if not answer:
        raise ValueError(f"{name} is empty")
    return [{"role": "assistant", "content": answer}] if is_chat else answer


def _plain(*names: str) -> Callable[[Record, bool], Record]:
    return lambda record, is_chat: {name: _filled(record, name) for name in names}


def _messages(name: str) -> Callable[[Record, bool], Record]:
    return lambda record, is_chat: {
        "messages": _turns(record[name]),
        **{key: record[key] for key in ("tools",) if record.get(key)},
    }


def _question(ask: str, answer: str) -> Callable[[Record, bool], Record]:
    return lambda record, is_chat: {
        "prompt": _asked(record, is_chat, ask, "input"),
        "completion": _said(record, is_chat, answer),
    }


def _choice(ask: str) -> Callable[[Record, bool], Record]:
    return lambda record, is_chat: {
        "prompt": _asked(record, is_chat, ask, "input"),
        **{name: _said(record, is_chat, name) for name in ("chosen", "rejected")},
    }


def _judged(ask: str, answer: str) -> Callable[[Record, bool], Record]:
    return lambda record, is_chat: {**_question(ask, answer)(record, is_chat), "label": _label(record)}


def _label(record: Record) -> bool:
    if not isinstance(record["label"], bool | int):
        raise ValueError("label is neither true nor false")
    return bool(record["label"])


_PREFERENCE = "dpo orpo cpo simpo kto"
FORMATS = (
    Format("messages", "sft", ("messages",), _messages("messages")),
    Format("ShareGPT", "sft", ("conversations",), _messages("conversations")),
    Format("prompt, completion, label", "kto", ("prompt", "completion", "label"),
           lambda record, is_chat: {**_plain("prompt", "completion")(record, is_chat), "label": _label(record)}),
    Format("prompt, completion", "sft", ("prompt", "completion"), _plain("prompt", "completion")),
    Format("prompt, chosen, rejected", _PREFERENCE, ("prompt", "chosen", "rejected"),
           _plain("prompt", "chosen", "rejected")),
    Format("alpaca with chosen, rejected", _PREFERENCE, ("instruction", "chosen", "rejected"), _choice("instruction")),
    Format("question, chosen, rejected", _PREFERENCE, ("question", "chosen", "rejected"), _choice("question")),
    Format("chosen, rejected", _PREFERENCE, ("chosen", "rejected"), _plain("chosen", "rejected")),
    Format("alpaca with label", "kto", ("instruction", "output", "label"), _judged("instruction", "output")),
    Format("alpaca", "sft", ("instruction", "output"), _question("instruction", "output")),
    Format("query, response", "sft", ("query", "response"), _question("query", "response")),
    Format("question, answer", "sft", ("question", "answer"), _question("question", "answer")),
    Format("text", "sft", ("text",), _plain("text")),
)  # fmt: skip
"""Tried in this order."""


def recognise(record: Record, task: str, where: str) -> Format:
    """The format that a record is in. Raises UsageError, showing the record."""
    fitting = [one for one in FORMATS if task in one.tasks.split()]
    for one in fitting:
        if set(one.columns) <= record.keys():
            return one
    raise UsageError(
        f"{where} is in no format for task {task}: its first record is {shown(record)}",
        f"it needs the columns of one of: {'; '.join(one.name for one in fitting)}",
    )


def shown(record: Mapping[str, Any]) -> str:
    """A record for an error, cut short."""
    text = json.dumps(dict(record), ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class Converter:
    """What makes TRL's records of the records of one format, for ``Dataset.map``."""

    def __init__(self, form: Format, where: str, is_chat: bool) -> None:
        self._name, self._where, self._is_chat = form.name, where, is_chat

    def __call__(self, record: Record, number: int) -> Record:
        """Raises UsageError, showing the record that does not fit."""
        form = next(one for one in FORMATS if one.name == self._name)
        try:
            return form.convert(record, self._is_chat)
        except ValueError as error:
            raise UsageError(
                f"record {number + 1} of {self._where} is not as {form.name} should be ({error}): {shown(record)}",
                "correct it, or take it out",
            ) from None


def is_conversation(record: Record) -> bool:
    """Whether a record (as TRL takes it) is made of messages, which a tokenizer needs a chat template for."""
    return "messages" in record or any(isinstance(record.get(name), list) for name in ("prompt", "chosen"))


def load(places: Iterable[str], task: str, *, split: str, streaming: bool, chat: bool, settings: dict[str, Any]) -> Any:
    """One data set of all places, ready for TRL: a ``Dataset``, or an ``IterableDataset`` when `streaming`.

    With `chat`, instructions become conversations. Raises UsageError for what cannot be found, read or recognised.
    """
    import datasets

    parts = []
    forms: dict[str, str] = {}
    for place in places:
        raw, first = _read(place, split, streaming, settings)
        convert = Converter(recognise(first, task, place), place, chat)
        form = " and ".join(f"{name} ({type(value).__name__})" for name, value in sorted(convert(first, 0).items()))
        forms.setdefault(form, place)
        parts.append(raw.map(convert, with_indices=True, remove_columns=list(first)))
    if len(forms) > 1:
        raise UsageError(
            "the data sets are in different formats: "
            + ", ".join(f"{place} becomes {form}" for form, place in forms.items()),
            "give them one format, or train on one of them",
        )
    try:
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except ValueError as error:
        # Alike in their first records, but not in all: messages of which only some call tools, say.
        raise UsageError("the data sets do not go together", first_line(error)) from None


def _read(place: str, split: str, streaming: bool, settings: dict[str, Any]) -> tuple[Any, Record]:
    """What `datasets` makes of a place, and its first record."""
    import datasets

    builder, options = find(place, settings)
    try:
        raw = datasets.load_dataset(builder, split=split, streaming=streaming, **options)
        first = next(iter(raw), None)
    except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DatasetNotFoundError) as error:
        cause = error.__cause__ or error
        raise UsageError(f"data {place} cannot be read ({first_line(cause)})", "correct it, or name another") from None
    except StopIteration:
        first = None
    except (OSError, ValueError) as error:
        raise UsageError(f"data {place} cannot be read ({first_line(error)})", "correct it, or name another") from None
    if first is None:
        raise UsageError(f"data {place} is empty", "name another")
    return raw, first


def check_name(place: str) -> None:
    """Raises UsageError for what can be no data, without looking into a bucket or on the hub."""
    if "://" not in place and place not in BUILTIN:
        find(place, {})


def find(place: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What ``datasets.load_dataset`` is to be told of a place: its first argument, and the others.

    Raises UsageError when there is nothing, or nothing that can be read as data.
    """
    if place in BUILTIN:
        library = obsfs.Settings.load(**settings).library
        for suffix in ("", *_BUILDERS) if library else ():
            if found := _in_bucket(f"{str(library).rstrip('/')}/datasets/{place}{suffix}", settings):
                return found
        return BUILTIN[place], {}
    if "://" in place:
        if found := _in_bucket(place, settings):
            return found
        raise UsageError(f"there is no data at {place}", "see what is there with `obsfs mount`, or push it")
    path = Path(place).expanduser()
    if path.exists():
        files = [str(one) for one in sorted(path.rglob("*")) if one.is_file()] if path.is_dir() else [str(path)]
        return _builder(place, files, {})
    if path.suffix in _BUILDERS or place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise UsageError(
            f"there is no data at {place}", "give a file, a directory, obs://BUCKET/FILE, or a name of the hub"
        )
    return place, {}


def _in_bucket(url: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    fs = obsfs.OBSFileSystem(**settings)
    try:
        if not fs.exists(url):
            return None
        files = [f"obs://{one}" for one in fs.find(url)] if fs.isdir(url) else [url]
    except (OSError, obsfs.ObsfsError) as error:
        raise UsageError(
            f"data {url} cannot be read ({first_line(error)})", "see the README on endpoints and keys"
        ) from None
    return _builder(url, files, {"storage_options": settings} if settings else {})


def _builder(place: str, files: list[str], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for suffix, builder in _BUILDERS.items():
        if chosen := [file for file in files if file.removesuffix(".gz").endswith(suffix) and "/.obsfs/" not in file]:
            return builder, {"data_files": chosen, **options}
    raise UsageError(f"{place} has no data that can be read", f"it takes {', '.join(_BUILDERS)}")
