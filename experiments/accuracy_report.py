"""The table, the sentences and the pictures of the experiment, all made from the lines of
results.jsonl.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from shapes import SHAPES

FROZEN = ("linear", "attentive", "nearest neighbours")
COLOURS = {"plain": "tab:blue", "contrastive": "tab:orange", "random": "tab:gray"}
MARKS = {
    "fine-tuned": ("o", "-"),
    "linear": ("o", "-"),
    "attentive": ("s", "--"),
    "nearest neighbours": ("^", ":"),
}

# of (method, arm) by number of labels, one a seed
Accuracies = dict[tuple[str, str], dict[int, list[float]]]


def write_report(folder: Path, lines: Sequence[dict[str, Any]]) -> str:
    """Writes table.md, accuracy.png and curves.png into the folder and returns the table with its
    sentences.
    """
    first, accuracies = lines[0], accuracies_of(lines)
    names = _names(first["config"])
    text = f"{_table(first['config'], accuracies, names)}\n{findings(accuracies, names)}"
    (folder / "table.md").write_text(text)
    _draw_accuracies(folder / "accuracy.png", first["config"], accuracies, names)
    _draw_curves(
        folder / "curves.png", [line for line in lines[1:] if line["kind"] == "pretrain"], names
    )
    return text


def accuracies_of(lines: Sequence[dict[str, Any]]) -> Accuracies:
    """All accuracies of results.jsonl, seeds and numbers of labels in order."""
    accuracies: Accuracies = {}
    for line in sorted(
        (line for line in lines[1:] if line["kind"] != "pretrain"),
        key=lambda line: (line["labels"], line["seed"]),
    ):
        for method, value in line["top1"].items():
            accuracies.setdefault((method, line["arm"]), {}).setdefault(line["labels"], []).append(
                value
            )
    return accuracies


def findings(accuracies: Accuracies, names: dict[str, str]) -> str:
    """What the table says, in sentences, whatever that is."""
    margin, labels = largest_margin(accuracies, ("fine-tuned", "plain"), ("fine-tuned", "random"))
    pretrained, scratch = (
        fmean(accuracies["fine-tuned", arm][labels]) for arm in ("plain", "random")
    )
    seeds = len(accuracies["fine-tuned", "plain"][labels])
    sentences = [
        f"Largest margin of fine-tuning from pretraining ({names['plain']}) over training from scratch: {100 * margin:+.1f} "
        f"points at {labels} labels ({pretrained:.1%} against {scratch:.1%}, mean of {seeds} seeds)."
    ]
    for method in FROZEN:
        counts = [
            labels
            for labels, margin in margins(accuracies, (method, "plain"), (method, "random")).items()
            if margin > 0
        ]
        total = len(accuracies[method, "plain"])
        sentences.append(
            f"Frozen, {method}: pretrained ({names['plain']}) features are ahead of random ones at {len(counts)} of {total} "
            "numbers of labels."
        )
    gains = margins(accuracies, ("fine-tuned", "contrastive"), ("fine-tuned", "plain"))
    sentences.append(
        f"The contrastive term ({names['contrastive']} against {names['plain']}), fine-tuned: "
        + ", ".join(f"{100 * gain:+.1f} points at {labels}" for labels, gain in gains.items())
        + "."
    )
    return "\n".join(f"- {sentence}" for sentence in sentences) + "\n"


def margins(
    accuracies: Accuracies, ours: tuple[str, str], theirs: tuple[str, str]
) -> dict[int, float]:
    """Difference of the means of two rows by number of labels."""
    return {
        labels: fmean(values) - fmean(accuracies[theirs][labels])
        for labels, values in accuracies[ours].items()
    }


def largest_margin(
    accuracies: Accuracies, ours: tuple[str, str], theirs: tuple[str, str]
) -> tuple[float, int]:
    """(margin, number of labels) where the first row is furthest ahead of the second, or least
    behind it.
    """
    return max((margin, labels) for labels, margin in margins(accuracies, ours, theirs).items())


def _names(config: dict[str, Any]) -> dict[str, str]:
    return {
        "plain": "lambda 0",
        "contrastive": f"lambda {config['contrastive_weight']:g}, tau {config['temperature']:g}",
        "random": "random weights",
    }


def _table(config: dict[str, Any], accuracies: Accuracies, names: dict[str, str]) -> str:
    counts = sorted(config["labels"])
    unseen = (
        "photographs that nothing was trained on"
        if config["scored_on"] == "validation"
        else "the two tuning photographs"
    )
    rows = [
        f"Top-1 accuracy in %, mean (each seed), on {config['scored_clips']} clips of {unseen}; chance is {100 / len(SHAPES):g}. "
        f"Pretraining: {config['steps']} steps of {config['batch']} clips; fine-tuning: {config['finetune_steps']} steps of "
        f"{config['batch']}.",
        "",
        "| | encoder | " + " | ".join(f"{count} labels" for count in counts) + " |",
        "|---" * (len(counts) + 2) + "|",
    ]
    for method in ("fine-tuned", *FROZEN):
        for arm in COLOURS:
            what = method if method == "fine-tuned" else f"frozen, {method}"
            cells = [
                f"**{100 * fmean(values):.1f}** ({', '.join(f'{100 * value:.1f}' for value in values)})"
                for count in counts
                for values in [accuracies[method, arm][count]]
            ]
            name = "from scratch" if (method, arm) == ("fine-tuned", "random") else names[arm]
            rows.append(f"| {what} | {name} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _draw_accuracies(
    path: Path, config: dict[str, Any], accuracies: Accuracies, names: dict[str, str]
) -> None:
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_rows(
        left,
        "whole model trained",
        ("fine-tuned",),
        config,
        accuracies,
        {**names, "random": "from scratch"},
    )
    _draw_rows(right, "encoder frozen", FROZEN, config, accuracies, names)
    left.set_ylim(bottom=0)
    left.set_ylabel("top-1 accuracy on unseen photographs")
    figure.savefig(path, dpi=120)


def _draw_rows(
    axes: Axes,
    title: str,
    methods: Sequence[str],
    config: dict[str, Any],
    accuracies: Accuracies,
    names: dict[str, str],
) -> None:
    counts = sorted(config["labels"])
    for method in methods:
        marker, style = MARKS[method]
        for arm, colour in COLOURS.items():
            values = accuracies[method, arm]
            label = names[arm] if len(methods) == 1 else f"{method}, {names[arm]}"
            axes.plot(
                counts,
                [fmean(values[count]) for count in counts],
                style,
                color=colour,
                marker=marker,
                label=label,
            )
            axes.scatter(
                [count for count in counts for _ in values[count]],
                [value for count in counts for value in values[count]],
                marker=marker,
                s=12,
                color=colour,
                alpha=0.4,
            )
    axes.axhline(1 / len(SHAPES), color="black", linewidth=0.8, linestyle="--", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("labelled clips")
    axes.set_title(f"{title}; lines: means, points: seeds")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _draw_curves(path: Path, lines: Sequence[dict[str, Any]], names: dict[str, str]) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for line in lines:
        step, reconstruction, contrastive = zip(*line["curve"], strict=True)
        left.plot(step, reconstruction, color=COLOURS[line["arm"]], label=names[line["arm"]])
        if line["arm"] == "contrastive":
            right.plot(step, contrastive, color=COLOURS[line["arm"]], label=names[line["arm"]])
    left.set_yscale("log")
    for axes, title in (
        (left, "reconstruction loss"),
        (right, "contrastive loss, before its weight"),
    ):
        axes.set_title(title)
        axes.set_xlabel("step of pretraining")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
