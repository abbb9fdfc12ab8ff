"""Attention as it is benchmarked: our kernels, the backends of SDPA, FlexAttention.

Letters: B clips, N tokens, H heads, D head width.
"""

import contextlib
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from video_mae.benchmark.clock import Work
from video_mae.benchmark.kernel_operations import Inputs, Operation, Provider, compiled
from video_mae.kernels import attention_long, attention_short, reference
from video_mae.kernels.attention import HALF, packed_attention, pick


@dataclass
class AttentionOperation(Operation):
    """packed_attention at [batch, tokens, 3, heads, width]."""

    tokens: int
    heads: int
    width: int  # of a head

    op, baseline, form = "attention", "reference", "{name} {batch}x{tokens}x{heads}x{width}"

    def inputs(self) -> Inputs:
        qkv_BN3HD = self.normal(self.batch, self.tokens, 3, self.heads, self.width)
        upstream = self.normal(self.batch, self.tokens, self.heads, self.width)
        return SimpleNamespace(qkv_BN3HD=qkv_BN3HD.requires_grad_(), upstream=upstream)

    def definition(self, x: Inputs) -> Tensor:
        return reference.packed_attention(x.qkv_BN3HD)

    def ours(self, x: Inputs, **way: Any) -> Tensor:
        return packed_attention(x.qkv_BN3HD, **way).contiguous()

    def sample(self, result: Tensor) -> Tensor:
        """The first and the last clip: in float64 all the scores of a batch would not fit."""
        return torch.stack([result[0], result[-1]])

    def named(self, gradients: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(("dq", "dk", "dv"), gradients[0].unbind(2), strict=True))

    def work(self, mode: str) -> Work:
        """4 B H N^2 d, 2.5 times that backward (no score is kept); q, k, v, out and the
        log-sum-exp, backward also their gradients.
        """
        rows = self.batch * self.heads * self.tokens
        row_bytes = self.width * self.dtype.itemsize
        forward = Work(4 * rows * self.tokens * self.width, rows * (4 * row_bytes + 4))
        backward = Work(2.5 * forward.flops, rows * (8 * row_bytes + 4))
        both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
        return {"forward": forward, "backward": backward, "both": both}[mode]

    def providers(self) -> dict[str, Provider]:
        run_compiled, run_flex = compiled(reference.packed_attention), compiled(flex_attention)
        return {
            "reference": self.definition,
            "reference compiled": lambda x: run_compiled(x.qkv_BN3HD),
            "sdpa flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
            "sdpa cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
            "sdpa efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
            "sdpa math": partial(_sdpa, SDPBackend.MATH),
            "sdpa default": partial(_sdpa, None),
            "flex": lambda x: _heads_last(run_flex(*_heads_first(x.qkv_BN3HD))),
            "ours short": partial(_by_program, attention_short),
            "ours long": partial(_by_program, attention_long),
            "ours auto": self.ours,
        }

    def resolved(self, x: Inputs) -> dict[str, str]:
        default = SDPBackend(torch._fused_sdp_choice(*_heads_first(x.qkv_BN3HD))).name
        return {
            "sdpa default": default.removesuffix("_ATTENTION").lower(),
            "ours auto": pick(x.qkv_BN3HD.shape, self.dtype, "auto", self.device),
        }


def _heads_first(qkv_BN3HD: Tensor) -> Any:
    """q, k, v [B, H, N, d] as strided views of the packed tensor; backward their gradients are
    stacked, which a provider is charged.
    """
    return [part.transpose(1, 2) for part in qkv_BN3HD.unbind(2)]


def _heads_last(out_BHND: Tensor) -> Tensor:
    """The result as the next layer takes it."""
    return out_BHND.transpose(1, 2).contiguous()


def _sdpa(backend: SDPBackend | None, x: Inputs) -> Tensor:
    """PyTorch's attention by one backend, or by what it picks."""
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return _heads_last(F.scaled_dot_product_attention(*_heads_first(x.qkv_BN3HD)))


class _Program(torch.autograd.Function):
    """One of our two programs, whatever `auto` would pick."""

    @staticmethod
    def forward(ctx: Any, qkv_BN3HD: Tensor, program: Any) -> Tensor:
        out, lse = program.forward(qkv_BN3HD)
        ctx.save_for_backward(qkv_BN3HD, out, lse)
        ctx.program = program
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.program.backward(*ctx.saved_tensors, *gradients), None


def _by_program(program: Any, x: Inputs) -> Tensor:
    qkv_BN3HD, most = x.qkv_BN3HD, attention_short.MAX_TOKENS
    pick(qkv_BN3HD.shape, qkv_BN3HD.dtype, "triton", qkv_BN3HD.device)
    fits = qkv_BN3HD.shape[1] <= most and qkv_BN3HD.dtype in HALF
    if program is attention_short and not fits:
        raise ValueError(f"takes 16-bit values of up to {most} tokens")
    return _Program.apply(qkv_BN3HD, program)  # pyright: ignore[reportReturnType]
