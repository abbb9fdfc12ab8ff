"""What a run tells: metrics.jsonl, log.txt, the console, throughput, data wait and what to do about
it, MFU; and of which videos.
"""

import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from video_mae.config.machines import FACTS
from video_mae.config.training import Precision
from video_mae.files import (
    Register,
    StorageError,
    append,
    json_line,
    log,
    mend_jsonl,
    one_line,
    read_jsonl,
)
from video_mae.progress_bar import ProgressBar
from video_mae.training.engine import Engine
from video_mae.training.heartbeat import progress

Advise = Callable[[float, Mapping[str, float], float], tuple[str, str] | None]
"""From the data wait, the milliseconds of a clip in each stage of loading and clips/s to the stage
that limits the run, and one line.
"""

# How the console names and writes what every line of metrics has.
FORMS = {
    "lr": ("lr", ".2e"),
    "grad_norm": ("grad norm", ".3g"),
    "clips_per_second": ("clips/s", ".1f"),
    "data_wait": ("data wait", ".0%"),
    "memory_gb": ("memory", ".1f"),
    "mfu": ("MFU", ".1%"),
    "skipped_steps": ("skipped steps", "d"),
    "bad_videos": ("bad videos", "d"),
}


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Dense FLOP/s that a GPU's data sheet promises; None where it is unknown (fp32 runs without
    TF32 here: no figure).
    """
    if precision == "fp32" or (precision == "bf16" and "V100" in device_name):
        return None
    for name, flops in FACTS.peak_flops.items():
        if re.search(rf"\b{name}\b", device_name):
            return flops
    return None


class Journal:
    """Measures the steps of a run and writes them to RUN/metrics.jsonl, RUN/log.txt and the
    console.

    Every rank makes one and calls `step`; the main rank alone writes. clips_per_step counts all
    ranks, flops_per_clip is a forward and backward pass; both may be changed between steps. With
    resumed_step = k, lines of later steps are cut off metrics.jsonl: that work was lost. stages: of
    loading, whose costs are measured. sums: what `sums` returned for the checkpoint that a run goes
    on from. Lines of metrics that the disk refuses are written later. `quarantine` names the videos
    that could not be decoded, `fallbacks` those that another decoder had to read. `advise` is asked
    after each line but the first, in which workers start; what it says of a stage is told once.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        total_steps: int,
        clips_per_step: int,
        flops_per_clip: float,
        resumed_step: int = 0,
        stages: Sequence[str] = (),
        sums: Sequence[Sequence[str]] = (),
    ) -> None:
        self.engine, self.total_steps = engine, total_steps
        self.clips_per_step, self.stages = clips_per_step, stages
        run_folder = Path(engine.config.output)
        self.metrics_file, self.log_file = run_folder / "metrics.jsonl", run_folder / "log.txt"
        self.quarantine = Register(run_folder / "quarantine.jsonl")
        self.fallbacks = Register(run_folder / "fallbacks.jsonl")
        self.advise: Advise = lambda data_wait, milliseconds, clips_per_second: None
        # the stages that were told, and whether workers are past their start
        self._told, self._has_line = set[str](), False
        self._unwritten, self._has_told_fallbacks = b"", False
        self.flops_per_clip = flops_per_clip
        self._peak_flops: float | None = None  # of all ranks
        if engine.device.type == "cuda":
            name = torch.cuda.get_device_name(engine.device)
            peak = peak_flops(name, engine.config.engine.precision)
            if peak is not None:
                self._peak_flops = peak * engine.world_size
        self._has_begun = False
        self._clear(time.perf_counter())
        if sums:  # of another number of ranks it is about what they had
            self._num_steps, *means = map(float, sums[engine.rank % len(sums)])
            self._sums = self._stack(*means)
        if engine.rank == 0:
            mend_jsonl(self.metrics_file, resumed_step, {"step"}, self.say)
            for register in (self.quarantine, self.fallbacks):
                mend_jsonl(register.file, resumed_step, {"path", "decoder", "reason"}, self.say)
        self._bar: Any = ProgressBar(
            total_steps,
            "step",
            initial=resumed_step,
            disable=engine.rank != 0 or not (sys.stdout.isatty() and sys.stderr.isatty()),
        )

    def say(self, message: str, *, anywhere: bool = False) -> None:
        """Prints a message once, on the main rank, or on any, and keeps it in log.txt; nothing for
        "".
        """
        if not message or (self.engine.rank != 0 and not anywhere):
            return
        message = one_line(message)  # it may name files
        try:
            ProgressBar.write(message, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # a terminal that is closed, a pipe whose reader has gone
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        log(self.log_file, message)

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
        progress.begin("reading")
        yield
        progress.begin("forward")
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
        progress.begin("measuring")
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
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Takes in optimizer step number `step` (the first is 1); writes a line every log_interval
        steps and after the last.

        values: `loss` and whatever else the stage measures, the same names each time. They, the
        gradient norm and skipped_steps stay on the device until a line is due, and the line holds
        means over its steps (NaN in one step makes the mean null), but lr and skipped_steps (a
        count since the start) of the step itself, and `more` as it is.
        """
        self._sums = self._sums + self._stack(*values.values(), grad_norm)
        self._num_steps += 1
        self._clips += self.clips_per_step
        self._flops += self.clips_per_step * self.flops_per_clip
        self._bar.update(step - self._bar.n)
        if step % self.engine.config.journal.log_interval != 0 and step != self.total_steps:
            return
        others = self._stack(skipped_steps, self._wait_seconds, *self._stage_seconds)
        # the only host sync of an interval
        reduced = self.engine.mean(torch.cat([self._sums / self._num_steps, others])).tolist()
        grad_norm, skipped_steps, wait_seconds, *stage_seconds = reduced[len(values) :]
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        clips, flops = self._clips, self._flops
        seconds_left = (self.total_steps - step) * seconds / self._num_steps
        self._clear(self._begin + seconds)
        if self.engine.rank != 0:
            return
        clips_per_second, data_wait = clips / seconds, min(1.0, wait_seconds / seconds)
        milliseconds = {
            stage: 1e3 * spent * self.engine.world_size / clips
            for stage, spent in zip(self.stages, stage_seconds, strict=True)
        }
        line = {
            "step": step,
            "epoch": epoch,
            **dict(zip(values, reduced, strict=False)),  # the rest is what comes after them
            **(more or {}),
            "lr": lr,
            "grad_norm": grad_norm,
            "clips_per_second": clips_per_second,
            "data_wait": data_wait,
            **{f"{stage}_ms": spent for stage, spent in milliseconds.items()},
            "mfu": None if self._peak_flops is None else flops / seconds / self._peak_flops,
            "memory_gb": self._memory_gb(),
            "skipped_steps": int(skipped_steps),
            "bad_videos": len(self.quarantine),
            "time": time.time(),
        }
        parts = _describe(line, [*values, *(more or {})])
        text = self._write(line, parts, "train")
        if self._bar.disable:
            self.say(f"{text}  ETA {timedelta(seconds=round(seconds_left))}")
        else:
            self._bar.set_postfix(parts)
            log(self.log_file, text)
        if self._has_line:
            advice = self.advise(data_wait, milliseconds, clips_per_second)
            if advice is not None and advice[0] not in self._told:
                self._told.add(advice[0])
                self.say(advice[1])
        self._has_line = True

    def record(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Writes a line of its own about the model as it is after a step, such as its validation;
        the values are those of all ranks.
        """
        if self.engine.rank == 0:
            line = {"step": step, "epoch": epoch, **values, "time": time.time()}
            parts = {name.replace("_", " "): number(value, ".6g") for name, value in values.items()}
            self.say(self._write(line, parts, "validation"))

    def sums(self) -> list[list[str]]:
        """What the next line averages so far, of each rank, as JSON has it: for a checkpoint."""
        return self.engine.gather(list(map(str, [self._num_steps, *self._sums.view(-1).tolist()])))

    def tell_fallbacks(self, ending: bool) -> None:
        """Once as soon as there are some, and at the end."""
        if self.engine.rank != 0 or (self._has_told_fallbacks and not ending):
            return
        found = read_jsonl(self.fallbacks.file)
        if not found:
            return
        self._has_told_fallbacks = True
        first, reason = found[0], found[0]["reason"].split(";")[0]
        self.say(
            f"{len(found)} of the videos so far were read by another decoder, the first "
            f"{first['path']} by {first['decoder']}, as {reason}; {self.fallbacks.file} names "
            "them, `video-mae pack` cures them"
        )

    def close(self) -> None:
        """Ends the progress bar. Raises: as `flush`."""
        self._bar.close()
        self.flush()

    def flush(self) -> None:
        """Writes the lines that the disk has refused. Raises: StorageError where it still does."""
        if self._unwritten and self.metrics_file.parent.exists():  # else what ends the run says so
            append(self.metrics_file, self._unwritten)
            self._unwritten = b""

    def _clear(self, now: float) -> None:
        self._begin, self._wait_seconds, self._num_steps = now, 0.0, 0
        self._clips, self._flops = 0, 0.0
        self._stage_seconds = [0.0] * len(self.stages)
        self._sums = torch.zeros((), dtype=torch.float64, device=self.engine.device)

    def _stack(self, *values: torch.Tensor | float) -> torch.Tensor:
        """Numbers of the device and of the host as one tensor on the device."""
        place: dict[str, Any] = {"device": self.engine.device, "dtype": torch.float64}
        # full() fills on the device; as_tensor() would copy from the host and wait for the stream
        tensors = [
            value if isinstance(value, torch.Tensor) else torch.full((), value, **place)
            for value in values
        ]
        return torch.stack([tensor.detach().to(**place).reshape(()) for tensor in tensors])

    def _memory_gb(self) -> float:
        """Peak so far in 10^9 bytes: allocated by PyTorch on a GPU, resident on a CPU."""
        if self.engine.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.engine.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def _write(self, line: dict[str, Any], parts: dict[str, str], kind: str) -> str:
        """Writes a line of metrics and gives it to the monitors; returns it as a text."""
        line = {key: value if _is_finite(value) else None for key, value in line.items()}
        step = line["step"]
        is_told = self._unwritten != b""
        self._unwritten += json_line(line)
        try:  # after those that the disk refused before
            self.flush()
        except StorageError as error:
            if not is_told:
                self.say(str(error))
        if not self.metrics_file.parent.exists():
            # nothing can be saved any more: all ranks are to end with this step
            self.engine.statuses.remember(signal.SIGTERM)
        self.engine.write_events(
            [
                (f"{kind}/{key}", float(value), step)
                for key, value in line.items()
                if value is not None and key not in ("step", "time")
            ]
        )
        words = [f"step {step}/{self.total_steps}"]
        words += [f"{name} {value}" for name, value in parts.items()]
        return "  ".join(words)


def _describe(line: dict[str, Any], measures: Iterable[str]) -> dict[str, str]:
    """The console's words for a line of metrics; what is zero, unknown, or the loss again is left
    out.
    """
    forms = {"epoch": ("epoch", ".2f"), "loss": ("loss", ".4f")}
    for name in measures:
        if name != "loss" and line[name] not in (0.0, line["loss"]):
            forms[name] = (name.removesuffix("_loss").replace("_", " "), ".4f")
    forms |= FORMS
    for key in ("mfu", "skipped_steps", "bad_videos"):
        if not line[key]:
            del forms[key]
    words = {name: number(line[key], form) for key, (name, form) in forms.items()}
    words["memory"] += " GB"
    return words


def number(value: float | None, form: str) -> str:
    """A value of a line of metrics, where null is what was not finite."""
    return format(value, form) if _is_finite(value) else "not finite"


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
