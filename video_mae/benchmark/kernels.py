"""`video-mae bench`: each operation against everything else that computes it.

Right or wrong, times, distance from the roofline, memory.

On a CPU the shapes are small and ours are the references, labelled so.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from video_mae.benchmark.attention_operation import AttentionOperation
from video_mae.benchmark.clock import Clock, turns
from video_mae.benchmark.kernel_measurement import matches, measure_operation
from video_mae.benchmark.kernel_operations import (
    MODES,
    ContrastiveOperation,
    EmbedOperation,
    GatherOperation,
    JointOperation,
    Operation,
    ReconstructionOperation,
)
from video_mae.benchmark.record import (
    Record,
    Results,
    Table,
    dtype_name,
    environment,
    make_table,
)
from video_mae.benchmark.report import publish
from video_mae.config.bench import OPS, KernelBenchConfig, words
from video_mae.kernels import compile_check
from video_mae.kernels.preset_shapes import SHAPES, attention_shapes

BATCH = 32
LENGTHS_ON_GPU = (64, 128, 196, 256, 320, 392, 512, 640, 1024, 1280)
# of attention, where `auto` should change over; by default they are left out
LENGTHS_ON_CPU = (64, 160, 392, 1568)
BUDGET_MS = {"quick": 20.0, "cuda": 40.0, "cpu": 200.0}  # of each time that is taken

NOTES = (
    "Times are medians. cold: of the device, cache flushed before the call, launches not waited "
    "for. graph: of the device, replayed over 3 inputs.",
    "wall: with all of Python in it. The first of these that a row has makes its other columns, "
    "and p20-p80.",
    "% floor: the least time that the measured ceilings allow for the fewest operations and bytes, "
    "over the time taken (over 100 where a cache helps).",
    "x NAME: times as fast as NAME in the same mode, for right results alone. Errors are against "
    "float64, the RMS one is relative.",
    "right: no value further off than twice what PyTorch's own arithmetic of that precision is, "
    "and the error as a whole small.",
)


def start(config: KernelBenchConfig) -> int:
    """The stage as the command line starts it. Raises: ValueError for shapes or providers that do
    not exist.
    """
    if config.compile_check:
        return compile_check.main([])
    return publish("kernels", measure(config), tables, config, NOTES)


def default_device() -> torch.device:
    """What is benchmarked: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """What models are trained in there."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def operations(device: torch.device, dtype: torch.dtype) -> list[Operation]:
    """Every operation at every shape, also those that are only run when asked for."""
    if device.type == "cuda":
        base = next(shape for shape in SHAPES if shape.preset == "base")
        name, batch, size, width = "base", BATCH, (16, 224, 224), 768
        visible, predicted = base.visible, base.predicted
        attention = [(shape.name, BATCH, *shape[1:]) for shape in attention_shapes()]
        attention += [("length", BATCH, tokens, 12, 64) for tokens in LENGTHS_ON_GPU]
    else:
        name, batch, size, width = "small", 2, (16, 112, 112), 384
        visible, predicted = 40, (("small", 352),)
        attention = [("encoder small", 2, 160, 6, 64), ("decoder small", 1, 784, 3, 64)]
        attention += [("length", 1, tokens, 3, 64) for tokens in LENGTHS_ON_CPU]
    found: list[Operation] = [
        kind(name, dtype, device, batch, size, visible, width)
        for kind in (GatherOperation, EmbedOperation)
    ]
    for name, count in predicted:
        found += [
            ReconstructionOperation(name, dtype, device, batch, size, count, width),
            ContrastiveOperation(name, dtype, device, batch, count, "clip"),
            JointOperation(name, dtype, device, batch, size, count, width),
        ]
    if device.type == "cuda":
        found.append(ContrastiveOperation("batch", dtype, device, 8, 1024, "batch"))
    found += [AttentionOperation(name, dtype, device, *dims) for name, *dims in attention]
    return sorted(found, key=lambda operation: OPS.index(operation.op))


def measure(config: KernelBenchConfig) -> Iterator[Results]:
    """Measures operation after operation; each gives a part of one run as soon as it is done.

    Raises: ValueError for words that no operation has.
    """
    device = default_device()
    dtype = default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    ops, shapes, providers = map(words, (config.ops, config.shapes, config.providers))
    found, chosen = operations(device, dtype), []
    for operation in found:
        is_wanted = matches(operation.shape, shapes) if shapes else operation.name != "length"
        if is_wanted and operation.op in (ops or OPS):
            chosen.append(operation)
    if not chosen:
        names = sorted({operation.shape for operation in found})
        raise ValueError(
            f"shapes: no shape has {', '.join(shapes)} in its name; there are: {'; '.join(names)}"
        )
    names = dict.fromkeys(name for operation in chosen for name in operation.providers())
    if not any(matches(name, providers) for name in names):
        raise ValueError(
            f"providers: no provider has {', '.join(providers)} in its name; "
            f"there are: {'; '.join(names)}"
        )
    if config.quick:
        chosen = list({operation.op: operation for operation in reversed(chosen)}.values())[::-1]
    clock = Clock(device, BUDGET_MS["quick" if config.quick else device.type])
    ceilings = clock.ceilings(dtype)
    header = {
        **environment(device),
        "benchmark": "kernels",
        "dtype": dtype_name(dtype),
        "ceilings": ceilings._asdict(),
    }
    for operation in turns(chosen, 1):
        # else the shapes of one function would be too many for the compiler, and it would quietly
        # run it eagerly
        torch.compiler.reset()
        records = measure_operation(operation, clock, ceilings, providers)
        if records:
            yield Results(header, records)


def tables(results: Results) -> list[Table]:
    """A table for each operation and shape."""
    found = []
    for (op, shape, dtype), records in groupby(results.records, lambda record: record.name[1:4]):
        found.append(_table(f"{op}: {shape}, {dtype}", list(records)))
    return found


def _table(title: str, records: Sequence[Record]) -> Table:
    baselines = [record for record in records if record.measures.get("is_baseline")]
    baseline = baselines[0].provider if baselines else "baseline"
    rows: list[dict[str, Any]] = []
    best_names: list[str] = []
    for mode in MODES:
        cells = [record for record in records if record.mode == mode]
        # milliseconds of those that are there and right
        right = {r.provider: r.main.p50 for r in cells if r.measures.get("gate") == ""}
        others = {name: ms for name, ms in right.items() if not name.startswith("ours")}
        best = min(others, key=others.__getitem__, default="")
        if best:
            best_names.append(f"{mode} {best}")
        for record in cells:
            figures, m = record.figures(), record.measures
            for key, name in (("x_base", baseline), ("x_best", best)):
                if record.provider in right and name in right:
                    figures[key] = right[name] / right[record.provider]
            if "resolved" in m:
                figures["provider"] += f" ({m['resolved']})"
            if not record.reason:
                if not m["flops"]:
                    del figures["tflops"]
                figures["repeats"] = "equal" if m["bit_equal"] else "differ"
                figures["verdict"] = f"WRONG: {m['gate']}" if m["gate"] else "right"
                if "note" in m:
                    figures["verdict"] += f"; {m['note']}"
            rows.append(figures)
    notes = [f"best other: {', '.join(best_names)}"]
    if not best_names:
        notes = ["no other provider is right: nothing to compare with"]
    for record in baselines:
        if record.measures["gate"]:
            notes.append(f"{baseline} {record.mode} is wrong, so nothing is compared with it")
    columns = {
        "mode": "{mode}",
        "provider": "{provider}",
        "cold ms": "{cold:.4g}",
        "graph ms": "{graph:.4g}",
        "wall ms": "{wall:.4g}",
        "p20-p80": "{p20:.4g}-{p80:.4g}",
        "TFLOP/s": "{tflops:.3g}",
        "GB/s": "{gbps:.4g}",
        "% floor": "{floor_percent:.1f}",
        f"x {baseline}": "{x_base:.2f}",
        "x best other": "{x_best:.2f}",
        "peak MB": "{peak_mb:.4g}",
        "max error": "{max_error:.1e}",
        "RMS error": "{rms_error:.1e}",
        "repeats": "{repeats}",
        "verdict": "{verdict}",
    }
    return make_table(title, columns, rows, notes)
