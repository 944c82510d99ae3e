"""The plot of the README, from the results of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_OURS, _OTHERS, _FLOOR = "#0072b2", "#bbbbbb", "#e69f00"
_FLOORS = ("ext4", "boto3")
_CASES = (
    ("cold_load", "obs", "Cold: from_pretrained, 1 GB in 4 shards"),
    ("cold_dd", "obs", "Cold: 2 GiB in sequence"),
    ("warm_load", "lan", "Warm: from_pretrained, from the SSD"),
)


def draw(results: dict[str, Any], output: Path) -> None:
    """One panel for each case that was measured: seconds of each system, median and spread. No file without any."""
    panels = []
    for case, profile, title in _CASES:
        found = [
            figure
            for figure in results["figures"]
            if (figure["case"], figure["profile"], figure["metric"]) == (case, profile, "seconds")
        ]
        if found:
            panels.append((title, sorted(found, key=lambda figure: float(figure["median"]))))
    if not panels:
        return
    drawing = Figure(figsize=(9, sum(0.42 * len(found) + 0.9 for _, found in panels)), layout="constrained")
    axes = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=[len(found) + 1 for _, found in panels])
    for axis, (title, found) in zip(axes[:, 0], panels, strict=True):
        names = [f"{figure['system']}{_NOTES.get(figure['system'], '')}" for figure in found]
        medians = [figure["median"] for figure in found]
        below = [figure["median"] - min(figure["values"]) for figure in found]
        above = [max(figure["values"]) - figure["median"] for figure in found]
        bars = axis.barh(names, medians, xerr=(below, above), color=[_colour(figure["system"]) for figure in found])
        axis.bar_label(bars, [f"{median:.2f} s" for median in medians], padding=6)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("seconds, less is better")
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(output)


_NOTES = {
    "boto3": ", 16 threads, to nowhere",
    "ext4": ", the local disk itself",
    "s5cmd": ", download, then load",
    "obstore": ", download, then load",
}


def _colour(system: str) -> str:
    if system == "obsfs":
        return _OURS
    return _FLOOR if system in _FLOORS else _OTHERS
