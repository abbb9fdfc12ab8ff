"""Visible tubelets of a clip, normalised, ready for the embedding: only these are turned into
floats.

Letters: B clips, T frames, H W pixels, C channels, V visible, P values of a tubelet.
"""
# The type checker takes the body of a Triton kernel for Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .dispatch import choose
from .launch import launch, register
from .reference import Tubelet

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32)
CLIP_TYPES = (torch.uint8, torch.uint16, *FLOAT_TYPES)

# Two values a thread: a warp then stores 128 bytes of bf16 at once, and its loads touch few rows.
# Not yet timed on a GPU.
GATHER_BLOCK = 512
VALUES_PER_WARP = 64


def gather_tubelets(
    clip_BTHWC: Tensor,
    index_BV: Tensor,
    tubelet: Tubelet,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    impl: str = "auto",
) -> Tensor:
    """Gathers tubelets and normalises them: (x - mean_c) / std_c.

    clip_BTHWC: uint8 or uint16 (white is 255 or 65535), or floating point in [0, 1]. index_BV:
    int64 tokens in raster order of the grid that `tubelet` (frames, rows, columns) makes of the
    clip. mean, std: one value, or one a channel.
    Returns: [B, V, P] of `dtype`, P ordered (channel, frame, row, column). No gradient: a clip is
    data.
    Raises: ValueError for a shape, dtype or index that does not fit; on a GPU, which cannot raise
    without being waited for, the tubelet of an index outside the grid is NaN.
    """
    check_clip("gather_tubelets", clip_BTHWC, index_BV, tubelet)
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, clip_BTHWC.shape[-1]):
            raise ValueError(
                f"gather_tubelets: {name} has {len(values)} values, not 1 or one for each of "
                f"{clip_BTHWC.shape[-1]} channels"
            )
    if choose("gather_tubelets", impl, clip_BTHWC.device) == "reference":
        return reference.gather_tubelets(clip_BTHWC, index_BV, tubelet, mean, std, dtype)
    check_dtypes("gather_tubelets", clip_BTHWC.dtype, dtype)
    return _gather_op(clip_BTHWC, index_BV, tubelet, mean, std, dtype)


def check_clip(
    operation: str,
    clip_BTHWC: Tensor,
    index_BN: Tensor,
    tubelet: Tubelet,
) -> None:
    """Raises: ValueError naming the argument that does not fit."""
    shape, device = tuple(clip_BTHWC.shape), index_BN.device
    if len(shape) != 5:
        raise ValueError(f"{operation}: clip_BTHWC has shape {shape}, not (B, T, H, W, C)")
    if clip_BTHWC.dtype not in CLIP_TYPES and not clip_BTHWC.is_floating_point():
        raise ValueError(
            f"{operation}: clip_BTHWC is {clip_BTHWC.dtype}; give uint8, uint16, or floating "
            "point in [0, 1]"
        )
    if any(side % unit for side, unit in zip(shape[1:4], tubelet, strict=True)):
        raise ValueError(
            f"{operation}: clip_BTHWC of {shape[1:4]} is not a multiple of the tubelet {tubelet}"
        )
    if index_BN.ndim != 2 or index_BN.shape[0] != shape[0] or index_BN.dtype != torch.int64:
        raise ValueError(
            f"{operation}: index has shape {tuple(index_BN.shape)} of {index_BN.dtype}, "
            f"not ({shape[0]}, tokens) of int64"
        )
    if device != clip_BTHWC.device:
        raise ValueError(f"{operation}: index is on {device}, clip_BTHWC on {clip_BTHWC.device}")
    # Where reading the index costs no wait, and there is one: a fake tensor has no values.
    is_readable = device.type == "cpu" and type(index_BN) is Tensor
    if not is_readable or torch.compiler.is_compiling() or index_BN.numel() == 0:
        return
    num_tokens = cut_of(clip_BTHWC, tubelet).num_tokens
    for value in index_BN.aminmax():
        if not 0 <= value < num_tokens:
            raise ValueError(
                f"{operation}: index holds {int(value)}, the clip has tokens 0 to {num_tokens - 1}"
            )


