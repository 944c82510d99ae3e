"""What a log record looks like, whatever it quotes."""

from __future__ import annotations

import io
import logging

import pytest

from obsfs.logs import VisibleFormatter

_FORGED = "2026-01-01 00:00:00,000 CRITICAL obsfs: forged"


def _logged(write: object) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(VisibleFormatter())
    logger = logging.Logger("obsfs.test")
    logger.addHandler(handler)
    write(logger)  # type: ignore[operator]
    return stream.getvalue()


@pytest.mark.parametrize("between", ["\n", "\r", "\r\n", "\u2028", "\u0085", "\x0b", "\x0c"])
def test_a_record_is_one_line(between: str) -> None:
    text = _logged(lambda logger: logger.warning("cannot read %s", f"a{between}{_FORGED}\x1b[2J\x9b31m"))
    assert len(text.splitlines()) == 1
    assert text.removesuffix("\n").isprintable()
    assert " WARNING obsfs.test: cannot read a" in text


def test_a_trace_forges_no_record() -> None:
    def write(logger: logging.Logger) -> None:
        try:
            raise ValueError(f"x\n{_FORGED}\x1b[2J")
        except ValueError:
            logger.exception("it failed")

    first, *rest = _logged(write).splitlines()
    assert first.endswith("ERROR obsfs.test: it failed")
    assert any("ValueError: x" in line for line in rest)
    assert all(line.startswith("  | ") and line.isprintable() for line in rest)


def test_a_record_has_a_bound() -> None:
    assert len(_logged(lambda logger: logger.warning("x" * 1_000_000))) < 5000


def test_other_handlers_see_the_record_as_it_was() -> None:
    record = logging.LogRecord("n", logging.INFO, "p", 1, "a%s", ("\n",), None)
    VisibleFormatter().format(record)
    assert record.getMessage() == "a\n"
