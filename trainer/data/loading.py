"""Read data sets, by ``datasets`` and by reading.py, and convert them to the records that TRL takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from obsfs.plugin import UsageError, first_line
from trainer.data import reading
from trainer.data.formats import (
    Format,
    Made,
    Record,
    Shape,
    can_have_tools,
    held_columns,
    recognise,
    refuse_other,
    refuse_tools,
    shown,
    without_nulls,
)
from trainer.data.sources import find
from trainer.data.unused_fields import UnusedFields, entry

SAMPLE = 256
"""How many records of streamed data are checked before the run. All others must have the same columns."""
_ENTRY = "account"
"""The column for :func:`trainer.data.unused_fields.entry`, until the entries are counted."""


class RecordOrigins(NamedTuple):
    """The sources of the records of one data set: names and sizes. The size of a streamed source is None."""

    names: tuple[str, ...]
    sizes: tuple[int | None, ...]

    def where(self, index: int) -> str:
        """Return the name of the record at an index (from 0): its number (from 1) in its source, and the source."""
        before = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            if size is None:
                return f"record {index + 1} of {', '.join(self.names)}"
            if index < before + size:
                return f"record {index - before + 1} of {name}"
            before += size
        raise IndexError(index)


class Loaded(NamedTuple):
    """One data set made of all sources.

    Args:
        records: A ``Dataset``, or an ``IterableDataset`` if it is streamed.
        places: The sources of the records.
        accounts: For each source, the fields that are not used.
        kinds: The index of the first record of each kind (:func:`trainer.data.unused_fields.kind`); empty if streamed.
        unread: Notes on files that were not read.
    """

    records: Any
    places: RecordOrigins
    accounts: list[UnusedFields]
    kinds: list[int]
    unread: list[str]

    @property
    def notes(self) -> list[str]:
        """Notes on what is not used, a line each."""
        return [*self.unread, *(line for one in self.accounts for line in one.notes())]


class _Raw(NamedTuple):
    """A source as it was read, before conversion.

    Args:
        place: The name of the source.
        records: The records.
        first: The first one.
        columns: The columns in which any record (if streamed: any of a sample) has a value.
        nested: The columns in which a table filled in nulls.
        given: The columns of the data set.
        form: The format of the records.
        unread: A note on files that were not read.
    """

    place: str
    records: Any
    first: Record
    columns: set[str]
    nested: list[str]
    given: list[str]
    form: Format
    unread: str


class Converter:
    """Converts the records of one source to TRL's, for ``Dataset.map``, and records which fields are not used.

    Args:
        raw: The source.
        task: The task of the run.
        shape: What all records become.
        ignored: Columns to leave out.
        account: Takes the unused fields of streamed data; None puts them into a column, because ``datasets`` may take
            converted records from its cache.
        becomes: The required columns and types of the result, as :func:`described` gives them; empty for any.
    """

    def __init__(
        self,
        raw: _Raw,
        task: str,
        shape: Shape,
        ignored: Collection[str],
        *,
        account: UnusedFields | None,
        becomes: str,
    ) -> None:
        self._form, self._task, self._shape, self._where = raw.form, task, shape, raw.place
        self._nested, self._ignored, self._account = frozenset(raw.nested), frozenset(ignored), account
        self._becomes = becomes
        self._code = _code()  # so that ``datasets`` does not reuse what other code converted

    def __call__(self, record: Record, number: int) -> Record:
        """Convert a record. Raises UsageError with the record and its number, counted from 1, if it does not fit."""
        try:
            record = {name: one for name, one in _opened(record).items() if name not in self._ignored}
            made = self._made(record)
        except ValueError as error:
            raise UsageError(
                f"record {number + 1} of {self._where} does not fit ({error}): {shown(record)}",
                "correct it, or take it out",
            ) from None
        if self._account is None:
            return {**made.record, _ENTRY: entry(made)}
        self._account.add(made.columns, made.keys)
        return made.record

    def _made(self, record: Record) -> Made:
        record = {name: without_nulls(one) if name in self._nested else one for name, one in record.items()}
        refuse_other(self._form, record, self._task)
        made = self._form.make(record, self._shape)
        refuse_tools(made.record, self._task)
        if self._becomes and (becomes := described(made.record)) != self._becomes:
            raise ValueError(f"it becomes {becomes}, and the first one {self._becomes}")
        return made


def load_all(
    places: Iterable[str],
    task: str,
    *,
    split: str,
    streaming: bool,
    chat: bool,
    settings: dict[str, Any],
    ignored: Collection[str] = (),
) -> Loaded:
    """Read all sources into one data set, ready for TRL.

    Args:
        places: The sources: files, directories, URLs, names.
        task: The task of the run.
        split: The split of data sets on the hub.
        streaming: Read while training, without converting everything first.
        chat: Make conversations of instructions, for a chat template.
        settings: Settings of obsfs for buckets.
        ignored: Columns to leave out.

    Raises:
        UsageError: A source cannot be found, read or recognised, or a record does not fit the format of its source.
    """
    import datasets

    ignored = frozenset(ignored)
    raws = [
        _read(place, task=task, split=split, streaming=streaming, settings=settings, ignored=ignored)
        for place in places
    ]
    shapes = [raw.form.shape(raw.first, raw.columns, chat) for raw in raws]
    # Streamed data may have tools later on.
    has_tools = any(shape.has_tools for shape in shapes) or (streaming and can_have_tools(task))
    parts, accounts, kinds, forms, before = [], [], [], dict[str, str](), 0
    for raw, own in zip(raws, shapes, strict=True):
        shape = own._replace(has_tools=has_tools and own.can_have_tools)
        account = UnusedFields(raw.place)
        first = Converter(raw, task, shape, ignored, account=UnusedFields(raw.place), becomes="")(raw.first, 0)
        forms.setdefault(described(first), raw.place)
        features = _features(first, has_entry=not streaming)
        convert = Converter(raw, task, shape, ignored, account=account if streaming else None, becomes=described(first))
        part = raw.records.map(convert, with_indices=True, remove_columns=raw.given, features=features)
        if not streaming:
            kinds += [before + index for index in _count(part, account)]
            part = part.remove_columns(_ENTRY)
            before += len(part)
        parts.append(part)
        accounts.append(account)
    if len(forms) > 1:
        raise UsageError(
            "the data sets are in different formats: "
            + ", ".join(f"{place} becomes {form}" for form, place in forms.items()),
            "give them one format, or train on one of them",
        )
    try:
        whole = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except ValueError as error:
        raise UsageError("the data sets do not go together", first_line(error)) from None
    sizes = tuple(None if streaming else len(part) for part in parts)
    unread = [raw.unread for raw in raws if raw.unread]
    return Loaded(whole, RecordOrigins(tuple(raw.place for raw in raws), sizes), accounts, kinds, unread)


def load(places: Iterable[str], task: str, *, split: str, streaming: bool, chat: bool, settings: dict[str, Any]) -> Any:
    """Return only the data set of :func:`load_all`."""
    return load_all(places, task, split=split, streaming=streaming, chat=chat, settings=settings).records


def described(made: Record) -> str:
    """Return the columns and types of a record of TRL, as text."""
    kinds = {str: "text", list: "messages", bool: "true or false"}
    told = [f"{name} ({kinds.get(type(value), '?')})" for name, value in sorted(made.items()) if name != "tools"]
    return " and ".join(told)


def _features(made: Record, *, has_entry: bool) -> Any:
    """Return the columns of TRL's records. Messages are JSON, so that the table adds no keys to a message."""
    from datasets import Features, Json, Value

    kinds = {list: Json(), bool: Value("bool")}
    found = {name: kinds.get(type(value), Value("string")) for name, value in made.items()}
    return Features({**found, **({_ENTRY: Value("string")} if has_entry else {})})


