"""Attention over any number of tokens: a program a tile of queries, or of keys.

Softmax is accumulated tile by tile. Source of the method: FlashAttention-2 (Dao, 2023), as three
kernels (out; dq; dk and dv) without atomics, so results repeat bit for bit.

Letters: B clips, N tokens, H heads, D head width, BM query rows of a tile, BN key rows of a tile.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from typing import Any

import torch
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
    query_gradient,
    query_key_value,
    store_queries,
    times,
    width_class,
    zero_tile,
)
from .launch import launch

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


@triton.jit
def softmax_step(
    q,
    k_head,
    v_head,
    start,
    N,
    scale,
    top,
    total,
    acc,
    HEAD,
    BN,
    MASKED,
):
    """A query tile's (largest score, sum of weights, weighted sum of values) with one more key
    tile.
    """
    scores = inner(q, load_tile(k_head, start, HEAD.qkv_n, N, HEAD, BN, MASKED), HEAD)
    if MASKED:
        scores = tl.where((start + tl.arange(0, BN) < N)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(scores * scale - new_top[:, None])
    shrink = tl.math.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    v = load_tile(v_head, start, HEAD.qkv_n, N, HEAD, BN, MASKED)
    acc = accumulate(weights, v, times(acc, shrink[:, None]), HEAD)
    return new_top, total, acc


@triton.jit
def forward_kernel(
    qkv,  # [B, N, 3, H, D], strides given, the last one 1
    out,  # [B, N, H, D]
    lse,  # [B, H, N] float32
    units_b,
    N,
    scale,
    HEAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """out and lse of BM queries of one head.

    Neighbouring programs share a head and so find its keys in the cache.
    """
    num_tiles = tl.cdiv(N, BM)
    head, start = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles * BM
    q_head, k_head, v_head = query_key_value(qkv, head, units_b, HEAD)
    q = load_tile(q_head, start, HEAD.qkv_n, N, HEAD, BM, True)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = zero_tile(HEAD, BM)
    last = (N - 1) // BN * BN  # only the last key tile may reach beyond the tokens
    for first in range(0, last, BN):
        top, total, acc = softmax_step(
            q, k_head, v_head, first, N, scale, top, total, acc, HEAD, BN, False
        )
    top, total, acc = softmax_step(
        q, k_head, v_head, last, N, scale, top, total, acc, HEAD, BN, True
    )
    store_queries(out, lse, head, start, acc, top, total, N, HEAD, BM)


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
    HEAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dq and delta of BM queries of one head."""
    num_tiles = tl.cdiv(N, BM)
    head, start = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles * BM
    of = backward_pointers(head, qkv, out, lse, dout, delta, dqkv, units_b, dout_units_b, N, HEAD)
    query_gradient(of, (), (), start, N, scale, HEAD, BM, BN, True)


@triton.jit
def key_gradient_kernel(
    qkv,  # [B, N, 3, H, D], strides given, the last one 1
    out,  # [B, N, H, D], not read
    lse,  # [B, H, N] float32
    dout,  # [B, N, H, D], strides given, the last one 1
    delta,  # [B, H, N] float32
    dqkv,  # [B, N, 3, H, D], dk and dv are written
    units_b,
    dout_units_b,
    N,
    scale,
    HEAD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk and dv of BN keys of one head."""
    num_tiles = tl.cdiv(N, BN)
    head, start = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles * BN
    of = backward_pointers(head, qkv, out, lse, dout, delta, dqkv, units_b, dout_units_b, N, HEAD)
    key_gradient(of, start, N, scale, HEAD, BM, BN, True)


def launch_tiles(kernel: Any, name: str, arguments: tuple[Any, ...]) -> None:
    """Starts a program for each tile of rows of each head."""
    qkv_BN3HD, _, lse_BHN = arguments[:3]
    B, H, N = lse_BHN.shape
    if qkv_BN3HD.dtype == torch.float32 and qkv_BN3HD.is_cuda:
        BM, BN, warps, stages = EXACT_TILES[name]
    else:
        key = has_hopper_products(qkv_BN3HD.device), width_class(qkv_BN3HD.shape[-1])
        BM, BN, warps, stages = TILES[name][key]
    programs = B * H * triton.cdiv(N, BN if name == "key_gradient" else BM)
    launch(kernel, programs, *arguments, BM, BN, num_warps=warps, num_stages=stages)


def forward(qkv_BN3HD: Tensor) -> tuple[Tensor, Tensor]:
    """(out_BNHD, lse_BHN)."""
    arguments = forward_arguments(qkv_BN3HD)
    launch_tiles(forward_kernel, "forward", arguments)
    return arguments[1:3]


def backward(*saved_and_dout: Tensor) -> Tensor:
    """dqkv_BN3HD, contiguous, of (qkv_BN3HD, out_BNHD, lse_BHN, dout_BNHD)."""
    arguments = backward_arguments(*saved_and_dout)
    launch_tiles(query_gradient_kernel, "query_gradient", arguments)
    launch_tiles(key_gradient_kernel, "key_gradient", arguments)
    return arguments[5]
