"""Text from outside, as a person is shown it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obsfs.errors import ObsfsError
from obsfs.text import to_json, visible


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("model-00001.safetensors", "model-00001.safetensors"),
        ("模型 ü", "模型 ü"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\x9b2Jb", r"a\x9b2Jb"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("a\u2028b\u202ec", r"a\u2028b\u202ec"),
        ("\udc80", r"\udc80"),
    ],
)
def test_what_a_terminal_would_act_on_is_an_escape(raw: str, shown: str) -> None:
    assert visible(raw) == shown


@given(st.text())
def test_what_is_shown_is_printable(raw: str) -> None:
    assert visible(raw).isprintable()


def test_a_text_of_any_length_is_cut() -> None:
    assert visible("x" * 200_000, 10) == "xxxxxxxxx…"


def test_an_error_is_one_printable_line() -> None:
    text = str(ObsfsError("cannot read a\x1b[2Jb\nc", "Remedy " + "y" * 200_000))
    assert text.startswith(r"cannot read a\x1b[2Jb c: Remedy y")
    assert text.isprintable()
    assert text.endswith("y…")


@settings(max_examples=25)
@given(
    st.recursive(
        st.text() | st.floats() | st.integers() | st.none() | st.booleans(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_json_is_for_every_reader(document: object) -> None:
    text = to_json(document)
    assert text.isascii()

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.dumps(json.loads(text, parse_constant=refuse), ensure_ascii=False).encode()


def test_json_shows_names_as_they_are() -> None:
    assert json.loads(to_json({"模 \x1b": ["ü\n", "\udcff", 1.5, None]})) == {"模 \x1b": ["ü\n", r"\udcff", 1.5, None]}
