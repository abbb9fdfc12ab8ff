"""What is timed in `video-mae bench step`: a model with AdamW and the ways to take its training
step, and how they are timed in turn.

Letters: B clips, T frames, H W pixels, C channels.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from video_mae.benchmark.timeline import Border, Timeline, marked
from video_mae.config import EngineConfig, OptimConfig, RunConfig
from video_mae.training.engine import Engine
from video_mae.training.optim import parameter_groups

Name = TypeVar("Name")

SAMPLE_MS = 100  # of steps between two looks at a GPU, which would wait for the host at each
# steps before a capture: they make the optimizer's state, and what libraries make on first use
WARM_UP = 3


class Trainer:
    """A model in its place and precision, and AdamW for it.

    bf16: weights, activations and gradients are bfloat16, the optimizer has a float32 master copy,
    as under DeepSpeed.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device = model.to(device), device
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._masters: list[torch.Tensor] = []
        groups = parameter_groups(self.model, weight_decay=0.05)
        if dtype != torch.float32:
            masters = {id(weight): weight.detach().clone() for weight in self._weights}
            self._masters = list(masters.values())
            for master in self._masters:
                master.grad = torch.zeros_like(master)
            for group in groups:
                group["params"] = [masters[id(weight)] for weight in group["params"]]
            self.model.to(dtype)
        self._adamw = torch.optim.AdamW(
            groups, lr=1e-5, betas=(0.9, 0.95), fused=True, capturable=device.type == "cuda"
        )

    def backward(self, loss: torch.Tensor) -> None:
        """Fills the gradients."""
        loss.backward()

    def update(self) -> None:
        """The optimizer's part of a step; the gradients are gone afterwards."""
        if self._masters:
            torch._foreach_copy_(
                [_gradient(master) for master in self._masters],
                [_gradient(weight) for weight in self._weights],
            )
        self._adamw.step()
        if self._masters:
            torch._foreach_copy_([weight.data for weight in self._weights], self._masters)
        self.model.zero_grad(set_to_none=True)

    def kept_bytes(self) -> int:
        """What weights, master weights and optimizer state take between steps."""
        state = [
            value
            for values in self._adamw.state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        ]
        masters = [tensor for master in self._masters for tensor in (master, _gradient(master))]
        kept = [*self.model.parameters(), *self.model.buffers(), *state, *masters]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


class EngineTrainer:
    """The same as a training run has it: a copy of the model under `Engine`, ZeRO 1 in one process."""

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, batch: int
    ) -> None:
        precision = "fp32" if dtype == torch.float32 else "bf16"
        config = RunConfig(
            engine=EngineConfig(zero_stage=1, precision=precision),
            optim=OptimConfig(micro_batch=batch),
        )
        self.engine = Engine(copy.deepcopy(model), config)
        self.model, self.device = self.engine.deepspeed.module, device

    def backward(self, loss: torch.Tensor) -> None:
        """Fills the gradients."""
        self.engine.backward(loss, last=True)

    def update(self) -> None:
        """The optimizer's part of a step, and what the host reads of the step before."""
        self.engine.step(1e-5)
        self.engine.statuses.take(of_all=False)

    def kept_bytes(self) -> int:
        """What weights, master weights and optimizer state take between steps."""
        state = self.engine.optimizer.state
        moments = [
            value
            for values in state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        ]
        return sum(
            tensor.numel() * tensor.element_size()
            for tensor in [*self.model.parameters(), *self.model.buffers(), *state, *moments]
        )


class Step:
    """A training step as it is called: data copy, preparation of the input, forward, backward,
    optimizer.

    clip: of the host; loss: what the model makes of the clip on the device, or of what `prepare`
    makes of it. parts: the borders between the parts of the forward pass, and the name of its
    first.
    """

    def __init__(
        self,
        trainer: Trainer | EngineTrainer,
        clip: torch.Tensor,
        loss: Callable[[torch.Tensor], torch.Tensor],
        prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
        borders: Sequence[Border] = (),
        first_part: str = "",
    ) -> None:
        self.trainer, self._loss, self._prepare, self._borders, self._first_part = (
            trainer,
            loss,
            prepare,
            borders,
            first_part,
        )
        self._clip = clip.pin_memory() if trainer.device.type == "cuda" else clip

    @property
    def can_be_graphed(self) -> bool:
        """Does the host only launch?"""
        return isinstance(self.trainer, Trainer)

    @property
    def has_parts(self) -> bool:
        """Can `parts` tell more than one?"""
        return bool(self._borders)

    def __call__(self) -> None:
        self._run(self._clip.to(self.trainer.device, non_blocking=True), lambda part: None)

    def parts(self) -> dict[str, float]:
        """Takes a step; milliseconds of its parts."""
        timeline = Timeline(self.trainer.device)
        with marked(self._borders, timeline):
            timeline.begin("data copy")
            self._run(self._clip.to(self.trainer.device, non_blocking=True), timeline.begin)
        return timeline.milliseconds()

    def graphed(self) -> Callable[[], None]:
        """The same step as one CUDA graph: only the copy of the clip is left to the host."""
        device = self.trainer.device
        clip = self._clip.to(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._run(clip, lambda part: None)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(clip, lambda part: None)

        def replay() -> None:
            clip.copy_(self._clip, non_blocking=True)
            graph.replay()

        return replay

    def _run(self, clip: torch.Tensor, begin: Callable[[str], None]) -> None:
        if self._prepare is not None:
            begin("preparation")
            clip = self._prepare(clip)
        begin(self._first_part)
        self.trainer.backward(self._loss(clip))
        begin("optimizer")
        self.trainer.update()


def time_in_turn(
    calls: Mapping[Name, Callable[[], object]], device: torch.device, num_rounds: int
) -> dict[Name, list[float]]:
    """Milliseconds of each call, a sample a round, the calls in turn: what a machine does besides
    then falls on all of them.

    Every other round goes backwards, so none always follows the same other. On a GPU a sample is
    the mean of many calls.
    """
    samples: dict[Name, list[float]] = {name: [] for name in calls}
    repeats = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        call()
        if device.type == "cuda":
            repeats[name] = max(1, round(SAMPLE_MS / time_call(call, device)))
    for i in range(num_rounds):
        for name in reversed(list(calls)) if i % 2 else calls:
            samples[name].append(time_call(calls[name], device, repeats[name]))
    return samples


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast ours is: the median over rounds, each of which has a sample of both."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    assert weight.grad is not None
    return weight.grad


def time_call(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    """Milliseconds of one call, until the device is done; the mean of `repeats`, between which it
    is not waited for.
    """
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return 1e3 * (time.perf_counter() - start) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
