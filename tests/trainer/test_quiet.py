"""What libraries say of a model is shown as everything else."""

from __future__ import annotations

import logging

from trainer.quiet import silence_progress_bars


def test_a_warning_of_transformers_acts_on_no_terminal() -> None:
    silence_progress_bars()
    handlers = logging.getLogger("transformers").handlers
    record = logging.LogRecord("transformers.x", logging.WARNING, "", 0, "a model of type %s", ("e\x1b[2J\n",), None)
    assert handlers
    for handler in handlers:
        assert handler.format(record) == r"[transformers] a model of type e\x1b[2J\n"
