"""The backward pass of the losses: gradients that the forward pass made, times what is known now.

Letters: B clips, M masked, P values of a tubelet.
"""
# The type checker takes the body of a Triton kernel for Python.
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, register

BLOCK = 1024


@triton.jit
def scale_kernel(
    values,  # [B, M, P], contiguous
    scale,  # [B, M] float32
    out,  # [B, M, P], contiguous
    tokens,  # M
    stride_b,  # of scale, as stride_m
    stride_m,
    factor,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token."""
    program = tl.program_id(0)
    place = (program // tokens).to(tl.int64) * stride_b + program % tokens * stride_m
    by = tl.load(scale + place) * factor
    start = program.to(tl.int64) * P
    for first in tl.static_range(0, P, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(values + start + i, mask=i < P, other=0).to(tl.float32)
        tl.store(out + start + i, (x * by).to(out.dtype.element_ty), mask=i < P)


def _scale_tokens(
    values_BMP: Tensor, scale_BM: Tensor, factor: float, dtype: torch.dtype
) -> Tensor:
    """values * scale * factor in float32, rounded once."""
    out_BMP = torch.empty(values_BMP.shape, dtype=dtype, device=values_BMP.device)
    launch(
        scale_kernel,
        scale_BM.numel(),
        values_BMP.contiguous(),
        scale_BM,
        out_BMP,
        scale_BM.shape[1],
        *scale_BM.stride(),
        factor,
        values_BMP.shape[2],
        BLOCK,
        num_warps=4,
    )
    return out_BMP


scale_tokens = register(
    "scale_tokens(Tensor values, Tensor scale, float factor, ScalarType dtype) -> Tensor",
    _scale_tokens,
)
