"""Self-attention on the packed output of the qkv layer."""

import torch
import torch.nn.functional as F

from . import reference
from .dispatch import choose


def packed_attention(qkv_BN3HD: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for every head, without a mask.

    qkv_BN3HD: [B, N, 3, heads, d], as a linear layer wrote it. Returns: out_BNHD [B, N, heads, d].
    Raises: ValueError for a wrong shape.
    """
    if qkv_BN3HD.ndim != 5 or qkv_BN3HD.shape[2] != 3:
        raise ValueError(f"packed_attention: qkv_BN3HD has shape {tuple(qkv_BN3HD.shape)}, not (B, N, 3, heads, head width)")
    if choose("packed_attention", impl) == "reference":
        return reference.packed_attention(qkv_BN3HD)
    q, k, v = (x.transpose(1, 2) for x in qkv_BN3HD.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
