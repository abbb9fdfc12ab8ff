"""The contrastive loss in the least memory: a streaming softmax whose M x M similarities never
exist; and the norms of both ways.

The forward pass keeps a few floats a row; the backward pass computes the similarities again, a tile
at a time. No atomics: every program owns what it writes, so results repeat bit for bit. Logarithms
inside the kernels are to the base 2.

Letters: B clips, M predicted tubelets, P values of a tubelet, N = B * M rows, S splits of the
columns, BM BN BK BP lengths of a tile along rows, columns, P (of a similarity) and P (of a
gradient).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import dot, floats, in_units, launch, precision, register
from .reference import NORM_FLOOR

LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
# softmax weights over norms of at least NORM_FLOOR then fit float16: at most 32000, rarely
# subnormal
GRADIENT_SCALE = 32.0
COMBINE_BLOCK = 128
# the columns of a row tile are split between programs until there are so many: several waves of any
# GPU
ENOUGH_PROGRAMS = 1024
FLOOR = tl.constexpr(NORM_FLOOR)
LEAST = tl.constexpr(-1e30)  # below every logit, and finite: it may meet a factor of 0
# an inverse norm below this is of a vector longer than the floor
SHORT = tl.constexpr(0.9999 / NORM_FLOOR)
# that a row kernel takes at once, and values of each: two rows a warp, 16 bytes a thread
ROWS, ROW_BLOCK = 8, 256


# By bytes a value: (BM, BN, BK, warps, stages) forward, (BM, BN, BK, BP, warps, stages) backward.
# From the compile check (no spills, HGMMA on sm_90); not yet timed on a GPU.
FORWARD_TILES = {2: (128, 128, 64, 8, 3), 4: (64, 64, 16, 8, 1)}
BACKWARD_TILES = {2: (64, 64, 64, 256, 8, 2), 4: (32, 32, 32, 64, 8, 1)}


@triton.jit(do_not_specialize=["N", "units"])
def inverse_norm_kernel(
    x,  # [N, P]
    inverse,  # [N] float32
    N,
    units,
    UNIT: tl.constexpr,
    OF_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / max(|x|, floor) of some rows; OF_ZERO for a row of zeros."""
    P = units * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_at = x + row.to(tl.int64)[:, None] * P
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    nonzero = tl.zeros([ROWS, BLOCK], tl.int32)
    for start in range(0, P, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(
            row_at + column[None, :], mask=(row < N)[:, None] & (column < P)[None, :], other=0.0
        ).to(tl.float32)
        squares += value * value
        nonzero |= (value != 0).to(tl.int32)
    norm = tl.sqrt(tl.sum(squares, 1))
    tl.store(
        inverse + row,
        tl.where(tl.sum(nonzero, 1) != 0, 1.0 / tl.maximum(norm, FLOOR), OF_ZERO),
        mask=row < N,
    )


def inverse_norms(
    predicted_BMP: torch.Tensor, target_BMP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] float32 each. A target of zeros gets 0: its similarities are 0 without a test, and its
    row is known to be no term.
    """
    found = []
    for x, of_zero in ((predicted_BMP, 1 / NORM_FLOOR), (target_BMP, 0.0)):
        B, M, P = x.shape
        unit, units = in_units(P)
        inverse_N = floats(x, B * M)
        launch(
            inverse_norm_kernel,
            triton.cdiv(B * M, ROWS),
            x,
            inverse_N,
            B * M,
            units,
            unit,
            of_zero,
            ROWS,
            ROW_BLOCK,
            num_warps=4,
        )
        found.append(inverse_N)
    return found[0], found[1]


def shares(inverse_target_N: torch.Tensor, B: int) -> torch.Tensor:
    """What a term of each clip weighs in the mean over clips of their means: 1 / (B * its terms);
    counted on the device.
    """
    terms_B = (inverse_target_N.view(B, -1) > 0).sum(1, dtype=torch.float32).clamp(min=1)
    return (1 / B) / terms_B


def mean_of_terms(
    terms_2N: torch.Tensor, share_B: torch.Tensor, temperature_1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, its derivative by tau [1])."""
    loss, pull = (terms_2N.view(2, len(share_B), -1).sum(2) * share_B).sum(1)
    return loss.clone(), -pull / temperature_1


@triton.jit
def logits(
    predicted,  # [B, M, P]
    target,  # [B, M, P]
    inverse_target,  # [N] float32
    row_scale_BM,  # inverse norms of the rows, over tau
    first,  # row of the N where the clip begins
    top,  # the tile's first row in the clip
    start,  # its first column
    M,
    P,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
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


@triton.jit
def store_terms(terms, row, N, has_term, largest, own_logit, total, pull, inside):
    """Writes to terms [2, N] a row's loss and `pull`, 0 where there is no term."""
    loss = LN2 * (largest - own_logit + tl.math.log2(total))
    tl.store(terms + row, tl.where(has_term, loss, 0.0), mask=inside)
    tl.store(terms + N + row, tl.where(has_term, pull, 0.0), mask=inside)


@triton.jit(do_not_specialize=["M", "N", "units", "splits", "tiles_per_split"])
def partial_softmax_kernel(
    predicted,
    target,  # [B, M, P]
    inverse_predicted,
    inverse_target,  # [N] float32
    temperature,  # [1] float32
    # [3, S, N] float32, of a row's rivals: largest logit, sum of 2 ** (logit - largest), the same
    # times (logit - largest)
    partial,
    own,  # [N] float32: the logit of a prediction and its own target
    M,
    N,
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
    at = partial + tl.cast(split, tl.int64) * N + first + row
    parts = tl.cast(splits, tl.int64) * N
    tl.store(at, largest, mask=row < M)
    tl.store(at + parts, rivals, mask=row < M)
    tl.store(at + 2 * parts, weighted, mask=row < M)


@triton.jit(do_not_specialize=["N", "splits"])
def combine_kernel(
    partial,
    own,  # [3, S, N], [N] float32, see partial_softmax_kernel
    inverse_target,  # [N] float32
    lse,  # [N] float32, base 2
    # [N] float32: softmax of the own target - 1, as minus that of its rivals: where it is almost 0
    # it is still exact
    own_weight,
    # [2, N] float32: the row's loss, and (mean logit under the softmax) - (own logit); 0 where
    # there is no term
    terms,
    N,
    splits,
    BLOCK: tl.constexpr,
):
    """Joins the splits of a block of rows, in order."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    parts = tl.cast(splits, tl.int64) * N
    own_logit = tl.load(own + row, mask=inside, other=0.0)
    largest = own_logit
    rivals = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        at = partial + tl.cast(split, tl.int64) * N + row
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
    store_terms(terms, row, N, has_term, largest, own_logit, total, pull, inside)


@triton.jit(do_not_specialize=["M", "units"])
def streamed_gradient_kernel(
    predicted,
    target,  # [B, M, P]
    inverse_predicted,
    inverse_target,  # [N] float32
    lse,
    own_weight,  # [N] float32, see combine_kernel
    pull,  # [N] float32: (mean logit under the softmax) - (own logit)
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
    predicted_BMP: torch.Tensor, target_BMP: torch.Tensor, temperature_1: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """(loss, its derivative by tau, the clips' weights, and more that backward takes)."""
    B, M, P = predicted_BMP.shape
    BM, BN, BK, warps, stages = FORWARD_TILES[predicted_BMP.element_size()]
    row_tiles, column_tiles = B * triton.cdiv(M, BM), triton.cdiv(M, BN)
    wanted = min(column_tiles, triton.cdiv(ENOUGH_PROGRAMS, row_tiles))
    tiles_per_split = triton.cdiv(column_tiles, wanted)
    splits = triton.cdiv(column_tiles, tiles_per_split)
    unit, units = in_units(P)
    partial_3SN, terms_2N = floats(predicted_BMP, 3, splits, B * M), floats(predicted_BMP, 2, B * M)
    own_N, lse_N, own_weight_N = (floats(predicted_BMP, B * M) for _ in range(3))
    inverse_predicted_N, inverse_target_N = inverse_norms(predicted_BMP, target_BMP)
    launch(
        partial_softmax_kernel,
        row_tiles * splits,
        predicted_BMP,
        target_BMP,
        inverse_predicted_N,
        inverse_target_N,
        temperature_1,
        partial_3SN,
        own_N,
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
        partial_3SN,
        own_N,
        inverse_target_N,
        lse_N,
        own_weight_N,
        terms_2N,
        B * M,
        splits,
        COMBINE_BLOCK,
        num_warps=4,
    )
    share_B = shares(inverse_target_N, B)
    return (
        *mean_of_terms(terms_2N, share_B, temperature_1),
        share_B / temperature_1,
        inverse_predicted_N,
        inverse_target_N,
        lse_N,
        own_weight_N,
        terms_2N[1].clone(),
    )


def _backward(
    predicted_BMP: torch.Tensor,
    target_BMP: torch.Tensor,
    temperature_1: torch.Tensor,
    weight_B: torch.Tensor,
    *rows_N: torch.Tensor,
) -> torch.Tensor:
    """rows_N: what `_forward` returns after weight_B."""
    B, M, P = predicted_BMP.shape
    BM, BN, BK, BP, warps, stages = BACKWARD_TILES[predicted_BMP.element_size()]
    unit, units = in_units(P)
    gradient_BMP = torch.empty_like(predicted_BMP)
    launch(
        streamed_gradient_kernel,
        B * triton.cdiv(M, BM) * triton.cdiv(P, BP),
        predicted_BMP,
        target_BMP,
        *rows_N,
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


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    predicted_BMP, target_BMP, temperature_1, dtemperature_1, weight_B, *rows_N = ctx.saved_tensors
    dpredicted_BMP = None
    if ctx.needs_input_grad[0]:
        weight_B = gradient * weight_B
        dpredicted_BMP = backward(predicted_BMP, target_BMP, temperature_1, weight_B, *rows_N)
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
