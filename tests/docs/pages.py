"""The pages that people read, taken apart: blocks of code, commands, promises, and quoted messages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
CHINESE = ROOT / "README.zh-CN.md"
PAGES = (README, *sorted(DOCS.glob("*.md")))
_MARKER = re.compile(r"<!-- not run here: (.+) -->")
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """A fenced block of code; `reason` is why the tests cannot run it, empty for those that they run."""

    page: Path
    line: int
    language: str
    text: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    lines = page.read_text().splitlines()
    number = 0
    while number < len(lines):
        if lines[number].startswith("```"):
            end = lines.index("```", number + 1)
            marker = _MARKER.fullmatch(lines[number - 1]) if number else None
            text = "\n".join(lines[number + 1 : end]) + "\n"
            found.append(Block(page, number + 1, lines[number][3:], text, marker[1] if marker else ""))
            number = end
        number += 1
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of each call of ``obsfs`` in a piece of shell, also inside ``$(...)``, after ``&&`` and in a pipe."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\|?|;|\$\(|\)", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # a quotation that was taken apart
                continue
            while words and (_ASSIGNMENT.fullmatch(words[0]) or words[0] in ("python3", "-m", "tests.venv", "export")):
                words.pop(0)
            if words and words[0].rpartition("/")[2] == "obsfs":
                yield words[1:]


def spans(page: Path) -> list[str]:
    """What stands between single backticks, outside of blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@dataclass(frozen=True)
class Promise:
    """A numbered promise of a page, and the tests that hold it."""

    page: Path
    number: str
    tests: tuple[str, ...]


def promises(page: Path) -> list[Promise]:
    """The promises of a page, each a paragraph that begins with ``**P1. ...`` and ends with ``Held by`` tests."""
    found: list[Promise] = []
    for part in re.split(r"^(?=\*\*[A-Z]\d+\. )", page.read_text(), flags=re.MULTILINE)[1:]:
        number = part[2:].partition(".")[0]
        held = re.search(r"^Held by (.+?)\.$", part, flags=re.DOTALL | re.MULTILINE)
        found.append(Promise(page, number, tuple(re.findall(r"`(test_\w+)`", held[1])) if held else ()))
    return found
