"""A run on one page: RUN/report.html and RUN/curves.png, made from the files of the run folder
alone.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from video_mae.extras import require_package
from video_mae.files import draw_or_tell, read_jsonl, write_text
from video_mae.training.journal import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = list[dict[str, Any]]

NUM_PICTURES = 3
NUM_BAD_VIDEOS = 50  # rows of the table; the file has all

# panel: the values of metrics.jsonl that it shows
PANELS = {
    "loss (contrastive: unweighted)": (
        "loss",
        "reconstruction_loss",
        "contrastive_loss",
        "val_loss",
        "probe_loss",
    ),
    "learning rate": ("lr",),
    "accuracy (%)": ("accuracy", "val_top1", "val_top5", "probe_knn", "probe_ridge"),
    "effective rank of features": ("probe_rank",),
    "gradient norm (L2)": ("grad_norm",),
    "throughput (clips/s)": ("clips_per_second",),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 1100px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } th { font-weight: 600; }
th, td { text-align: left; vertical-align: top; padding: .2em 1.2em .2em 0; }
th, td { border-bottom: 1px solid #ddd; }
img { max-width: 100%; height: auto; } td { overflow-wrap: anywhere; }
pre { background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 13px; }
"""


def write_report(run_folder: Path, say: Callable[[str], None] = print) -> Path:
    """Writes report.html and curves.png into a run folder and returns the page's path: images by
    relative links, no scripts.

    Reads metrics.jsonl, config.yaml, reconstructions/*.png, quarantine.jsonl and fallbacks.jsonl;
    any of them may be missing or short.
    Raises: FileNotFoundError where the folder itself is missing.
    """
    if not run_folder.is_dir():
        raise FileNotFoundError(f"{run_folder}: no such run folder")
    lines = read_jsonl(run_folder / "metrics.jsonl")
    bad_videos = read_jsonl(run_folder / "quarantine.jsonl")
    num_fallbacks = len(read_jsonl(run_folder / "fallbacks.jsonl"))
    config_file, config = run_folder / "config.yaml", "(no config.yaml in this folder)"
    if config_file.exists():
        config = config_file.read_text(encoding="utf-8", errors="replace")
    pictures = list((run_folder / "reconstructions").glob("*.png"))
    # by step: a longer number is a larger one
    pictures.sort(key=lambda picture: (len(picture.name), picture.name), reverse=True)
    name = escape(run_folder.resolve().name)
    body = [
        f"<h1>{name}</h1>",
        "<h2>Summary</h2>",
        _table(summarize(lines, len(bad_videos), num_fallbacks)),
        "<h2>Curves</h2>",
        '<p><img src="curves.png" alt="loss, learning rate, gradient norm, throughput and accuracy '
        'by step"></p>',
    ]
    if pictures:
        body.append("<h2>Reconstructions</h2>")
    for picture in pictures[:NUM_PICTURES]:
        title, link = escape(picture.stem), quote(f"reconstructions/{picture.name}")
        body.append(f'<p>{title}</p>\n<p><img src="{link}" alt="{title}"></p>')
    if bad_videos:
        more = ""
        if len(bad_videos) > NUM_BAD_VIDEOS:
            more = f", the last {NUM_BAD_VIDEOS} of {len(bad_videos)}"
        body.append(f"<h2>Videos that could not be decoded{more}</h2>")
        shown = bad_videos[-NUM_BAD_VIDEOS:]
        body.append(_table([(bad["path"], f"{bad['decoder']}: {bad['reason']}") for bad in shown]))
    body += ["<h2>Configuration</h2>", f"<pre>{escape(config)}</pre>"]
    page = run_folder / "report.html"
    write_text(
        page,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n",
    )
    draw_or_tell(run_folder / "curves.png", partial(draw_curves, lines), say)
    return page


