"""The plots of the kernels' results: the roofline, and attention over its tokens."""

import statistics
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from video_mae.benchmark.record import Results

COLORS = (*(f"C{i}" for i in range(10)), "black", "gold")
MARKERS = "osD^v<>P*Xph"
PANELS = {"ms": "p50", "TFLOP/s": "tflops", "peak MB": "peak_mb"}

Figures = dict[str, Any]
"""Of a record (see `Record.figures`)."""


def draw_plots(found: Sequence[Results], file: Path) -> list[Path]:
    """NAME_roofline.png and NAME_tokens.png beside NAME.jsonl, each where there are right results
    of kernels for it. found: newest first.
    """
    header = found[0].header
    points: list[Figures] = []
    for results in found:
        for record in results.records:
            if record.benchmark == "kernels" and record.times and not record.measures["gate"]:
                points.append(record.figures())
    computing = [p for p in points if p["dtype"] == header.get("dtype") and p["flops"]]
    attention = [p for p in points if p["op"] == "attention"]
    drawn = {"roofline": _roofline(header, computing), "tokens": _over_tokens(attention)}
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
    if not points:
        return None
    flops, bytes_ = (header["ceilings"][f"{noun}_per_second"] for noun in ("flops", "bytes"))
    corner = flops / bytes_
    intensities = [corner, *(p["flops"] / p["bytes"] for p in points)]
    edges = [min(intensities) / 2, corner, max(intensities) * 2]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    roof = [min(flops, x * bytes_) / 1e12 for x in edges]
    label = f"measured ceilings: {flops / 1e12:.4g} TFLOP/s, {bytes_ / 1e12:.3g} TB/s"
    axes.plot(edges, roof, color="black", label=label)
    for color, op in zip(COLORS, dict.fromkeys(p["op"] for p in points), strict=False):
        for is_ours, whose, marker, fill in (
            (True, "ours", "D", "full"),
            (False, "others", "o", "none"),
        ):
            chosen = [p for p in points if p["op"] == op and p["is_ours"] == is_ours]
            axes.plot(
                [p["flops"] / p["bytes"] for p in chosen],
                [p["tflops"] for p in chosen],
                marker,
                color=color,
                fillstyle=fill,
                markersize=5,
                alpha=0.7,
                label=f"{op}, {whose}",
            )
    axes.set(
        title=f"{header['device']}, {header['dtype']}",
        xscale="log",
        yscale="log",
        xlabel="least operations a least byte",
        ylabel="TFLOP/s of the operations that are needed",
    )
    axes.legend(fontsize=7)
    return figure


def _over_tokens(points: Sequence[Figures]) -> Figure | None:
    """Milliseconds, TFLOP/s and peak memory of attention over its tokens, for the heads and batch
    that were measured at most lengths.
    """
    for p in points:
        p["family"] = f"batch {p['batch']}, {p['heads']} heads of {p['width']}, {p['dtype']}"
    families = [family for family, _ in dict.fromkeys((p["family"], p["tokens"]) for p in points)]
    if len(families) < 2:
        return None
    chosen = statistics.mode(families)
    points = sorted((p for p in points if p["family"] == chosen), key=itemgetter("tokens"))
    lengths = list(dict.fromkeys(p["tokens"] for p in points))
    if len(lengths) < 2:
        return None
    modes = list(dict.fromkeys(p["mode"] for p in points))
    providers = list(dict.fromkeys(p["provider"] for p in points))
    shown = {label: key for label, key in PANELS.items() if any(key in p for p in points)}
    figure = Figure(figsize=(4.5 * len(modes), 3.2 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(modes), squeeze=False)
    for (label, key), line in zip(shown.items(), panels, strict=True):
        for mode, axes in zip(modes, line, strict=True):
            for provider, color, marker in zip(providers, COLORS, MARKERS, strict=False):
                # a line a provider; ours are thick
                of_mode = [p for p in points if p["mode"] == mode and p["provider"] == provider]
                measured = [p for p in of_mode if key in p]
                axes.plot(
                    [p["tokens"] for p in measured],
                    [p[key] for p in measured],
                    color=color,
                    marker=marker,
                    markersize=3,
                    label=provider,
                    linewidth=2.2 if provider.startswith("ours") else 1.0,
                )
            axes.set(
                title=f"{mode}, {chosen}", ylabel=label, xlabel="tokens", xscale="log", yscale="log"
            )
            axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=6)
            axes.minorticks_off()
    panels[0][0].legend(fontsize=6)
    return figure
