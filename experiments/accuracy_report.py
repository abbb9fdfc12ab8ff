"""The table, the sentences and the pictures of the experiment, all made from the lines of
results.jsonl.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from clips import SUBJECTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

METHODS = ("fine-tuned", "linear", "nearest neighbours")
COLOURS = {
    "random": "tab:gray",
    "pixels": "tab:blue",
    "pixels_longer": "navy",
    "pixels_contrastive": "tab:cyan",
    "features": "tab:red",
    "features_contrastive": "tab:orange",
    "ema": "tab:olive",
    "ema_contrastive": "tab:green",
}
TWINS = tuple((name, f"{name}_contrastive") for name in ("pixels", "features", "ema"))

# of (method, arm) by number of labels, one a seed of pretraining and of fine-tuning
Accuracies = dict[tuple[str, str], dict[int, list[float]]]


def write_report(folder: Path, lines: Sequence[dict[str, Any]]) -> str:
    """Writes table.md, accuracy.png and curves.png into the folder and returns the table with its
    sentences.
    """
    first, accuracies = lines[0], accuracies_of(lines)
    names = _names(first["config"])
    text = f"{_table(lines, accuracies, names)}\n{findings(accuracies, names)}"
    (folder / "table.md").write_text(text)
    _draw_accuracies(folder / "accuracy.png", first["config"], accuracies, names)
    pretrained = [line for line in lines[1:] if line["kind"] == "pretrain"]
    _draw_curves(folder / "curves.png", pretrained, names)
    return text


def accuracies_of(lines: Sequence[dict[str, Any]]) -> Accuracies:
    """All accuracies that are figures, seeds and numbers of labels in order."""
    accuracies: Accuracies = {}
    figures = [line for line in lines[1:] if line["kind"] in ("finetune", "probe")]
    for line in sorted(figures, key=lambda line: (line["labels"], line["weights"], line["seed"])):
        for method, value in line["top1"].items():
            of_arm = accuracies.setdefault((method, line["arm"]), {})
            of_arm.setdefault(line["labels"], []).append(value)
    return accuracies


def findings(accuracies: Accuracies, names: dict[str, str]) -> str:
    """What the table says, in sentences, whatever that is."""
    scratch = "fine-tuned", "random"
    largest = {
        arm: max(margins(accuracies, ("fine-tuned", arm), scratch).values())
        for arm in names
        if arm != "random"
    }
    best = max(largest, key=lambda arm: largest[arm])
    sentences = [
        f"Fine-tuned from {names[best]}, the arm with the largest margin, against from scratch: "
        + _differences(accuracies, ("fine-tuned", best), scratch)
    ]
    pairs = [("Targets of features", "features", name) for name in ("pixels", "pixels_longer")]
    pairs += [("The contrastive term", contrastive, plain) for plain, contrastive in TWINS]
    for what, ours, theirs in pairs:
        for method in METHODS if {ours, theirs} <= set(names) else ():
            sentences.append(
                f"{what} ({names[ours]} against {names[theirs]}), {method}: "
                + _differences(accuracies, (method, ours), (method, theirs))
            )
    return "\n".join(f"- {sentence}." for sentence in sentences) + "\n"


def margins(
    accuracies: Accuracies, ours: tuple[str, str], theirs: tuple[str, str]
) -> dict[int, float]:
    """Difference of the means of two rows by number of labels."""
    return {
        labels: fmean(values) - fmean(accuracies[theirs][labels])
        for labels, values in accuracies[ours].items()
    }


def standard_error(values: Sequence[float]) -> float:
    """Of the mean over seeds; 0 for one."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _differences(accuracies: Accuracies, ours: tuple[str, str], theirs: tuple[str, str]) -> str:
    """Points at every number of labels, with the standard error of the difference."""
    cells = []
    for labels, margin in margins(accuracies, ours, theirs).items():
        errors = [standard_error(accuracies[row][labels]) for row in (ours, theirs)]
        error = (errors[0] ** 2 + errors[1] ** 2) ** 0.5
        cells.append(f"{100 * margin:+.1f} +- {100 * error:.1f} points at {labels}")
    return ", ".join(cells)


