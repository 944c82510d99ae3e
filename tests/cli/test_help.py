"""What people read first: help and tables fit the terminal, and nothing is cut off."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import takewhile

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from obsfs.cli import main
from obsfs.cli import obsfs as program
from obsfs.cli.output import columns, facts, fold
from obsfs.settings import knobs
from obsfs.text import visible
from tests.conftest import Mounter, Store


def verbs(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        yield (*path, name)
        verb = group.get_command(context, name)
        if isinstance(verb, click.Group):
            yield from verbs(verb, (*path, name))


def help_of(*words: str, width: int = 80) -> list[str]:
    done = CliRunner().invoke(program, [*words, "--help"], terminal_width=width, env={"COLUMNS": str(width)})
    assert done.exit_code == 0, done.output
    return str(done.output).splitlines()


@pytest.mark.parametrize("words", [(), *verbs(program)], ids=" ".join)
def test_help_fits_a_terminal_of_80_columns(words: tuple[str, ...]) -> None:
    assert max(map(len, help_of(*words))) <= 80


@pytest.mark.parametrize("width", [40, 60, 100, 140])
@pytest.mark.parametrize("words", [(), ("mount",), ("models",), ("cache", "clean"), ("serve",)], ids=" ".join)
def test_help_fits_any_terminal_and_breaks_no_word(words: tuple[str, ...], width: int) -> None:
    wide, lines = " ".join(help_of(*words, width=10_000)).split(), help_of(*words, width=width)
    assert " ".join(lines).split() == wide
    options = "\n".join(lines).partition("  Example")[0].splitlines()[1:]  # examples are to be copied whole
    assert not [line for line in options if len(line) > width and len(line.split()) > 3]
    assert not [line for line in options if line != line.rstrip()]


@pytest.mark.parametrize("words", [(), *verbs(program)], ids=" ".join)
def test_each_help_has_an_example(words: tuple[str, ...]) -> None:
    text = "\n".join(help_of(*words))
    assert "Example" in text
    assert re.search(rf"obsfs ({'|'.join(words[:1])})?.*\S", text.partition("Example")[2])


@pytest.mark.parametrize("group", [(), ("cache",), ("models",)])
def test_each_summary_is_one_whole_line(group: tuple[str, ...]) -> None:
    lines = help_of(*group)
    listed = list(takewhile(str.strip, lines[lines.index("Commands:") + 1 :]))
    assert [line.split()[0] for line in listed] == [words[-1] for words in verbs(program) if words[:-1] == group]
    assert not [line for line in listed if line.endswith(("...", "…"))]


def test_settings_stand_under_the_headings_of_their_groups() -> None:
    lines = help_of("mount")
    headings = [line.rstrip(":") for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:5] == ["Options", "Bucket", "Cache", "Fetching", "Mount"]
    assert all(knob.group in headings for knob in knobs().values())
    text = "\n".join(lines)
    assert text.index("\nCache:") < text.index("--cache-dir") < text.index("\nFetching:") < text.index("--connections")


_ROWS = [("obs://models/a", "1.0 MiB", "now"), ("obs://models/a-much-longer-name-of-a-model", "2.0 GiB", "")]


def test_a_table_is_aligned_where_it_fits_and_folds_where_it_does_not() -> None:
    titles = ("object", ">cached", ">last used")
    assert list(columns(titles, _ROWS, 80)) == [
        "object                                       cached  last used",
        "obs://models/a                              1.0 MiB        now",
        "obs://models/a-much-longer-name-of-a-model  2.0 GiB",
    ]
    assert list(columns(titles, _ROWS, 60)) == [
        "obs://models/a",
        "  cached     1.0 MiB",
        "  last used  now",
        "obs://models/a-much-longer-name-of-a-model",
        "  cached     2.0 GiB",
    ]


@given(st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30)), max_size=5), st.integers(1, 40))
def test_no_cell_is_lost_or_broken(rows: list[tuple[str, str]], width: int) -> None:
    shown = "\n".join(columns(("name", "value"), rows, width))
    assert all(cell.isprintable() for cell in shown.splitlines())
    for row in rows:
        for cell in row:
            assert (
                cell.encode("unicode_escape").decode() in shown.encode("unicode_escape").decode()
                or not cell.isprintable()
            )


@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(1, 40))
def test_text_folds_between_words_and_nowhere_else(text: str, width: int) -> None:
    lines = fold(text, width)
    assert " ".join(" ".join(lines).split()) == " ".join(visible(text).split())
    assert all(len(line) <= width or " " not in line.strip() for line in lines if line.isascii())


def test_a_number_stays_beside_its_unit() -> None:
    assert fold("cached 1.5 GiB in 20 ms of 9 s", 12) == ["cached", "1.5 GiB in", "20 ms of 9 s"]


def test_facts_are_folded_under_themselves() -> None:
    rows = [("a", "one two three"), ("long name", "/a/path/without/blanks")]
    assert list(facts(rows, 22)) == [
        "  a          one two",
        "             three",
        "  long name",
        "    /a/path/without/blanks",
    ]
    assert next(facts(rows)) == "  a          one two three"


def test_the_status_of_a_mount_fits(
    bucket: Store, mount: Mounter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = mount(bucket)
    for width in (None, 40, 60, 80, 120, 200):
        monkeypatch.delenv("COLUMNS", raising=False)
        if width:
            monkeypatch.setenv("COLUMNS", str(width))
        assert main(["status", str(path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert not [line for line in lines if line != line.rstrip()]
        assert f"in {path.parent / 'blocks'}" in " ".join(" ".join(lines).split())
        if width is None:  # a program reads it: nothing is folded
            assert not [line for line in lines if line.startswith("   ")]
        else:
            assert not [line for line in lines if len(line) > width and len(line.split()) > 2]
