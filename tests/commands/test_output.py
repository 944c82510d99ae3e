"""What commands print is made visible, in one place."""

from __future__ import annotations

import ast
import os
import pty
import sys
from pathlib import Path

import pytest

import obsfs.commands
from obsfs.commands.output import columns, escape_markup
from tests.conftest import Store

_EVIL = "e\x1b]0;PWNED\x07\x1b[2J\x9b31m\u2028\u202eb\rc\nd"
_SINKS = {"echo", "secho", "print", "echo_via_pager", "style"}


def test_no_command_prints_past_the_output_module() -> None:
    allowed = {"output.py"}
    for path in Path(obsfs.commands.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name not in allowed else ():
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            is_help = path.name == "__init__.py" and "get_help" in ast.unparse(node)
            assert name not in _SINKS or owner == "console" or is_help, f"{path.name}:{node.lineno} prints by itself"


def test_tables_show_what_names_hold() -> None:
    for line in columns(("name", ">size"), [(_EVIL, "1")]):
        assert line.isprintable()
    assert r"\x1b]0;PWNED\x07" in "\n".join(columns(("name",), [(_EVIL,)]))
    assert escape_markup(_EVIL).isprintable()


def _on_terminal(*arguments: str) -> bytes:
    """What a command sends to a terminal, without what rich does to colour it."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-m", "obsfs", *arguments], {**os.environ, "TERM": "dumb"})
    found = b""
    try:
        while data := os.read(fd, 65536):
            found += data
    except OSError:
        pass
    finally:
        os.close(fd)
        os.waitpid(pid, 0)
    return found


@pytest.mark.parametrize(
    "verb",
    [("models", "{b}"), ("models", "show", "{b}/m"), ("models", "show", "{b}/x"), ("pull", "{b}/m", "{d}"),
     ("verify", "{b}/m"), ("warm", "{b}/"), ("cache", "info"), ("cache", "verify"), ("models", "show", "{b}/" + _EVIL),
     ("mount", _EVIL, "/x"), ("umount", "/" + _EVIL), (_EVIL,), ("status", "--" + _EVIL)],
    ids=lambda verb: " ".join(verb)[:12],
)  # fmt: skip
def test_no_name_acts_on_the_terminal(bucket: Store, tmp_path: Path, verb: tuple[str, ...]) -> None:
    bucket.put("m/config.json", b'{"architectures": ["A\\u001b]0;PWNED\\u0007\\u009b31m"]}')
    bucket.put(f"m/{_EVIL}.bin", b"x")
    bucket.put(f"m{_EVIL}/.obsfs/manifest.json", b"{")
    if verb[0] == "cache":
        _on_terminal("warm", f"{bucket}/")
    found = _on_terminal(*(word.replace("{b}", str(bucket)).replace("{d}", str(tmp_path / "d")) for word in verb))
    assert found
    text = found.decode(errors="replace")
    for bad in ("\x1b]", "\x07", "\x9b", "\u2028", "\u202e", "\x1b[2J"):
        assert bad not in text, repr(text[-300:])
