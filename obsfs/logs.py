"""How log records are written: one record, one line, whatever names and errors from outside it quotes."""

from __future__ import annotations

import logging

from obsfs.text import visible

_MAX_LINE = 4000
"""Characters of a record's message."""
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class VisibleFormatter(logging.Formatter):
    """Show messages by `obsfs.text.visible`, and indent the lines of traces.

    So a name or an error code from a bucket can neither move a terminal's cursor nor forge a record of its own.
    """

    def __init__(self, fmt: str = _FORMAT) -> None:
        super().__init__(fmt)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line of a record; the message and the logger's name are made visible."""
        shown = logging.makeLogRecord(record.__dict__)
        shown.message, shown.name = visible(record.getMessage(), _MAX_LINE), visible(record.name)
        return super().formatMessage(shown)

    def formatException(self, ei: object) -> str:
        """Return a trace of which no line begins as a record does."""
        return _indented(super().formatException(ei))  # type: ignore[arg-type]

    def formatStack(self, stack_info: str) -> str:
        """Return a stack as :meth:`formatException` does."""
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join(f"  | {visible(line, _MAX_LINE)}" for line in text.split("\n"))
