"""Where the time of a training step goes: marks on the tensors between its parts, in the forward
and in the backward pass.

A mark is an identity whose forward and backward take the time, on a GPU as an event in the stream.
What lies between two marks belongs to one part, so the parts of a step add up to all of it, and
what they add is the marks themselves: a few microseconds each.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from video_mae.model.blocks import Block, Blocks
from video_mae.model.vit import VideoMAE


class Border(NamedTuple):
    """Between two parts: the first input of a module, or its output."""

    module: nn.Module
    side: Literal["input", "output"]
    before: str
    after: str


class Timeline:
    """The parts of one step, in the order of time: `begin` starts a part and ends the one before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def begin(self, part: str) -> None:
        """From now on the time belongs to `part`."""
        self._marks.append((part, self._now()))

    def milliseconds(self) -> dict[str, float]:
        """Ends the last part; the time of each, which is spread over forward and backward pass, in
        the order in which they began.
        """
        self.begin("end")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parts: dict[str, float] = {}
        for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            parts[part] = parts.get(part, 0.0) + _elapsed(start, end)
        return parts

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def marked(borders: Sequence[Border], timeline: Timeline) -> Iterator[None]:
    """Within it, these modules tell the timeline when a tensor, or later its gradient, crosses one
    of the borders.
    """

    def watch(border: Border) -> Any:
        if border.side == "output":
            return border.module.register_forward_hook(
                lambda module, inputs, output: _Mark.apply(output, timeline, border)
            )
        return border.module.register_forward_pre_hook(
            lambda module, inputs: (_Mark.apply(inputs[0], timeline, border), *inputs[1:])
        )

    handles = [watch(border) for border in borders]
    yield
    for handle in handles:
        handle.remove()


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor, timeline: Timeline, border: Border) -> torch.Tensor:
        timeline.begin(border.after)
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.timeline, ctx.border = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        ctx.timeline.begin(ctx.border.before)
        return gradients[0], None, None


def borders_of(model: VideoMAE) -> list[Border]:
    """Between the parts of our model; a forward pass begins with `gather`.

    Attention is the product of queries, keys and values alone: what the attention kernels compute.
    Its projections are in `rest`.
    """

    def attention(blocks: Blocks, name: str) -> list[Border]:
        around: list[Border] = []
        for block in blocks:
            assert isinstance(block, Block)
            around += [
                Border(block.attn.qkv, "output", f"{name} rest", f"{name} attention"),
                Border(block.attn.proj, "input", f"{name} attention", f"{name} rest"),
            ]
        return around

    encoder, decoder = model.encoder, model.decoder
    return [
        Border(encoder.patch_embed, "input", "gather", "embed"),
        Border(encoder.blocks[0], "input", "embed", "encoder rest"),
        *attention(encoder.blocks, "encoder"),
        Border(decoder.encoder_to_decoder, "input", "encoder rest", "decoder rest"),
        *attention(decoder.blocks, "decoder"),
        Border(decoder.head, "output", "decoder rest", "losses"),
    ]


def _elapsed(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end)
    assert not isinstance(end, torch.cuda.Event)
    return 1e3 * (end - start)
