"""Data sets read by ``datasets``, and made into the records that TRL takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from obsfs.errors import UsageError, first_line
from obsfs.text import visible
from trainer.data.formats import Converter, Format, Record, recognise, unused
from trainer.data.places import find


class Places(NamedTuple):
    """Where the records of one data set come from. A size is None where a place is streamed."""

    names: tuple[str, ...]
    sizes: tuple[int | None, ...]

    def where(self, index: int) -> str:
        """Return what to call the record at an index (from 0) of the whole: its number (from 1) and its place."""
        before = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            if size is None:
                return f"record {index + 1} of {', '.join(self.names)}"
            if index < before + size:
                return f"record {index - before + 1} of {name}"
            before += size
        raise IndexError(index)


class Loaded(NamedTuple):
    """One data set of all places: a ``Dataset``, or an ``IterableDataset`` when it is streamed. `notes` say what is
    not used."""

    records: Any
    places: Places
    notes: list[str]


class _Raw(NamedTuple):
    """A place as ``datasets`` reads it: `nested` are the columns in which its tables have filled in nulls."""

    place: str
    records: Any
    first: Record
    form: Format
    nested: list[str]


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
    """Read all places into one data set, ready for TRL. With `chat`, instructions become conversations.

    Raises UsageError for what cannot be found, read or recognised, and for each record that does not fit its format.
    """
    import datasets

    ignored = frozenset(ignored)
    raws = [
        _read(place, task=task, split=split, streaming=streaming, settings=settings, ignored=ignored)
        for place in places
    ]
    has_tools = any("tools" in raw.form.convert(raw.first, chat) for raw in raws if _fits(raw, chat))
    parts, notes, forms = [], [], dict[str, str]()
    for raw in raws:
        convert = Converter(
            raw.form, task, raw.place, is_chat=chat, has_tools=has_tools, nested=raw.nested, ignored=ignored
        )
        made = convert(raw.first, 0)
        forms.setdefault(_described(made), raw.place)
        parts.append(
            raw.records.map(convert, with_indices=True, remove_columns=list(raw.first), features=_features(made))
        )
        if names := unused(raw.form, raw.first):
            is_one = len(names) == 1
            said = visible(", ".join(names))
            notes.append(f"{raw.place}: column{'' if is_one else 's'} {said} {'is' if is_one else 'are'} not used")
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
    return Loaded(whole, Places(tuple(raw.place for raw in raws), sizes), notes)


def load(places: Iterable[str], task: str, *, split: str, streaming: bool, chat: bool, settings: dict[str, Any]) -> Any:
    """Return the data set alone of :func:`load_all`."""
    return load_all(places, task, split=split, streaming=streaming, chat=chat, settings=settings).records


def _fits(raw: _Raw, chat: bool) -> bool:
    try:
        raw.form.convert(raw.first, chat)
    except ValueError:
        return False  # Told with its number, when its turn comes.
    return True


def _described(made: Record) -> str:
    return " and ".join(f"{name} ({type(value).__name__})" for name, value in sorted(made.items()) if name != "tools")


def _features(made: Record) -> Any:
    """The columns of TRL's records. Messages are JSON, so that no table fills in keys that a message does not have."""
    from datasets import Features, Json, Value

    kinds = {list: Json(), bool: Value("bool")}
    return Features({name: kinds.get(type(value), Value("string")) for name, value in made.items()})


def _read(
    place: str, *, task: str, split: str, streaming: bool, settings: dict[str, Any], ignored: Collection[str]
) -> _Raw:
    """Read a place, and recognise it by its first record."""
    import datasets

    builder, options = find(place, settings)
    try:
        if builder == "json":
            options = {**options, "features": _json_features(builder, split, options)}
        records = datasets.load_dataset(builder, split=split, streaming=streaming, **options)
        first = next(iter(records), None)
    except (datasets.exceptions.DatasetGenerationError, datasets.exceptions.DatasetNotFoundError) as error:
        cause = error.__cause__ or error
        raise UsageError(f"data {place} cannot be read ({first_line(cause)})", "correct it, or name another") from None
    except StopIteration:
        first = None
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"data {place} cannot be read ({first_line(error)})", "correct it, or name another") from None
    if first is None:
        raise UsageError(f"data {place} is empty", "name another")
    kept = {name: value for name, value in first.items() if name not in ignored}
    nested = [name for name, kind in (records.features or {}).items() if not isinstance(kind, datasets.Value)]
    nested = [name for name in nested if not isinstance(records.features[name], datasets.Json)]
    form = recognise(kept, task, place)
    return _Raw(place, records, first, form, nested)


def _json_features(builder: str, split: str, options: dict[str, Any]) -> Any:
    """The columns of JSON files, with everything nested kept as it is.

    Left to itself, ``datasets`` makes tables of it, and gives each object the keys of all others, with nulls.
    """
    import datasets

    probe = datasets.load_dataset(builder, split=split, streaming=True, **options)
    kinds = probe.features
    text = datasets.Value("string")
    if kinds is None:  # An array of objects, which is read whole.
        kinds = {}
        for record in probe:
            kinds |= {name: text for name, one in record.items() if isinstance(one, str) or kinds.get(name) == text}
            kinds = {**dict.fromkeys(record), **kinds}
            if None not in record.values():
                break
    return datasets.Features({name: text if kind == text else datasets.Json() for name, kind in kinds.items()}) or None
