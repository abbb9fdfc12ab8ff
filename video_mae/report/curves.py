"""Curves of metrics.jsonl, of a run or of several, as plotly takes them."""

import math
from collections.abc import Sequence
from html import escape
from statistics import fmean

from video_mae.files import JsonObject
from video_mae.report.record import Lines, RunRecord

MOST_POINTS = 1000  # of a curve; more lines are averaged in groups
FEW_POINTS = 12  # which are shown as points, too
# told apart on white and on black, by most people who see fewer colours as well
COLORS = ("#3b82f6", "#f08c00", "#12a150", "#e5484d", "#8e4ec6", "#0e9aa7", "#a1742d", "#7b8494")
DASHES = ("solid", "dot", "dash", "dashdot", "longdash")


def draw_curves(runs: Sequence[RunRecord], keys: Sequence[str]) -> list[JsonObject]:
    """The curves of those keys of metrics.jsonl that there are values of: a colour a key, or, of
    several runs, a colour a run and a dash a key.
    """
    curves = list[JsonObject]()
    named = set[str]()
    for place, run in enumerate(runs):
        known = [key for key in keys if _is_told(run.lines, key)]
        for number, key in enumerate(known):
            name = _name(key)
            curve = {**_curve(run.lines, key), "name": name, "legendgroup": key}
            if len(runs) > 1:
                curve["hovertemplate"] = f"%{{y}}<extra>{escape(run.name)}: {name}</extra>"
                curve["showlegend"] = key not in named
                dash = DASHES[number % len(DASHES)]
                curve["line"] = {"color": COLORS[place % len(COLORS)], "dash": dash}
            named.add(key)
            curves.append(curve)
    return curves


def _curve(lines: Lines, key: str) -> JsonObject:
    """Means over groups of lines; null, a value that was not finite, leaves a gap."""
    known = [line for line in lines if key in line]
    size = math.ceil(len(known) / MOST_POINTS)
    x, y = list[int](), list[float | None]()
    for start in range(0, len(known), size):
        group = known[start : start + size]
        values = [line[key] for line in group]
        x.append(group[-1]["step"])
        y.append(None if None in values else fmean(values))
    mode = "lines+markers" if len(known) < FEW_POINTS else "lines"
    return {"type": "scatter", "x": x, "y": y, "mode": mode}


def _is_told(lines: Lines, key: str) -> bool:
    """Whether there are values; without a contrastive loss the other one is the loss, and no step
    that was skipped is no news.
    """
    if key.endswith("reconstruction_loss"):
        key = key.replace("reconstruction", "contrastive")
    if key.endswith(("contrastive_loss", "skipped_steps")):
        return any(line.get(key) for line in lines)
    return any(line.get(key) is not None for line in lines)


def _name(key: str) -> str:
    words = key.removesuffix("_ms").replace("_", " ").replace("top", "top-")
    return words.replace("val ", "validation ").replace(" ema ", " of averages ")
