"""Attention over at most 256 tokens: one program does a head of a clip, forward (all its keys and
values at hand, exact softmax) and backward (two phases, so that no two programs write the same
gradient: no atomics, equal bits every time).

Letters: B clips, N tokens, H heads, D head width = D0 + D1 (attention_tiles.py), K0 + K1 >= N keys,
BM query rows, BN key rows.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from typing import NamedTuple

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
    load_tiles,
    query_gradient,
    split,
    store_tile,
    width_class,
    zero_tile,
)
from .launch import on_device

MAX_TOKENS = 256
FORWARD_ROWS = 64  # the least that a Hopper product takes


class Tiles(NamedTuple):
    """Of the backward kernel: BM queries meet BN keys for dq, KEY_BN keys meet KEY_BM queries for
    dk and dv.

    keeps: all keys and values stay in shared memory while dq is made. Where registers do not allow
    that, and for dk and dv everywhere, the tiles of the inner loop are copied to shared memory
    while the one before is multiplied (stages = 2).
    """

    BM: int
    BN: int
    KEY_BM: int
    KEY_BN: int
    warps: int
    stages: int
    keeps: bool = False


# (Hopper products, width class): without spills, with two programs a multiprocessor on sm_90, by
# the compile check; not yet timed on a GPU. Four warps share 64 rows: eight would each compute what
# another one does.
BACKWARD_TILES = {
    (True, 64): Tiles(64, 64, 64, 64, 4, 2, True),
    (True, 96): Tiles(64, 64, 32, 64, 4, 2),
    (True, 128): Tiles(64, 64, 32, 64, 4, 1),
    (False, 64): Tiles(64, 32, 32, 32, 4, 2),
    (False, 96): Tiles(32, 32, 16, 32, 4, 2),
    (False, 128): Tiles(32, 32, 32, 32, 4, 2),
}


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
    K0: tl.constexpr,
    K1: tl.constexpr,
    BM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and lse of one head of one clip."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    q = qkv + head_offset(b, h, units_b, UNIT, stride_h)
    k = q + stride_3
    v = k + stride_3
    out_head = out + (tl.cast(b, tl.int64) * N * H + h) * D
    lse_head = lse + tl.cast(tl.program_id(0), tl.int64) * N
    # K1 > 0 is chosen only where the first K0 keys all exist
    k00, k01 = load_tile(k, 0, stride_n, N, D, D0, D1, K0, K1 == 0)
    v00, v01 = load_tile(v, 0, stride_n, N, D, D0, D1, K0, K1 == 0)
    if K1 > 0:
        k10, k11 = load_tile(k, K0, stride_n, N, D, D0, D1, K1, True)
        v10, v11 = load_tile(v, K0, stride_n, N, D, D0, D1, K1, True)
    for start in range(0, N, BM):
        q0, q1 = load_tile(q, start, stride_n, N, D, D0, D1, BM, True)
        scores0 = inner(q0, q1, k00, k01, D1, PRECISION)
        if K1 > 0:
            scores1 = inner(q0, q1, k10, k11, D1, PRECISION)
            scores1 = tl.where((K0 + tl.arange(0, K1) < N)[None, :], scores1, float("-inf"))
            top = tl.maximum(tl.max(scores0, 1), tl.max(scores1, 1)) * scale
        else:
            scores0 = tl.where((tl.arange(0, K0) < N)[None, :], scores0, float("-inf"))
            top = tl.max(scores0, 1) * scale
        weights0 = tl.math.exp2(scores0 * scale - top[:, None])
        total = tl.sum(weights0, 1)
        acc0, acc1 = zero_tile(D0, D1, BM)
        acc0, acc1 = accumulate(weights0, v00, v01, acc0, acc1, D1, PRECISION)
        if K1 > 0:
            weights1 = tl.math.exp2(scores1 * scale - top[:, None])
            total += tl.sum(weights1, 1)
            acc0, acc1 = accumulate(weights1, v10, v11, acc0, acc1, D1, PRECISION)
        store_tile(
            out_head, start, H * D, N, acc0 / total[:, None], acc1 / total[:, None], D, D0, D1, BM
        )
        rows = start + tl.arange(0, BM)
        tl.store(lse_head + rows, top + tl.math.log2(total), mask=rows < N)


@triton.jit
def backward_kernel(
    qkv,  # [B, N, 3, H, D], strides given, the last one 1
    out,  # [B, N, H, D]
    lse,  # [B, H, N] float32
    dout,  # [B, N, H, D], strides given, the last one 1
    delta,  # [B, H, N] float32, written, then read by the same program
    dqkv,  # [B, N, 3, H, D]
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
    KEPT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KEY_BM: tl.constexpr,
    KEY_BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dqkv of one head of one clip: first all dq, then all dk and dv; the weights are computed in
    both.
    """
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    q = qkv + head_offset(b, h, units_b, UNIT, stride_h)
    k = q + stride_3
    v = k + stride_3
    dout_head = dout + head_offset(b, h, dout_units_b, UNIT, dout_h)
    out_head = out + (tl.cast(b, tl.int64) * N * H + h) * D
    rows = tl.cast(tl.program_id(0), tl.int64) * N
    dq = dqkv + (tl.cast(b, tl.int64) * N * 3 * H + h) * D
    dk = dq + H * D
    keys = load_tiles(k, stride_n, N, D, D0, D1, KEPT)
    values = load_tiles(v, stride_n, N, D, D0, D1, KEPT)
    for start in tl.range(0, N, BM, num_stages=1):
        query_gradient(
            q,
            k,
            v,
            keys,
            values,
            out_head,
            dout_head,
            lse + rows,
            delta + rows,
            dq,
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
            KEPT,
            False,
            PRECISION,
        )
    tl.debug_barrier()  # every thread's delta is there
    for start in tl.range(0, N, KEY_BN, num_stages=1):
        key_gradient(
            q,
            k,
            v,
            dout_head,
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
            KEY_BM,
            KEY_BN,
            False,
            PRECISION,
        )