def check_dtypes(operation: str, clip_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Raises: ValueError for a clip or an activation that the kernels do not compute with: they are
    float32 inside.
    """
    if clip_dtype not in CLIP_TYPES or dtype not in FLOAT_TYPES:
        raise ValueError(
            f"{operation}: impl triton takes no {dtype} with a clip of {clip_dtype}; use float32 "
            "or less, or impl reference"
        )


def dense_rows(clip_BTHWC: Tensor) -> Tensor:
    """The clip as the kernels read it: the pixels of a row one after another. A crop of a larger
    clip is read where it lies.
    """
    dense = clip_BTHWC.stride(-1) == 1 and clip_BTHWC.stride(-2) == clip_BTHWC.shape[-1]
    return clip_BTHWC if dense else clip_BTHWC.contiguous()


class Cut(NamedTuple):
    """How a clip is cut into tubelets, known when a kernel is compiled."""

    num_tokens: int  # of the clip, in grid_h rows of grid_w for each step in time
    grid_h: int
    grid_w: int
    frames: int  # of a tubelet, as the rest
    rows: int
    columns: int
    channels: int
    row_values: int  # values of a row, which lie one after another in a clip
    num_values: int


def cut_of(clip_BTHWC: Tensor, tubelet: Sequence[int]) -> Cut:
    """The Cut of a clip whose sides are multiples of the tubelet's."""
    _, T, H, W, C = clip_BTHWC.shape
    t, p, q = tubelet
    tokens = (T // t) * (H // p) * (W // q)
    return Cut(tokens, H // p, W // q, t, p, q, C, q * C, t * p * q * C)


@triton.jit
def locate(
    clip,  # [B, T, H, W, C], the last two dense
    index,  # [B, N] int64, contiguous
    tokens,  # N
    stride_b,
    stride_t,
    stride_h,
    CUT,
):
    """Where this program's tubelet starts, and whether its index is inside the grid.

    Elsewhere nothing may be read.
    """
    program = tl.program_id(0)
    batch = (program // tokens).to(tl.int64)
    token = tl.load(index + program)
    inside = (token >= 0) & (token < CUT.num_tokens)
    token = tl.where(inside, token, 0)
    frame = token // (CUT.grid_h * CUT.grid_w) * CUT.frames
    row = token // CUT.grid_w % CUT.grid_h * CUT.rows
    column = token % CUT.grid_w * CUT.row_values
    return clip + batch * stride_b + frame * stride_t + row * stride_h + column, inside


@triton.jit
def gather_kernel(
    clip,  # [B, T, H, W, C], the last two dense
    index,  # [B, V] int64, contiguous
    out,  # [B, V, P], contiguous
    tokens,  # V
    stride_b,
    stride_t,
    stride_h,
    SCALE: tl.constexpr,  # one value a channel, or one for all
    SHIFT: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a tubelet, in the order of the output, so stores are whole lines.

    The loads of one channel skip the others, but the tubelet's rows reach the cache once, with the
    first channel.
    """
    source, inside = locate(clip, index, tokens, stride_b, stride_t, stride_h, CUT)
    target = out + tl.program_id(0).to(tl.int64) * CUT.num_values
    for start in tl.static_range(0, CUT.num_values, BLOCK):
        i = start + tl.arange(0, BLOCK)
        column, row = i % CUT.columns, i // CUT.columns % CUT.rows
        frame = i // (CUT.columns * CUT.rows) % CUT.frames
        channel = i // (CUT.columns * CUT.rows * CUT.frames)
        offset = frame * stride_t + row * stride_h + column * CUT.channels + channel
        pixels = tl.load(source + offset, mask=(i < CUT.num_values) & inside, other=0).to(
            tl.float32
        )
        scale = tl.full([BLOCK], SCALE[0], tl.float32)
        shift = tl.full([BLOCK], SHIFT[0], tl.float32)
        for c in tl.static_range(1, len(SCALE)):
            scale = tl.where(channel == c, SCALE[c], scale)
            shift = tl.where(channel == c, SHIFT[c], shift)
        values = tl.where(inside, pixels * scale + shift, float("nan"))
        tl.store(target + i, values.to(out.dtype.element_ty), mask=i < CUT.num_values)


def _gather(
    clip_BTHWC: Tensor,
    index_BV: Tensor,
    tubelet: list[int],
    mean: list[float],
    std: list[float],
    dtype: torch.dtype,
) -> Tensor:
    clip, index, cut = dense_rows(clip_BTHWC), index_BV.contiguous(), cut_of(clip_BTHWC, tubelet)
    out_BVP = torch.empty(*index.shape, cut.num_values, dtype=dtype, device=clip.device)
    scales = max(len(mean), len(std))
    means, stds = (list(x) * (scales // len(x)) for x in (mean, std))
    white = reference.pixel_range(clip.dtype)
    block = min(GATHER_BLOCK, triton.next_power_of_2(cut.num_values))
    launch(
        gather_kernel,
        index.numel(),
        clip,
        index,
        out_BVP,
        index.shape[1],
        *clip.stride()[:3],
        tuple(1 / (white * s) for s in stds),
        tuple(-m / s for m, s in zip(means, stds, strict=True)),
        cut,
        block,
        num_warps=max(1, block // VALUES_PER_WARP),
    )
    return out_BVP


_gather_op = register(
    "gather_tubelets(Tensor clip, Tensor index, int[] tubelet, float[] mean, float[] std, "
    "ScalarType dtype) -> Tensor",
    _gather,
)
