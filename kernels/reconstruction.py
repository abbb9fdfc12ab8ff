"""L_rec: the squared error of the predicted tubelets, their targets read from the uint8 clip.

One pass over the masked tubelets makes statistics, errors, residuals (the gradient but for a factor
a token) and, where wanted, targets. The backward pass multiplies the residuals by that factor,
known only then: without the loss scale in it, float16 could not hold the gradient of a mean over
millions of values.
Letters: B clips, T frames, H W pixels, C channels, M masked, P values of a tubelet.
"""
# The type checker takes the body of a Triton kernel for Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .dispatch import choose
from .launch import floats, in_units, launch, register, runs
from .reference import EPSILON, Normalize, Tubelet
from .scaling import scale_tokens
from .tubelets import check_clip, check_dtypes, cut_of, dense_rows, locate

# one warp for a tubelet of 2 x 16 x 16 x 3, which so waits for no other; by the compile check, not
# timed
VALUES_PER_WARP = 2048


def reconstruction_loss(
    predicted_BMP: Tensor,
    clip_BTHWC: Tensor,
    index_BM: Tensor,
    tubelet: Tubelet,
    normalize: Normalize = "channel",
    impl: str = "auto",
) -> Tensor:
    """Mean squared error between predictions and normalised true pixels of the masked tubelets.

    predicted_BMP: P ordered (frame, row, column, channel). clip_BTHWC: uint8 or uint16 (white is
    255 or 65535), or floating point in [0, 1]. index_BM: int64. Returns: float32.
    Raises: ValueError for a shape, dtype or index that does not fit; on a GPU an index outside the
    grid makes the loss NaN. Source: VideoMAE (channel), MAE (tubelet).
    """
    return reconstruction_loss_and_targets(
        predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, impl, None
    )[0]


