"""Fill in the generated parts of the pages while mkdocs builds them, so that they can never be outdated.

``<!-- options -->`` becomes the tables of all settings, ``<!-- figures -->`` a table of ``benchmarks/figures.json`` if
there is one, and ``<!-- example: NAME.py -->`` the program ``docs/examples/NAME.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from obsfs.cli.output import human
from obsfs.settings import Knob, knobs

ROOT = Path(__file__).resolve().parent.parent.parent
FIGURES = ROOT / "benchmarks" / "figures.json"
_PLOT = "benchmarks/speed.svg"


def on_files(files: Any, config: Any) -> Any:
    """Give the pages the plot, which the README shows from another directory."""
    from mkdocs.structure.files import File  # the tests take the rest of this module without mkdocs

    files.append(File.generated(config, "images/speed.svg", abs_src_path=str(ROOT / _PLOT)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page."""
    markdown = markdown.replace("<!-- options -->", "\n".join(options()))
    markdown = markdown.replace("<!-- figures -->", "\n".join(figures(FIGURES)))
    return re.sub(r"<!-- example: (\w+\.py) -->", lambda found: example(found[1]), markdown)


def options() -> Iterator[str]:
    """All settings as tables, one for each group of ``obsfs mount --help``."""
    group = ""
    for knob in knobs().values():
        if knob.group != group:
            group = knob.group
            yield from ("", f"## {group}", "", "| Setting | Default | |", "|---|---|---|")
        yield f"| `{_flag(knob)}` | {_default(knob)} | {knob.text} |"


def _flag(knob: Knob) -> str:
    if knob.type is bool:
        return f"{knob.flag} / --no-{knob.flag.removeprefix('--')}" if knob.default else knob.flag
    if knob.choices:
        return f"{knob.flag} {{{','.join(knob.choices)}}}"
    return f"{knob.flag} {knob.metavar}"


def _default(knob: Knob) -> str:
    if knob.name == "cache_dir":
        return "`~/.cache/obsfs`"
    if knob.default is None:
        return ""
    if knob.type is bool:
        return "on" if knob.default else "off"
    if knob.metavar == "SIZE":
        return f"`{human(knob.default)}`"
    if knob.metavar == "OCTAL":
        return f"`{knob.default:03o}`"
    return f"`{knob.default:g}s`" if knob.metavar == "TIME" else f"`{knob.default}`"


def figures(path: Path) -> Iterator[str]:
    """The medians of a run of the benchmark; nothing where there is no file."""
    if not path.exists():
        return
    report = json.loads(path.read_text())
    machine = report["machine"]
    yield from ("## A run of the benchmark", "")
    yield f"{machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}."
    yield from ("", "| Case | Link | System | Figure | Median | Values |", "|---|---|---|---|---|---|")
    for one in report["figures"]:
        values = ", ".join(f"{value:.4g}" for value in one["values"])
        cells = (one["case"], one["profile"], one["system"], one["metric"], f"{one['median']:.4g}", values)
        yield f"| {' | '.join(cells)} |"


def example(name: str) -> str:
    """A program of ``docs/examples/`` as a block of code."""
    return f"```python\n{(ROOT / 'docs' / 'examples' / name).read_text()}```"
