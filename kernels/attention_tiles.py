"""Device functions that the short and the long attention kernels share: tiles of rows, scores, and
the gradients of one tile.

A head of width D is cut into powers of two, D = D0 + D1 (80 = 64 + 16, 88 = 64 + 32; D1 = 0 for
64), so that little is padded. A tile is a pair (low [rows, D0], high [rows, D1]); without a high
part the low one stands in for it and is never used.

Letters: B clips, N tokens, H heads, D head width, BM query rows of a tile, BN key rows of a tile.
Scores are q k^T as it is; PEEL: only the last tile needs masks, and a loop without them pays where
it runs often; a second copy of it costs registers. `scale` is log2(e) / sqrt(D), so the softmax is
2 ** (scale * score - lse) with lse in base 2.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import dot

LOG2_E = math.log2(math.e)
WIDTH_CLASSES = (64, 96, 128)
VECTOR = 8  # values that a thread can read at once, of 16 bits each


def split(width: int) -> tuple[int, int]:
    """(D0, D1): powers of two of at least 16 (or D1 = 0) that hold a head of this width with the
    least padding.
    """
    low = max(16, 1 << (width.bit_length() - 1))
    high = max(16, triton.next_power_of_2(width - low)) if width > low else 0
    return (2 * low, 0) if high == low else (low, high)


def width_class(width: int) -> int:
    """The key of a table: the least of WIDTH_CLASSES that holds the padded head."""
    return next(limit for limit in WIDTH_CLASSES if sum(split(width)) <= limit)


def has_hopper_products(device: torch.device) -> bool:
    """Whether products read both operands from shared memory (HGMMA): elsewhere registers hold
    them, so tiles must be smaller.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def last_stride_one(x: torch.Tensor) -> torch.Tensor:
    """x itself where a row can be read as it lies, else a copy: gradients arrive transposed or
    expanded.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def head_constants(qkv_BN3HD: torch.Tensor) -> dict[str, Any]:
    """What every kernel has to know of its input at compile time: few in a run. Of numbers given at
    run time Triton sees only whether 16 divides them, and 88, the stride of a head of that width,
    would make it read value by value.
    """
    heads, width = qkv_BN3HD.shape[3:]
    low, high = split(width)
    return {
        "stride_n": qkv_BN3HD.stride(1),
        "stride_3": qkv_BN3HD.stride(2),
        "stride_h": qkv_BN3HD.stride(3),
        "H": heads,
        "D": width,
        "D0": low,
        "D1": high,
        "PRECISION": "ieee" if qkv_BN3HD.dtype == torch.float32 else "tf32",
    }


def in_units(*strides: int) -> tuple[int, ...]:
    """(unit, each stride in these units): clips of odd numbers of tokens and heads start at
    multiples of 8 values, not of 16.
    """
    unit = math.gcd(VECTOR, *strides)
    return unit, *(stride // unit for stride in strides)


@triton.jit
def load_part(
    base,
    start,
    stride,
    end,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows [start, start + ROWS) and columns [FIRST, FIRST + WIDTH); zeros beyond D columns and, if
    MASKED, beyond `end` rows.
    """
    row, column = tl.arange(0, ROWS), FIRST + tl.arange(0, WIDTH)
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if MASKED:
        return tl.load(
            pointers, mask=(start + row < end)[:, None] & (column < D)[None, :], other=0.0
        )
    elif FIRST + WIDTH > D:
        return tl.load(pointers, mask=(column < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_tile(
    base,
    start,
    stride,
    end,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The pair of parts of ROWS rows."""
    low = load_part(base, start, stride, end, D, 0, D0, ROWS, MASKED)
    if D1 > 0:
        return low, load_part(base, start, stride, end, D, D0, D1, ROWS, MASKED)
    else:
        return low, low


@triton.jit
def store_part(
    base,
    start,
    stride,
    end,
    part,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What lies beyond D columns or `end` rows is not written."""
    row, column = tl.arange(0, ROWS), FIRST + tl.arange(0, WIDTH)
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    tl.store(
        pointers,
        part.to(base.dtype.element_ty),
        mask=(start + row < end)[:, None] & (column < D)[None, :],
    )


@triton.jit
def store_tile(
    base,
    start,
    stride,
    end,
    low,
    high,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Writes a pair of parts."""
    store_part(base, start, stride, end, low, D, 0, D0, ROWS)
    if D1 > 0:
        store_part(base, start, stride, end, high, D, D0, D1, ROWS)


@triton.jit
def zero_tile(D0: tl.constexpr, D1: tl.constexpr, ROWS: tl.constexpr):
    """A pair of float32 accumulators."""
    low = tl.zeros([ROWS, D0], tl.float32)
    if D1 > 0:
        return low, tl.zeros([ROWS, D1], tl.float32)
    else:
        return low, low


@triton.jit
def inner(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T: the products of the rows of two tiles."""
    products = dot(a0, tl.trans(b0), tl.zeros([a0.shape[0], b0.shape[0]], tl.float32), PRECISION)
    if D1 > 0:
        products = dot(a1, tl.trans(b1), products, PRECISION)
    return products


@triton.jit
def accumulate(weights, b0, b1, acc0, acc1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights b for a tile b, the weights rounded to its dtype."""
    acc0 = dot(weights.to(b0.dtype), b0, acc0, PRECISION)
    if D1 > 0:
        acc1 = dot(weights.to(b1.dtype), b1, acc1, PRECISION)
    return acc0, acc1


@triton.jit
def row_products(a0, a1, b0, b1, D1: tl.constexpr):
    """sum_d a_id b_id: one number a row."""
    products = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if D1 > 0:
        products += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return products


@triton.jit
def head_offset(b, h, units_b, UNIT: tl.constexpr, stride_h: tl.constexpr):
    """Where a head of a clip starts, in 64 bits: a batch may have more than 2 ** 31 values."""
    return tl.cast(b, tl.int64) * units_b * UNIT + tl.cast(h, tl.int64) * stride_h


@triton.jit
def load_tiles(
    base, stride, end, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SIZES: tl.constexpr
):
    """All rows as a tuple of tiles of these sizes, to be kept; rows are missing in the last tile
    alone.
    """
    tiles = ()
    for i in tl.static_range(len(SIZES)):
        tile = load_tile(base, i * SIZES[0], stride, end, D, D0, D1, SIZES[i], i == len(SIZES) - 1)
        tiles = tiles + (tile,)  # noqa: RUF005, Triton has no starred tuples
    return tiles


@triton.jit
def query_step(
    q0,
    q1,
    dout0,
    dout1,
    lse,
    delta,
    k0,
    k1,
    v0,
    v1,
    start,
    N,
    scale,
    dq0,
    dq1,
    D1: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq (before its scale) of a query tile plus what one key tile adds to it."""
    weights = tl.math.exp2(inner(q0, q1, k0, k1, D1, PRECISION) * scale - lse[:, None])
    if MASKED:
        weights = tl.where((start + tl.arange(0, BN) < N)[None, :], weights, 0.0)
    dscores = weights * (inner(dout0, dout1, v0, v1, D1, PRECISION) - delta[:, None])
    return accumulate(dscores, k0, k1, dq0, dq1, D1, PRECISION)


@triton.jit
def query_gradient(
    q,
    k,
    v,
    keys,
    values,
    out,
    dout,
    lse,
    delta,
    dq,
    start,
    stride_n,
    out_n,
    dout_n,
    dq_n,
    N,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    KEPT: tl.constexpr,
    PEEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes dq of the BM queries from `start`, and delta = sum_d out * dout for the keys' turn;
    pointers are of one head.

    KEPT: the sizes of the tiles in `keys` and `values`, which hold all keys; (): tiles of BN keys
    are read from k and v.
    """
    rows = start + tl.arange(0, BM)
    q0, q1 = load_tile(q, start, stride_n, N, D, D0, D1, BM, True)
    dout0, dout1 = load_tile(dout, start, dout_n, N, D, D0, D1, BM, True)
    out0, out1 = load_tile(out, start, out_n, N, D, D0, D1, BM, True)
    lse_M = tl.load(lse + rows, mask=rows < N, other=float("inf"))
    delta_M = row_products(out0, out1, dout0, dout1, D1)
    tl.store(delta + rows, delta_M, mask=rows < N)
    dq0, dq1 = zero_tile(D0, D1, BM)
    if len(KEPT) > 0:
        for i in tl.static_range(len(KEPT)):
            k0, k1 = keys[i]
            v0, v1 = values[i]
            dq0, dq1 = query_step(
                q0,
                q1,
                dout0,
                dout1,
                lse_M,
                delta_M,
                k0,
                k1,
                v0,
                v1,
                i * KEPT[0],
                N,
                scale,
                dq0,
                dq1,
                D1,
                KEPT[i],
                i == len(KEPT) - 1,
                PRECISION,
            )
    else:
        last = 0
        if PEEL:
            last = (N - 1) // BN * BN
            for first in range(0, last, BN):
                k0, k1 = load_tile(k, first, stride_n, N, D, D0, D1, BN, False)
                v0, v1 = load_tile(v, first, stride_n, N, D, D0, D1, BN, False)
                dq0, dq1 = query_step(
                    q0,
                    q1,
                    dout0,
                    dout1,
                    lse_M,
                    delta_M,
                    k0,
                    k1,
                    v0,
                    v1,
                    first,
                    N,
                    scale,
                    dq0,
                    dq1,
                    D1,
                    BN,
                    False,
                    PRECISION,
                )
        for first in range(last, N, BN):
            k0, k1 = load_tile(k, first, stride_n, N, D, D0, D1, BN, True)
            v0, v1 = load_tile(v, first, stride_n, N, D, D0, D1, BN, True)
            dq0, dq1 = query_step(
                q0,
                q1,
                dout0,
                dout1,
                lse_M,
                delta_M,
                k0,
                k1,
                v0,
                v1,
                first,
                N,
                scale,
                dq0,
                dq1,
                D1,
                BN,
                True,
                PRECISION,
            )
    natural = scale * 0.6931471805599453  # 1 / sqrt(D)
    store_tile(dq, start, dq_n, N, dq0 * natural, dq1 * natural, D, D0, D1, BM)


@triton.jit
def key_step(
    k0,
    k1,
    v0,
    v1,
    q,
    dout,
    lse,
    delta,
    start,
    stride_n,
    dout_n,
    N,
    scale,
    dk0,
    dk1,
    dv0,
    dv1,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk (before its scale) and dv of a key tile plus what one query tile adds to them; scores are
    held transposed.
    """
    rows = start + tl.arange(0, BM)
    q0, q1 = load_tile(q, start, stride_n, N, D, D0, D1, BM, MASKED)
    dout0, dout1 = load_tile(dout, start, dout_n, N, D, D0, D1, BM, MASKED)
    if MASKED:
        # 2 ** -inf: queries that do not exist weigh nothing
        lse_M = tl.load(lse + rows, mask=rows < N, other=float("inf"))
        delta_M = tl.load(delta + rows, mask=rows < N, other=0.0)
    else:
        lse_M = tl.load(lse + rows)
        delta_M = tl.load(delta + rows)
    weights = tl.math.exp2(inner(k0, k1, q0, q1, D1, PRECISION) * scale - lse_M[None, :])
    dv0, dv1 = accumulate(weights, dout0, dout1, dv0, dv1, D1, PRECISION)
    dscores = weights * (inner(v0, v1, dout0, dout1, D1, PRECISION) - delta_M[None, :])
    dk0, dk1 = accumulate(dscores, q0, q1, dk0, dk1, D1, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def key_gradient(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    start,
    stride_n,
    dout_n,
    dk_n,
    N,
    scale,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PEEL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes dk and dv of the BN keys from `start`, by tiles of BM queries. All pointers are of one
    head.
    """
    k0, k1 = load_tile(k, start, stride_n, N, D, D0, D1, BN, True)
    v0, v1 = load_tile(v, start, stride_n, N, D, D0, D1, BN, True)
    dk0, dk1 = zero_tile(D0, D1, BN)
    dv0, dv1 = zero_tile(D0, D1, BN)
    last = 0
    if PEEL:
        last = (N - 1) // BM * BM
        for first in range(0, last, BM):
            dk0, dk1, dv0, dv1 = key_step(
                k0,
                k1,
                v0,
                v1,
                q,
                dout,
                lse,
                delta,
                first,
                stride_n,
                dout_n,
                N,
                scale,
                dk0,
                dk1,
                dv0,
                dv1,
                D,
                D0,
                D1,
                BM,
                False,
                PRECISION,
            )
    for first in range(last, N, BM):
        dk0, dk1, dv0, dv1 = key_step(
            k0,
            k1,
            v0,
            v1,
            q,
            dout,
            lse,
            delta,
            first,
            stride_n,
            dout_n,
            N,
            scale,
            dk0,
            dk1,
            dv0,
            dv1,
            D,
            D0,
            D1,
            BM,
            True,
            PRECISION,
        )
    natural = scale * 0.6931471805599453  # 1 / sqrt(D)
    store_tile(dk, start, dk_n, N, dk0 * natural, dk1 * natural, D, D0, D1, BN)
    store_tile(dv, start, dk_n, N, dv0, dv1, D, D0, D1, BN)
