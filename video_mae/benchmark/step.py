"""`video-mae bench step`: whole training steps of the published sizes, where their time goes, and
Hugging Face's step beside ours.

Letters: B clips, T frames, H W pixels, C channels, N tokens.
"""

import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from video_mae.benchmark import step_models
from video_mae.benchmark.clock import Call, Clock, peak_growth, ratio, turns
from video_mae.benchmark.kernels import default_device, default_dtype
from video_mae.benchmark.record import (
    Record,
    Results,
    Table,
    dtype_name,
    environment,
    make_table,
    percentiles,
    reason_of,
)
from video_mae.benchmark.report import publish
from video_mae.benchmark.step_models import EngineTrainer, Step, Trainer
from video_mae.config import ModelConfig
from video_mae.config.bench import StepBenchConfig, words
from video_mae.kernels.dispatch import describe
from video_mae.model.masking import TokenMask, token_mask
from video_mae.model.vit import VideoMAE, pretraining_macs
from video_mae.training.engine import leave
from video_mae.training.journal import peak_flops

Name = tuple[str, str]
"""(provider, mode) of a step."""

OURS, OURS_BY_ENGINE = "ours eager", "ours by Engine"
THEIRS = "Hugging Face eager"
THEIRS_PREPARED = "Hugging Face eager, input prepared"
THEIRS_COMPILED = "Hugging Face compiled"
PARTS = (
    "data copy",
    "preparation",
    "gather",
    "embed",
    "encoder attention",
    "encoder rest",
    "decoder attention",
    "decoder rest",
    "losses",
    "optimizer",
)
MASKS = {"full": 0.0, "dual": 0.5}  # mode: share of the tokens that the decoder leaves out
HIDDEN = 0.9
SAME_LOSS = 1e-4
PART_ROUNDS = 5
NOTES = (
    "A step: copy of the clips to the device, forward, backward, AdamW (fused; float32 master "
    "weights under bfloat16). The steps take turns, back and forth; ms are medians; x HF: the "
    "median over the rounds of Hugging Face's time over ours in the same round.",
    "ours by Engine: as a training run takes it, through DeepSpeed (ZeRO 1, one process). What it "
    "takes beyond `ours eager` is DeepSpeed's.",
    "full: 90 % tube masking, every hidden token is decoded. dual: the decoder leaves half of all "
    "tokens out (VideoMAE V2). Hugging Face's model cannot; its full step is what dual is compared "
    "with.",
    "Hugging Face: VideoMAEForPreTraining with SDPA, our weights, clips and masks. Its input is "
    "made of uint8 clips on the device in two passes, the cheapest way that we know; this is part "
    "of its step, but for `input prepared`.",
    "% ceiling: of the FLOP/s of a large matrix product, measured in this run; MFU: of the data "
    "sheet's. Both count 6 operations for each multiply-accumulate that a forward pass needs.",
    "Parts: eager steps with marks on the tensors between the parts, in the forward and the "
    "backward pass; a mark takes the time of the clock on a CPU, and of an event in the stream on "
    "a GPU. attention is softmax(q k^T) v alone, its projections are in rest.",
)


def start(config: StepBenchConfig) -> int:
    """The stage as the command line starts it. Raises: ValueError for a clip that a preset cannot
    cut.
    """
    status = publish("step", measure(config), tables, config, NOTES)
    leave()
    return status


