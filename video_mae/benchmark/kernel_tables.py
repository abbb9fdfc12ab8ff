"""Each operation against everything else that computes it: right or wrong, times, distance from the
roofline, memory.

    python -m video_mae.benchmark.kernel_tables [--ops NAME ...] [--shapes PART ...] [--providers
    PART ...] [--dtype bfloat16] [--quick]

`video-mae bench` is the same with a page and plots. On a CPU the shapes are small and ours are the
references, labelled so.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from video_mae.benchmark.kernel_cells import BENCHMARK, dtype_name, matches, measure_problem
from video_mae.benchmark.kernel_losses import Contrastive, Embed, Gather, Joint, Reconstruction
from video_mae.benchmark.kernel_problems import MODES, Attention, Problem
from video_mae.benchmark.measure import Clock
from video_mae.benchmark.records_base import (
    DASH,
    Record,
    Run,
    Table,
    append,
    environment,
    results_file,
)
from video_mae.kernels.preset_shapes import SHAPES, attention_shapes

OPS = ("gather", "embed", "reconstruction", "contrastive", "joint", "attention")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Attention: (name, batch, tokens, heads, head width). The lengths show where `auto` should change
# over; by default they are left out.
BATCH = 32
SHAPES_ON_GPU = [(shape.name, BATCH, *shape[1:]) for shape in attention_shapes()]
LENGTHS_ON_GPU = [
    ("length", BATCH, tokens, 12, 64)
    for tokens in (64, 128, 196, 256, 320, 392, 512, 640, 1024, 1280)
]
SHAPES_ON_CPU = [("encoder small", 2, 160, 6, 64), ("decoder small", 1, 784, 3, 64)]
LENGTHS_ON_CPU = [("length", 1, tokens, 3, 64) for tokens in (64, 160, 392, 1568)]
OPTIONAL = "length "
BUDGET_MS = {"quick": 20.0, "cuda": 40.0, "cpu": 200.0}  # of each time that is taken

HOW_TO_READ = (
    "Times are medians. cold: of the device, cache flushed before the call, launches not waited for. graph: of the device, replayed over 3 "
    "inputs.",
    "wall: with all of Python in it. The first of these that a row has makes its other columns, and p20-p80.",
    "% floor: the least time that the measured ceilings allow for the fewest operations and bytes, over the time taken (over 100 where a "
    "cache helps).",
    "x NAME: times as fast as NAME in the same mode, for right results alone. Errors are against float64, the RMS one is relative.",
    "right: no value further off than twice what PyTorch's own arithmetic of that precision is, and the error as a whole small.",
)


def problems(device: torch.device, dtype: torch.dtype) -> list[Problem]:
    """Every operation at every shape, also those that are only run when asked for."""
    clips: list[Problem]
    if device.type == "cuda":
        size, base = (16, 224, 224), next(shape for shape in SHAPES if shape.preset == "base")
        clips = [
            *(
                kind("base", BATCH, size, base.visible, 768, dtype, device)
                for kind in (Gather, Embed)
            ),
            *(
                Reconstruction(name, BATCH, size, count, 768, dtype, device)
                for name, count in base.predicted
            ),
            *(
                Contrastive(name, BATCH, count, "clip", dtype, device)
                for name, count in base.predicted
            ),
            Contrastive("batch", 8, 1024, "batch", dtype, device),
            *(
                Joint(name, BATCH, size, count, 768, dtype, device)
                for name, count in base.predicted
            ),
        ]
        shapes = SHAPES_ON_GPU + LENGTHS_ON_GPU
    else:
        size = (16, 112, 112)
        clips = [
            Gather("small", 2, size, 40, 384, dtype, device),
            Embed("small", 2, size, 40, 384, dtype, device),
            Reconstruction("small", 2, size, 352, 384, dtype, device),
            Contrastive("small", 2, 352, "clip", dtype, device),
            Joint("small", 2, size, 352, 384, dtype, device),
        ]
        shapes = SHAPES_ON_CPU + LENGTHS_ON_CPU
    return clips + [Attention(*shape, dtype, device) for shape in shapes]


def select(
    found: Sequence[Problem],
    ops: Sequence[str] = (),
    shapes: Sequence[str] = (),
    providers: Sequence[str] = (),
) -> list[Problem]:
    """The problems of these operations whose shape has one of these words (without words all but
    the lengths), and such a provider.

    Raises: ValueError for an operation or words that no problem has.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"ops: {op} is not one of {', '.join(OPS)}")
    chosen = [
        problem
        for problem in found
        if (not ops or problem.op in ops)
        and matches(problem.shape, shapes)
        and (shapes or not problem.shape.startswith(OPTIONAL))
    ]
    if not chosen:
        raise ValueError(
            f"shapes: no shape has {', '.join(shapes)} in its name; there are: "
            f"{'; '.join(sorted({problem.shape for problem in found}))}"
        )
    names = dict.fromkeys(provider.name for problem in chosen for provider in problem.providers())
    if not any(matches(name, providers) for name in names):
        raise ValueError(
            f"providers: no provider has {', '.join(providers)} in its name; there are: {'; '.join(names)}"
        )
    return chosen


