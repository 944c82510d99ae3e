"""Report fields of the data that training does not use: over all records, not only a sample."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from obsfs.plugin import tell, visible
from trainer.data import messages as chats
from trainer.data.formats import Made, Record

_SHOWN = 20
"""The most names to print on one line; of further ones only the number is printed."""


class UnusedFields:
    """The fields of one source that training does not use: `columns`, and `keys` of messages that few templates show.

    Args:
        place: The name of the source.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._columns: dict[str, None] = {}
        self._keys: dict[str, None] = {}
        self._is_live = False

    @property
    def columns(self) -> list[str]:
        """The unused columns, in order of appearance."""
        return list(self._columns)

    @property
    def keys(self) -> list[str]:
        """The keys of messages, named as by :func:`trainer.data.messages.other_keys`."""
        return list(self._keys)

    def add(self, columns: Iterable[str], keys: Iterable[str]) -> None:
        """Add the unused fields of a record. After :meth:`go_live`, print new ones at once."""
        new = [one for one in columns if one not in self._columns]
        other = [f"the {one}" for one in keys if one not in self._keys]
        self._columns |= dict.fromkeys(new)
        self._keys |= dict.fromkeys(keys)
        if self._is_live and (new or other) and os.environ.get("RANK", "0") == "0":
            if new:
                tell(visible(_unused(self.place, new)), err=True)
            if other:
                tell(f"{visible(self.place)}: some records have {visible(', '.join(other))}", err=True)

    def go_live(self) -> None:
        """Print new fields from now on. (For streamed data: fields found so far are reported elsewhere.)"""
        self._is_live = True

    def notes(self) -> list[str]:
        """Return a line on the unused columns, if there are any."""
        return [_unused(self.place, self.columns)] if self._columns else []


def _unused(place: str, names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"{place}: column{'' if len(names) == 1 else 's'} {shown}{more} {'is' if len(names) == 1 else 'are'} not used"
    )


def entry(made: Made) -> str:
    """Return the unused fields and the kind of a record as text. Few distinct texts are fast to count."""
    return json.dumps([made.columns, made.keys, kind(made.record)])


def kind(record: Record) -> str:
    """Return the properties of a record that a chat template may refuse, as text.

    They are the first and last roles, which role follows which, tools, calls, and other keys. A template accepts all
    records of one kind, or none.
    """
    sides = {name: side for name, side in record.items() if isinstance(side, list)}
    return ";".join(
        [*(f"{name}:{_roles(side)}" for name, side in sides.items()), "tools" if record.get("tools") else ""]
    )


def _roles(side: list[dict[str, Any]]) -> str:
    words = [one["role"] + ("+calls" if one.get("tool_calls") else "") for one in side]
    pairs = sorted({f"{a}-{b}" for a, b in pairwise(words)})
    return " ".join([*words[:1], *pairs, *words[-1:], *sorted(chats.other_keys(side))])
