"""Attention over any number of tokens: a program a tile of queries (out, dq) or of keys (dk and
dv), softmax accumulated tile by tile.

Source of the method: FlashAttention-2 (Dao, 2023), as three kernels without atomics, so results
repeat bit for bit.
Letters: B clips, N tokens, H heads, D head width = D0 + D1 (attention_tiles.py), BM query rows of a
tile, BN key rows of a tile.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
import torch
import triton
import triton.language as tl

from .attention_tiles import (
    LOG2_E,
    accumulate,
    has_hopper_products,
    head_constants,
    head_offset,
    in_units,
    inner,
    key_gradient,
    last_stride_one,
    load_tile,
    query_gradient,
    store_tile,
    width_class,
    zero_tile,
)
from .launch import on_device

# kernel -> (Hopper products, width class) -> (BM, BN, warps, stages): spill-free by the compile
# check; not yet timed on a GPU.
TILES = {
    "forward": {
        (True, 64): (128, 64, 4, 3),
        (True, 96): (128, 64, 8, 3),
        (True, 128): (128, 64, 8, 3),
        (False, 64): (128, 64, 8, 2),
        (False, 96): (128, 32, 8, 2),
        (False, 128): (128, 64, 8, 2),
    },
    "query_gradient": {
        (True, 64): (64, 64, 4, 2),
        (True, 96): (64, 64, 4, 2),
        (True, 128): (128, 64, 8, 2),
        (False, 64): (128, 64, 8, 2),
        (False, 96): (64, 32, 4, 2),
        (False, 128): (64, 64, 8, 2),
    },
    "key_gradient": {
        (True, 64): (64, 128, 8, 2),
        (True, 96): (64, 128, 8, 2),
        (True, 128): (64, 64, 8, 2),
        (False, 64): (32, 64, 4, 2),
        (False, 96): (32, 32, 8, 2),
        (False, 128): (32, 64, 8, 2),
    },
}
# Of float32, whose unrounded products run outside the tensor cores, and hold their operands in
# registers.
EXACT_TILES = {
    "forward": (16, 16, 8, 1),
    "query_gradient": (16, 16, 8, 1),
    "key_gradient": (16, 32, 8, 1),
}


def tiles(kernel: str, qkv_BN3HD: torch.Tensor) -> tuple[int, int, int, int]:
    """(BM, BN, warps, stages)."""
    if qkv_BN3HD.dtype == torch.float32 and qkv_BN3HD.is_cuda:
        return EXACT_TILES[kernel]
    return TILES[kernel][has_hopper_products(qkv_BN3HD.device), width_class(qkv_BN3HD.shape[-1])]


@triton.jit
def softmax_step(
    q0,
    q1,
    k,
    v,
    start,
    stride_n,
    N,
    scale,
    top,
    total,
    acc0,
    acc1,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(largest score, sum of weights, weighted sum of values) of a query tile after one more key
    tile.
    """
    k0, k1 = load_tile(k, start, stride_n, N, D, D0, D1, BN, MASKED)
    scores = inner(q0, q1, k0, k1, D1, PRECISION)
    if MASKED:
        scores = tl.where((start + tl.arange(0, BN) < N)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    v0, v1 = load_tile(v, start, stride_n, N, D, D0, D1, BN, MASKED)
    acc0 = acc0 * shrink[:, None]
    if D1 > 0:
        acc1 = acc1 * shrink[:, None]
    acc0, acc1 = accumulate(weights, v0, v1, acc0, acc1, D1, PRECISION)
    return new_top, total, acc0, acc1


@triton.jit
def forward_kernel(
    qkv,  # [B, N, 3, H, D], strides given, the last one 1
    out,  # [B, N, H, D]
    lse,  # [B, H, N] float32
    units_b,
    N,
    scale,
    UNIT: tl.constexpr,
    stride_n: tl.constexpr,
    stride_3: tl.constexpr,
    stride_h: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse of BM queries of one head; neighbouring programs share a head and so find its
    keys in the cache.
    """
    num_tiles = tl.cdiv(N, BM)
    head, start = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles * BM
    b, h = head // H, head % H
    q = qkv + head_offset(b, h, units_b, UNIT, stride_h)
    k = q + stride_3
    v = k + stride_3
    q0, q1 = load_tile(q, start, stride_n, N, D, D0, D1, BM, True)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc0, acc1 = zero_tile(D0, D1, BM)
    last = (N - 1) // BN * BN  # only the last key tile may reach beyond the tokens
    for first in range(0, last, BN):
        top, total, acc0, acc1 = softmax_step(
            q0,
            q1,
            k,
            v,
            first,
            stride_n,
            N,
            scale,
            top,
            total,
            acc0,
            acc1,
            D,
            D0,
            D1,
            BN,
            False,
            PRECISION,
        )
    top, total, acc0, acc1 = softmax_step(
        q0,
        q1,
        k,
        v,
        last,
        stride_n,
        N,
        scale,
        top,
        total,
        acc0,
        acc1,
        D,
        D0,
        D1,
        BN,
        True,
        PRECISION,
    )
    out_head = out + (tl.cast(b, tl.int64) * N * H + h) * D
    store_tile(
        out_head, start, H * D, N, acc0 / total[:, None], acc1 / total[:, None], D, D0, D1, BM
    )
    rows = start + tl.arange(0, BM)
    tl.store(lse + tl.cast(head, tl.int64) * N + rows, top + tl.math.log2(total), mask=rows < N)


@triton.jit
def query_gradient_kernel(
    qkv,  # [B, N, 3, H, D], strides given, the last one 1
    out,  # [B, N, H, D]
    lse,  # [B, H, N] float32
    dout,  # [B, N, H, D], strides given, the last one 1
    delta,  # [B, H, N] float32, written
    dqkv,  # [B, N, 3, H, D], dq is written
    units_b,
    dout_units_b,
    N,
    scale,
    UNIT: tl.constexpr,
    stride_n: tl.constexpr,
    stride_3: tl.constexpr,
    stride_h: tl.constexpr,
    dout_n: tl.constexpr,
    dout_h: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq and delta of BM queries of one head."""
    num_tiles = tl.cdiv(N, BM)
    head, start = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles * BM
    b, h = head // H, head % H
    q = qkv + head_offset(b, h, units_b, UNIT, stride_h)
    k = q + stride_3
    rows = tl.cast(head, tl.int64) * N
    query_gradient(
        q,
        k,
        k + stride_3,
        (),
        (),
        out + (tl.cast(b, tl.int64) * N * H + h) * D,
        dout + head_offset(b, h, dout_units_b, UNIT, dout_h),
        lse + rows,
        delta + rows,
        dqkv + (tl.cast(b, tl.int64) * N * 3 * H + h) * D,
        start,
        stride_n,
        H * D,
        dout_n,
        3 * H * D,
        N,
        scale,
        D,
        D0,
        D1,
        BM,
        BN,
        (),
        True,
        PRECISION,
    )


@triton.jit
def key_gradient_kernel(
    qkv,  # [B, N, 3, H, D], strides given, the last one 1
    lse,  # [B, H, N] float32
    dout,  # [B, N, H, D], strides given, the last one 1
    delta,  # [B, H, N] float32
    dqkv,  # [B, N, 3, H, D], dk and dv are written
    units_b,
    dout_units_b,
    N,
    scale,
    UNIT: tl.constexpr,
    stride_n: tl.constexpr,
    stride_3: tl.constexpr,
    stride_h: tl.constexpr,
    dout_n: tl.constexpr,
    dout_h: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BN keys of one head."""
    num_tiles = tl.cdiv(N, BN)
    head, start = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles * BN
    b, h = head // H, head % H
    q = qkv + head_offset(b, h, units_b, UNIT, stride_h)
    k = q + stride_3
    rows = tl.cast(head, tl.int64) * N
    dk = dqkv + (tl.cast(b, tl.int64) * N * 3 * H + h) * D + H * D
    key_gradient(
        q,
        k,
        k + stride_3,
        dout + head_offset(b, h, dout_units_b, UNIT, dout_h),
        lse + rows,
        delta + rows,
        dk,
        dk + H * D,
        start,
        stride_n,
        dout_n,
        3 * H * D,
        N,
        scale,
        D,
        D0,
        D1,
        BM,
        BN,
        True,
        PRECISION,
    )


def forward(qkv_BN3HD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_BNHD, lse_BHN)."""
    qkv = last_stride_one(qkv_BN3HD)
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty(batch, tokens, heads, width, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device)
    unit, units_b = in_units(qkv.stride(0))
    rows, keys, warps, stages = tiles("forward", qkv)
    with on_device(qkv):
        forward_kernel[(batch * heads * triton.cdiv(tokens, rows),)](
            qkv,
            out,
            lse,
            units_b,
            tokens,
            LOG2_E * width**-0.5,
            unit,
            **head_constants(qkv),
            BM=rows,
            BN=keys,
            num_warps=warps,
            num_stages=stages,
        )
    return out, lse


def backward(
    qkv_BN3HD: torch.Tensor, out_BNHD: torch.Tensor, lse_BHN: torch.Tensor, dout_BNHD: torch.Tensor
) -> torch.Tensor:
    """dqkv_BN3HD, contiguous."""
    qkv, dout = last_stride_one(qkv_BN3HD), last_stride_one(dout_BNHD)
    batch, tokens, _, heads, width = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse_BHN)
    unit, *units = in_units(qkv.stride(0), dout.stride(0))
    numbers = (*units, tokens, LOG2_E * width**-0.5, unit)
    constants = {**head_constants(qkv), "dout_n": dout.stride(1), "dout_h": dout.stride(2)}
    with on_device(qkv):
        rows, keys, warps, stages = tiles("query_gradient", qkv)
        query_gradient_kernel[(batch * heads * triton.cdiv(tokens, rows),)](
            qkv,
            out_BNHD,
            lse_BHN,
            dout,
            delta,
            dqkv,
            *numbers,
            **constants,
            BM=rows,
            BN=keys,
            num_warps=warps,
            num_stages=stages,
        )
        rows, keys, warps, stages = tiles("key_gradient", qkv)
        key_gradient_kernel[(batch * heads * triton.cdiv(tokens, keys),)](
            qkv,
            lse_BHN,
            dout,
            delta,
            dqkv,
            *numbers,
            **constants,
            BM=rows,
            BN=keys,
            num_warps=warps,
            num_stages=stages,
        )
    return dqkv