def measure(
    device: torch.device,
    dtype: torch.dtype,
    ops: Sequence[str] = (),
    shapes: Sequence[str] = (),
    providers: Sequence[str] = (),
    quick: bool = False,
) -> Iterator[Run]:
    """Measures problem after problem; each gives a part of one run as soon as it is done.

    providers: words of which a provider's name must have one; empty for all. quick: fewer samples,
    and the first shape of each operation.
    """
    chosen = select(problems(device, dtype), ops, shapes, providers)
    if quick:
        chosen = [
            problem
            for i, problem in enumerate(chosen)
            if problem.op not in {other.op for other in chosen[:i]}
        ]
    clock = Clock(device, BUDGET_MS["quick" if quick else device.type])
    ceilings = clock.ceilings(dtype)
    header = {
        **environment(device),
        "benchmark": BENCHMARK,
        "dtype": dtype_name(dtype),
        "ceilings": ceilings._asdict(),
    }
    for problem in chosen:
        # else the shapes of one function would be too many for the compiler, and it would quietly
        # run it eagerly
        torch.compiler.reset()
        if records := measure_problem(problem, clock, ceilings, providers):
            yield Run(header, records)


def tables(run: Run) -> list[Table]:
    """A table for each operation and shape of a run."""
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in run.records:
        groups.setdefault((record.op, record.shape, record.dtype), []).append(record)
    return [
        _table(f"{op}: {shape}, {dtype}", records) for (op, shape, dtype), records in groups.items()
    ]


def _table(title: str, records: list[Record]) -> Table:
    baseline = next((record for record in records if record.measures.get("is_baseline")), None)
    baseline_name = baseline.provider if baseline else "baseline"
    rows, best_names = [], []
    for mode in MODES:
        cells = [record for record in records if record.mode == mode]
        usable = [record for record in cells if not record.reason and not record.measures["gate"]]
        base = next((record for record in usable if record.measures["is_baseline"]), None)
        best = min(
            (record for record in usable if not record.measures["is_ours"]),
            key=_main_ms,
            default=None,
        )
        best_names += [f"{mode} {best.provider}"] if best else []
        rows += [_row(record, base, best) for record in cells]
    notes = [
        f"best other: {', '.join(best_names)}"
        if best_names
        else "no other provider is right: nothing to compare with"
    ]
    notes += [
        f"{baseline_name} {record.mode} is wrong, so nothing is compared with it"
        for record in records
        if record.measures.get("is_baseline") and record.measures["gate"]
    ]
    columns = [
        "mode",
        "provider",
        "cold ms",
        "graph ms",
        "wall ms",
        "p20-p80",
        "TFLOP/s",
        "GB/s",
        "% floor",
        f"x {baseline_name}",
        "x best other",
        "peak MB",
        "max error",
        "RMS error",
        "repeats",
        "verdict",
    ]
    return Table(title, columns, rows, notes)


def _main_ms(record: Record) -> float:
    """The time that rates and speed-ups are made of: cold, or what there is."""
    return next(iter(record.times.values())).p50


def _row(record: Record, base: Record | None, best: Record | None) -> list[str]:
    m = record.measures
    name = f"{record.provider} ({m['resolved']})" if "resolved" in m else record.provider
    if record.reason:
        return [record.mode, name, *[DASH] * 13, f"not available: {record.reason}"]
    main, right = next(iter(record.times.values())), not m["gate"]
    times = [
        f"{record.times[way].p50:.4g}" if way in record.times else DASH
        for way in ("cold", "graph", "wall")
    ]
    ratios = [
        f"{_main_ms(other) / main.p50:.2f}" if right and other else DASH for other in (base, best)
    ]
    verdict = f"{'right' if right else 'WRONG: ' + str(m['gate'])}{'; ' + str(m['note']) if 'note' in m else ''}"
    return [
        record.mode,
        name,
        *times,
        f"{main.p20:.4g}-{main.p80:.4g}",
        _figure(m["tflops"], ".3g") if m["flops"] else DASH,
        _figure(m["gbps"], ".4g"),
        _figure(m["floor_percent"], ".1f"),
        *ratios,
        _figure(m.get("peak_mb"), ".4g"),
        _figure(m.get("max_error"), ".1e"),
        _figure(m.get("rms_error"), ".1e"),
        "equal" if m["bit_equal"] else "differ",
        verdict,
    ]


def _figure(value: float | bool | str | None, form: str) -> str:
    return DASH if value is None else format(value, form)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table a problem and appends the records to a file."""
    parser = argparse.ArgumentParser(
        description="Measure each operation against everything else that computes it."
    )
    parser.add_argument("--ops", nargs="+", default=[], help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument(
        "--shapes", nargs="+", default=[], help="shapes with one of these words in their name"
    )
    parser.add_argument(
        "--providers", nargs="+", default=[], help="providers with one of these words in their name"
    )
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), help="bfloat16 on a GPU, float32 on a CPU by default"
    )
    parser.add_argument(
        "--quick", action="store_true", help="the first shape of each operation, fewer samples"
    )
    parser.add_argument(
        "--output", default="runs/bench", help="a folder: DEVICE/kernels.jsonl in it is appended to"
    )
    options = parser.parse_args(arguments)
    device = default_device()
    dtype = DTYPES[options.dtype] if options.dtype else default_dtype(device)
    print(*HOW_TO_READ, sep="\n")
    for run in measure(
        device, dtype, options.ops, options.shapes, options.providers, options.quick
    ):
        append(results_file(options.output, run.header, BENCHMARK), run)
        print(*(f"\n{table.text()}" for table in tables(run)), flush=True)
    return 0


def default_device() -> torch.device:
    """What is benchmarked: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """What models are trained in there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


if __name__ == "__main__":
    sys.exit(main())