def _count(part: Any, account: UnusedFields) -> list[int]:
    """Add the unused fields of every record, and return the index of the first record of each kind."""
    firsts: dict[str, int] = {}
    seen: dict[str, str] = {}
    index = 0
    for batch in part.select_columns(_ENTRY).with_format("arrow").iter(batch_size=10_000):
        for text in batch[_ENTRY].to_pylist():
            if text not in seen:
                columns, keys, seen[text] = json.loads(text)
                account.add(columns, keys)
                firsts.setdefault(seen[text], index)
            index += 1
    return list(firsts.values())


@cache
def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _opened(record: Record) -> Record:
    """Return a record as it was in its file. Raises ValueError."""
    if record.keys() == {reading.RECORD, reading.COLUMNS}:
        return reading.parsed(str(record[reading.RECORD]))
    return record


def _read(
    place: str, *, task: str, split: str, streaming: bool, settings: dict[str, Any], ignored: Collection[str]
) -> _Raw:
    """Read a source, and recognise its format by the first record."""
    import datasets

    found = find(place, settings)
    try:
        if found.is_text:
            records = _read_text(found.files, found.options.get("storage_options", {}), streaming=streaming)
        else:
            records = datasets.load_dataset(found.builder, split=split, streaming=streaming, **found.options)
        first = next(iter(records), None)
        columns = set() if first is None else _columns(records, first, streaming=streaming)
    except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DatasetNotFoundError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, UsageError):
            raise cause from None
        raise UsageError(f"data {place} cannot be read ({first_line(cause)})", "correct it, or name another") from None
    except StopIteration:
        first = None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"data {place} cannot be read ({first_line(error)})", "correct it, or name another") from None
    if first is None:
        raise UsageError(f"data {place} is empty", "name another")
    nested = [name for name, kind in (records.features or {}).items() if not isinstance(kind, datasets.Value)]
    nested = [name for name in nested if not isinstance(records.features[name], datasets.Json)]
    try:
        opened = {name: value for name, value in _opened(first).items() if name not in ignored}
    except ValueError as error:
        raise UsageError(f"record 1 of {place} does not fit ({error})", "correct it, or take it out") from None
    form = recognise(opened, task, place)
    return _Raw(place, records, opened, columns - set(ignored), nested, list(first), form, found.unread)


