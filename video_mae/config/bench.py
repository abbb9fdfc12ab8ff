"""What the benchmarks read: `video-mae bench`, `bench step` and `bench data`."""

from typing import Literal

from video_mae.config.model import PRESETS
from video_mae.config.schema import Knobs, knob, require

OPS = ("gather", "embed", "reconstruction", "contrastive", "joint", "attention")


def words(value: str) -> list[str]:
    """The words of a comma-separated key."""
    return [word.strip() for word in value.split(",") if word.strip()]


class BenchConfig(Knobs):
    """The keys that every benchmark has."""

    output: str = knob(
        "runs/bench",
        "a folder: DEVICE/BENCHMARK.jsonl in it is appended to, its page and plots are made anew",
        filled=True,
    )
    baseline: str = knob(
        "", "an older file of records: prints what became slower since (also --baseline FILE)"
    )


class KernelBenchConfig(BenchConfig):
    """`video-mae bench key=value ...`."""

    ops: str = knob("", f"comma-separated, of {', '.join(OPS)}; empty: all")
    shapes: str = knob(
        "",
        "comma-separated words: only shapes with one of them in their name; `length` sweeps the "
        "tokens of attention; empty: all but these",
    )
    providers: str = knob(
        "", "comma-separated words: only providers with one of them in their name; empty: all"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = knob(
        "auto", "of the values; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    quick: bool = knob(False, "the first shape of each operation, fewer samples")
    compile_check: bool = knob(
        False,
        "compile every kernel for sm_90 and sm_80 instead of measuring, without a GPU: registers, "
        "spills, shared memory, tensor cores (also --compile-check)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for op in words(self.ops):
            require(op in OPS, "ops", op, f"is not one of {', '.join(OPS)}")


class StepBenchConfig(BenchConfig):
    """`video-mae bench step key=value ...`."""

    presets: str = knob(
        "auto",
        "comma-separated, of small, base, large, huge, giant; auto: small on a CPU, small to huge "
        "on a GPU",
    )
    compiled: str = knob(
        "auto",
        "presets that are also compiled, which takes minutes; auto: small and base on a GPU, none "
        "on a CPU; empty: none",
    )
    batch: int = knob(0, "clips of a step; 0: 8 on a CPU, 32 on a GPU", low=0)
    side: int = knob(
        0, "height and width of a clip in pixels; 0: 112 on a CPU, 224 on a GPU", low=0
    )
    rounds: int = knob(9, "samples of every step", low=2)
    precision: Literal["auto", "fp32", "bf16"] = knob("auto", "auto: bf16 on a GPU, fp32 on a CPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(words(self.presets) != [], "presets", "(empty)", "must name at least one")
        for key in ("presets", "compiled"):
            for name in words(getattr(self, key)):
                remedy = f"is not one of {', '.join(PRESETS)}"
                require(name in (*PRESETS, "auto"), key, name, remedy)


class DataBenchConfig(BenchConfig):
    """`video-mae bench data key=value ...`."""

    source: str = knob(
        "",
        "a list file with lines `PATH LABEL`, or a folder with a folder per class; empty: 8 videos "
        "of 340 x 256 pixels, rendered into a temporary folder",
    )
    num_frames: int = knob(16, "frames of a clip", low=1)
    stride: int = knob(4, "video frames from one frame of a clip to the next", low=1)
    side: int = knob(224, "height and width of a clip in pixels", low=1)
    batch: int = knob(
        8, "clips that are collated into one tensor, several crops of a video among them", low=1
    )
    rounds: int = knob(9, "passes over the files, a clip of each", low=2)
    rows: tuple[str, ...] = knob((), "only these rows, by their names; empty: all")
    appetite: float = knob(
        1600.0,
        "clips a second that a device takes; ViT-B with 90 % masking on an H100 at 35 % of its "
        "peak: 1600",
        above=0,
    )
