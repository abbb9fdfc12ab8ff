"""L_rec: the squared error of the predicted tubelets, their targets read straight from the uint8
clip.

One pass over the masked tubelets makes statistics, errors, residuals (the gradient but for a factor
a token) and, where wanted, targets. The backward pass multiplies the residuals by that factor,
known only then: without the loss scale in it, float16 could not hold the gradient of a mean over
millions of values.
Letters: B clips, T frames, H W pixels, C channels, M masked, P values of a tubelet.
"""
# The type checker takes the body of a Triton kernel for Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from typing import Any

import torch
import triton
import triton.language as tl

from . import reference
from .attention_tiles import in_units
from .dispatch import check_clip, choose
from .launch import on_device, register
from .reference import EPSILON, Normalize
from .tubelets import check_dtypes, check_index, dense_rows, geometry, locate

# one warp for a tubelet of 2 x 16 x 16 x 3, which so waits for no other; by the compile check, not
# timed
VALUES_PER_WARP = 2048
SCALE_BLOCK = 1024


def reconstruction_loss(
    predicted_BMP: torch.Tensor,
    clip_BTHWC: torch.Tensor,
    index_BM: torch.Tensor,
    tubelet: tuple[int, int, int],
    normalize: Normalize = "channel",
    impl: str = "auto",
    *,
    weight_BM: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error between predictions and normalised true pixels of the masked tubelets, in
    float32.

    predicted_BMP: P ordered (frame, row, column, channel). clip_BTHWC: uint8 or uint16 (white is
    255 or 65535), or floating point in [0, 1]. index_BM: int64. weight_BM: what each token counts,
    sum(w * e) / sum(w).
    Raises: ValueError for a shape, dtype or index that does not fit; on a GPU an index outside the
    grid makes the loss NaN. Source: VideoMAE (channel), MAE (tubelet).
    """
    check_arguments(
        "reconstruction_loss", predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, weight_BM
    )
    if choose("reconstruction_loss", impl, clip_BTHWC.device) == "reference":
        return reference.reconstruction_loss(
            predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, weight_BM
        )[0]
    return _fused(predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, weight_BM, None)[0]


def reconstruction_loss_and_targets(
    predicted_BMP: torch.Tensor,
    clip_BTHWC: torch.Tensor,
    index_BM: torch.Tensor,
    tubelet: tuple[int, int, int],
    normalize: Normalize = "channel",
    impl: str = "auto",
    *,
    weight_BM: torch.Tensor | None = None,
    target_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with the targets_BMP that the contrastive loss wants (float32, or target_dtype), at
    no second read of the clip.
    """
    check_arguments(
        "reconstruction_loss", predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, weight_BM
    )
    if choose("reconstruction_loss", impl, clip_BTHWC.device) == "reference":
        loss, target_BMP = reference.reconstruction_loss(
            predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, weight_BM
        )
        return loss, target_BMP if target_dtype is None else target_BMP.to(target_dtype)
    return _fused(
        predicted_BMP,
        clip_BTHWC,
        index_BM,
        tubelet,
        normalize,
        weight_BM,
        target_dtype or torch.float32,
    )


def check_arguments(
    operation: str,
    predicted_BMP: torch.Tensor,
    clip_BTHWC: torch.Tensor,
    index_BM: torch.Tensor,
    tubelet: tuple[int, int, int],
    normalize: Normalize,
    weight_BM: torch.Tensor | None = None,
) -> None:
    """Raises: ValueError naming the argument that does not fit."""
    check_clip(clip_BTHWC, index_BM, tubelet, operation)
    check_index(clip_BTHWC, index_BM, tubelet, operation)
    values = tubelet[0] * tubelet[1] * tubelet[2] * clip_BTHWC.shape[-1]
    if predicted_BMP.shape != (*index_BM.shape, values):
        raise ValueError(
            f"{operation}: predicted_BMP has shape {tuple(predicted_BMP.shape)}, not {(*index_BM.shape, values)}"
        )
    if not predicted_BMP.is_floating_point() or predicted_BMP.device != clip_BTHWC.device:
        raise ValueError(
            f"{operation}: predicted_BMP is {predicted_BMP.dtype} on {predicted_BMP.device}, not floating point on "
            f"{clip_BTHWC.device}"
        )
    if normalize not in ("channel", "tubelet", "none"):
        raise ValueError(f"{operation}: normalize {normalize} is not one of channel, tubelet, none")
    if normalize != "none" and (tubelet == (1, 1, 1) if normalize == "channel" else values == 1):
        raise ValueError(
            f"{operation}: normalize {normalize} needs more than one value a {normalize}, tubelet is {tubelet}; use none"
        )
    if weight_BM is not None and (
        weight_BM.shape != index_BM.shape or weight_BM.device != clip_BTHWC.device
    ):
        raise ValueError(
            f"{operation}: weight_BM has shape {tuple(weight_BM.shape)} on {weight_BM.device}, not "
            f"{tuple(index_BM.shape)} on {clip_BTHWC.device}"
        )


def _fused(
    predicted_BMP: torch.Tensor,
    clip_BTHWC: torch.Tensor,
    index_BM: torch.Tensor,
    tubelet: tuple[int, int, int],
    normalize: Normalize,
    weight_BM: torch.Tensor | None,
    target_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    for dtype in (predicted_BMP.dtype, target_dtype or torch.float32):
        check_dtypes("reconstruction_loss", clip_BTHWC.dtype, dtype)
    residual_dtype = (
        predicted_BMP.dtype if torch.is_grad_enabled() and predicted_BMP.requires_grad else None
    )
    error_BM, target_BMP, _ = _TokenError.apply(
        predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, residual_dtype, target_dtype
    )
    return reference.weighted_mean(error_BM, weight_BM), target_BMP


class _TokenError(torch.autograd.Function):
    """Mean squared error of every token; the mean over tokens is left to torch, whose gradient is
    the factor of every token.
    """

    @staticmethod
    def forward(
        predicted_BMP: torch.Tensor,
        clip_BTHWC: torch.Tensor,
        index_BM: torch.Tensor,
        tubelet: tuple[int, int, int],
        normalize: Normalize,
        residual_dtype: torch.dtype | None,
        target_dtype: torch.dtype | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return token_errors(
            predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, residual_dtype, target_dtype
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, target_BMP, residual_BMP = output
        ctx.mark_non_differentiable(target_BMP, residual_BMP)
        ctx.save_for_backward(residual_BMP)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad_error_BM: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (residual_BMP,) = ctx.saved_tensors
        factor = 2 / max(residual_BMP.shape[2], 1)
        return (
            scale_tokens(residual_BMP, grad_error_BM, factor, ctx.dtype),
            None,
            None,
            None,
            None,
            None,
            None,
        )


# A tubelet is a tile [GROUPS, RUN] of its values in order. A thread holds whole runs, so which
# values of a run are of one channel is known at compile time, and only which channel that is
# depends on the run: elementwise sums by channel would triple the instructions.


@triton.jit
def channel_sums(values, CHANNELS: tl.constexpr):
    """The sum of the values of each channel, as a tuple."""
    place, run = (
        tl.arange(0, values.shape[1])[None, :] % CHANNELS,
        tl.arange(0, values.shape[0]) * values.shape[1],
    )
    in_run = ()
    for r in tl.static_range(CHANNELS):
        in_run = in_run + (tl.sum(tl.where(place == r, values, 0.0), axis=1),)  # noqa: RUF005, Triton has no starred tuples
    sums = ()
    for c in tl.static_range(CHANNELS):
        own = tl.zeros([values.shape[0]], tl.float32)
        for r in tl.static_range(CHANNELS):
            own += tl.where((run + r) % CHANNELS == c, in_run[r], 0.0)
        sums = sums + (tl.sum(own, axis=0),)  # noqa: RUF005
    return sums


@triton.jit
def spread(numbers, GROUPS: tl.constexpr, RUN: tl.constexpr, CHANNELS: tl.constexpr):
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
    GRID_T: tl.constexpr,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    FRAMES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    RUN: tl.constexpr,
):
    """One program a tubelet, its values in the order of the prediction, so that 16 bytes are read
    and written at once; in the clip the values of a row lie in that order too.
    """
    ROW: tl.constexpr = COLUMNS * CHANNELS
    VALUES: tl.constexpr = FRAMES * ROWS * ROW
    PARTS: tl.constexpr = CHANNELS if NORMALIZE == "channel" else 1  # each normalised by itself
    COUNT: tl.constexpr = VALUES // PARTS
    source, inside = locate(
        clip, index, tokens, stride_b, stride_t, stride_h, GRID_T, GRID_H, GRID_W, FRAMES, ROWS, ROW
    )
    i = tl.arange(0, GROUPS)[:, None] * RUN + tl.arange(0, RUN)[None, :]
    real = i < VALUES
    offset = i // (ROW * ROWS) * stride_t + i // ROW % ROWS * stride_h + i % ROW
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
            first = first + (tl.load(source + c, mask=inside, other=0).to(tl.float32),)  # noqa: RUF005
        y = tl.where(real, y - spread(first, GROUPS, RUN, PARTS), 0.0)
        y = tl.where(
            real, y - spread(channel_sums(y, PARTS), GROUPS, RUN, PARTS) * (1 / COUNT), 0.0
        )
        squares, factors = channel_sums(y * y, PARTS), ()
        for c in tl.static_range(PARTS):
            if NORMALIZE == "channel":
                factors = factors + (  # noqa: RUF005
                    1 / (tl.sqrt(squares[c] * (1 / (COUNT - 1))) + EPSILON * WHITE),
                )
            else:
                factors = factors + (  # noqa: RUF005
                    1 / tl.sqrt(squares[c] * (1 / (COUNT - 1)) + EPSILON * WHITE * WHITE),
                )
        y = y * spread(factors, GROUPS, RUN, PARTS)

    y = tl.where(inside, y, float("nan"))
    difference = tl.where(real, x - y, 0.0)
    tl.store(
        error + program, tl.sum(tl.sum(difference * difference, axis=1), axis=0) * (1 / VALUES)
    )
    start = program.to(tl.int64) * VALUES
    if residual is not None:
        tl.store(residual + start + i, difference.to(residual.dtype.element_ty), mask=real)
    if target is not None:
        tl.store(target + start + i, y.to(target.dtype.element_ty), mask=real)


@triton.jit
def scale_kernel(
    values,  # [B, M, P], contiguous
    scale,  # [B, M] float32
    out,  # [B, M, P], contiguous
    tokens,
    scale_stride_b,
    scale_stride_m,
    factor,
    NUM_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token."""
    program = tl.program_id(0)
    by = (
        tl.load(
            scale
            + (program // tokens).to(tl.int64) * scale_stride_b
            + program % tokens * scale_stride_m
        )
        * factor
    )
    start = program.to(tl.int64) * NUM_VALUES
    for first in tl.static_range(0, NUM_VALUES, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(values + start + i, mask=i < NUM_VALUES, other=0).to(tl.float32)
        tl.store(out + start + i, (x * by).to(out.dtype.element_ty), mask=i < NUM_VALUES)


def _token_errors(
    predicted_BMP: torch.Tensor,
    clip_BTHWC: torch.Tensor,
    index_BM: torch.Tensor,
    tubelet: list[int],
    normalize: Normalize,
    residual_dtype: torch.dtype | None,
    target_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(error_BM, target_BMP, residual_BMP): float32, then what was asked for, else empty."""
    outputs = error_BM, target_BMP, residual_BMP = _token_errors_fake(
        predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, residual_dtype, target_dtype
    )
    if error_BM.numel() == 0:
        return outputs
    predicted = predicted_BMP if predicted_BMP.stride(-1) == 1 else predicted_BMP.contiguous()
    clip, index = dense_rows(clip_BTHWC), index_BM.contiguous()
    unit, *units = in_units(predicted.stride(0), predicted.stride(1))
    with on_device(clip):
        residual_kernel[(index.numel(),)](
            predicted,
            clip,
            index,
            error_BM,
            None if residual_dtype is None else residual_BMP,
            None if target_dtype is None else target_BMP,
            index.shape[1],
            *units,
            clip.stride(0),
            clip.stride(1),
            clip.stride(2),
            UNIT=unit,
            NORMALIZE=normalize,
            WHITE=reference.pixel_range(clip.dtype),
            **_shape(clip, tubelet),
            num_warps=_num_warps(clip, tubelet),
        )
    return outputs


def _token_errors_fake(
    predicted_BMP: torch.Tensor,
    clip_BTHWC: torch.Tensor,
    index_BM: torch.Tensor,
    tubelet: list[int],
    normalize: Normalize,
    residual_dtype: torch.dtype | None,
    target_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def like_predicted(dtype: torch.dtype | None) -> torch.Tensor:
        return torch.empty(
            0 if dtype is None else predicted_BMP.shape,
            dtype=dtype or torch.float32,
            device=predicted_BMP.device,
        )

    error_BM = torch.empty(index_BM.shape, dtype=torch.float32, device=index_BM.device)
    return error_BM, like_predicted(target_dtype), like_predicted(residual_dtype)


def _shape(clip_BTHWC: torch.Tensor, tubelet: list[int]) -> dict[str, Any]:
    t, p, row = tubelet[0], tubelet[1], tubelet[2] * clip_BTHWC.shape[-1]
    # what a thread reads at once: 16 bytes of a uint8 clip, or else of the prediction alone
    run = 16 if row % 16 == 0 else 8
    groups = triton.next_power_of_2(triton.cdiv(t * p * row, run))
    return {"EPSILON": EPSILON, **geometry(clip_BTHWC, tubelet), "GROUPS": groups, "RUN": run}


def _num_warps(clip_BTHWC: torch.Tensor, tubelet: list[int]) -> int:
    shape = _shape(clip_BTHWC, tubelet)
    return min(max(shape["GROUPS"] * shape["RUN"] // VALUES_PER_WARP, 1), 16)


def _scale_tokens(
    values_BMP: torch.Tensor, scale_BM: torch.Tensor, factor: float, dtype: torch.dtype
) -> torch.Tensor:
    """values * scale * factor in float32, rounded once."""
    out_BMP = _scale_tokens_fake(values_BMP, scale_BM, factor, dtype)
    if out_BMP.numel() > 0:
        values = values_BMP.contiguous()
        with on_device(values):
            scale_kernel[(scale_BM.numel(),)](
                values,
                scale_BM,
                out_BMP,
                scale_BM.shape[1],
                scale_BM.stride(0),
                scale_BM.stride(1),
                factor,
                NUM_VALUES=values.shape[2],
                BLOCK=SCALE_BLOCK,
                num_warps=4,
            )
    return out_BMP


def _scale_tokens_fake(
    values_BMP: torch.Tensor, scale_BM: torch.Tensor, factor: float, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty(values_BMP.shape, dtype=dtype, device=values_BMP.device)


token_errors = register(
    "token_errors(Tensor predicted, Tensor clip, Tensor index, int[] tubelet, str normalize, ScalarType? residual, "
    "ScalarType? target) -> (Tensor, Tensor, Tensor)",
    _token_errors,
    _token_errors_fake,
)
scale_tokens = register(
    "scale_tokens(Tensor values, Tensor scale, float factor, ScalarType dtype) -> Tensor",
    _scale_tokens,
    _scale_tokens_fake,
)
