"""Plots of figures by matplotlib, in one self-contained HTML file or one PNG."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from obsfs.bench.measure import Figure
from obsfs.errors import UsageError
from obsfs.extras import remedy
from obsfs.text import to_json, visible

KINDS = (".html", ".png")
_COLD, _WARM = "#0072b2", "#e69f00"
"""Two colours of Okabe and Ito's, which most colour-blind people tell apart: https://jfly.uni-koeln.de/color/"""
_MAX_TITLE = 80
"""Characters that fit over a drawing."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0 2rem; } th, td { padding: .3rem 1.5rem .3rem 0; text-align: right; }
th { border-bottom: 1px solid #999; } th:first-child, td:first-child { text-align: left; } svg { max-width: 100%; }
"""


def require(path: Path) -> None:
    """Raises UsageError when a report of this name could not be written later."""
    if path.suffix not in KINDS:
        raise UsageError(f"--report {path}", f"its name must end in {' or '.join(KINDS)}")
    if not path.parent.is_dir():
        raise UsageError(f"--report {path}", f"there is no directory {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "matplotlib, which draws the report, is missing", f"{remedy('bench')}, or --no-report"
        ) from None


def write(path: Path, title: str, facts: Mapping[str, object], figures: Sequence[Figure]) -> None:
    """Write the report, and a JSON file beside it. `facts` say what was measured, and where. Raises UsageError."""
    drawing = draw(title if path.suffix == ".png" else "", figures)
    try:
        path.with_suffix(".json").write_text(to_json(document(facts, figures), indent=2) + "\n")
        if path.suffix == ".png":
            drawing.savefig(path, dpi=150)
            return
        image = io.StringIO()
        drawing.savefig(image, format="svg")
        path.write_text(_page(title, facts, figures, image.getvalue()), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}", error.strerror or str(error)) from None


def document(facts: Mapping[str, object], figures: Sequence[Figure]) -> dict[str, object]:
    """The same, for JSON."""
    return {**facts, "figures": [figure._asdict() for figure in figures]}


def _page(title: str, facts: Mapping[str, object], figures: Sequence[Figure], image: str) -> str:
    described = "".join(
        f"<tr><td>{name.replace('_', ' ')}</td><td>{_escape(value)}</td></tr>" for name, value in facts.items()
    )
    rows = "".join(
        f"<tr><td>{_escape(figure.title)}</td>"
        f"<td>{number(figure.cold)} {figure.unit}</td><td>{number(figure.warm)} {figure.unit}</td></tr>"
        for figure in figures
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{_escape(title)}</title>'
        f"<style>{_STYLE}</style>\n<h1>{_escape(title)}</h1>\n<table>{described}</table>\n"
        f"{image[image.index('<svg') :]}\n<table><tr><th></th><th>cold</th><th>warm</th></tr>{rows}</table></html>\n"
    )


def _escape(text: object) -> str:
    return html.escape(visible(text))


def draw(title: str, figures: Sequence[Figure]) -> Any:
    """A matplotlib figure: one panel for each unit, a cold and a warm bar for each case."""
    from matplotlib.figure import Figure as Drawing

    units = list(dict.fromkeys(figure.unit for figure in figures))
    groups = [[figure for figure in figures if figure.unit == unit] for unit in units]
    drawing = Drawing(figsize=(9, 1.2 + 0.75 * len(figures) + 0.6 * len(groups)), layout="constrained")
    panels = drawing.subplots(len(groups), 1, squeeze=False, height_ratios=[len(group) + 0.6 for group in groups])
    for panel, unit, group in zip(panels[:, 0], units, groups, strict=True):
        for shift, colour, name in ((-0.2, _COLD, "cold"), (0.2, _WARM, "warm")):
            values = [getattr(figure, name) for figure in group]
            places = [index + shift for index in range(len(group))]
            bars = panel.barh(places, values, height=0.36, color=colour, label=name)
            panel.bar_label(bars, [number(value) for value in values], padding=4)
        panel.set_yticks(range(len(group)), [figure.title for figure in group])
        panel.set_ylim(len(group) - 0.5, -0.5)
        panel.set_xlabel("ms, less is better" if unit == "ms" else f"{unit}, more is better")
        panel.margins(x=0.14)
        panel.spines[["top", "right"]].set_visible(False)
    drawing.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    if title:
        drawing.suptitle(visible(title, _MAX_TITLE), x=0.02, ha="left", parse_math=False)
    return drawing


def number(value: float) -> str:
    """Three digits or so, for people."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
