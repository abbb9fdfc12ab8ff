"""`video-mae bench step`: whole training steps of the published sizes, where their time goes, and
Hugging Face's step beside ours.

Letters: B clips, T frames, H W pixels, C channels, N tokens.
"""

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from video_mae.benchmark import hugging_face, timeline
from video_mae.benchmark.contender import (
    EngineTrainer,
    Step,
    Trainer,
    ratio,
    time_call,
    time_in_turn,
)
from video_mae.benchmark.kernel_cells import dtype_name
from video_mae.benchmark.kernel_tables import default_device, default_dtype
from video_mae.benchmark.measure import Clock, quantiles
from video_mae.benchmark.memory import peak_growth
from video_mae.benchmark.records import Record, Run, environment
from video_mae.benchmark.report import OUTPUT, publish
from video_mae.benchmark.step_tables import (
    BENCHMARK,
    NOTES,
    OURS_BY_ENGINE,
    THEIRS,
    THEIRS_COMPILED,
    THEIRS_PREPARED,
    tables,
)
from video_mae.config import PRESETS, ModelConfig
from video_mae.config.schema import Knobs, knob, require
from video_mae.kernels.dispatch import describe
from video_mae.model.masking import TokenMask, token_mask
from video_mae.model.vit import VideoMAE, pretraining_macs
from video_mae.training.engine import leave
from video_mae.training.journal import peak_flops

Name = tuple[str, str]
"""(provider, mode) of a step."""

MASKS = {"full": 0.0, "dual": 0.5}  # mode: share of the tokens that the decoder leaves out
HIDDEN = 0.9
SAME_LOSS = 1e-4
PART_ROUNDS = 5