def _read_text(files: Sequence[str], storage_options: dict[str, Any], *, streaming: bool) -> Any:
    """Return the records of JSON and CSV files, as :func:`trainer.data.reading.read_text` makes them."""
    from datasets import Dataset, Features, IterableDataset, Value

    features = Features({reading.RECORD: Value("large_string"), reading.COLUMNS: Value("string")})
    given: dict[str, Any] = {"files": list(files), "storage_options": storage_options}
    if streaming:
        return IterableDataset.from_generator(reading.read_text, features=features, gen_kwargs=given)
    if next(reading.read_text(files, storage_options), None) is None:
        return []  # datasets raises an error for no records
    given |= {"stamps": tuple(reading.stamps(files, storage_options)), "code": _code()}
    return Dataset.from_generator(reading.read_text, features=features, gen_kwargs=given)


def _columns(records: Any, first: Record, *, streaming: bool) -> set[str]:
    """Return the columns in which any record has a value."""
    if streaming:
        sample = [_opened(record) for record in records.take(SAMPLE)]
        return {name for record in sample for name in held_columns(record)}
    if first.keys() == {reading.RECORD, reading.COLUMNS}:
        return {name for text in records.unique(reading.COLUMNS) for name in json.loads(text)}
    columns = records.with_format("arrow")[:].itercolumns() if False else records.data.itercolumns()
    return {name for name, column in zip(records.column_names, columns, strict=True) if column.null_count < len(column)}
