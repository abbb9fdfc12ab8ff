"""Device functions that the short and the long attention kernels share.

A head of width D is cut into powers of two (80 = 64 + 16, 88 = 64 + 32; one part for 64), so that
little is padded. A tile of rows is the tuple of its parts.

Letters: B clips, N tokens, H heads, D head width, BM query rows of a tile, BN key rows of a tile.
Scores are q k^T as it is. `scale` is log2(e) / sqrt(D), so the softmax is 2 ** (scale * score -
lse) with lse in base 2.
"""
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import dot, floats, in_units, precision

LOG2_E = math.log2(math.e)
WIDTH_CLASSES = (64, 96, 128)


class Head(NamedTuple):
    """What the kernels know of their input when they are compiled: few in a run.

    Of numbers given at run time Triton sees only whether 16 divides them, and 88, the stride of a
    head of that width, would make it read value by value. UNIT: of the strides between clips, which
    are given at run time. dout_n, dout_h: strides of the gradient.
    """

    H: int
    D: int
    PARTS: tuple[int, ...]
    PRECISION: str
    UNIT: int
    qkv_n: int
    qkv_3: int
    qkv_h: int
    dout_n: int = 0
    dout_h: int = 0


class Pointers(NamedTuple):
    """Where the tensors of one head of one clip begin, of the backward pass."""

    q: tl.tensor  # [N, D], rows qkv_n apart, as those of k and v
    k: tl.tensor
    v: tl.tensor
    out: tl.tensor  # [N, D], rows H * D apart
    dout: tl.tensor  # [N, D], rows dout_n apart
    lse: tl.tensor  # [N]
    delta: tl.tensor  # [N]
    dq: tl.tensor  # [N, D], rows 3 * H * D apart, as those of dk and dv
    dk: tl.tensor
    dv: tl.tensor


def parts(width: int) -> tuple[int, ...]:
    """One or two powers of two of at least 16 that hold this width with the least padding."""
    low = max(16, 1 << (width.bit_length() - 1))
    if width <= low:
        return (low,)
    high = max(16, triton.next_power_of_2(width - low))
    return (2 * low,) if high == low else (low, high)


def width_class(width: int) -> int:
    """The key of a table: the least of WIDTH_CLASSES that holds the padded head."""
    return next(limit for limit in WIDTH_CLASSES if sum(parts(width)) <= limit)


def has_hopper_products(device: torch.device) -> bool:
    """Whether products read both operands from shared memory (HGMMA).

    Elsewhere registers hold them, so tiles must be smaller.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def last_stride_one(x: Tensor) -> Tensor:
    """x where a row can be read as it lies, else a copy: gradients come transposed or expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_results(qkv_BN3HD: Tensor) -> tuple[Tensor, Tensor]:
    """(out_BNHD, lse_BHN) of a forward pass."""
    B, N, _, H, D = qkv_BN3HD.shape
    out_BNHD = torch.empty(B, N, H, D, dtype=qkv_BN3HD.dtype, device=qkv_BN3HD.device)
    return out_BNHD, floats(qkv_BN3HD, B, H, N)


def _numbers(qkv_BN3HD: Tensor, *others: Tensor) -> tuple[Any, ...]:
    """The arguments after the tensors: strides between clips in units, N, scale, HEAD."""
    _, N, _, H, D = qkv_BN3HD.shape
    strides = [x.stride() for x in (qkv_BN3HD, *others)]
    unit, *units = in_units(*(stride[0] for stride in strides))
    within_clips = [step for stride in strides for step in stride[1:-1]]
    head = Head(H, D, parts(D), precision(qkv_BN3HD), unit, *within_clips)
    return *units, N, LOG2_E * D**-0.5, head


def forward_arguments(qkv_BN3HD: Tensor) -> tuple[Any, ...]:
    """What the forward kernels take before their tiles: qkv, out and lse to be written, numbers."""
    qkv = last_stride_one(qkv_BN3HD)
    return qkv, *empty_results(qkv), *_numbers(qkv)


def backward_arguments(
    qkv_BN3HD: Tensor, out_BNHD: Tensor, lse_BHN: Tensor, dout_BNHD: Tensor
) -> tuple[Any, ...]:
    """What the backward kernels take before their tiles; the last of the six tensors is dqkv."""
    qkv, dout = last_stride_one(qkv_BN3HD), last_stride_one(dout_BNHD)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    numbers = _numbers(qkv, dout)
    return qkv, out_BNHD, lse_BHN, dout, torch.empty_like(lse_BHN), dqkv, *numbers


@triton.jit
def load_tile(base, start, stride, end, HEAD, ROWS, MASKED):
    """Rows [start, start + ROWS); zeros beyond D columns and, if MASKED, beyond `end` rows."""
    row = tl.arange(0, ROWS)
    tile = ()
    for i in tl.static_range(len(HEAD.PARTS)):
        column = i * HEAD.PARTS[0] + tl.arange(0, HEAD.PARTS[i])
        pointers = (
            base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
        )
        if MASKED:
            inside = (start + row < end)[:, None] & (column < HEAD.D)[None, :]
            part = tl.load(pointers, mask=inside, other=0.0)
        elif i * HEAD.PARTS[0] + HEAD.PARTS[i] > HEAD.D:
            part = tl.load(pointers, mask=(column < HEAD.D)[None, :], other=0.0)
        else:
            part = tl.load(pointers)
        tile += (part,)
    return tile