def measure(config: StepBenchConfig) -> Iterator[Results]:
    """Measures preset after preset; each gives a part of one run."""
    device = default_device()
    side, batch, presets, compiled = 112, 8, "small", ""
    if device.type == "cuda":
        side, batch, presets, compiled = 224, 32, "small, base, large, huge", "small, base"
    side = config.side or side
    precisions = {"auto": default_dtype(device), "fp32": torch.float32, "bf16": torch.bfloat16}
    dtype = precisions[config.precision]
    models = {
        preset: ModelConfig.preset(preset, height=side, width=side)
        for preset in words(config.presets.replace("auto", presets))
    }
    clock = Clock(device)
    ceilings = clock.ceilings(dtype)
    header = {
        **environment(device),
        "benchmark": "step",
        "dtype": dtype_name(dtype),
        "kernels": describe("auto", device),
        "ceilings": ceilings._asdict(),
    }
    for preset, model in models.items():
        gc.collect()  # DeepSpeed's engine of the model before is a ring of references
        # else the models of one class would be too many for the compiler, and it would quietly run
        # them eagerly
        torch.compiler.reset()
        bench = StepBench(
            preset=preset,
            model=model,
            batch=config.batch or batch,
            rounds=config.rounds,
            is_compiled=preset in words(config.compiled.replace("auto", compiled)),
            clock=clock,
            dtype=dtype,
            ceiling=ceilings.flops_per_second,
        )
        yield Results(header, bench.measure())


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """One model, its batch and its place, measured. ceiling: FLOP/s of the device, as measured."""

    preset: str
    model: ModelConfig
    batch: int
    rounds: int
    is_compiled: bool
    clock: Clock
    dtype: torch.dtype
    ceiling: float

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def record(self, op: str, provider: str, mode: str = "full", **what: Any) -> Record:
        c = self.model
        return Record(
            benchmark="step",
            op=op,
            shape=f"{self.preset}, {self.batch} x {c.num_frames}x{c.height}x{c.width}",
            dtype=dtype_name(self.dtype),
            provider=provider,
            mode=mode,
            **what,
        )

    def measure(self) -> list[Record]:
        """Everything about one model: the losses, the steps, the preparation of the competitor's
        input, the parts.
        """
        c, seeds_B = self.model, torch.arange(self.batch, device=self.device)
        shape = self.batch, c.num_frames, c.height, c.width, c.in_channels
        generator = torch.Generator().manual_seed(0)
        clip_BTHWC = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        masks = {
            mode: token_mask(seeds_B, c.grid, "tube", HIDDEN, skipped)
            for mode, skipped in MASKS.items()
        }
        ours = VideoMAE(c).to(self.device)
        records: list[Record] = []

        def built(provider: str, package: str, build: Call) -> Any:
            """None and a row that says why, where it cannot be."""
            try:
                return build()
            except (ImportError, ValueError, torch.OutOfMemoryError) as error:
                remedy = f"; pip install {package}" if isinstance(error, ImportError) else ""
                reason = f"{reason_of(error)}{remedy}"
                records.append(self.record("step", provider, reason=reason))

        by_engine = built(
            OURS_BY_ENGINE,
            "deepspeed",
            partial(EngineTrainer, ours, self.device, self.dtype, self.batch),
        )
        theirs = built(THEIRS, "transformers", partial(step_models.hugging_face_model, ours))
        gate = ""
        if theirs is not None:
            theirs.to(self.device)
            loss = self.compare_losses(ours, theirs, clip_BTHWC, masks["full"])
            gate = loss.measures["gate"]
            records += [loss, *self.measure_preparation(clip_BTHWC)]
        trainer = Trainer(ours, self.device, self.dtype)
        models: dict[str, tuple[Any, Any]] = {OURS: (trainer, ours)}
        if self.is_compiled:
            models["ours compiled"] = (trainer, torch.compile(ours, dynamic=False))
        if by_engine is not None:
            models[OURS_BY_ENGINE] = (by_engine, by_engine.engine)
        steps = {
            (provider, mode): Step(trainer, clip_BTHWC, model, mask)
            for provider, (trainer, model) in models.items()
            for mode, mask in masks.items()
        }
        if theirs is not None:
            steps |= self.their_steps(theirs, clip_BTHWC, masks["full"])
        return records + self.measure_steps(masks, steps, gate)

    @torch.no_grad()
    def compare_losses(
        self, ours: VideoMAE, theirs: Any, clip_BTHWC: Tensor, mask: TokenMask
    ) -> Record:
        """The losses of both models in float32; measure `gate` says what is wrong, and is empty
        where they are the same.
        """
        clip_BTHWC = clip_BTHWC.to(self.device)
        hidden_BN = step_models.boolean_mask(mask, self.model.num_tokens)
        video_BTCHW = step_models.prepare(clip_BTHWC, self.model)
        our_loss = ours(clip_BTHWC, mask).loss.item()
        their_loss = theirs(video_BTCHW, hidden_BN).loss.item()
        gate = ""
        if abs(our_loss - their_loss) > SAME_LOSS:
            gate = f"the losses differ: ours is {our_loss:.6f}, theirs {their_loss:.6f}"
        measures = {"ours": our_loss, "theirs": their_loss, "gate": gate}
        return self.record("loss", THEIRS, measures=measures)

    def their_steps(self, model: Any, clip_BTHWC: Tensor, mask: TokenMask) -> dict[Name, Step]:
        prepare = partial(step_models.prepare, config=self.model, dtype=self.dtype)
        hidden_BN = step_models.boolean_mask(mask, self.model.num_tokens)
        trainer = Trainer(model, self.device, self.dtype)
        prepared = prepare(clip_BTHWC.to(self.device))
        steps = {
            THEIRS: Step(trainer, clip_BTHWC, model, hidden_BN, prepare),
            THEIRS_PREPARED: Step(trainer, clip_BTHWC, model, hidden_BN, lambda _: prepared),
        }
        if self.is_compiled:
            compiled = torch.compile(model)
            steps[THEIRS_COMPILED] = Step(trainer, clip_BTHWC, compiled, hidden_BN, prepare)
        return {(name, "full"): step for name, step in steps.items()}

    def measure_steps(
        self, masks: Mapping[str, TokenMask], steps: Mapping[Name, Step], gate: str
    ) -> list[Record]:
        """A record a step, and one for the parts of each eager one; ratios only where `gate` is
        empty.
        """
        memory: dict[Name, int] = {}
        failed: list[Record] = []
        for name, step in steps.items():
            try:
                step()
                growth = peak_growth(step, self.device)[1]
                kept = step_models.kept_bytes(step.trainer)
                memory[name] = growth + kept if growth else 0
            except RuntimeError as error:  # out of memory, or the compiler's
                failed.append(self.record("step", *name, reason=reason_of(error)))
                step.trainer.model.zero_grad()
                torch.cuda.empty_cache()
        calls = {name: steps[name] for name in memory}
        samples = self.clock.in_turn(calls, self.rounds)
        records: list[Record] = []
        for (provider, mode), times in samples.items():
            measures = self.rates(masks[mode], times)
            if memory[provider, mode]:
                measures["peak_mb"] = memory[provider, mode] / 1e6
            for theirs in (THEIRS, THEIRS_PREPARED, THEIRS_COMPILED):
                if provider.startswith("ours") and not gate and (theirs, "full") in samples:
                    measures[f"x {theirs}"] = ratio(samples[theirs, "full"], times)
            spread = {"step": percentiles(times)}
            records.append(self.record("step", provider, mode, times=spread, measures=measures))
        eager = {name: step for name, step in calls.items() if name[0] in (OURS, THEIRS)}
        return records + failed + self.measure_parts(eager)

    def rates(self, mask: TokenMask, times: Sequence[float]) -> dict[str, float]:
        seconds = statistics.median(times) / 1e3
        macs = pretraining_macs(self.model, mask.visible_BV.shape[1], mask.masked_BM.shape[1])
        flops_per_second = 6 * self.batch * macs / seconds
        rates = {
            "clips_per_second": self.batch / seconds,
            "tflops": flops_per_second / 1e12,
            "ceiling_percent": 100 * flops_per_second / self.ceiling,
        }
        if self.clock.on_gpu and self.dtype == torch.bfloat16:
            peak = peak_flops(torch.cuda.get_device_name(self.device), "bf16")
            if peak is not None:
                rates["mfu"] = flops_per_second / peak
        return rates

    def measure_parts(self, steps: Mapping[Name, Step]) -> list[Record]:
        """Each marked step follows one without marks, in turn."""
        samples: dict[Name, list[tuple[float, dict[str, float]]]] = {name: [] for name in steps}
        for name in turns(steps, PART_ROUNDS):
            plain = self.clock.milliseconds([steps[name]])
            samples[name].append((plain, steps[name].parts()))
        records = []
        for name, rounds in samples.items():
            plain, marked = zip(*rounds, strict=True)
            times = {part: percentiles([parts[part] for parts in marked]) for part in marked[0]}
            excess = ratio([sum(parts.values()) for parts in marked], plain)
            measures = {"marked_over_step": excess}
            records.append(self.record("parts", *name, times=times, measures=measures))
        return records

    def measure_preparation(self, clip_BTHWC: Tensor) -> list[Record]:
        """What the input of their model takes on its way from uint8: the cheapest that we know, and
        their own processor.
        """
        clip_BTHWC = clip_BTHWC.to(self.device)
        videos = list(clip_BTHWC.permute(0, 1, 4, 2, 3))
        processor = step_models.processor(self.model)
        calls: dict[str, Call] = {
            "in two passes": partial(step_models.prepare, clip_BTHWC, self.model),
            "by VideoMAEVideoProcessor": partial(processor, videos, return_tensors="pt"),
        }
        samples = self.clock.in_turn(calls, PART_ROUNDS)
        return [
            self.record("preparation", provider, times={"step": percentiles(times)})
            for provider, times in samples.items()
        ]


