"""Attention over at most 256 tokens: one program does a head of a clip.

Forward it has all its keys and values at hand, for an exact softmax; backward it goes through them
in two phases, so that no two programs write the same gradient: no atomics, equal bits every time.

Letters: B clips, N tokens, H heads, D head width, BM query rows, BN key rows.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    accumulate,
    backward_arguments,
    backward_pointers,
    forward_arguments,
    has_hopper_products,
    inner,
    key_gradient,
    load_tile,
    load_tiles,
    parts,
    query_gradient,
    query_key_value,
    store_queries,
    width_class,
    zero_tile,
)
from .launch import launch

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
    HEAD: tl.constexpr,
    SIZES: tl.constexpr,  # of the tiles of keys, which hold them all: one, or two
    BM: tl.constexpr,
):
    """out and lse of one head of one clip."""
    head = tl.program_id(0)
    q_head, k_head, v_head = query_key_value(qkv, head, units_b, HEAD)
    keys = load_tiles(k_head, HEAD.qkv_n, N, HEAD, SIZES)
    values = load_tiles(v_head, HEAD.qkv_n, N, HEAD, SIZES)
    for start_row in range(0, N, BM):
        q = load_tile(q_head, start_row, HEAD.qkv_n, N, HEAD, BM, True)
        scores = ()
        for i in tl.static_range(len(SIZES)):
            tile = inner(q, keys[i], HEAD)
            if i == len(SIZES) - 1:
                exists = i * SIZES[0] + tl.arange(0, SIZES[i]) < N
                tile = tl.where(exists[None, :], tile, float("-inf"))
            scores += (tile,)
        top = tl.max(scores[0], 1)
        for i in tl.static_range(1, len(SIZES)):
            top = tl.maximum(top, tl.max(scores[i], 1))
        top *= scale
        acc = zero_tile(HEAD, BM)
        for i in tl.static_range(len(SIZES)):
            weights = tl.math.exp2(scores[i] * scale - top[:, None])
            if i == 0:
                total = tl.sum(weights, 1)
            else:
                total += tl.sum(weights, 1)
            acc = accumulate(weights, values[i], acc, HEAD)
        store_queries(out, lse, head, start_row, acc, top, total, N, HEAD, BM)


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
    HEAD: tl.constexpr,
    KEPT: tl.constexpr,  # sizes of the tiles of keys that are kept for dq, or ()
    BM: tl.constexpr,
    BN: tl.constexpr,
    KEY_BM: tl.constexpr,
    KEY_BN: tl.constexpr,
):
    """dqkv of one head of one clip: first all dq, then all dk and dv.

    The weights are computed in both.
    """
    of = backward_pointers(
        tl.program_id(0), qkv, out, lse, dout, delta, dqkv, units_b, dout_units_b, N, HEAD
    )
    keys = load_tiles(of.k, HEAD.qkv_n, N, HEAD, KEPT)
    values = load_tiles(of.v, HEAD.qkv_n, N, HEAD, KEPT)
    for first in tl.range(0, N, BM, num_stages=1):
        query_gradient(of, keys, values, first, N, scale, HEAD, BM, BN, False)
    tl.debug_barrier()  # every thread's delta is there
    for first in tl.range(0, N, KEY_BN, num_stages=1):
        key_gradient(of, first, N, scale, HEAD, KEY_BM, KEY_BN, False)


def forward_tiles(tokens: int, width: int, hopper: bool) -> tuple[tuple[int, ...], int, int]:
    """(SIZES, BM, warps) of the forward kernel.

    Spill-free by the compile check; not yet timed on a GPU.
    """
    if width_class(width) == 128:
        return (max(16, triton.next_power_of_2(tokens)),), FORWARD_ROWS, 8
    sizes = parts(tokens)
    if sizes[0] < 256:
        return sizes, FORWARD_ROWS, 4
    if not hopper:
        return sizes, 16, 8
    if parts(width) == (64,):
        return (128, 128), FORWARD_ROWS, 4
    return sizes, FORWARD_ROWS, 8 if sum(parts(width)) > 80 else 4


def kept_sizes(tokens: int, rows: int) -> tuple[int, ...]:
    """Tiles of so many rows that hold all tokens, the last one no larger than it must be."""
    full = (tokens - 1) // rows
    return (rows,) * full + (max(16, triton.next_power_of_2(tokens - full * rows)),)


def forward(qkv_BN3HD: Tensor) -> tuple[Tensor, Tensor]:
    """(out_BNHD, lse_BHN)."""
    arguments = forward_arguments(qkv_BN3HD)
    qkv, out, lse, *_ = arguments
    sizes, rows, warps = forward_tiles(qkv.shape[1], qkv.shape[-1], has_hopper_products(qkv.device))
    programs = lse.shape[0] * lse.shape[1]
    launch(forward_kernel, programs, *arguments, sizes, rows, num_warps=warps, num_stages=1)
    return out, lse


def backward(*saved_and_dout: Tensor) -> Tensor:
    """dqkv_BN3HD, contiguous, of (qkv_BN3HD, out_BNHD, lse_BHN, dout_BNHD)."""
    arguments = backward_arguments(*saved_and_dout)
    qkv, _, lse, *_ = arguments
    *tiles, warps, stages, keeps = BACKWARD_TILES[
        has_hopper_products(qkv.device), width_class(qkv.shape[-1])
    ]
    kept = kept_sizes(qkv.shape[1], tiles[1]) if keeps else ()
    programs = lse.shape[0] * lse.shape[1]
    launch(backward_kernel, programs, *arguments, kept, *tiles, num_warps=warps, num_stages=stages)
    return arguments[5]