def summarize(lines: Lines, num_bad_videos: int, num_fallbacks: int) -> list[tuple[str, str]]:
    """The rows (name, text) of a report's first table, from the lines of metrics.jsonl."""
    training, validation = _with(lines, "loss"), _with(lines, "val_loss")
    bad_videos = ("bad videos", str(num_bad_videos))
    if not training:
        return [("steps", "none logged yet"), bad_videos]
    last, measured = training[-1], _measured(lines)
    rows = [("steps", str(last["step"])), ("epochs", f"{last['epoch']:.2f}")]
    for name, key, form in (
        ("loss", "loss", ".4f"),
        ("reconstruction loss", "reconstruction_loss", ".4f"),
        ("contrastive loss", "contrastive_loss", ".4f"),
        ("training accuracy", "accuracy", ".1%"),
    ):
        if key in measured:
            rows.append((f"final {name}", number(last[key], form)))
    scored = [line for line in validation if line["val_top1"] is not None]
    best = max(scored, key=lambda line: line["val_top1"], default=None)
    for which, line in (("best", best), ("last", validation[-1] if validation else None)):
        if line is not None:
            top1, top5 = number(line["val_top1"], ".1%"), number(line["val_top5"], ".1%")
            text = f"{top1} / {top5} after step {line['step']}, {line['val_videos']} videos"
            rows.append((f"{which} validation, top-1 / top-5", f"{text}, one view"))
    for line in _with(lines, "probe_loss")[-1:]:
        for key, value in line.items():
            if key.startswith("probe_"):
                name = key.removeprefix("probe_").replace("_", " ")
                text = f"{number(value, '.4g')} after step {line['step']}"
                rows.append((f"last probe, {name}", text))
    for name, key, form in (
        ("clips/s", "clips_per_second", ".1f"),
        ("data wait", "data_wait", ".1%"),
        ("MFU", "mfu", ".1%"),
    ):
        known = [line[key] for line in training if line[key] is not None]
        if known:
            rows.append((f"{name}, median", format(statistics.median(known), form)))
    hours = (last["time"] - training[0]["time"]) / 3600
    memory = max(line["memory_gb"] or 0.0 for line in training)
    rows += [
        ("peak memory", f"{memory:.1f} GB"),
        ("hours between the first and the last line", f"{hours:.2f} (pauses included)"),
        ("skipped steps", str(last["skipped_steps"])),
        bad_videos,
    ]
    if num_fallbacks:
        text = f"{num_fallbacks}, named in fallbacks.jsonl"
        rows.append(("videos read by another decoder", text))
    return rows


def draw_curves(lines: Lines, path: Path) -> None:
    """Draws losses, learning rate, gradient norm, throughput with data wait, and accuracies, by
    optimizer step, as a PNG: what there are values of.
    """
    require_package("matplotlib")
    from matplotlib.figure import Figure

    measured = _measured(lines)
    shown = {label: keys for label, keys in PANELS.items() if measured.intersection(keys)}
    columns = max(1, math.ceil(len(shown) / 2))
    # not pyplot: no global state, no display
    figure = Figure(figsize=(5.5 * columns, 7), layout="constrained")
    grid = list(figure.subplots(2, columns, squeeze=False).flat)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    for axes, (label, keys) in zip(grid, shown.items(), strict=False):
        for key in keys:
            if key in measured:
                _plot(axes, lines, key)
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
        if "accuracy" in keys:
            _show_shares(axes)
        if "grad_norm" in keys and any(line.get("grad_norm") for line in lines):
            axes.set_yscale("log")
        if "clips_per_second" in keys:
            axes.set_ylim(bottom=0)
            axes.yaxis.label.set_color("C0")
            wait = axes.twinx()
            _plot(wait, lines, "data_wait", "C1")
            wait.set_ylabel("step time spent waiting for data (%)", color="C1")
            _show_shares(wait)
    if not shown:
        figure.suptitle("no step logged yet")
    figure.savefig(path, format="png", dpi=100)


def _plot(axes: "Axes", lines: Lines, key: str, color: str | None = None) -> None:
    """One curve; null (a value that was not finite) leaves a gap."""
    known = _with(lines, key)
    values = [math.nan if line[key] is None else line[key] for line in known]
    axes.plot(
        [line["step"] for line in known],
        values,
        label=key.replace("_", " ").replace("val ", "validation "),
        color=color,
        marker="." if len(known) < 40 else "",
        linewidth=1.2,
    )


def _show_shares(axes: "Axes") -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def _with(lines: Lines, key: str) -> Lines:
    """The lines that have a value there: `loss` is of training, `val_loss` of validation."""
    return [line for line in lines if key in line]


def _measured(lines: Lines) -> set[str]:
    """What there are values of; without a contrastive loss the other one is the loss."""
    keys = set[str]().union(*lines)
    if not any(line.get("contrastive_loss") for line in lines):
        keys -= {"reconstruction_loss", "contrastive_loss"}
    return keys


def _table(rows: list[tuple[str, str]]) -> str:
    lines = [f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows]
    return "\n".join(["<table>", *lines, "</table>"])
