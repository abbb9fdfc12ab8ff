"""A run on one page: RUN/report.html and RUN/curves.png, made from the files of the run folder
alone.
"""

import re
import statistics
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from video_mae.files import draw_or_tell, read_jsonl, unicode_text

NUM_PICTURES = 3
NUM_BAD_VIDEOS = 50  # rows of the table; the file has all

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; } th { font-weight: 600; }
th, td { text-align: left; vertical-align: top; padding: .2em 1.2em .2em 0; border-bottom: 1px solid #ddd; }
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
    lines, bad_videos = (
        read_jsonl(run_folder / "metrics.jsonl"),
        read_jsonl(run_folder / "quarantine.jsonl"),
    )
    num_fallbacks = len(read_jsonl(run_folder / "fallbacks.jsonl"))
    config_file = run_folder / "config.yaml"
    config = (
        config_file.read_text(encoding="utf-8", errors="replace")
        if config_file.exists()
        else "(no config.yaml in this folder)"
    )
    pictures = sorted((run_folder / "reconstructions").glob("*.png"), key=_step_of, reverse=True)[
        :NUM_PICTURES
    ]
    name = run_folder.resolve().name
    body = [
        f"<h1>{escape(name)}</h1>",
        "<h2>Summary</h2>",
        _table(summarize(lines, len(bad_videos), num_fallbacks)),
        "<h2>Curves</h2>",
        '<p><img src="curves.png" alt="loss, learning rate, gradient norm, throughput and accuracy by step"></p>',
    ]
    if pictures:
        body.append("<h2>Reconstructions</h2>")
    for picture in pictures:
        body.append(
            f'<p>{escape(picture.stem)}</p>\n<p><img src="reconstructions/{quote(picture.name)}" alt="{escape(picture.stem)}"></p>'
        )
    if bad_videos:
        more = (
            f", the last {NUM_BAD_VIDEOS} of {len(bad_videos)}"
            if len(bad_videos) > NUM_BAD_VIDEOS
            else ""
        )
        body.append(f"<h2>Videos that could not be decoded{more}</h2>")
        body.append(
            _table(
                [
                    (entry["path"], f"{entry['decoder']}: {entry['reason']}")
                    for entry in bad_videos[-NUM_BAD_VIDEOS:]
                ]
            )
        )
    body += ["<h2>Configuration</h2>", f"<pre>{escape(config)}</pre>"]
    page = run_folder / "report.html"
    page.write_text(
        unicode_text(
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
            f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
        ),
        encoding="utf-8",
    )
    draw_or_tell(run_folder / "curves.png", partial(draw_curves, lines), say)
    return page


def summarize(
    lines: list[dict[str, Any]], num_bad_videos: int, num_fallbacks: int
) -> list[tuple[str, str]]:
    """The rows (name, text) of a report's first table, from the lines of metrics.jsonl."""
    training, validation = _split(lines)
    if not training:
        return [("steps", "none logged yet"), ("bad videos", str(num_bad_videos))]
    last = training[-1]
    rows = [
        ("steps", str(last["step"])),
        ("epochs", f"{last['epoch']:.2f}"),
        ("final loss", _number(last["loss"], ".4f")),
    ]
    if _any(training, "contrastive_loss"):
        rows += [
            ("final reconstruction loss", _number(last["reconstruction_loss"], ".4f")),
            ("final contrastive loss", _number(last["contrastive_loss"], ".4f")),
        ]
    if "accuracy" in last:
        rows.append(("final training accuracy", _number(last["accuracy"], ".1%")))
    best = max(
        (line for line in validation if line["val_top1"] is not None),
        key=lambda line: line["val_top1"],
        default=None,
    )
    for name, line in (("best", best), ("last", validation[-1] if validation else None)):
        if line is not None:
            accuracies = f"{_number(line['val_top1'], '.1%')} / {_number(line['val_top5'], '.1%')}"
            rows.append(
                (
                    f"{name} validation, top-1 / top-5",
                    f"{accuracies} after step {line['step']}, {line['val_videos']} videos, one view",
                )
            )
    rows += [
        ("clips/s, median", _median(training, "clips_per_second", ".1f")),
        ("data wait, median", _median(training, "data_wait", ".1%")),
    ]
    if _any(training, "mfu"):
        rows.append(("MFU, median", _median(training, "mfu", ".1%")))
    rows += [
        ("peak memory", _number(max(line["memory_gb"] or 0.0 for line in training), ".1f") + " GB"),
        (
            "hours between the first and the last line",
            f"{(last['time'] - training[0]['time']) / 3600:.2f} (pauses included)",
        ),
        ("skipped steps", str(last["skipped_steps"])),
        ("bad videos", str(num_bad_videos)),
    ]
    if num_fallbacks:
        rows.append(
            ("videos read by another decoder", f"{num_fallbacks}, named in fallbacks.jsonl")
        )
    return rows


def draw_curves(lines: list[dict[str, Any]], path: Path) -> None:
    """Draws losses, learning rate, gradient norm, throughput with data wait, and accuracies, by
    optimizer step, as a PNG.
    """
    training, validation = _split(lines)
    has_accuracy = bool(validation) or _any(training, "accuracy")
    # not pyplot: no global state, no display
    figure = Figure(figsize=(16 if has_accuracy else 11, 7), layout="constrained")
    panels = figure.subplots(2, 3 if has_accuracy else 2, squeeze=False)
    (loss, lr), (grad_norm, speed) = panels[:, :2]
    _plot(loss, training, "loss", "total", "C0")
    if _any(training, "contrastive_loss"):
        _plot(loss, training, "reconstruction_loss", "reconstruction", "C1")
        _plot(loss, training, "contrastive_loss", "contrastive (before its weight)", "C2")
    if validation:
        _plot(loss, validation, "val_loss", "validation", "C3")
    if len(loss.lines) > 1:
        loss.legend()
    _plot(lr, training, "lr", "learning rate", "C0")
    _plot(grad_norm, training, "grad_norm", "gradient norm", "C0")
    _plot(speed, training, "clips_per_second", "clips/s", "C0")
    wait = speed.twinx()
    _plot(wait, training, "data_wait", "data wait", "C1")
    for axes, label in (
        (loss, "loss (mean of an interval)"),
        (lr, "learning rate"),
        (grad_norm, "gradient norm (L2)"),
        (speed, "throughput (clips/s)"),
    ):
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.grid(alpha=0.3)
    if _any(training, "grad_norm"):
        grad_norm.set_yscale("log")
    speed.set_ylim(bottom=0)
    speed.yaxis.label.set_color("C0")
    wait.set_ylabel("step time spent waiting for data (%)", color="C1")
    wait.set_ylim(0, 1)
    wait.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    if has_accuracy:
        _draw_accuracy(panels[0, 2], training, validation)
        panels[1, 2].set_axis_off()
    if not training:
        figure.suptitle("no step logged yet")
    figure.savefig(path, format="png", dpi=100)


def _draw_accuracy(
    axes: Axes, training: list[dict[str, Any]], validation: list[dict[str, Any]]
) -> None:
    for lines, key, label, color in (
        (training, "accuracy", "training, top-1", "C0"),
        (validation, "val_top1", "validation, top-1", "C3"),
        (validation, "val_top5", "validation, top-5", "C4"),
    ):
        if lines and key in lines[0]:
            _plot(axes, lines, key, label, color)
    axes.set(xlabel="optimizer step", ylabel="accuracy (%)", ylim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.grid(alpha=0.3)
    axes.legend()


def _split(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines about training, and those about validation."""
    return [line for line in lines if "loss" in line], [
        line for line in lines if "val_loss" in line
    ]


def _any(lines: list[dict[str, Any]], key: str) -> bool:
    """Whether a line has a value there that is neither zero nor unknown."""
    return any(key in line and line[key] for line in lines)


def _plot(axes: Axes, lines: list[dict[str, Any]], key: str, label: str, color: str) -> None:
    """One curve; null (a value that was not finite) leaves a gap."""
    values = [float("nan") if line[key] is None else line[key] for line in lines]
    axes.plot(
        [line["step"] for line in lines],
        values,
        label=label,
        color=color,
        marker="." if len(lines) < 40 else "",
        linewidth=1.2,
    )


def _table(rows: list[tuple[str, str]]) -> str:
    return (
        "<table>\n"
        + "\n".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows
        )
        + "\n</table>"
    )


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)


def _median(lines: list[dict[str, Any]], key: str, form: str) -> str:
    known = [line[key] for line in lines if line[key] is not None]
    return format(statistics.median(known), form) if known else "unknown"


def _step_of(picture: Path) -> tuple[int, str]:
    """Orders pictures by the number in their name, however many zeros it has."""
    number = re.search(r"\d+", picture.stem)
    return int(number.group()) if number else -1, picture.name
