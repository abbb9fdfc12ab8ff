"""What both ways of the contrastive loss share: norms of rows, weights of clips, terms of the mean.

Logarithms inside the kernels are to the base 2.

Letters: B clips, M predicted tubelets, P values of a tubelet, A = B * M: all rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import floats, in_units, launch
from .reference import NORM_FLOOR

LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)
# softmax weights over norms of at least NORM_FLOOR then fit float16: at most 32000, rarely
# subnormal
GRADIENT_SCALE = 32.0
FLOOR = tl.constexpr(NORM_FLOOR)
# an inverse norm below this is of a vector longer than the floor
SHORT = tl.constexpr(0.9999 / NORM_FLOOR)
# that a row kernel takes at once, and values of each: two rows a warp, 16 bytes a thread
ROWS, ROW_BLOCK = 8, 256


@triton.jit(do_not_specialize=["A", "units"])
def inverse_norm_kernel(
    x,  # [A, P]
    inverse,  # [A] float32
    A,
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
            row_at + column[None, :], mask=(row < A)[:, None] & (column < P)[None, :], other=0.0
        ).to(tl.float32)
        squares += value * value
        nonzero |= (value != 0).to(tl.int32)
    norm = tl.sqrt(tl.sum(squares, 1))
    tl.store(
        inverse + row,
        tl.where(tl.sum(nonzero, 1) != 0, 1.0 / tl.maximum(norm, FLOOR), OF_ZERO),
        mask=row < A,
    )


def inverse_norms(predicted_BMP: Tensor, target_BMP: Tensor) -> tuple[Tensor, Tensor]:
    """[A] float32 each. A target of zeros gets 0: its similarities are 0 without a test, and its
    row is known to be no term.
    """
    found = []
    for x, of_zero in ((predicted_BMP, 1 / NORM_FLOOR), (target_BMP, 0.0)):
        B, M, P = x.shape
        unit, units = in_units(P)
        inverse_A = floats(x, B * M)
        launch(
            inverse_norm_kernel,
            triton.cdiv(B * M, ROWS),
            x,
            inverse_A,
            B * M,
            units,
            unit,
            of_zero,
            ROWS,
            ROW_BLOCK,
            num_warps=4,
        )
        found.append(inverse_A)
    return found[0], found[1]


def shares(inverse_target_A: Tensor, B: int) -> Tensor:
    """What a term of each clip weighs in the mean over clips of their means: 1 / (B * its terms);
    counted on the device.
    """
    terms_B = (inverse_target_A.view(B, -1) > 0).sum(1, dtype=torch.float32).clamp(min=1)
    return (1 / B) / terms_B


def mean_of_terms(
    terms_2A: Tensor, share_B: Tensor, temperature_1: Tensor
) -> tuple[Tensor, Tensor]:
    """(loss, its derivative by tau [1])."""
    loss, pull = (terms_2A.view(2, len(share_B), -1).sum(2) * share_B).sum(1)
    return loss.clone(), -pull / temperature_1


@triton.jit
def store_terms(terms, row, A, has_term, largest, own_logit, total, pull, inside):
    """Writes to terms [2, A] a row's loss and `pull`, 0 where there is no term."""
    loss = LN2 * (largest - own_logit + tl.math.log2(total))
    tl.store(terms + row, tl.where(has_term, loss, 0.0), mask=inside)
    tl.store(terms + A + row, tl.where(has_term, pull, 0.0), mask=inside)
