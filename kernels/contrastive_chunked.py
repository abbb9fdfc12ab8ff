"""The contrastive loss at full speed.

The products are by the BLAS, a chunk of rows at a time in bounded scratch, and between them one
kernel turns similarities into gradients. That is in the forward pass: nothing is computed twice.

Letters: B clips, M predicted tubelets, P values of a tubelet, A = B * M: all rows,
R rows of a chunk.
"""

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contrastive_terms import (
    GRADIENT_SCALE,
    LN2,
    LOG2E,
    ROW_BLOCK,
    ROWS,
    SHORT,
    inverse_norms,
    mean_of_terms,
    shares,
    store_terms,
)
from .launch import floats, in_units, launch, register, runs
from .scaling import scale_tokens

# Of a chunk: similarities, softmax weights and gradients. A chunk is four launches, which cost the
# host about 50 us; a clip of 1408 tubelets needs 12.6 MB and an H100 about 30 us for it. 32 MB stay
# in its cache, but 2 clips are done before the host has launched the next ones; 128 MB are 8 clips,
# five times what the host needs, for at most 5 us more a clip. Estimates, not yet timed on a GPU.
SCRATCH_BYTES = 128 << 20
# (columns at once, warps) by M > 256; from the compile check, not yet timed on a GPU
SOFTMAX_BLOCKS = {False: (256, 4), True: (2048, 8)}