class StepBenchConfig(Knobs):
    """`video-mae bench step key=value ...`."""

    presets: str = knob(
        "auto",
        "comma-separated, of small, base, large, huge, giant; auto: small on a CPU, small to huge on a GPU",
    )
    compiled: str = knob(
        "auto",
        "presets that are also compiled, which takes minutes; auto: small and base on a GPU, none on a CPU; "
        "empty: none",
    )
    batch: int = knob(0, "clips of a step; 0: 8 on a CPU, 32 on a GPU", low=0)
    side: int = knob(
        0, "height and width of a clip in pixels; 0: 112 on a CPU, 224 on a GPU", low=0
    )
    rounds: int = knob(9, "samples of every step", low=2)
    precision: Literal["auto", "fp32", "bf16"] = knob("auto", "auto: bf16 on a GPU, fp32 on a CPU")
    output: str = knob(
        OUTPUT,
        "a folder: DEVICE/step.jsonl in it is appended to, its page is made anew",
        filled=True,
    )
    baseline: str = knob(
        "", "an older file of records: prints what became slower since (also --baseline FILE)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("presets", "compiled"):
            for name in _words(getattr(self, key)):
                require(
                    name in PRESETS or name == "auto",
                    key,
                    name,
                    f"is not one of {', '.join(PRESETS)}",
                )
        require(_words(self.presets) != [], "presets", "(empty)", "must name at least one")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, its batch and its place. ceiling: FLOP/s of the device, as measured."""

    preset: str
    model: ModelConfig
    batch: int
    rounds: int
    compiled: bool
    device: torch.device
    dtype: torch.dtype
    ceiling: float

    def record(self, op: str, provider: str, mode: str, **what: Any) -> Record:
        c = self.model
        shape = f"{self.preset}, {self.batch} x {c.num_frames}x{c.height}x{c.width}"
        return Record(
            benchmark=BENCHMARK,
            op=op,
            shape=shape,
            dtype=dtype_name(self.dtype),
            provider=provider,
            mode=mode,
            **what,
        )


def start(config: StepBenchConfig) -> int:
    """The stage as the command line starts it. Raises: ValueError for a clip that a preset cannot
    cut.
    """
    status = publish(BENCHMARK, measure(config), tables, config.output, config.baseline, NOTES)
    leave()
    return status


def measure(config: StepBenchConfig) -> Iterator[Run]:
    """Measures preset after preset; each gives a part of one run."""
    device = default_device()
    on_gpu = device.type == "cuda"
    dtype = {"auto": default_dtype(device), "fp32": torch.float32, "bf16": torch.bfloat16}[
        config.precision
    ]
    side = config.side or (224 if on_gpu else 112)
    presets = _words(
        config.presets.replace("auto", "small, base, large, huge" if on_gpu else "small")
    )
    compiled = _words(config.compiled.replace("auto", "small, base" if on_gpu else ""))
    models = {preset: ModelConfig.preset(preset, height=side, width=side) for preset in presets}
    ceilings = Clock(device).ceilings(dtype)
    header = {
        **environment(device),
        "benchmark": BENCHMARK,
        "dtype": dtype_name(dtype),
        "kernels": describe("auto", device),
        "ceilings": ceilings._asdict(),
    }
    for preset, model in models.items():
        gc.collect()  # DeepSpeed's engine of the model before is a ring of references
        # else the models of one class would be too many for the compiler, and it would quietly run
        # them eagerly
        torch.compiler.reset()
        case = Case(
            preset=preset,
            model=model,
            batch=config.batch or (32 if on_gpu else 8),
            rounds=config.rounds,
            compiled=preset in compiled,
            device=device,
            dtype=dtype,
            ceiling=ceilings.flops_per_second,
        )
        yield Run(header, measure_case(case))


def measure_case(case: Case) -> list[Record]:
    """Everything about one model: the losses, the steps, the preparation of the competitor's input,
    the parts.
    """
    c = case.model
    generator = torch.Generator().manual_seed(0)
    clip_BTHWC = torch.randint(
        0,
        256,
        (case.batch, c.num_frames, c.height, c.width, c.in_channels),
        dtype=torch.uint8,
        generator=generator,
    )
    seeds_B = torch.arange(case.batch, device=case.device)
    masks = {
        mode: token_mask(seeds_B, c.grid, "tube", HIDDEN, skipped)
        for mode, skipped in MASKS.items()
    }
    ours = VideoMAE(c).to(case.device)
    missing: list[Record] = []
    try:
        ours_by_engine = _engine_steps(case, ours, clip_BTHWC, masks)
    except (ImportError, ValueError, torch.OutOfMemoryError) as error:
        ours_by_engine, remedy = (
            {},
            "; pip install deepspeed" if isinstance(error, ImportError) else "",
        )
        missing = [
            case.record(
                "step",
                OURS_BY_ENGINE,
                "full",
                reason=f"{str(error).strip().splitlines()[0]}{remedy}",
            )
        ]
    try:
        theirs = hugging_face.hugging_face_model(ours)
    except ImportError as error:
        missing.append(
            case.record("step", THEIRS, "full", reason=f"{error}; pip install transformers")
        )
        steps = _our_steps(case, ours, clip_BTHWC, masks) | ours_by_engine
        return missing + _measure_steps(case, masks, steps, "there is nothing to compare with")
    torch.nn.Module.to(theirs, case.device)
    hidden_BN = hugging_face.boolean_mask(masks["full"], c.num_tokens)
    loss = compare_losses(case, ours, theirs, clip_BTHWC, masks["full"])
    steps = (
        _our_steps(case, ours, clip_BTHWC, masks)
        | ours_by_engine
        | _their_steps(case, theirs, clip_BTHWC, hidden_BN)
    )
    return [
        *missing,
        loss,
        *_measure_preparation(case, clip_BTHWC),
        *_measure_steps(case, masks, steps, str(loss.measures["gate"])),
    ]


@torch.no_grad()
def compare_losses(
    case: Case, ours: VideoMAE, theirs: Any, clip_BTHWC: torch.Tensor, mask: TokenMask
) -> Record:
    """The losses of both models in float32; measure `gate` says what is wrong, and is empty where
    they are the same.
    """
    clip_BTHWC = clip_BTHWC.to(case.device)
    our_loss = _our_loss(ours, mask, clip_BTHWC).item()
    hidden_BN = hugging_face.boolean_mask(mask, case.model.num_tokens)
    their_loss = _their_loss(theirs, hidden_BN, hugging_face.prepare(clip_BTHWC, case.model)).item()
    gate = (
        ""
        if abs(our_loss - their_loss) <= SAME_LOSS
        else f"the losses differ: ours is {our_loss:.6f}, theirs {their_loss:.6f}"
    )
    return case.record(
        "loss", THEIRS, "full", measures={"ours": our_loss, "theirs": their_loss, "gate": gate}
    )


def _our_steps(
    case: Case, model: VideoMAE, clip_BTHWC: torch.Tensor, masks: Mapping[str, TokenMask]
) -> dict[Name, Step]:
    trainer = Trainer(model, case.device, case.dtype)
    borders = timeline.borders_of(model)
    steps = {
        ("ours eager", mode): Step(
            trainer,
            clip_BTHWC,
            partial(_our_loss, model, mask),
            borders=borders,
            first_part="gather",
        )
        for mode, mask in masks.items()
    }
    if case.compiled:
        compiled = torch.compile(model, dynamic=False)
        steps |= {
            ("ours compiled", mode): Step(trainer, clip_BTHWC, partial(_our_loss, compiled, mask))
            for mode, mask in masks.items()
        }
    return steps


def _engine_steps(
    case: Case, model: VideoMAE, clip_BTHWC: torch.Tensor, masks: Mapping[str, TokenMask]
) -> dict[Name, Step]:
    trainer = EngineTrainer(model, case.device, case.dtype, case.batch)
    return {
        (OURS_BY_ENGINE, mode): Step(trainer, clip_BTHWC, partial(_our_loss, trainer.engine, mask))
        for mode, mask in masks.items()
    }


def _their_steps(
    case: Case, model: Any, clip_BTHWC: torch.Tensor, hidden_BN: torch.Tensor
) -> dict[Name, Step]:
    prepare = partial(hugging_face.prepare, config=case.model, dtype=case.dtype)
    trainer, loss = Trainer(model, case.device, case.dtype), partial(_their_loss, model, hidden_BN)
    prepared = prepare(clip_BTHWC.to(case.device))
    steps = {
        (THEIRS, "full"): Step(
            trainer, clip_BTHWC, loss, prepare, hugging_face.borders_of(model), "embed"
        ),
        (THEIRS_PREPARED, "full"): Step(trainer, clip_BTHWC, lambda _: loss(prepared)),
    }
    if case.compiled:
        steps[THEIRS_COMPILED, "full"] = Step(
            trainer, clip_BTHWC, partial(_their_loss, torch.compile(model), hidden_BN), prepare
        )
    return steps


def _measure_steps(
    case: Case, masks: Mapping[str, TokenMask], steps: Mapping[Name, Step], gate: str
) -> list[Record]:
    """A record a step, and one for the parts of each that has any; ratios only where `gate` is
    empty.
    """
    calls: dict[Name, Callable[[], object]] = {}
    memory: dict[Name, int | None] = {}
    failed: list[Record] = []
    for (provider, mode), step in steps.items():
        graphed = case.device.type == "cuda" and provider.startswith("ours") and step.can_be_graphed
        for name, is_graph in (
            ((provider, mode), False),
            *([((f"{provider}, graphed", mode), True)] if graphed else []),
        ):
            try:
                calls[name], growth = _make_ready(step, is_graph, case.device)
            except RuntimeError as error:  # out of memory, or the compiler's
                failed.append(
                    case.record(
                        "step",
                        *name,
                        reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                    )
                )
                step.trainer.model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
            else:
                memory[name] = None if growth is None else growth + step.trainer.kept_bytes()
    samples = time_in_turn(calls, case.device, case.rounds)
    records: list[Record] = []
    for name, times in samples.items():
        provider, mode = name
        measures = _rates(case, masks[mode], times)
        peak = memory[name]
        if peak is not None:
            measures["peak_mb"] = peak / 1e6
        if provider.startswith("ours") and not gate:
            measures |= {
                f"x {theirs}": ratio(samples[theirs, "full"], times)
                for theirs in (THEIRS, THEIRS_PREPARED, THEIRS_COMPILED)
                if (theirs, "full") in samples
            }
        records.append(
            case.record("step", provider, mode, times={"step": quantiles(times)}, measures=measures)
        )
    return [
        *records,
        *failed,
        *_measure_parts(
            case, {name: steps[name] for name in steps if name in samples and steps[name].has_parts}
        ),
    ]


def _make_ready(
    step: Step, is_graph: bool, device: torch.device
) -> tuple[Callable[[], object], int | None]:
    """(the warm call, bytes that it takes). What a graph takes, it takes when it is captured."""
    if not is_graph:
        step()
        return step, peak_growth(step, device)
    captured: list[Callable[[], None]] = []
    growth = peak_growth(lambda: captured.append(step.graphed()), device)
    return captured[0], growth


def _rates(case: Case, mask: TokenMask, times: Sequence[float]) -> dict[str, float | bool | str]:
    seconds = statistics.median(times) / 1e3
    flops = (
        6
        * case.batch
        * pretraining_macs(case.model, mask.visible_BV.shape[1], mask.masked_BM.shape[1])
    )
    rates: dict[str, float | bool | str] = {
        "clips_per_second": case.batch / seconds,
        "tflops": flops / seconds / 1e12,
        "ceiling_percent": 100 * flops / seconds / case.ceiling,
    }
    if case.device.type == "cuda":
        peak = peak_flops(
            torch.cuda.get_device_name(case.device),
            "bf16" if case.dtype == torch.bfloat16 else "fp32",
        )
        rates |= {} if peak is None else {"mfu": flops / seconds / peak}
    return rates


def _measure_parts(case: Case, steps: Mapping[Name, Step]) -> list[Record]:
    """Each marked step follows one without marks, in turn."""
    found: dict[Name, list[dict[str, float]]] = {name: [] for name in steps}
    excess: dict[Name, list[float]] = {name: [] for name in steps}
    for _ in range(PART_ROUNDS):
        for name, step in steps.items():
            plain = time_call(step, case.device)
            found[name].append(step.parts())
            excess[name].append(sum(found[name][-1].values()) / plain)
    return [
        case.record(
            "parts",
            *name,
            times={part: quantiles([parts[part] for parts in rounds]) for part in rounds[0]},
            measures={"marked_over_step": statistics.median(excess[name])},
        )
        for name, rounds in found.items()
    ]


def _measure_preparation(case: Case, clip_BTHWC: torch.Tensor) -> list[Record]:
    """What the input of their model takes on its way from uint8: the cheapest that we know, and
    their own processor.
    """
    clip_BTHWC = clip_BTHWC.to(case.device)
    processor, videos = hugging_face.processor(case.model), list(clip_BTHWC.permute(0, 1, 4, 2, 3))
    samples = time_in_turn(
        {
            "in two passes": partial(hugging_face.prepare, clip_BTHWC, case.model),
            "by VideoMAEVideoProcessor": partial(processor, videos, return_tensors="pt"),
        },
        case.device,
        PART_ROUNDS,
    )
    return [
        case.record("preparation", provider, "full", times={"step": quantiles(times)})
        for provider, times in samples.items()
    ]


def _our_loss(model: Callable[..., Any], mask: TokenMask, clip_BTHWC: torch.Tensor) -> torch.Tensor:
    return model(clip_BTHWC, mask).loss


def _their_loss(
    model: Callable[..., Any], hidden_BN: torch.Tensor, video_BTCHW: torch.Tensor
) -> torch.Tensor:
    return model(video_BTCHW, hidden_BN).loss


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]