def tables(results: Results) -> list[Table]:
    """For each model the steps, and the parts of those that are not compiled."""
    found: list[Table] = []
    for (shape, dtype), group in groupby(results.records, lambda record: record.name[2:4]):
        of: dict[str, list[Record]] = {"loss": [], "preparation": [], "step": [], "parts": []}
        for record in group:
            of[record.op].append(record)
        notes: list[str] = []
        for record in of["loss"]:
            m = record.measures
            closed = f"; NOT COMPARED: {m['gate']}" if m["gate"] else ""
            notes.append(f"loss: ours {m['ours']:.6f}, theirs {m['theirs']:.6f}{closed}")
        for record in of["preparation"]:
            notes.append(f"preparing their input {record.provider}: {record.main.p50:.4g} ms")
        columns = {
            "mode": "{mode}",
            "step": "{provider}",
            "ms": "{p50:.5g}",
            "p20-p80": "{p20:.5g}-{p80:.5g}",
            "clips/s": "{clips_per_second:.4g}",
            "TFLOP/s": "{tflops:.3g}",
            "% ceiling": "{ceiling_percent:.1f}",
            "MFU": "{mfu:.1%}",
            "peak MB": "{peak_mb:.4g}",
            "x HF": f"{{x {THEIRS}:.2f}}",
            "x HF prepared": f"{{x {THEIRS_PREPARED}:.2f}}",
            "x HF compiled": f"{{x {THEIRS_COMPILED}:.2f}}",
        }
        rows = [record.figures() for record in of["step"]]
        found.append(make_table(f"step {shape} {dtype}", columns, rows, notes))
        if of["parts"]:
            parts = {part: f"{{{part}:.3g}}" for part in PARTS}
            columns = {
                "part": "{provider} {mode}",
                **parts,
                "sum": "{sum:.4g}",
                "marked over unmarked step": "{marked_over_step:.3f}",
            }
            rows = [record.figures() for record in of["parts"]]
            for figures, record in zip(rows, of["parts"], strict=True):
                figures["sum"] = sum(time.p50 for time in record.times.values())
            table = make_table("", columns, rows)
            titles, *lines = zip(table.columns, *table.rows, strict=True)  # a column a step
            found.append(Table(f"parts of the step {shape} {dtype}, ms", titles, lines))
    return found
