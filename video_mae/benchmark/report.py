"""What becomes of a measured run: tables in the terminal, a line a record in a file, and a page
with plots made from that file.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from video_mae.benchmark.records import Record, Run, Table, append, read, results_file, slower_table

OUTPUT = "runs/bench"  # where benchmarks write by default
# of taking the time of a kernel; plots show the first that a record has
WAYS = ("cold", "graph", "wall")
DPI = 120
MARKERS = "osD^v<>P*Xph"

Tables = Callable[[Run], list[Table]]


def publish(
    name: str,
    parts: Iterable[Run],
    tables: Tables,
    output: str,
    baseline: str = "",
    notes: Sequence[str] = (),
) -> int:
    """Prints each part of a run as it is measured and appends it to OUTPUT/DEVICE/NAME.jsonl; at
    the end makes NAME.md and plots of that file anew and prints what became slower than in
    `baseline`, an older file (empty: no comparison).

    All parts have the same header. notes: how to read the tables. Returns: exit status 0. Raises:
    FileNotFoundError or ValueError for the baseline, before anything is measured.
    """
    # all of it now: it may be the very file that this run is added to
    older = read(Path(baseline)) if baseline else []
    run = None
    for part in parts:
        if run is None:
            run = Run(part.header, [])
            print(about(part), *notes, sep="\n", flush=True)
        run.records.extend(part.records)
        append(results_file(output, part.header, name), part)
        print(*(f"\n{table.text()}" for table in tables(part)), sep="\n", flush=True)
    assert run is not None
    file = results_file(output, run.header, name)
    print(
        f"\nrecords {file}",
        *(f"made {path}" for path in write_page(file, tables, notes)),
        sep="\n",
        flush=True,
    )
    if baseline:
        print(f"\n{slower_table(run, older, baseline).text()}")
    return 0


def about(run: Run) -> str:
    """The header of a run in a line."""
    known = {
        key: value
        for key, value in run.header.items()
        if value is not None and not isinstance(value, dict)
    }
    ceilings = {
        key: f"{value / 1e12:.4g} T" for key, value in run.header.get("ceilings", {}).items()
    }
    return "; ".join(
        f"{key.replace('_', ' ')} {value}" for key, value in {**known, **ceilings}.items()
    )


def newest(runs: Sequence[Run]) -> list[Run]:
    """The runs, newest first, without what a later one measured again, by (op, shape, dtype):
    ratios stay within one run.
    """
    seen: set[tuple[str, str, str]] = set()
    kept: list[Run] = []
    for run in reversed(runs):
        records = [
            record for record in run.records if (record.op, record.shape, record.dtype) not in seen
        ]
        seen |= {(record.op, record.shape, record.dtype) for record in records}
        if records:
            kept.append(Run(run.header, records))
    return kept


def write_page(file: Path, tables: Tables, notes: Sequence[str] = ()) -> list[Path]:
    """Makes NAME.md and plots beside NAME.jsonl, from its records alone; returns their paths."""
    runs = newest(read(file))
    plots = draw_plots(runs, file.with_suffix(""))
    parts = [
        f"# {file.stem}: {runs[0].header['device']}",
        f"Made from `{file.name}`; newest first.",
        "\n".join(f"- {note}" for note in notes),
    ]
    for run in runs:
        parts += [
            f"## {run.header['date']}",
            about(run),
            *(table.markdown() for table in tables(run)),
        ]
    parts += [f"![{plot.stem}]({plot.name})" for plot in plots]
    page = file.with_suffix(".md")
    page.write_text("\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8")
    return [page, *plots]


def draw_plots(runs: Sequence[Run], stem: Path) -> list[Path]:
    """STEM_roofline.png and STEM_tokens.png of the kernels, each where there are records for it."""
    runs = [
        Run(
            run.header,
            [
                r
                for r in run.records
                if r.benchmark == "kernels" and r.times and not r.measures["gate"]
            ],
        )
        for run in runs
    ]
    drawn = {"roofline": _roofline(runs), "tokens": _over_tokens(runs)}
    paths = {
        stem.with_name(f"{stem.name}_{noun}.png"): figure
        for noun, figure in drawn.items()
        if figure
    }
    for path, figure in paths.items():
        figure.savefig(path, dpi=DPI)
    return list(paths)


def main_ms(record: Record) -> float:
    """The time of a record that plots show."""
    return next(record.times[way].p50 for way in WAYS if way in record.times)


def _roofline(runs: Sequence[Run]) -> Figure | None:
    """TFLOP/s over operations a byte, under the ceilings that the newest run measured; every right
    result in its dtype.
    """
    points = [
        r
        for run in runs
        for r in run.records
        if run.header["dtype"] == runs[0].header["dtype"] and r.measures["flops"]
    ]
    if not points:
        return None
    flops, bytes_ = (
        runs[0].header["ceilings"][f"{noun}_per_second"] for noun in ("flops", "bytes")
    )
    intensities = [_intensity(r) for r in points]
    edges = [
        min(*intensities, flops / bytes_) / 2,
        flops / bytes_,
        max(*intensities, flops / bytes_) * 2,
    ]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        edges,
        [min(flops, x * bytes_) / 1e12 for x in edges],
        color="black",
        label=f"measured ceilings: {flops / 1e12:.4g} TFLOP/s, {bytes_ / 1e12:.3g} TB/s",
    )
    for color, op in zip(_colors(), dict.fromkeys(r.op for r in points), strict=False):
        for ours, marker in ((True, "D"), (False, "o")):
            chosen = [r for r in points if r.op == op and r.measures["is_ours"] == ours]
            axes.plot(
                [_intensity(r) for r in chosen],
                [float(r.measures["flops"]) / main_ms(r) / 1e9 for r in chosen],
                marker,
                color=color,
                fillstyle="full" if ours else "none",
                markersize=5,
                alpha=0.7,
                label=f"{op}, {'ours' if ours else 'others'}",
            )
    axes.set(
        title=f"{runs[0].header['device']}, {points[0].dtype}",
        xscale="log",
        yscale="log",
        xlabel="least operations a least byte",
        ylabel="TFLOP/s of the operations that are needed",
    )
    axes.legend(fontsize=7)
    return figure


def _intensity(record: Record) -> float:
    return float(record.measures["flops"]) / float(record.measures["bytes"])


def _over_tokens(runs: Sequence[Run]) -> Figure | None:
    """Milliseconds, TFLOP/s and peak memory of attention over its tokens, for the heads and batch
    that were measured at most lengths.
    """
    points = [r for run in runs for r in run.records if r.op == "attention"]
    families = Counter(
        family for family, _ in {(_family(r), r.measures["tokens"]) for r in points}
    ).most_common(1)
    if not families or families[0][1] < 2:
        return None
    family = families[0][0]
    points = sorted((r for r in points if _family(r) == family), key=lambda r: r.measures["tokens"])
    lengths = list(dict.fromkeys(int(r.measures["tokens"]) for r in points))
    modes = list(dict.fromkeys(r.mode for r in points))
    rows: list[tuple[str, Callable[[Record], float | None]]] = [
        ("ms", main_ms),
        ("TFLOP/s", lambda r: float(r.measures["tflops"])),
        ("peak MB", lambda r: _number(r, "peak_mb")),
    ]
    rows = [(label, value) for label, value in rows if any(value(r) is not None for r in points)]
    figure = Figure(figsize=(4.5 * len(modes), 3.2 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), len(modes), squeeze=False)
    providers = list(dict.fromkeys(r.provider for r in points))
    for (label, value), line in zip(rows, panels, strict=True):
        for mode, axes in zip(modes, line, strict=True):
            _lines(axes, [r for r in points if r.mode == mode], providers, value)
            axes.set(
                title=f"{mode}, batch {family[0]}, {family[1]} heads of {family[2]}, {family[3]}",
                ylabel=label,
                xlabel="tokens",
                xscale="log",
                yscale="log",
            )
            axes.set_xticks(lengths, [str(length) for length in lengths], fontsize=6)
            axes.minorticks_off()
    panels[0][0].legend(fontsize=6)
    return figure


def _lines(
    axes: Axes,
    points: Sequence[Record],
    providers: Sequence[str],
    value: Callable[[Record], float | None],
) -> None:
    """A line a provider; ours are thick."""
    for provider, color, marker in zip(providers, _colors(), MARKERS, strict=False):
        pairs = [
            (r.measures["tokens"], number)
            for r in points
            if r.provider == provider and (number := value(r)) is not None
        ]
        axes.plot(
            [x for x, _ in pairs],
            [y for _, y in pairs],
            color=color,
            marker=marker,
            markersize=3,
            label=provider,
            linewidth=2.2 if provider.startswith("ours") else 1.0,
        )


def _family(record: Record) -> tuple[float | bool | str, ...]:
    return (*(record.measures[key] for key in ("batch", "heads", "width")), record.dtype)


def _number(record: Record, key: str) -> float | None:
    return float(record.measures[key]) if key in record.measures else None


def _colors() -> list[str]:
    return [f"C{i}" for i in range(10)] + ["black", "gold"]