def reconstruction_loss_and_targets(
    predicted_BMP: Tensor,
    clip_BTHWC: Tensor,
    index_BM: Tensor,
    tubelet: Tubelet,
    normalize: Normalize = "channel",
    impl: str = "auto",
    target_dtype: torch.dtype | None = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The same, with the targets_BMP that the contrastive loss wants, at no second read of the
    clip; target_dtype None: without.
    """
    check_arguments("reconstruction_loss", predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize)
    if choose("reconstruction_loss", impl, clip_BTHWC.device) == "reference":
        loss, target_BMP = reference.reconstruction_loss(
            predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize
        )
        return loss, target_BMP.to(target_dtype or target_BMP.dtype)
    for dtype in (predicted_BMP.dtype, target_dtype or torch.float32):
        check_dtypes("reconstruction_loss", clip_BTHWC.dtype, dtype)
    with_gradient = torch.is_grad_enabled() and predicted_BMP.requires_grad
    error_BM, target_BMP, _ = token_errors(
        predicted_BMP,
        clip_BTHWC,
        index_BM,
        tubelet,
        normalize,
        predicted_BMP.dtype if with_gradient else None,
        target_dtype,
    )
    return reference.mean_error(error_BM), target_BMP


def check_arguments(
    operation: str,
    predicted_BMP: Tensor,
    clip_BTHWC: Tensor,
    index_BM: Tensor,
    tubelet: Tubelet,
    normalize: Normalize,
) -> None:
    """Raises: ValueError naming the argument that does not fit."""
    check_clip(operation, clip_BTHWC, index_BM, tubelet)
    values = cut_of(clip_BTHWC, tubelet).num_values
    if predicted_BMP.shape != (*index_BM.shape, values):
        raise ValueError(
            f"{operation}: predicted_BMP has shape {tuple(predicted_BMP.shape)}, "
            f"not {(*index_BM.shape, values)}"
        )
    if not predicted_BMP.is_floating_point() or predicted_BMP.device != clip_BTHWC.device:
        raise ValueError(
            f"{operation}: predicted_BMP is {predicted_BMP.dtype} on {predicted_BMP.device}, "
            f"not floating point on {clip_BTHWC.device}"
        )
    if normalize not in ("channel", "tubelet", "none"):
        raise ValueError(f"{operation}: normalize {normalize} is not one of channel, tubelet, none")
    if normalize != "none" and (tubelet == (1, 1, 1) if normalize == "channel" else values == 1):
        raise ValueError(
            f"{operation}: normalize {normalize} needs more than one value a {normalize}, "
            f"tubelet is {tubelet}; use none"
        )


# A tubelet is a tile [GROUPS, RUN] of its values in order. A thread holds whole runs, so which
# values of a run are of one channel is known at compile time, and only which channel that is
# depends on the run: elementwise sums by channel would triple the instructions.


@triton.jit
def channel_sums(values, CHANNELS):
    """The sum of the values of each channel, as a tuple."""
    place, run = (
        tl.arange(0, values.shape[1])[None, :] % CHANNELS,
        tl.arange(0, values.shape[0]) * values.shape[1],
    )
    in_run = ()
    for r in tl.static_range(CHANNELS):
        in_run += (tl.sum(tl.where(place == r, values, 0.0), axis=1),)
    sums = ()
    for c in tl.static_range(CHANNELS):
        own = tl.zeros([values.shape[0]], tl.float32)
        for r in tl.static_range(CHANNELS):
            own += tl.where((run + r) % CHANNELS == c, in_run[r], 0.0)
        sums += (tl.sum(own, axis=0),)
    return sums


@triton.jit
def spread(numbers, GROUPS, RUN, CHANNELS):
    """[GROUPS, RUN]: for each value the number of its channel."""
    place, run = tl.arange(0, RUN)[None, :] % CHANNELS, tl.arange(0, GROUPS) * RUN
    tile = tl.zeros([GROUPS, RUN], tl.float32)
    for r in tl.static_range(CHANNELS):
        number = tl.zeros([GROUPS], tl.float32)
        for c in tl.static_range(CHANNELS):
            number = tl.where((run + r) % CHANNELS == c, numbers[c], number)
        tile = tl.where(place == r, number[:, None], tile)
    return tile


@triton.jit
def residual_kernel(
    predicted,  # [B, M, P], the last dense
    clip,  # [B, T, H, W, C], the last two dense
    index,  # [B, M] int64, contiguous
    error,  # [B, M] float32: mean squared error of a token
    residual,  # [B, M, P] predicted - target, or None
    target,  # [B, M, P], or None
    tokens,
    predicted_units_b,
    predicted_units_m,
    stride_b,
    stride_t,
    stride_h,
    UNIT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WHITE: tl.constexpr,
    EPSILON: tl.constexpr,
    CUT: tl.constexpr,
    GROUPS: tl.constexpr,
    RUN: tl.constexpr,
):
    """One program a tubelet, its values in the order of the prediction, so that 16 bytes are read
    and written at once; in the clip the values of a row lie in that order too.
    """
    PARTS: tl.constexpr = CUT.channels if NORMALIZE == "channel" else 1  # normalised by themselves
    COUNT: tl.constexpr = CUT.num_values // PARTS
    source, inside = locate(clip, index, tokens, stride_b, stride_t, stride_h, CUT)
    i = tl.arange(0, GROUPS)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    real = i < CUT.num_values
    offset = (
        i // (CUT.row_values * CUT.rows) * stride_t
        + i // CUT.row_values % CUT.rows * stride_h
        + i % CUT.row_values
    )
    y = tl.load(source + offset, mask=real & inside, other=0).to(tl.float32)

    program = tl.program_id(0)
    batch, token = (program // tokens).to(tl.int64), program % tokens
    x = tl.load(
        predicted + (batch * predicted_units_b + token * predicted_units_m) * UNIT + i,
        mask=real,
        other=0,
    ).to(tl.float32)

    if NORMALIZE == "none":
        y = y * (1 / WHITE)
    else:
        # Measured from its first pixel, a flat tubelet is exactly 0, and float32 sums lose nothing
        # to a large mean. What is beyond the tubelet stays 0.
        first = ()
        for c in tl.static_range(PARTS):
            first += (tl.load(source + c, mask=inside, other=0).to(tl.float32),)
        y = tl.where(real, y - spread(first, GROUPS, RUN, PARTS), 0.0)
        y = tl.where(
            real, y - spread(channel_sums(y, PARTS), GROUPS, RUN, PARTS) * (1 / COUNT), 0.0
        )
        squares, factors = channel_sums(y * y, PARTS), ()
        for c in tl.static_range(PARTS):
            variance = squares[c] * (1 / (COUNT - 1))
            if NORMALIZE == "channel":
                factor = 1 / (tl.sqrt(variance) + EPSILON * WHITE)
            else:
                factor = 1 / tl.sqrt(variance + EPSILON * WHITE * WHITE)
            factors += (factor,)
        y = y * spread(factors, GROUPS, RUN, PARTS)

    y = tl.where(inside, y, float("nan"))
    difference = tl.where(real, x - y, 0.0)
    tl.store(
        error + program,
        tl.sum(tl.sum(difference * difference, axis=1), axis=0) * (1 / CUT.num_values),
    )
    start = program.to(tl.int64) * CUT.num_values
    if residual is not None:
        tl.store(residual + start + i, difference.to(residual.dtype.element_ty), mask=real)
    if target is not None:
        tl.store(target + start + i, y.to(target.dtype.element_ty), mask=real)


def _token_errors(
    predicted_BMP: Tensor,
    clip_BTHWC: Tensor,
    index_BM: Tensor,
    tubelet: list[int],
    normalize: Normalize,
    residual_dtype: torch.dtype | None,
    target_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(error_BM, target_BMP, residual_BMP): float32, then what was asked for, else empty."""
    predicted = predicted_BMP if predicted_BMP.stride(-1) == 1 else predicted_BMP.contiguous()
    clip, index, cut = dense_rows(clip_BTHWC), index_BM.contiguous(), cut_of(clip_BTHWC, tubelet)
    error_BM = floats(predicted, *index.shape)
    target_BMP, residual_BMP = (
        floats(predicted, 0)
        if dtype is None
        else torch.empty(predicted.shape, dtype=dtype, device=predicted.device)
        for dtype in (target_dtype, residual_dtype)
    )
    if not runs(predicted):  # torch.compile would take minutes over the symbolic sizes below
        return error_BM, target_BMP, residual_BMP
    # what a thread reads at once: 16 bytes of a uint8 clip, or else of the prediction alone
    run = 16 if cut.row_values % 16 == 0 else 8
    groups = triton.next_power_of_2(triton.cdiv(cut.num_values, run))
    unit, *units = in_units(predicted.stride(0), predicted.stride(1))
    launch(
        residual_kernel,
        index.numel(),
        predicted,
        clip,
        index,
        error_BM,
        None if residual_dtype is None else residual_BMP,
        None if target_dtype is None else target_BMP,
        index.shape[1],
        *units,
        *clip.stride()[:3],
        unit,
        normalize,
        reference.pixel_range(clip.dtype),
        EPSILON,
        cut,
        groups,
        run,
        num_warps=min(max(groups * run // VALUES_PER_WARP, 1), 16),
    )
    return error_BM, target_BMP, residual_BMP


def _gradient(ctx: Any, gradient_BM: Tensor) -> tuple[Tensor]:
    (residual_BMP,) = ctx.saved_tensors
    factor = 2 / max(residual_BMP.shape[2], 1)
    return (scale_tokens(residual_BMP, gradient_BM, factor, ctx.dtype),)


# The mean over tokens is left to torch, whose gradient is the factor of every token.
token_errors = register(
    "token_errors(Tensor predicted, Tensor clip, Tensor index, int[] tubelet, str normalize, "
    "ScalarType? residual, ScalarType? target) -> (Tensor, Tensor, Tensor)",
    _token_errors,
    keeps=lambda inputs, results: results[2:],
    backward=_gradient,
)
