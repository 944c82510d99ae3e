"""What commands print is made visible, in one place."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import obsfs
from obsfs.cli import main
from obsfs.cli.output import columns, escape_markup
from tests.conftest import Store

_EVIL = "e\x1b]0;PWNED\x07\x1b[2J\x9b31m\u2028\u202eb\rc\nd"
_SINKS = {"echo", "secho", "print", "echo_via_pager", "style", "prompt", "confirm", "input", "print_exc"}
_STREAMS = {"sys.stdout", "sys.stderr", "sys.stdout.buffer", "sys.stderr.buffer", "sys.__stdout__", "sys.__stderr__"}
_CHILDREN = {"obsfs/service/daemon.py", "obsfs/bench/touch.py", "obsfs/demo/model.py"}
"""What these processes write is read by the one that started them."""
_OWN = {"obsfs/cli/output.py", "obsfs/demo/__main__.py", *_CHILDREN}  # the second runs before any package is there


def _prints(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls that print, or write to a stream of the process, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            # A name alone is a function of ours, unless it is one of Python's own.
            is_ours = not owner and name not in ("print", "input")
            if (name in _SINKS and owner != "console" and not is_ours) or (name == "write" and owner in _STREAMS):
                yield node.lineno, ast.unparse(node)


def test_nothing_prints_past_the_output_module() -> None:
    top = Path(obsfs.__file__).parents[1]
    paths = [path for package in ("obsfs", "trainer") for path in (top / package).rglob("*.py")]
    assert len(paths) > 100
    found = {}
    for path in paths:
        name = path.relative_to(top).as_posix()
        text = path.read_text()
        assert "from click import" not in text, name
        found[name] = [] if name in _OWN else [(line, call) for line, call in _prints(ast.parse(text))]
    own = {"click.echo(error.ctx.get_help() if error.ctx else '')", "traceback.print_exc()"}
    found["obsfs/cli/__init__.py"] = [one for one in found["obsfs/cli/__init__.py"] if one[1] not in own]
    assert {name: calls for name, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "code", ["print(x)", "click.echo(x)", "input(x)", "click.prompt(x)", "sys.stdout.write(x)", "rich.print(x)"]
)
def test_printing_is_seen(code: str) -> None:
    assert list(_prints(ast.parse(code)))


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


_UNREADABLE = os.fsdecode(b"m\xff\xe9")
"""A name that is not UTF-8."""
_NOWHERE = ("--endpoint-url", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "arguments",
    [("cache", "info"), ("cache", "info", "--json"), ("verify", "{d}", "--json"), ("bench", "{m}", "--no-report"),
     ("status", "{m}", "--json"), ("{u}",), ("mount", "obs://b/{u}", "{d}"), ("umount", "{m}"), ("refresh", "{m}"),
     ("models", "obs://bbb/{u}", *_NOWHERE), ("pull", "obs://bbb/m", "--as", "{u}", *_NOWHERE), ("train", "{u}"),
     ("warm", "obs://bbb/{u}", *_NOWHERE), ("push", "{d}", "obs://bbb/{u}"),
     ("mount", "obs://bbb", "{m}/x", *_NOWHERE)],
    ids=lambda arguments: " ".join(arguments)[:14],
)  # fmt: skip
def test_a_name_that_is_not_utf_8_is_shown(
    tmp_path: Path,
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    home = tmp_path / _UNREADABLE
    home.mkdir()
    (home / "config.json").write_bytes(b"{}")
    monkeypatch.setenv("OBSFS_CACHE_DIR", str(home / "blocks"))
    filled = {"{d}": str(tmp_path), "{m}": str(home), "{u}": _UNREADABLE}
    status = main([re.sub(r"{.}", lambda found: filled[found[0]], word) for word in arguments])
    out, err = (text.decode() for text in capfdbinary.readouterr())
    assert status in (0, 2), err
    if status == 0 and "--json" in arguments:
        json.dumps(json.loads(out), ensure_ascii=False).encode()
    elif status == 2:
        assert err.count("\n") == 1
        assert err.startswith("obsfs: ")


def test_what_the_encoding_of_a_stream_does_not_have_is_an_escape(tmp_path: Path) -> None:
    home = tmp_path / f"模{_UNREADABLE}"
    (home / "v1").mkdir(parents=True)
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "OBSFS_CACHE_DIR": str(home)}
    command = [sys.executable, "-m", "obsfs", "cache", "info"]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u6a21m\udcff\udce9" in done.stdout
