"""What a run tells: metrics.jsonl, log.txt, the console, throughput, data wait and what to do about
it, MFU; and of which videos.
"""

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from video_mae.files import Register, cut_after, json_line, one_line

Precision = Literal["fp32", "bf16", "fp16"]
Event = tuple[str, float, int]
Advise = Callable[[float, Mapping[str, float], float], tuple[str, str] | None]
"""From the data wait, the milliseconds of a clip in each stage of loading and clips/s to the stage
that limits the run, and one line.
"""

# Dense bf16/fp16 tensor-core FLOP/s by device name (a whole-word pattern; the first match counts).
# Source: NVIDIA's data sheets, halved where a sheet quotes 2:4 sparsity; RTX 4090: fp16 with fp32
# accumulation, Ada whitepaper. V100 has no bf16.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "V100": 125e12,
    "L40S": 362e12,
    "RTX 4090$": 165e12,
    "A10": 125e12,
}


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Dense FLOP/s that a GPU's data sheet promises; None where it is unknown (fp32 runs without
    TF32 here: no figure).
    """
    if precision == "fp32" or (precision == "bf16" and "V100" in device_name):
        return None
    return next(
        (flops for name, flops in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)),
        None,
    )


class Journal:
    """Measures the steps of a run and writes them to RUN/metrics.jsonl, RUN/log.txt and the
    console.

    Every rank makes one and calls `step`; the main rank alone writes. clips_per_step counts all
    ranks, flops_per_clip is a forward and backward pass. With resumed_step = k, lines of later
    steps are cut off metrics.jsonl: that work was lost. reduce_mean averages a tensor over ranks;
    every rank calls it at the same steps. stages: of loading, whose costs are measured.
    `quarantine` names the videos that could not be decoded, `fallbacks` those that another decoder
    had to read. `advise` is asked after each line but the first, in which workers start; what it
    says of a stage is told once.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        is_main: bool,
        total_steps: int,
        log_interval: int,
        clips_per_step: int,
        flops_per_clip: float | None,
        num_devices: int,
        device: torch.device,
        precision: Precision,
        write_events: Callable[[list[Event]], None] | None = None,
        reduce_mean: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
        resumed_step: int = 0,
        stages: Sequence[str] = (),
    ) -> None:
        self.is_main, self.total_steps, self.log_interval, self.clips_per_step = (
            is_main,
            total_steps,
            log_interval,
            clips_per_step,
        )
        self.device, self.write_events, self.reduce_mean = device, write_events, reduce_mean
        self.metrics_file, self.log_file = run_folder / "metrics.jsonl", run_folder / "log.txt"
        self.quarantine, self.fallbacks = (
            Register(run_folder / "quarantine.jsonl"),
            Register(run_folder / "fallbacks.jsonl"),
        )
        self._num_ranks, self._stages = num_devices, tuple(stages)
        self.advise: Advise = lambda data_wait, milliseconds, clips_per_second: None
        # the stages that were told, and whether workers are past their start
        self._told, self._has_line = set[str](), False
        peak = (
            peak_flops(torch.cuda.get_device_name(device), precision)
            if device.type == "cuda"
            else None
        )
        # of one clip/s
        self._flops_share = (
            None
            if peak is None or flops_per_clip is None
            else flops_per_clip / (peak * num_devices)
        )
        self._bar: tqdm[Any] | None = None
        self._has_begun = False
        self._clear(time.perf_counter())
        run_folder.mkdir(parents=True, exist_ok=True)
        if is_main:
            cut_after(self.metrics_file, resumed_step)
            if sys.stdout.isatty():
                self._bar = tqdm(
                    total=total_steps,
                    initial=resumed_step,
                    file=sys.stdout,
                    dynamic_ncols=True,
                    unit="step",
                )

    def say(self, message: str) -> None:
        """Prints a message once, on the main rank, and keeps it in log.txt."""
        if not self.is_main:
            return
        message = one_line(message)  # it may name files
        if self._bar is None:
            print(message, flush=True)
        else:
            self._bar.write(message, file=sys.stdout)
        self._log(message)

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Wraps the fetching of a batch: the time inside counts as waiting for data.

        It is the host's wait. A GPU that is still busy with earlier steps hides some of it, so it
        bounds the loss from above.
        """
        begin = time.perf_counter()
        if not self._has_begun:
            # what came before the first batch (building the model) is no part of a step
            self._begin, self._has_begun = begin, True
        yield
        self._wait_seconds += time.perf_counter() - begin

    def spent(self, seconds: Iterable[float]) -> None:
        """Takes in what a batch has cost in each of the stages of loading, on its way here."""
        self._stage_seconds = [
            total + more for total, more in zip(self._stage_seconds, seconds, strict=True)
        ]

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Wraps what is no part of a step, such as a validation: the time inside slows no figure
        down.
        """
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin

    def step(
        self,
        step: int,
        epoch: float,
        values: Mapping[str, torch.Tensor | float],
        lr: float,
        grad_norm: torch.Tensor | float,
        skipped_steps: torch.Tensor | float,
    ) -> None:
        """Takes in optimizer step number `step` (the first is 1); writes a line every log_interval
        steps and after the last.

        values: `loss` and whatever else the stage measures, the same names each time. They, the
        gradient norm and skipped_steps stay on the device until a line is due, and the line holds
        means over its steps (NaN in one step makes the mean null), but lr and skipped_steps (a
        count since the start) of the step itself.
        """
        self._sums = self._sums + torch.stack(
            [self._scalar(value) for value in (*values.values(), grad_norm)]
        )
        self._num_steps += 1
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if step % self.log_interval != 0 and step != self.total_steps:
            return
        others = torch.stack(
            [
                self._scalar(value)
                for value in (skipped_steps, self._wait_seconds, *self._stage_seconds)
            ]
        )
        # the only host sync of an interval
        reduced = self.reduce_mean(torch.cat([self._sums / self._num_steps, others])).tolist()
        means, (grad_norm, skipped_steps, wait_seconds, *stage_seconds) = (
            reduced[: len(values)],
            reduced[len(values) :],
        )
        now = time.perf_counter()
        if self.is_main:
            seconds = max(now - self._begin, 1e-9)
            clips = self.clips_per_step * self._num_steps
            clips_per_second, data_wait = clips / seconds, min(1.0, wait_seconds / seconds)
            milliseconds = {
                stage: 1e3 * spent * self._num_ranks / clips
                for stage, spent in zip(self._stages, stage_seconds, strict=True)
            }
            line = {
                "step": step,
                "epoch": epoch,
                **dict(zip(values, means, strict=True)),
                "lr": lr,
                "grad_norm": grad_norm,
                "clips_per_second": clips_per_second,
                "data_wait": data_wait,
                **{f"{stage}_ms": spent for stage, spent in milliseconds.items()},
                "mfu": None if self._flops_share is None else clips_per_second * self._flops_share,
                "memory_gb": self._memory_gb(),
                "skipped_steps": int(skipped_steps),
                "bad_videos": len(self.quarantine),
                "time": time.time(),
            }
            self._write(line, _describe(line, values), "train", seconds / self._num_steps)
            advice = (
                self.advise(data_wait, milliseconds, clips_per_second) if self._has_line else None
            )
            if advice is not None and advice[0] not in self._told:
                self._told.add(advice[0])
                self.say(advice[1])
            self._has_line = True
        self._clear(now)

    def record(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Writes a line of its own about the model as it is after a step, such as its validation;
        the values are those of all ranks.
        """
        if self.is_main:
            parts = {
                name.replace("_", " "): _number(value, ".6g") for name, value in values.items()
            }
            self._write(
                {"step": step, "epoch": epoch, **values, "time": time.time()}, parts, "validation"
            )

    def close(self) -> None:
        """Ends the progress bar; the files are complete after every line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _clear(self, now: float) -> None:
        self._begin, self._wait_seconds, self._num_steps = now, 0.0, 0
        self._stage_seconds = [0.0] * len(self._stages)
        self._sums = torch.zeros((), dtype=torch.float64, device=self.device)

    def _scalar(self, value: torch.Tensor | float) -> torch.Tensor:
        # full() fills on the device; as_tensor() would copy from the host and wait for the stream
        if not isinstance(value, torch.Tensor):
            return torch.full((), value, dtype=torch.float64, device=self.device)
        return value.detach().to(self.device, torch.float64).reshape(())

    def _memory_gb(self) -> float:
        """Peak so far in 10^9 bytes: allocated by PyTorch on a GPU, resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def _write(
        self,
        line: dict[str, Any],
        parts: dict[str, str],
        kind: str,
        seconds_per_step: float | None = None,
    ) -> None:
        line = {
            key: value if isinstance(value, int) or _is_finite(value) else None
            for key, value in line.items()
        }
        with self.metrics_file.open("ab") as stream:
            stream.write(json_line(line))
        text = f"step {line['step']}/{self.total_steps}  " + "  ".join(
            f"{name} {value}" for name, value in parts.items()
        )
        if seconds_per_step is None:
            self.say(text)
        elif self._bar is None:
            self.say(
                f"{text}  ETA {timedelta(seconds=round((self.total_steps - line['step']) * seconds_per_step))}"
            )
        else:
            self._bar.set_postfix(parts)
            self._log(text)
        if self.write_events is not None:
            self.write_events(
                [
                    (f"{kind}/{key}", float(value), line["step"])
                    for key, value in line.items()
                    if value is not None and key not in ("step", "time")
                ]
            )

    def _log(self, message: str) -> None:
        with self.log_file.open("a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message}\n")


def _describe(line: dict[str, Any], values: Iterable[str]) -> dict[str, str]:
    """The console's words for a line of metrics; what is zero, unknown, or the loss again is left
    out.
    """
    parts = {"epoch": _number(line["epoch"], ".2f"), "loss": _number(line["loss"], ".4f")}
    parts |= {
        name.removesuffix("_loss").replace("_", " "): _number(line[name], ".4f")
        for name in values
        if name != "loss" and line[name] not in (0.0, line["loss"])
    }
    parts |= {
        "lr": _number(line["lr"], ".2e"),
        "grad norm": _number(line["grad_norm"], ".3g"),
        "clips/s": _number(line["clips_per_second"], ".1f"),
        "data wait": _number(line["data_wait"], ".0%"),
        "memory": f"{line['memory_gb']:.1f} GB",
    }
    if line["mfu"] is not None:
        parts["MFU"] = format(line["mfu"], ".1%")
    for key in ("skipped_steps", "bad_videos"):
        if line[key]:
            parts[key.replace("_", " ")] = str(line[key])
    return parts


def _number(value: float | None, form: str) -> str:
    return format(value, form) if _is_finite(value) else "not finite"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
