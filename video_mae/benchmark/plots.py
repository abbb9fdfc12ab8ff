"""The plots of the kernels' results: the roofline, and attention over its tokens."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from video_mae.benchmark.record import Record, Results

COLORS = (*(f"C{i}" for i in range(10)), "black", "gold")
MARKERS = "osD^v<>P*Xph"


def draw_plots(found: Sequence[Results], file: Path) -> list[Path]:
    """NAME_roofline.png and NAME_tokens.png beside NAME.jsonl, each where there are right results
    of kernels for it. found: newest first.
    """
    dtype = found[0].header.get("dtype")
    points: list[Record] = []
    for results in found:
        for r in results.records:
            if r.benchmark == "kernels" and r.times and not r.measures["gate"]:
                points.append(r)
    computing = [r for r in points if r.dtype == dtype and r.measures["flops"]]
    attention = [r for r in points if r.op == "attention"]
    drawn = {"roofline": _roofline(found[0].header, computing), "tokens": _over_tokens(attention)}
    paths: list[Path] = []
    for noun, figure in drawn.items():
        if figure is not None:
            paths.append(file.with_name(f"{file.stem}_{noun}.png"))
            figure.savefig(paths[-1], dpi=120)
    return paths


def _roofline(header: dict[str, Any], points: Sequence[Record]) -> Figure | None:
    """TFLOP/s over operations a byte, under the ceilings that the newest run measured; every right
    result in its dtype.
    """
    if not points:
        return None
    flops, bytes_ = (header["ceilings"][f"{noun}_per_second"] for noun in ("flops", "bytes"))

    def intensity(record: Record) -> float:
        return record.measures["flops"] / record.measures["bytes"]

    corner = flops / bytes_
    intensities = [corner, *map(intensity, points)]
    edges = [min(intensities) / 2, corner, max(intensities) * 2]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    roof = [min(flops, x * bytes_) / 1e12 for x in edges]
    label = f"measured ceilings: {flops / 1e12:.4g} TFLOP/s, {bytes_ / 1e12:.3g} TB/s"
    axes.plot(edges, roof, color="black", label=label)
    for color, op in zip(COLORS, dict.fromkeys(r.op for r in points), strict=False):
        for is_ours, whose, marker, fill in (
            (True, "ours", "D", "full"),
            (False, "others", "o", "none"),
        ):
            chosen = [r for r in points if r.op == op and r.measures["is_ours"] == is_ours]
            axes.plot(
                [intensity(r) for r in chosen],
                [r.measures["flops"] / r.main.p50 / 1e9 for r in chosen],
                marker,
                color=color,
                fillstyle=fill,
                markersize=5,
                alpha=0.7,
                label=f"{op}, {whose}",
            )
    axes.set(
        title=f"{header['device']}, {points[0].dtype}",
        xscale="log",
        yscale="log",
        xlabel="least operations a least byte",
        ylabel="TFLOP/s of the operations that are needed",
    )
    axes.legend(fontsize=7)
    return figure


def _over_tokens(points: Sequence[Record]) -> Figure | None:
    """Milliseconds, TFLOP/s and peak memory of attention over its tokens, for the heads and batch
    that were measured at most lengths.
    """

    def family(record: Record) -> tuple[Any, ...]:
        m = record.measures
        return m["batch"], m["heads"], m["width"], record.dtype

    lengths_of = Counter(
        member for member, _ in {(family(r), r.measures["tokens"]) for r in points}
    )
    if not lengths_of or max(lengths_of.values()) < 2:
        return None
    chosen = lengths_of.most_common(1)[0][0]
    points = sorted((r for r in points if family(r) == chosen), key=lambda r: r.measures["tokens"])
    lengths = list(dict.fromkeys(r.measures["tokens"] for r in points))
    modes = list(dict.fromkeys(r.mode for r in points))
    providers = list(dict.fromkeys(r.provider for r in points))
    shown: dict[str, str] = {"ms": "p50", "TFLOP/s": "tflops", "peak MB": "peak_mb"}
    if not any("peak_mb" in r.measures for r in points):
        del shown["peak MB"]
    figure = Figure(figsize=(4.5 * len(modes), 3.2 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(modes), squeeze=False)
    for (label, key), line in zip(shown.items(), panels, strict=True):
        for mode, axes in zip(modes, line, strict=True):
            for provider, color, marker in zip(providers, COLORS, MARKERS, strict=False):
                # a line a provider; ours are thick
                figures = [r.figures() for r in points if (r.mode, r.provider) == (mode, provider)]
                figures = [values for values in figures if key in values]
                axes.plot(
                    [values["tokens"] for values in figures],
                    [values[key] for values in figures],
                    color=color,
                    marker=marker,
                    markersize=3,
                    label=provider,
                    linewidth=2.2 if provider.startswith("ours") else 1.0,
                )
            axes.set(
                title=f"{mode}, batch {chosen[0]}, {chosen[1]} heads of {chosen[2]}, {chosen[3]}",
                ylabel=label,
                xlabel="tokens",
                xscale="log",
                yscale="log",
            )
            axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=6)
            axes.minorticks_off()
    panels[0][0].legend(fontsize=6)
    return figure
