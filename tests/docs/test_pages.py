"""What the pages say is there: the tests behind promises, the messages, the verbs and flags, the other edition."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import chain
from pathlib import Path

import click
import pytest

from docs.tools import hooks
from obsfs.cli import obsfs as program
from obsfs.settings import knobs
from tests.docs.pages import CHINESE, DOCS, PAGES, README, ROOT, Block, blocks, commands, promises, spans
from trainer.config import known_keys

_MESSAGES = DOCS / "troubleshooting.md"
_FOREIGN = {"user_allow_other", "Bus error", "Stale file handle", "Input/output error", "Cannot allocate memory"}
_FOREIGN |= {"Transport endpoint is not connected", "Too many open files in system"}
"""Messages on the page that are not ours."""


@cache
def every_test() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.update(re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(), flags=re.MULTILINE))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_each_test_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", page.read_text()))
    modules = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert named - every_test() - modules == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_promises_are_numbered_in_order_and_each_has_a_test(page: Path) -> None:
    found = promises(page)
    assert [one.number[1:] for one in found] == [str(number) for number in range(1, len(found) + 1)]
    assert len({one.number[0] for one in found}) <= 1
    assert [one.number for one in found if not one.tests] == []
    assert page.read_text().count("Held by") == len(found)


def test_the_pages_promise_something() -> None:
    assert len(list(chain.from_iterable(map(promises, PAGES)))) > 90


@cache
def literals() -> list[str]:
    """All texts in the code, with ``\\0`` where something is filled in."""
    found: list[str] = []
    for path in chain((ROOT / "obsfs").rglob("*.py"), (ROOT / "trainer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\w*\}", "\0", node.value))
    return found


def quoted_messages() -> list[str]:
    rows = re.findall(r"^\| (.+?) \| .+ \|$", _MESSAGES.read_text(), flags=re.MULTILINE)
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row) if not message.startswith("E")]


def is_printed(message: str, texts: list[str]) -> bool:
    """Whether a text of the code has this message, where ``...`` stands for what is filled in."""
    parts = [re.escape(part) for part in message.split("...")]
    pattern = re.compile(r"[^\n]*".join(parts))
    return any(pattern.search(text) for text in texts)


def test_each_quoted_message_is_one_of_ours() -> None:
    texts = literals()
    messages = [message for message in quoted_messages() if message not in _FOREIGN]
    assert len(messages) > 20
    assert [message for message in messages if not is_printed(message, texts)] == []
    assert not is_printed("no such sentence is in the code ...", texts)


_KEYS = {f"--{key}" for key in known_keys("sft") or {}}
"""The keys of a run, each of which ``obsfs train`` takes as a flag."""


def all_flags(command: click.Command) -> set[str]:
    return {flag for one in command.params for flag in (*one.opts, *one.secondary_opts)} | {"--help", "-h"}


def find_mistake(words: list[str]) -> str | None:
    """What is wrong with a call of ``obsfs``; None if nothing is."""
    command: click.Command = program
    context = click.Context(program)
    if words and words[0] in ("--version", "VERB"):
        return None
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0])
        if found is None:
            return None if command.name == "models" else f"there is no verb {words[0]}"
        command, words = found, words[1:]
    ours = words[: words.index("--")] if "--" in words else words
    flags = all_flags(command)
    if command.name == "train":
        flags |= _KEYS
    given = [word.partition("=")[0] for word in ours if re.match(r"--?[a-zA-Z]", word)]
    wrong = [flag for flag in given if flag not in flags and flag.lower() != flag.upper()]
    return f"there is no flag {wrong[0]}" if wrong else None


def test_mistakes_are_found() -> None:
    assert find_mistake(["mount", "obs://b", "/d", "--cache-siz", "1"]) == "there is no flag --cache-siz"
    assert find_mistake(["mnt"]) == "there is no verb mnt"
    assert find_mistake(["cache", "empty"]) == "there is no verb empty"
    assert find_mistake(["train", "run.yaml", "--learning_rat", "1"]) == "there is no flag --learning_rat"
    assert find_mistake(["serve", "m", "--", "--max-model-len", "8"]) is None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_verbs_and_flags_exist(page: Path) -> None:
    text = "\n".join(block.text.replace("ExecStart=", "") for block in blocks(page) if block.language != "python")
    calls = [words for piece in (text, *spans(page)) for words in commands(piece)]
    wrong = {" ".join(words): mistake for words in calls if (mistake := find_mistake(words))}
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_flags_in_the_text_exist(page: Path) -> None:
    verbs = [program, *(command for name in program.list_commands(click.Context(program))
                        if (command := program.get_command(click.Context(program), name)))]  # fmt: skip
    verbs += [sub for verb in verbs if isinstance(verb, click.Group) for sub in verb.commands.values()]
    known = {flag for verb in verbs for flag in all_flags(verb)} | _KEYS | {"--KEY"}
    foreign = {"--device"}
    named = {span.split()[0] for span in spans(page) if span.startswith("--")}
    assert {flag.partition("=")[0] for flag in named} - known - foreign == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_each_marker_is_right_above_its_block(page: Path) -> None:
    assert page.read_text().count("<!-- not run here") == len([block for block in blocks(page) if block.reason])


@pytest.mark.parametrize("block", [one for page in PAGES for one in blocks(page) if one.reason], ids=str)
def test_what_is_not_run_says_why_and_can_be_read(block: Block) -> None:
    assert len(block.reason.split()) > 2
    if block.language == "python":
        compile(block.text, str(block), "exec")


def test_the_options_are_all_settings() -> None:
    shown = "\n".join(hooks.options())
    assert all(f"| `{knob.flag}" in shown and knob.text in shown for knob in knobs().values())
    assert {f"## {knob.group}" for knob in knobs().values()} == set(re.findall(r"^## \w+$", shown, flags=re.MULTILINE))


def test_figures_of_the_benchmark_become_a_table(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    assert list(hooks.figures(path)) == []
    path.write_text(
        '{"machine": {"cores": 2, "kernel": "6.18", "python": "3.11.9"}, "figures": [{"case": "cold_dd", "profile": '
        '"obs", "system": "obsfs", "metric": "seconds", "median": 5.85, "values": [5.8, 5.9]}]}'
    )
    assert list(hooks.figures(path))[-1] == "| cold_dd | obs | obsfs | seconds | 5.85 | 5.8, 5.9 |"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_each_file_that_a_page_names_exists(page: Path) -> None:
    named = [span for span in spans(page) if re.fullmatch(r"(obsfs|trainer|tests|docs|benchmarks)/[\w./-]*", span)]
    generated = {"benchmarks/figures.json"}
    assert [name for name in named if name not in generated and not (ROOT / name).exists()] == []


def structure(page: Path) -> list[str]:
    """Of each line what both editions have: its kind, its code, its links, its numbers of columns."""
    shape: list[str] = []
    in_block = False
    for line in page.read_text().splitlines():
        if line.startswith("```") or in_block:
            in_block ^= line.startswith("```")
            shape.append(line.partition("    #")[0])
        elif line.startswith("<!--"):
            shape.append("<!--")
        elif line.startswith("#"):
            shape.append(line.split()[0])
        elif line.startswith("|"):
            shape.append(f"| {line.count('|')}")
        else:
            shape.append("text" if line.strip() else "")
    return shape


def test_the_chinese_readme_equals_the_english_line_by_line() -> None:
    english, chinese = structure(README), structure(CHINESE)
    assert chinese == english
    assert len(english) <= 150


def test_both_readmes_have_the_same_commands_links_and_figures() -> None:
    def found(page: Path, pattern: str) -> list[str]:
        return sorted(re.findall(pattern, page.read_text()))

    links = r"\]\((?!README)([^)]+)\)"
    assert found(CHINESE, links) == found(README, links)
    assert found(CHINESE, r"`([^`\n]+)`") == found(README, r"`([^`\n]+)`")
    assert found(CHINESE, r"\d+\.\d+ s\b") == found(README, r"\d+\.\d+ s\b")


@pytest.mark.parametrize("page", [README, CHINESE], ids=lambda page: str(page.name))
def test_links_of_the_readme_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
