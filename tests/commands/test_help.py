"""What people read first: help and tables fit the terminal, and nothing is cut off."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from obsfs.commands import obsfs as program
from obsfs.commands.output import columns
from obsfs.settings import knobs


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
