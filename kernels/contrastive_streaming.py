"""The contrastive loss in the least memory: a streaming softmax.

Its M x M similarities never exist. The forward pass keeps a few floats a row; the backward pass
computes the similarities again, a tile at a time. No atomics: every program owns what it writes, so
results repeat bit for bit. Logarithms inside the kernels are to the base 2.

Letters: B clips, M predicted tubelets, P values of a tubelet, A = B * M: all rows, S splits of the
columns, BM BN BK BP lengths of a tile along rows, columns, P (of a similarity) and P (of a
gradient).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contrastive_terms import (
    GRADIENT_SCALE,
    LN2,
    LOG2E,
    SHORT,
    inverse_norms,
    mean_of_terms,
    shares,
    store_terms,
)
from .launch import dot, floats, in_units, launch, precision, register

COMBINE_BLOCK = 128
# the columns of a row tile are split between programs until there are so many: several waves of any
# GPU
ENOUGH_PROGRAMS = 1024
LEAST = tl.constexpr(-1e30)  # below every logit, and finite: it may meet a factor of 0
# By bytes a value: (BM, BN, BK, warps, stages) forward, (BM, BN, BK, BP, warps, stages) backward.
# From the compile check (no spills, HGMMA on sm_90); not yet timed on a GPU.
FORWARD_TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 16, 8, 1)}
BACKWARD_TILES = {2: (64, 64, 64, 256, 8, 2), 4: (32, 32, 32, 64, 8, 1)}


@triton.jit
def logits(
    predicted,  # [B, M, P]
    target,  # [B, M, P]
    inverse_target,  # [A] float32
    row_scale_BM,  # inverse norms of the rows, over tau
    first,  # row of the A where the clip begins
    top,  # the tile's first row in the clip
    start,  # its first column
    M,
    P,
    BN,
    BK,
    PRECISION,
):
    """(logits [BM, BN] to the base 2, columns, their inverse norms) of a tile.

    Rows and columns beyond the clip are copies of its last one, which need no mask; the caller
    ignores them.
    """
    column = start + tl.arange(0, BN)
    scale_BN = tl.load(inverse_target + first + column, mask=column < M, other=0.0)
    # from the first row of a tile on: offsets inside of it fit 32 bits
    x, t = predicted + (first + top) * P, target + (first + start) * P
    i, j = tl.arange(0, row_scale_BM.shape[0]), tl.arange(0, BN)
    i, j, k = tl.minimum(i, M - top - 1), tl.minimum(j, M - start - 1), tl.arange(0, BK)
    x_at, t_at = x + (i[:, None] * P + k[None, :]), t + (j[None, :] * P + k[:, None])
    product = tl.zeros([row_scale_BM.shape[0], BN], tl.float32)
    for part in range(0, P, BK):
        x_tile = tl.load(x_at + part, mask=(part + k < P)[None, :], other=0.0)
        t_tile = tl.load(t_at + part, mask=(part + k < P)[:, None], other=0.0)
        product = dot(x_tile, t_tile, product, PRECISION)
    return product * row_scale_BM[:, None] * scale_BN[None, :], column, scale_BN


@triton.jit(do_not_specialize=["M", "A", "units", "splits", "tiles_per_split"])
def partial_softmax_kernel(
    predicted,  # [B, M, P]
    target,  # [B, M, P]
    inverse_predicted,  # [A] float32
    inverse_target,  # [A] float32
    temperature,  # [1] float32
    # of a row's rivals: largest logit, sum of 2 ** (logit - largest), the same times (logit -
    # largest)
    partial,  # [3, S, A] float32
    own,  # [A] float32: the logit of a prediction and its own target
    M,
    A,
    units,
    splits,
    tiles_per_split,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One row tile against one split of the columns."""
    P = units * UNIT
    split, tile = tl.program_id(0) % splits, tl.program_id(0) // splits
    row_tiles = tl.cdiv(M, BM)
    clip = (tile // row_tiles).to(tl.int64)
    top = tile % row_tiles * BM
    row = top + tl.arange(0, BM)
    first = clip * M
    row_scale = tl.load(inverse_predicted + first + row, mask=row < M, other=0.0) * (
        LOG2E / tl.load(temperature)
    )
    largest = tl.full([BM], LEAST, tl.float32)
    rivals = tl.zeros([BM], tl.float32)
    weighted = tl.zeros([BM], tl.float32)
    for start in range(
        split * tiles_per_split * BN, tl.minimum((split + 1) * tiles_per_split * BN, M), BN
    ):
        logit, column, _ = logits(
            predicted,
            target,
            inverse_target,
            row_scale,
            first,
            top,
            start,
            M,
            P,
            BN,
            BK,
            PRECISION,
        )
        is_own = row[:, None] == column[None, :]
        tl.store(
            own + first + row,
            tl.sum(tl.where(is_own, logit, 0.0), 1),
            mask=(row >= start) & (row < start + BN) & (row < M),
        )
        logit = tl.where(is_own, LEAST, logit + tl.where(column < M, 0.0, LEAST)[None, :])
        larger = tl.maximum(largest, tl.max(logit, 1))
        logit -= larger[:, None]
        share = tl.math.exp2(logit)
        shrink = tl.math.exp2(largest - larger)
        weighted = (weighted + rivals * (largest - larger)) * shrink + tl.sum(share * logit, 1)
        rivals = rivals * shrink + tl.sum(share, 1)
        largest = larger
    at = partial + tl.cast(split, tl.int64) * A + first + row
    parts = tl.cast(splits, tl.int64) * A
    tl.store(at, largest, mask=row < M)
    tl.store(at + parts, rivals, mask=row < M)
    tl.store(at + 2 * parts, weighted, mask=row < M)


@triton.jit(do_not_specialize=["A", "splits"])
def combine_kernel(
    partial,  # [3, S, A] float32, as own [A] see partial_softmax_kernel
    own,
    inverse_target,  # [A] float32
    lse,  # [A] float32, base 2
    # softmax of the own target - 1, as minus that of its rivals: where it is almost 0 it is still
    # exact
    own_weight,  # [A] float32
    # the row's loss, and (mean logit under the softmax) - (own logit); 0 where there is no term
    terms,  # [2, A] float32
    A,
    splits,
    BLOCK: tl.constexpr,
):
    """Joins the splits of a block of rows, in order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < A
    parts = tl.cast(splits, tl.int64) * A
    own_logit = tl.load(own + row, mask=inside, other=0.0)
    largest = own_logit
    rivals = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        at = partial + tl.cast(split, tl.int64) * A + row
        new = tl.load(at, mask=inside, other=0.0)
        new_rivals = tl.load(at + parts, mask=inside, other=0.0)
        new_weighted = tl.load(at + 2 * parts, mask=inside, other=0.0)
        larger = tl.maximum(largest, new)
        shrink, grow = tl.math.exp2(largest - larger), tl.math.exp2(new - larger)
        weighted = (weighted + rivals * (largest - larger)) * shrink + (
            new_weighted + new_rivals * (new - larger)
        ) * grow
        rivals = rivals * shrink + new_rivals * grow
        largest = larger
    total = rivals + tl.math.exp2(own_logit - largest)
    has_term = tl.load(inverse_target + row, mask=inside, other=0.0) > 0
    tl.store(lse + row, largest + tl.math.log2(total), mask=inside)
    tl.store(own_weight + row, -rivals / total, mask=inside)
    pull = LN2 * ((weighted + rivals * (largest - own_logit)) / total)
    store_terms(terms, row, A, has_term, largest, own_logit, total, pull, inside)


@triton.jit(do_not_specialize=["M", "units"])
def streamed_gradient_kernel(
    predicted,  # [B, M, P]
    target,  # [B, M, P]
    inverse_predicted,  # [A] float32
    inverse_target,  # [A] float32
    lse,  # [A] float32, see combine_kernel
    own_weight,  # [A] float32, see combine_kernel
    pull,  # [A] float32: (mean logit under the softmax) - (own logit)
    temperature,  # [1] float32
    weight,  # [B] float32: the gradient of the loss times the clip's share over tau
    gradient,  # [B, M, P]
    M,
    units,
    SCALE: tl.constexpr,
    UNIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BP columns of the gradient of one row tile; the similarities are computed again for each such
    slice.
    """
    P = units * UNIT
    slices, row_tiles = tl.cdiv(P, BP), tl.cdiv(M, BM)
    tile = tl.program_id(0) // slices
    value = tl.program_id(0) % slices * BP + tl.arange(0, BP)
    top = tile % row_tiles * BM
    row = top + tl.arange(0, BM)
    clip = (tile // row_tiles).to(tl.int64)
    first = clip * M
    tau = tl.load(temperature)
    inverse = tl.load(inverse_predicted + first + row, mask=row < M, other=0.0)
    row_lse = tl.load(lse + first + row, mask=row < M, other=0.0)
    row_own = tl.load(own_weight + first + row, mask=row < M, other=0.0)
    row_scale = inverse * (LOG2E / tau)
    has_term = tl.where(
        tl.load(inverse_target + first + row, mask=row < M, other=0.0) > 0, SCALE, 0.0
    )
    sum_BMBP = tl.zeros([BM, BP], tl.float32)
    for start in range(0, M, BN):
        logit, column, column_scale = logits(
            predicted,
            target,
            inverse_target,
            row_scale,
            first,
            top,
            start,
            M,
            P,
            BN,
            BK,
            PRECISION,
        )
        share = tl.where(
            row[:, None] == column[None, :],
            row_own[:, None],
            tl.math.exp2(logit - row_lse[:, None]),
        )
        share = share * column_scale[None, :] * has_term[:, None]
        t = tl.load(
            target + (first + start) * P + (tl.arange(0, BN)[:, None] * P + value[None, :]),
            mask=(column < M)[:, None] & (value < P)[None, :],
            other=0.0,
        )
        sum_BMBP = dot(share.to(t.dtype), t, sum_BMBP, PRECISION)
    at = (first + top) * P + (tl.arange(0, BM)[:, None] * P + value[None, :])
    inside = (row < M)[:, None] & (value < P)[None, :]
    x = tl.load(predicted + at, mask=inside, other=0.0).to(tl.float32)
    # What points along the prediction does not change its cosine. It needs no product: its length
    # is tau * pull.
    radial = tl.where(
        inverse < SHORT, tau * tl.load(pull + first + row, mask=row < M, other=0.0) * inverse, 0.0
    )
    result = (sum_BMBP * (1 / SCALE) - radial[:, None] * x) * (inverse * tl.load(weight + clip))[
        :, None
    ]
    tl.store(gradient + at, result.to(gradient.dtype.element_ty), mask=inside)


def _forward(
    predicted_BMP: Tensor, target_BMP: Tensor, temperature_1: Tensor
) -> tuple[Tensor, ...]:
    """(loss, its derivative by tau, the clips' weights, and more that backward takes)."""
    B, M, P = predicted_BMP.shape
    BM, BN, BK, warps, stages = FORWARD_TILES[predicted_BMP.element_size()]
    row_tiles, column_tiles = B * triton.cdiv(M, BM), triton.cdiv(M, BN)
    wanted = min(column_tiles, triton.cdiv(ENOUGH_PROGRAMS, row_tiles))
    tiles_per_split = triton.cdiv(column_tiles, wanted)
    splits = triton.cdiv(column_tiles, tiles_per_split)
    unit, units = in_units(P)
    partial_3SA, terms_2A = floats(predicted_BMP, 3, splits, B * M), floats(predicted_BMP, 2, B * M)
    own_A, lse_A, own_weight_A = (floats(predicted_BMP, B * M) for _ in range(3))
    inverse_predicted_A, inverse_target_A = inverse_norms(predicted_BMP, target_BMP)
    launch(
        partial_softmax_kernel,
        row_tiles * splits,
        predicted_BMP,
        target_BMP,
        inverse_predicted_A,
        inverse_target_A,
        temperature_1,
        partial_3SA,
        own_A,
        M,
        B * M,
        units,
        splits,
        tiles_per_split,
        unit,
        BM,
        BN,
        BK,
        precision(predicted_BMP),
        num_warps=warps,
        num_stages=stages,
    )
    launch(
        combine_kernel,
        triton.cdiv(B * M, COMBINE_BLOCK),
        partial_3SA,
        own_A,
        inverse_target_A,
        lse_A,
        own_weight_A,
        terms_2A,
        B * M,
        splits,
        COMBINE_BLOCK,
        num_warps=4,
    )
    share_B = shares(inverse_target_A, B)
    return (
        *mean_of_terms(terms_2A, share_B, temperature_1),
        share_B / temperature_1,
        inverse_predicted_A,
        inverse_target_A,
        lse_A,
        own_weight_A,
        terms_2A[1].clone(),
    )


def _backward(
    predicted_BMP: Tensor,
    target_BMP: Tensor,
    temperature_1: Tensor,
    weight_B: Tensor,
    *rows_A: Tensor,
) -> Tensor:
    """rows_A: what `_forward` returns after weight_B."""
    B, M, P = predicted_BMP.shape
    BM, BN, BK, BP, warps, stages = BACKWARD_TILES[predicted_BMP.element_size()]
    unit, units = in_units(P)
    gradient_BMP = torch.empty_like(predicted_BMP)
    launch(
        streamed_gradient_kernel,
        B * triton.cdiv(M, BM) * triton.cdiv(P, BP),
        predicted_BMP,
        target_BMP,
        *rows_A,
        temperature_1,
        weight_B,
        gradient_BMP,
        M,
        units,
        GRADIENT_SCALE,
        unit,
        BM,
        BN,
        BK,
        BP,
        precision(predicted_BMP),
        num_warps=warps,
        num_stages=stages,
    )
    return gradient_BMP


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    predicted_BMP, target_BMP, temperature_1, dtemperature_1, weight_B, *rows_A = ctx.saved_tensors
    dpredicted_BMP = None
    if ctx.needs_input_grad[0]:
        weight_B = gradient * weight_B
        dpredicted_BMP = backward(predicted_BMP, target_BMP, temperature_1, weight_B, *rows_A)
    return dpredicted_BMP, None, gradient * dtemperature_1


forward = register(
    "contrastive_streaming(Tensor predicted, Tensor target, Tensor temperature) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    keeps=lambda inputs, results: (*inputs, *results[1:]),
    backward=_gradients,
)
backward = register(
    "contrastive_streaming_backward(Tensor predicted, Tensor target, Tensor temperature, "
    "Tensor weight, Tensor inverse_predicted, Tensor inverse_target, Tensor lse, "
    "Tensor own_weight, Tensor pull) -> Tensor",
    _backward,
)
