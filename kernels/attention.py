"""Self-attention on the packed output of the qkv layer: which implementation runs.

Letters: B clips, N tokens, H heads, D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention_long, attention_short, reference
from .attention_tiles import WIDTH_CLASSES, empty_results, has_hopper_products, parts
from .dispatch import attention_limit, choose
from .launch import register

MAX_WIDTH = WIDTH_CLASSES[-1]  # of a head in the kernels
HALF = (torch.float16, torch.bfloat16)


def pick(shape: tuple[int, ...], dtype: torch.dtype, impl: str, device: torch.device) -> str:
    """The implementation for qkv of this shape. Raises: ValueError where there is none."""
    tokens, width = shape[1], shape[4]
    if impl == "auto" and device.type == "cuda":
        return "triton" if dtype in HALF and tokens <= attention_limit(device, width) else "sdpa"
    chosen = choose("packed_attention", impl, device)
    if chosen == "triton" and (dtype not in (*HALF, torch.float32) or width > MAX_WIDTH):
        raise ValueError(
            "packed_attention: impl triton takes float32, float16 and bfloat16 heads of up to "
            f"{MAX_WIDTH}, not {dtype} of {width}; use auto or sdpa"
        )
    return chosen


def packed_attention(qkv_BN3HD: Tensor, impl: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head, without a mask.

    qkv_BN3HD: [B, N, 3, heads, d], as a linear layer wrote it; under autocast it is taken in
    autocast's dtype.
    Returns: out_BNHD [B, N, heads, d]. Raises: ValueError for a wrong shape or dtype, or an impl
    that the device does not have.
    """
    if qkv_BN3HD.ndim != 5 or qkv_BN3HD.shape[2] != 3:
        raise ValueError(
            f"packed_attention: qkv_BN3HD has shape {tuple(qkv_BN3HD.shape)}, not "
            "(B, N, 3, heads, head width)"
        )
    if not qkv_BN3HD.is_floating_point():
        raise ValueError(f"packed_attention: qkv_BN3HD is {qkv_BN3HD.dtype}, not floating point")
    device = qkv_BN3HD.device
    if (
        device.type in ("cuda", "cpu")
        and torch.is_autocast_enabled(device.type)
        and qkv_BN3HD.dtype != torch.float64
    ):
        qkv_BN3HD = qkv_BN3HD.to(torch.get_autocast_dtype(device.type))
    chosen = pick(qkv_BN3HD.shape, qkv_BN3HD.dtype, impl, device)
    if qkv_BN3HD.numel() == 0:
        return qkv_BN3HD[:, :, 0]
    if chosen == "triton":
        return _forward(qkv_BN3HD)[0]
    if chosen == "reference":
        return reference.packed_attention(qkv_BN3HD)
    q, k, v = (x.transpose(1, 2) for x in qkv_BN3HD.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def kernels(qkv_BN3HD: Tensor) -> Any:
    """The module to run: one program holds every key of a head where they fit.

    float32 does not fit, nor elsewhere than on Hopper more than 192 keys of a head in two parts.
    """
    tokens, width = qkv_BN3HD.shape[1], qkv_BN3HD.shape[4]
    limit = (
        attention_short.MAX_TOKENS
        if len(parts(width)) == 1 or has_hopper_products(qkv_BN3HD.device)
        else 192
    )
    return attention_short if tokens <= limit and qkv_BN3HD.dtype in HALF else attention_long


def _gradient(ctx: Any, dout_BNHD: Tensor) -> tuple[Tensor]:
    return (_backward(*ctx.saved_tensors, dout_BNHD),)


_forward = register(
    "packed_attention(Tensor qkv) -> (Tensor, Tensor)",
    lambda qkv: kernels(qkv).forward(qkv),
    empty_results,
    lambda inputs, results: (*inputs, *results),
    _gradient,
)
_backward = register(
    "packed_attention_backward(Tensor qkv, Tensor out, Tensor lse, Tensor dout) -> Tensor",
    lambda qkv, out, lse, dout: kernels(qkv).backward(qkv, out, lse, dout),
    lambda qkv, out, lse, dout: qkv.new_empty(qkv.shape),
)