def _names(config: dict[str, Any]) -> dict[str, str]:
    pixel, feature = (
        "lambda {:g}, tau {:g}".format(*config[name])
        for name in ("pixel_contrast", "feature_contrast")
    )
    names = {
        "random": "random weights",
        "pixels": "pixels",
        "pixels_longer": "pixels, twice the steps",
        "pixels_contrastive": f"pixels, {pixel}",
        "features": "features",
        "features_contrastive": f"features, {feature}",
        "ema": "moving average",
        "ema_contrastive": f"moving average, {feature}",
    }
    return {arm: name for arm, name in names.items() if arm in ("random", *config["arms"])}


def _table(lines: Sequence[dict[str, Any]], accuracies: Accuracies, names: dict[str, str]) -> str:
    config = lines[0]["config"]
    counts = sorted(accuracies["fine-tuned", "random"])
    classes = len(SUBJECTS[config["subject"]].classes)
    unseen = "validation" if config["scored_on"] == "validation" else "tuning"
    rows = [
        f"Top-1 accuracy in %, mean (standard error over seeds), on "
        f"{classes * config['scored_per_class']} clips of {config['subject']}, {unseen} "
        f"photographs; chance is {100 / classes:.1f}. Pretraining: {config['steps']} steps of "
        f"{config['batch']} clips, for targets of features besides those of their teacher, pixels; "
        f"fine-tuning: the steps of training from scratch, of {config['finetune_batch']} clips.",
        "",
        "| | encoder | " + " | ".join(f"{count} labels" for count in counts) + " |",
        "|---" * (len(counts) + 2) + "|",
    ]
    for method in METHODS:
        for arm, name in names.items():
            cells = []
            for count in counts:
                values = accuracies[method, arm][count]
                error = 100 * standard_error(values)
                cells.append(f"**{100 * fmean(values):.1f}** ({error:.1f}, {len(values)} seeds)")
            if (method, arm) == ("fine-tuned", "random"):
                name = "from scratch"
            what = method if method == "fine-tuned" else f"frozen, {method}"
            rows.append(f"| {what} | {name} | {' | '.join(cells)} |")
    chosen = {
        line["labels"]: f"{line['steps']} steps, {line['lr']:g} at {line['labels']}"
        for line in lines[1:]
        if (line["kind"], line["arm"]) == ("finetune", "random")
    }
    best = ", ".join(chosen[count] for count in counts)
    rows += ["", f"From scratch as was best on the tuning photographs: {best} labels."]
    return "\n".join(rows) + "\n"


def _draw_accuracies(
    path: Path, config: dict[str, Any], accuracies: Accuracies, names: dict[str, str]
) -> None:
    figure = Figure(figsize=(15, 5), layout="constrained")
    panels = figure.subplots(1, len(METHODS), sharey=True)
    for axes, method in zip(panels, METHODS, strict=True):
        _draw_rows(axes, method, config, accuracies, names)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("top-1 accuracy on unseen photographs")
    figure.savefig(path, dpi=110)


def _draw_rows(
    axes: Axes,
    method: str,
    config: dict[str, Any],
    accuracies: Accuracies,
    names: dict[str, str],
) -> None:
    counts = sorted(accuracies[method, "random"])
    for arm in names:
        values = accuracies[method, arm]
        means = [fmean(values[count]) for count in counts]
        errors = [standard_error(values[count]) for count in counts]
        name = "from scratch" if (method, arm) == ("fine-tuned", "random") else names[arm]
        style = {"color": COLOURS[arm], "marker": "o", "capsize": 3, "label": name}
        axes.errorbar(counts, means, errors, **style)
    chance = 1 / len(SUBJECTS[config["subject"]].classes)
    axes.axhline(chance, color="black", linewidth=0.8, linestyle="--", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("labelled clips")
    axes.set_title("whole model trained" if method == "fine-tuned" else f"frozen, {method}")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _draw_curves(path: Path, lines: Sequence[dict[str, Any]], names: dict[str, str]) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for line in lines:
        if line["weights"] == 0 and line["arm"] in names:
            step, reconstruction, contrastive = zip(*line["curve"], strict=True)
            style = {"color": COLOURS[line["arm"]], "label": names[line["arm"]]}
            left.plot(step, reconstruction, **style)
            if line["arm"].endswith("contrastive"):
                right.plot(step, contrastive, **style)
    left.set_yscale("log")
    for axes, title in (
        (left, "reconstruction loss, of pixels or features"),
        (right, "contrastive loss, before its weight"),
    ):
        axes.set_title(title)
        axes.set_xlabel("step of pretraining")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
