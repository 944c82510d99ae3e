"""The account of what records hold and no training sees: told for every record, not only for those of a sample."""

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
"""Names that are told in one line; of more, their number."""


class UnusedFields:
    """What the records of one place hold and nothing is made of: `columns`, and `keys` of messages that only some chat
    templates show. `place` is its name."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._columns: dict[str, None] = {}
        self._keys: dict[str, None] = {}
        self._is_live = False

    @property
    def columns(self) -> list[str]:
        """In the order in which they came up."""
        return list(self._columns)

    @property
    def keys(self) -> list[str]:
        """As :func:`trainer.data.messages.other_keys` names them."""
        return list(self._keys)

    def add(self, columns: Iterable[str], keys: Iterable[str]) -> None:
        """Enter what is left of a record. Once the account is live, what is new in it is told at once."""
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
        """Tell from now on what is new: of streamed data, what has been noted until now is told elsewhere."""
        self._is_live = True

    def notes(self) -> list[str]:
        """Return a line on the columns, if there are any."""
        return [_unused(self.place, self.columns)] if self._columns else []


def _unused(place: str, names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"{place}: column{'' if len(names) == 1 else 's'} {shown}{more} {'is' if len(names) == 1 else 'are'} not used"
    )


def entry(made: Made) -> str:
    """Return what is to be known of a record, as text: the fewer different ones, the faster they are counted."""
    return json.dumps([made.columns, made.keys, kind(made.record)])


def kind(record: Record) -> str:
    """Return what a chat template may refuse a record for: which roles come first, last, and after which; tools, calls
    and other keys. Records of one kind are taken or refused alike."""
    sides = {name: side for name, side in record.items() if isinstance(side, list)}
    return ";".join(
        [*(f"{name}:{_roles(side)}" for name, side in sides.items()), "tools" if record.get("tools") else ""]
    )


def _roles(side: list[dict[str, Any]]) -> str:
    words = [one["role"] + ("+calls" if one.get("tool_calls") else "") for one in side]
    pairs = sorted({f"{a}-{b}" for a, b in pairwise(words)})
    return " ".join([*words[:1], *pairs, *words[-1:], *sorted(chats.other_keys(side))])