def forward_tiles(tokens: int, width: int, hopper: bool) -> tuple[int, int, int, int]:
    """(K0, K1, BM, warps) of the forward kernel: spill-free by the compile check; not yet timed on
    a GPU.
    """
    if width_class(width) == 128:
        return max(16, triton.next_power_of_2(tokens)), 0, FORWARD_ROWS, 8
    low, high = split(tokens)
    if low == 256 and not hopper:
        return 256, 0, 16, 8
    if low == 256 and split(width) == (64, 0):
        return 128, 128, FORWARD_ROWS, 4
    return low, high, FORWARD_ROWS, 8 if low == 256 and sum(split(width)) > 80 else 4


def kept_sizes(tokens: int, rows: int) -> tuple[int, ...]:
    """Tiles of so many rows that hold all tokens, the last one no larger than it must be."""
    full = (tokens - 1) // rows
    return (rows,) * full + (max(16, triton.next_power_of_2(tokens - full * rows)),)


def forward(qkv_BN3HD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out_BNHD, lse_BHN)."""
    qkv = last_stride_one(qkv_BN3HD)
    batch, tokens, _, heads, width = qkv.shape
    out = torch.empty(batch, tokens, heads, width, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=qkv.device)
    unit, units_b = in_units(qkv.stride(0))
    low, high, rows, warps = forward_tiles(tokens, width, has_hopper_products(qkv.device))
    with on_device(qkv):
        forward_kernel[(batch * heads,)](
            qkv,
            out,
            lse,
            units_b,
            tokens,
            LOG2_E * width**-0.5,
            unit,
            **head_constants(qkv),
            K0=low,
            K1=high,
            BM=rows,
            num_warps=warps,
            num_stages=1,
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
    tiles = BACKWARD_TILES[has_hopper_products(qkv.device), width_class(width)]
    with on_device(qkv):
        backward_kernel[(batch * heads,)](
            qkv,
            out_BNHD,
            lse_BHN,
            dout,
            delta,
            dqkv,
            *units,
            tokens,
            LOG2_E * width**-0.5,
            unit,
            dout_n=dout.stride(1),
            dout_h=dout.stride(2),
            **head_constants(qkv),
            KEPT=kept_sizes(tokens, tiles.BN) if tiles.keeps else (),
            BM=tiles.BM,
            BN=tiles.BN,
            KEY_BM=tiles.KEY_BM,
            KEY_BN=tiles.KEY_BN,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return dqkv