@triton.jit
def load_tiles(base, stride, end, HEAD, SIZES):
    """All rows as a tuple of tiles of these sizes; rows are missing in the last tile alone."""
    tiles = ()
    for i in tl.static_range(len(SIZES)):
        tile = load_tile(base, i * SIZES[0], stride, end, HEAD, SIZES[i], i == len(SIZES) - 1)
        tiles += (tile,)
    return tiles


@triton.jit
def store_tile(base, start, stride, end, tile, HEAD):
    """What lies beyond D columns or `end` rows is not written."""
    row = tl.arange(0, tile[0].shape[0])
    for i in tl.static_range(len(tile)):
        column = i * HEAD.PARTS[0] + tl.arange(0, HEAD.PARTS[i])
        tl.store(
            base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :]),
            tile[i].to(base.dtype.element_ty),
            mask=(start + row < end)[:, None] & (column < HEAD.D)[None, :],
        )


@triton.jit
def zero_tile(HEAD, ROWS):
    """A float32 accumulator."""
    tile = ()
    for i in tl.static_range(len(HEAD.PARTS)):
        tile += (tl.zeros([ROWS, HEAD.PARTS[i]], tl.float32),)
    return tile


@triton.jit
def times(tile, factor):
    """Every part times a factor, of all or of each row."""
    scaled = ()
    for i in tl.static_range(len(tile)):
        scaled += (tile[i] * factor,)
    return scaled


@triton.jit
def inner(a, b, HEAD):
    """a b^T: the products of the rows of two tiles."""
    products = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for i in tl.static_range(len(a)):
        products = dot(a[i], tl.trans(b[i]), products, HEAD.PRECISION)
    return products


@triton.jit
def accumulate(weights, b, acc, HEAD):
    """acc + weights b for a tile b, the weights rounded to its dtype."""
    sums = ()
    for i in tl.static_range(len(b)):
        sums += (dot(weights.to(b[i].dtype), b[i], acc[i], HEAD.PRECISION),)
    return sums


@triton.jit
def head_offset(b, h, units_b, UNIT, stride_h):
    """Where a head of a clip starts, in 64 bits: a batch may have more than 2 ** 31 values."""
    return tl.cast(b, tl.int64) * units_b * UNIT + tl.cast(h, tl.int64) * stride_h


