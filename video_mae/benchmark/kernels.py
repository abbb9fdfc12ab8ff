"""`video-mae bench`: each kernel against everything else that computes it."""

from typing import Literal

from video_mae.benchmark import kernel_tables as benchmark
from video_mae.benchmark.report import OUTPUT, publish
from video_mae.config.schema import Knobs, knob, require
from video_mae.kernels import compile_check


class KernelBenchConfig(Knobs):
    """`video-mae bench key=value ...`."""

    ops: str = knob("", f"comma-separated, of {', '.join(benchmark.OPS)}; empty: all")
    shapes: str = knob(
        "",
        "comma-separated words: only shapes with one of them in their name; `length` sweeps the tokens of attention; "
        "empty: all but these",
    )
    providers: str = knob(
        "", "comma-separated words: only providers with one of them in their name; empty: all"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = knob(
        "auto", "of the values; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    quick: bool = knob(False, "the first shape of each operation, fewer samples")
    output: str = knob(
        OUTPUT,
        "a folder: DEVICE/kernels.jsonl in it is appended to, its page and plots are made anew",
        filled=True,
    )
    baseline: str = knob(
        "", "an older file of records: prints what became slower since (also --baseline FILE)"
    )
    compile_check: bool = knob(
        False,
        "compile every kernel for sm_90 and sm_80 instead of measuring, without a GPU: registers, spills, "
        "shared memory, tensor cores (also --compile-check)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for op in words(self.ops):
            require(op in benchmark.OPS, "ops", op, f"is not one of {', '.join(benchmark.OPS)}")


def words(value: str) -> list[str]:
    """The words of a comma-separated key."""
    return [word.strip() for word in value.split(",") if word.strip()]


def start(config: KernelBenchConfig) -> int:
    """The stage as the command line starts it. Raises: ValueError for shapes or providers that do
    not exist.
    """
    if config.compile_check:
        return compile_check.main([])
    device = benchmark.default_device()
    dtype = (
        benchmark.default_dtype(device)
        if config.dtype == "auto"
        else benchmark.DTYPES[config.dtype]
    )
    parts = benchmark.measure(
        device,
        dtype,
        words(config.ops),
        words(config.shapes),
        words(config.providers),
        config.quick,
    )
    return publish(
        benchmark.BENCHMARK,
        parts,
        benchmark.tables,
        config.output,
        config.baseline,
        benchmark.HOW_TO_READ,
    )