@triton.jit(do_not_specialize=["first", "A"])
def softmax_gradient_kernel(
    products,  # [R, M] float32: predictions times targets, as they are
    # of the targets' dtype, written if GRADIENT: SCALE * (softmax - one hot) / |t_j|
    weights,  # [R, M]
    inverse_predicted,  # [A] float32
    inverse_target,  # [A] float32
    temperature,  # [1] float32
    # the row's loss, and (mean logit under the softmax) - (own logit); 0 where there is no term
    terms,  # [2, A] float32
    first,
    M,
    A,
    GRADIENT: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of a chunk that starts at row `first` of the A; logits are to the base 2."""
    row = first + tl.program_id(0)
    own = row % M
    inverse_target += row - own
    products += tl.program_id(0).to(tl.int64) * M
    weights += tl.program_id(0).to(tl.int64) * M
    scale = tl.load(inverse_predicted + row) * (LOG2E / tl.load(temperature))
    own_inverse = tl.load(inverse_target + own)
    own_logit = tl.load(products + own) * own_inverse * scale
    largest = own_logit
    rivals = own_logit * 0
    weighted = rivals
    for start in range(0, M, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inverse = tl.load(inverse_target + column, mask=column < M, other=0.0)
        logit = tl.load(products + column, mask=column < M, other=0.0) * inverse * scale
        is_rival = (column < M) & (column != own)
        larger = tl.maximum(largest, tl.max(tl.where(is_rival, logit, own_logit), 0))
        share = tl.where(is_rival, tl.math.exp2(logit - larger), 0.0)
        shrink = tl.math.exp2(largest - larger)
        rivals = rivals * shrink + tl.sum(share, 0)
        weighted = weighted * shrink + tl.sum(share * (logit - own_logit), 0)
        largest = larger
    total = rivals + tl.math.exp2(own_logit - largest)
    has_term = own_inverse > 0
    store_terms(terms, row, A, has_term, largest, own_logit, total, LN2 * weighted / total, True)
    if GRADIENT:
        row_weight = tl.where(has_term, SCALE, 0.0) / total
        for start in range(0, M, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inverse = tl.load(inverse_target + column, mask=column < M, other=0.0)
            logit = tl.load(products + column, mask=column < M, other=0.0) * inverse * scale
            # softmax - 1 of the own target, as minus its rivals': where it is almost 0 it is still
            # exact
            share = tl.where(column == own, -rivals, tl.math.exp2(logit - largest))
            tl.store(
                weights + column,
                (share * inverse * row_weight).to(weights.dtype.element_ty),
                mask=column < M,
            )


@triton.jit(do_not_specialize=["first", "R", "M", "A", "units"])
def through_cosine_kernel(
    pulls,  # [R, P] float32: SCALE * gradient by the normalised prediction
    predicted,  # [A, P]
    inverse_predicted,  # [A] float32
    terms,  # [2, A] float32, see softmax_gradient_kernel
    temperature,  # [1] float32
    weight,  # [B] float32
    # the result is added to it, times the clip's weight, if ADD, else it is overwritten
    gradient,  # [A, P]
    first,
    R,
    M,
    A,
    units,
    UNIT: tl.constexpr,
    ADD: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Takes some rows through the normalisation: (g - (g . x^) x^) / |x|. The product g . x^ is
    known: SCALE * tau * terms[1].
    """
    P = units * UNIT
    here = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = first + here
    inverse = tl.load(inverse_predicted + row, mask=here < R, other=0.0)
    pull = tl.load(terms + A + row, mask=here < R, other=0.0)
    radial = tl.where(inverse < SHORT, SCALE * tl.load(temperature) * pull * inverse, 0.0)
    for start in range(0, P, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (here < R)[:, None] & (column < P)[None, :]
        at = row.to(tl.int64)[:, None] * P + column[None, :]
        x = tl.load(predicted + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(
            pulls + here.to(tl.int64)[:, None] * P + column[None, :], mask=inside, other=0.0
        )
        result = (g - radial[:, None] * x) * inverse[:, None]
        if ADD:
            factor = tl.load(weight + row // M, mask=here < R, other=0.0)
            result = result * factor[:, None] + tl.load(gradient + at, mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(gradient + at, result.to(gradient.dtype.element_ty), mask=inside)


def matmul(a_BRK: Tensor, b_BKC: Tensor, out_BRC: Tensor) -> None:
    """out = a @ b, with a float32 `out` of 16-bit factors, which torch has on CUDA alone."""
    if a_BRK.is_cuda:
        torch.bmm(a_BRK, b_BKC, out_dtype=out_BRC.dtype, out=out_BRC)
    else:
        torch.bmm(a_BRK.float(), b_BKC.float(), out=out_BRC)


def chunk_size(B: int, M: int, bytes_per_row: int, scratch_bytes: int) -> tuple[int, int]:
    """(clips, rows of each) of pieces of about equal size that fit the scratch.

    Some whole clips, or a part of one; at least a row.
    """
    fit = max(1, scratch_bytes // bytes_per_row)
    num_clips, num_rows = max(1, min(B, fit // M)), min(M, fit)
    num_clips = triton.cdiv(B, triton.cdiv(B, num_clips))
    return num_clips, triton.cdiv(M, triton.cdiv(M, num_rows))


def loss_and_gradient(
    predicted_BMP: Tensor,
    target_BMP: Tensor,
    temperature_1: Tensor,
    gradient_BMP: Tensor | None,
    gradient_scale: float | None,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, its derivative by tau, weight_B); adds gradient_scale * the gradient to gradient_BMP.

    Without a gradient_scale fills it with the gradient over weight_B, the clips' shares over (tau *
    GRADIENT_SCALE), which float16 can hold.
    """
    B, M, P = predicted_BMP.shape
    A, unit, units = B * M, *in_units(P)
    block, warps = SOFTMAX_BLOCKS[bool(M > 256)]
    has_gradient = gradient_BMP is not None
    longest = max(M, P) if has_gradient else M  # of a row of products
    bytes_per_row = 4 * longest + (target_BMP.element_size() * M if has_gradient else 0)
    num_clips, num_rows = chunk_size(B, M, bytes_per_row, scratch_bytes)
    R = num_clips * num_rows
    products = floats(predicted_BMP, R * longest)
    weights = torch.empty(
        R * M if has_gradient else 1, dtype=target_BMP.dtype, device=predicted_BMP.device
    )
    terms_2A = floats(predicted_BMP, 2, A)
    inverse_predicted_A, inverse_target_A = inverse_norms(predicted_BMP, target_BMP)
    share_B = shares(inverse_target_A, B)
    factor = (1.0 if gradient_scale is None else gradient_scale) / GRADIENT_SCALE
    weight_B = share_B / temperature_1 * factor
    pieces = ()  # on fakes; a range over a symbolic number of clips would fix that number
    if runs(predicted_BMP):
        pieces = itertools.product(range(0, B, num_clips), range(0, M, num_rows))
    for clip, top in pieces:
        x_BRP = predicted_BMP[clip : clip + num_clips, top : top + num_rows]
        t_BMP = target_BMP[clip : clip + num_clips]
        first, R, shape = clip * M + top, x_BRP.shape[0] * x_BRP.shape[1], (*x_BRP.shape[:2], M)
        matmul(x_BRP, t_BMP.transpose(1, 2), products[: R * M].view(shape))
        launch(
            softmax_gradient_kernel,
            R,
            products,
            weights,
            inverse_predicted_A,
            inverse_target_A,
            temperature_1,
            terms_2A,
            first,
            M,
            A,
            has_gradient,
            GRADIENT_SCALE,
            block,
            num_warps=warps,
        )
        if gradient_BMP is None:
            continue
        # the products are spent
        matmul(weights[: R * M].view(shape), t_BMP, products[: R * P].view(x_BRP.shape))
        launch(
            through_cosine_kernel,
            triton.cdiv(R, ROWS),
            products,
            predicted_BMP,
            inverse_predicted_A,
            terms_2A,
            temperature_1,
            weight_B,
            gradient_BMP,
            first,
            R,
            M,
            A,
            units,
            unit,
            gradient_scale is not None,
            GRADIENT_SCALE,
            ROWS,
            ROW_BLOCK,
            num_warps=4,
        )
    return *mean_of_terms(terms_2A, share_B, temperature_1), weight_B


def _forward(
    predicted_BMP: Tensor,
    target_BMP: Tensor,
    temperature_1: Tensor,
    with_gradient: bool,
    scratch_bytes: int,
) -> tuple[Tensor, ...]:
    """(loss, its derivative by tau, weight_B, the gradient over weight_B or nothing)."""
    gradient_BMP = torch.empty_like(predicted_BMP) if with_gradient else None
    found = loss_and_gradient(
        predicted_BMP, target_BMP, temperature_1, gradient_BMP, None, scratch_bytes
    )
    return *found, floats(predicted_BMP, 0) if gradient_BMP is None else gradient_BMP


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    dtemperature_1, weight_B, gradient_BMP = ctx.saved_tensors
    dpredicted_BMP = None
    if ctx.needs_input_grad[0]:
        weight_BM = (gradient * weight_B)[:, None].expand(gradient_BMP.shape[:2])
        dpredicted_BMP = scale_tokens(gradient_BMP, weight_BM, 1.0, ctx.dtype)
    return dpredicted_BMP, None, gradient * dtemperature_1


forward = register(
    "contrastive_chunked(Tensor predicted, Tensor target, Tensor temperature, "
    "bool with_gradient, int scratch_bytes) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    keeps=lambda inputs, results: results[1:],
    backward=_gradients,
)
