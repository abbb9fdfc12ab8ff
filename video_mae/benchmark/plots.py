"""The plots of the kernels' results: the roofline, and attention over its tokens."""

from collections import defaultdict
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from video_mae.benchmark.record import Results

MARKERS = "osD^v<>P*Xph"  # of providers
PANELS = {"ms": "p50", "TFLOP/s": "tflops", "peak MB": "peak_mb"}

Figures = dict[str, Any]
"""Of a record (see `Record.figures`)."""


def draw_plots(found: Sequence[Results], file: Path) -> list[Path]:
    """NAME_roofline.png and NAME_tokens.png beside NAME.jsonl, each where there are right results
    of kernels for it. found: newest first.
    """
    points: list[Figures] = []
    for results in found:
        for record in results.records:
            if record.benchmark == "kernels" and record.times and not record.measures["gate"]:
                points.append(record.figures())
    drawn = {"roofline": _roofline(found[0].header, points), "tokens": _over_tokens(points)}
    paths: list[Path] = []
    for noun, figure in drawn.items():
        if figure is not None:
            paths.append(file.with_name(f"{file.stem}_{noun}.png"))
            figure.savefig(paths[-1], dpi=120)
    return paths


def _roofline(header: Figures, points: Sequence[Figures]) -> Figure | None:
    """TFLOP/s over operations a byte, under the ceilings that the newest run measured; every right
    result in its dtype.
    """
    points = [p for p in points if p["dtype"] == header.get("dtype") and p["flops"]]
    if not points:
        return None
    for p in points:
        p["intensity"] = p["flops"] / p["bytes"]
    flops, bytes_ = (header["ceilings"][f"{noun}_per_second"] for noun in ("flops", "bytes"))
    corner = flops / bytes_
    intensities = [corner, *map(itemgetter("intensity"), points)]
    edges = [min(intensities) / 2, corner, max(intensities) * 2]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    label = f"measured ceilings: {flops / 1e12:.4g} TFLOP/s, {bytes_ / 1e12:.3g} TB/s"
    axes.loglog(edges, [min(flops, x * bytes_) / 1e12 for x in edges], color="black", label=label)
    for number, op in enumerate(dict.fromkeys(map(itemgetter("op"), points))):
        for is_ours, marker, fill in ((True, "D", "full"), (False, "o", "none")):
            chosen = [p for p in points if p["op"] == op and p["is_ours"] == is_ours]
            axes.plot(
                [p["intensity"] for p in chosen],
                [p["tflops"] for p in chosen],
                marker,
                color=f"C{number}",
                fillstyle=fill,
                label=f"{op}, {'ours' if is_ours else 'others'}",
            )
    axes.set(
        title=f"{header['device']}, {header['dtype']}",
        xlabel="least operations a least byte",
        ylabel="TFLOP/s of the operations that are needed",
    )
    axes.legend(fontsize=7)
    return figure


def _over_tokens(points: Sequence[Figures]) -> Figure | None:
    """Milliseconds, TFLOP/s and peak memory of attention over its tokens, for the heads and batch
    that were measured at most lengths.
    """
    families: dict[str, list[Figures]] = defaultdict(list)
    for p in sorted((p for p in points if p["op"] == "attention"), key=itemgetter("tokens")):
        family = f"batch {p['batch']}, {p['heads']} heads of {p['width']}, {p['dtype']}"
        families[family].append(p)
    lengths = {family: {p["tokens"]: None for p in some} for family, some in families.items()}
    chosen = max(lengths, key=lambda family: len(lengths[family]), default="")
    if len(lengths.get(chosen, ())) < 2:
        return None
    points = families[chosen]
    modes, providers = (list(dict.fromkeys(p[key] for p in points)) for key in ("mode", "provider"))
    shown = {label: key for label, key in PANELS.items() if any(key in p for p in points)}
    figure = Figure(figsize=(4.5 * len(modes), 3.2 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(modes), squeeze=False)
    for row, (label, key) in enumerate(shown.items()):
        for axes, mode in zip(panels[row], modes, strict=True):
            # a line a provider; ours are thick
            for provider, marker in zip(providers, MARKERS, strict=False):
                own = [p for p in points if (p["mode"], p["provider"]) == (mode, provider)]
                axes.loglog(
                    [p["tokens"] for p in own],
                    [p.get(key) for p in own],
                    marker=marker,
                    markersize=3,
                    label=provider,
                    linewidth=2.2 if provider.startswith("ours") else 1.0,
                )
            axes.set(title=f"{mode}, {chosen}", ylabel=label, xlabel="tokens")
            axes.set_xticks(list(lengths[chosen]), list(lengths[chosen]), fontsize=6)
            axes.minorticks_off()
    panels[0][0].legend(fontsize=6)
    return figure