@triton.jit
def query_key_value(qkv, head, units_b, HEAD):
    """Where q, k and v of head number `head` of the batch begin."""
    q = qkv + head_offset(head // HEAD.H, head % HEAD.H, units_b, HEAD.UNIT, HEAD.qkv_h)
    k = q + HEAD.qkv_3
    return q, k, k + HEAD.qkv_3


@triton.jit
def packed_offset(head, N, HEAD, ROW):
    """Where a head starts in a dense tensor with ROW heads to a token: H, or 3 H."""
    b, h = head // HEAD.H, head % HEAD.H
    return (tl.cast(b, tl.int64) * N * ROW + h) * HEAD.D


@triton.jit
def backward_pointers(head, qkv, out, lse, dout, delta, dqkv, units_b, dout_units_b, N, HEAD):
    """The Pointers of head number `head` of the batch."""
    q, k, v = query_key_value(qkv, head, units_b, HEAD)
    dout_offset = head_offset(head // HEAD.H, head % HEAD.H, dout_units_b, HEAD.UNIT, HEAD.dout_h)
    rows = tl.cast(head, tl.int64) * N
    dq = dqkv + packed_offset(head, N, HEAD, 3 * HEAD.H)
    dk = dq + HEAD.H * HEAD.D
    return Pointers(
        q,
        k,
        v,
        out + packed_offset(head, N, HEAD, HEAD.H),
        dout + dout_offset,
        lse + rows,
        delta + rows,
        dq,
        dk,
        dk + HEAD.H * HEAD.D,
    )


@triton.jit
def store_queries(out, lse, head, start, acc, top, total, N, HEAD, BM):
    """Writes out and lse of a query tile: its weighted sums, largest scores, sums of weights."""
    divided = ()
    for i in tl.static_range(len(acc)):
        divided += (acc[i] / total[:, None],)
    out_head = out + packed_offset(head, N, HEAD, HEAD.H)
    store_tile(out_head, start, HEAD.H * HEAD.D, N, divided, HEAD)
    rows = start + tl.arange(0, BM)
    tl.store(lse + tl.cast(head, tl.int64) * N + rows, top + tl.math.log2(total), mask=rows < N)


@triton.jit
def query_step(rows, k, v, start, N, scale, dq, HEAD, MASKED):
    """dq (before its scale) of a query tile plus what the key tile from `start` adds to it."""
    q, dout, lse_M, delta_M = rows
    weights = tl.math.exp2(inner(q, k, HEAD) * scale - lse_M[:, None])
    if MASKED:
        exists = start + tl.arange(0, k[0].shape[0]) < N
        weights = tl.where(exists[None, :], weights, 0.0)
    dscores = weights * (inner(dout, v, HEAD) - delta_M[:, None])
    return accumulate(dscores, k, dq, HEAD)


@triton.jit
def query_gradient(
    of,  # Pointers
    keys,  # tuples of tiles that hold all keys and values, or (): tiles of BN are read from k and v
    values,
    start,
    N,
    scale,
    HEAD,
    BM,
    BN,
    PEEL,
):
    """Writes dq of the BM queries from `start`, and delta = sum_d out * dout for the keys' turn.

    PEEL: only the last tile needs masks, and a loop without them pays where it runs often; a second
    copy of the loop costs registers.
    """
    row = start + tl.arange(0, BM)
    q = load_tile(of.q, start, HEAD.qkv_n, N, HEAD, BM, True)
    dout = load_tile(of.dout, start, HEAD.dout_n, N, HEAD, BM, True)
    out = load_tile(of.out, start, HEAD.H * HEAD.D, N, HEAD, BM, True)
    lse_M = tl.load(of.lse + row, mask=row < N, other=float("inf"))
    delta_M = tl.sum(out[0].to(tl.float32) * dout[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(out)):
        delta_M += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    tl.store(of.delta + row, delta_M, mask=row < N)
    rows = q, dout, lse_M, delta_M
    dq = zero_tile(HEAD, BM)
    if len(keys) > 0:
        for i in tl.static_range(len(keys)):
            at = i * keys[0][0].shape[0]
            is_last = i == len(keys) - 1
            dq = query_step(rows, keys[i], values[i], at, N, scale, dq, HEAD, is_last)
    else:
        last = 0
        if PEEL:
            last = (N - 1) // BN * BN
            for first in range(0, last, BN):
                k = load_tile(of.k, first, HEAD.qkv_n, N, HEAD, BN, False)
                v = load_tile(of.v, first, HEAD.qkv_n, N, HEAD, BN, False)
                dq = query_step(rows, k, v, first, N, scale, dq, HEAD, False)
        for first in range(last, N, BN):
            k = load_tile(of.k, first, HEAD.qkv_n, N, HEAD, BN, True)
            v = load_tile(of.v, first, HEAD.qkv_n, N, HEAD, BN, True)
            dq = query_step(rows, k, v, first, N, scale, dq, HEAD, True)
    natural = scale * 0.6931471805599453  # 1 / sqrt(D)
    store_tile(of.dq, start, 3 * HEAD.H * HEAD.D, N, times(dq, natural), HEAD)


@triton.jit
def key_step(of, k, v, start, N, scale, dk, dv, HEAD, BM, MASKED):
    """(dk before its scale, dv) of a key tile plus what the query tile from `start` adds to them.

    Scores are held transposed.
    """
    rows = start + tl.arange(0, BM)
    q = load_tile(of.q, start, HEAD.qkv_n, N, HEAD, BM, MASKED)
    dout = load_tile(of.dout, start, HEAD.dout_n, N, HEAD, BM, MASKED)
    if MASKED:
        # 2 ** -inf: queries that do not exist weigh nothing
        lse_M = tl.load(of.lse + rows, mask=rows < N, other=float("inf"))
        delta_M = tl.load(of.delta + rows, mask=rows < N, other=0.0)
    else:
        lse_M = tl.load(of.lse + rows)
        delta_M = tl.load(of.delta + rows)
    weights = tl.math.exp2(inner(k, q, HEAD) * scale - lse_M[None, :])
    dv = accumulate(weights, dout, dv, HEAD)
    dscores = weights * (inner(v, dout, HEAD) - delta_M[None, :])
    return accumulate(dscores, q, dk, HEAD), dv


@triton.jit
def key_gradient(
    of,  # Pointers
    start,
    N,
    scale,
    HEAD,
    BM,
    BN,
    PEEL,
):
    """Writes dk and dv of the BN keys from `start`, by tiles of BM queries."""
    k = load_tile(of.k, start, HEAD.qkv_n, N, HEAD, BN, True)
    v = load_tile(of.v, start, HEAD.qkv_n, N, HEAD, BN, True)
    dk = zero_tile(HEAD, BN)
    dv = zero_tile(HEAD, BN)
    last = 0
    if PEEL:
        last = (N - 1) // BM * BM
        for first in range(0, last, BM):
            dk, dv = key_step(of, k, v, first, N, scale, dk, dv, HEAD, BM, False)
    for first in range(last, N, BM):
        dk, dv = key_step(of, k, v, first, N, scale, dk, dv, HEAD, BM, True)
    natural = scale * 0.6931471805599453  # 1 / sqrt(D)
    store_tile(of.dk, start, 3 * HEAD.H * HEAD.D, N, times(dk, natural), HEAD)
    store_tile(of.dv, start, 3 * HEAD.H * HEAD.D, N, dv, HEAD)
