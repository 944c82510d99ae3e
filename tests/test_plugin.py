"""The interface for packages that add verbs."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from obsfs import plugin


def test_everything_listed_exists() -> None:
    assert all(getattr(plugin, name) is not None for name in plugin.__all__)


def _greeting() -> click.Command:
    @click.command(cls=plugin.Command)
    @plugin.settings_options(*plugin.BUCKET_SETTINGS)
    def hello(**given: Any) -> None:
        settings = plugin.Settings.load(**given)
        if settings.region == "nowhere":
            raise plugin.UsageError("there is no such region", "choose another")
        plugin.tell(f"hello, {settings.region}\x1b")

    return hello


def test_the_documented_verb_reads_settings_and_prints_safe_text() -> None:
    result = CliRunner().invoke(_greeting(), ["--region", "cn-south-1"])
    assert (result.exit_code, result.output) == (0, "hello, cn-south-1\\x1b\n")


def test_an_error_of_a_verb_of_another_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Point:
        module = value = "somebody.verbs"

        def load(self) -> click.Command:
            return _greeting()

    monkeypatch.setattr("obsfs.cli._further", lambda: {"hello": Point()})
    assert plugin.main(["hello", "--region", "nowhere"]) == 2
    assert capsys.readouterr().err == "obsfs: there is no such region: choose another\n"
