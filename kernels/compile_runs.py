"""The launches that compile_check compiles: every operation at the presets' shapes, in every type,
and what else has tiles of its own.

Letters: B clips, N tokens, H heads, D head width.
"""

from functools import partial
from itertools import product

import torch

from . import attention_short
from . import contrastive_chunked as chunked
from . import contrastive_streaming as streaming
from .attention import kernels
from .compile_check import Run
from .joint import joint_loss
from .preset_shapes import ENCODER_TOKENS, attention_shapes
from .reconstruction import reconstruction_loss, reconstruction_loss_and_targets, scale_tokens
from .reference import Normalize
from .tubelets import CLIP_TYPES, FLOAT_TYPES, gather_tubelets

BATCH, VISIBLE, MASKED = 32, 160, 1408
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ANY = -1  # of the instructions that move 1 or 2 bytes
BASE, GIANT, STILL = (2, 16, 16), (2, 14, 14), (1, 16, 16)  # tubelets of presets, and of images
Tubelet = tuple[int, int, int]


def _empty(*shape: int, dtype: torch.dtype = FP32, gradient: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=gradient)


def _clip_and_index(
    tubelet: Tubelet, channels: int, dtype: torch.dtype, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    frames, rows, columns = (units * side for units, side in zip((8, 14, 14), tubelet, strict=True))
    return _empty(BATCH, frames, rows, columns, channels, dtype=dtype), _empty(
        BATCH, count, dtype=torch.int64
    )


def _gather(
    clip: torch.dtype, out: torch.dtype, tubelet: Tubelet = BASE, channels: int = 3
) -> None:
    gather_tubelets(
        *_clip_and_index(tubelet, channels, clip, VISIBLE),
        tubelet,
        (0.5,) * channels,
        (0.25,) * channels,
        out,
    )


def _reconstruct(
    clip: torch.dtype,
    predicted: torch.dtype,
    normalize: Normalize = "channel",
    tubelet: Tubelet = BASE,
    channels: int = 3,
    gradient: bool = True,
    targets: bool = False,
) -> None:
    clip_BTHWC, index_BM = _clip_and_index(tubelet, channels, clip, MASKED)
    predicted_BMP = _empty(
        BATCH,
        MASKED,
        tubelet[0] * tubelet[1] * tubelet[2] * channels,
        dtype=predicted,
        gradient=gradient,
    )
    if targets:
        reconstruction_loss_and_targets(
            predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize, target_dtype=predicted
        )
    else:
        reconstruction_loss(predicted_BMP, clip_BTHWC, index_BM, tubelet, normalize)


def _scale(values: torch.dtype, out: torch.dtype, count: int = 1536) -> None:
    scale_tokens(_empty(BATCH, MASKED, count, dtype=values), _empty(BATCH, MASKED), 1.0, out)


def _contrast(dtype: torch.dtype, masked: int, values: int, gradient: bool = True) -> None:
    predicted, target, one = (
        _empty(BATCH, masked, values, dtype=dtype),
        _empty(BATCH, masked, values, dtype=dtype),
        _empty(1),
    )
    chunked.loss_and_gradient(predicted, target, one, gradient, chunked.SCRATCH_BYTES)
    chunked.scaled(predicted, one)


def _contrast_in_little_memory(dtype: torch.dtype, masked: int, values: int) -> None:
    predicted, target, one = (
        _empty(BATCH, masked, values, dtype=dtype),
        _empty(BATCH, masked, values, dtype=dtype),
        _empty(1),
    )
    _, _, weight, *rows = streaming.forward(predicted, target, one)
    streaming.backward(predicted, target, one, weight, *rows)


def _join(predicted: torch.dtype, tubelet: Tubelet = BASE) -> None:
    clip_BTHWC, index_BM = _clip_and_index(tubelet, 3, torch.uint8, MASKED)
    predicted_BMP = _empty(
        BATCH, MASKED, tubelet[0] * tubelet[1] * tubelet[2] * 3, dtype=predicted, gradient=True
    )
    joint_loss(predicted_BMP, clip_BTHWC, index_BM, tubelet, "channel", 0.1, "clip", 0.1)


def _attend(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    qkv, dout = (
        _empty(BATCH, tokens, 3, heads, width, dtype=dtype),
        _empty(BATCH, tokens, heads, width, dtype=dtype),
    )
    program = kernels(qkv)
    out, lse = program.forward(qkv)
    program.backward(qkv, out, lse, dout)


def _name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))


def _attention_runs(arch: int) -> list[Run]:
    """The presets, once for each width where the number of heads or, beyond the short kernels, of
    tokens alone differs; every length that is cut in its own way; a head of each width class; few
    heads, whose clips start at odd places.
    """
    by_code = {
        (min(shape.tokens, attention_short.MAX_TOKENS + 1), shape.width): shape
        for shape in attention_shapes()
    }
    shapes = [(shape.tokens, shape.heads, shape.width) for shape in by_code.values()]
    shapes += [
        (256, 16, 64),
        (256, 16, 80),
        (197, 3, 88),
        (197, 3, 40),
        (160, 8, 128),
        (1568, 8, 128),
    ]
    dtypes = [(shape, BF16) for shape in shapes] + [((1568, 6, 64), FP32)]
    if arch == 90:
        dtypes += [((tokens, 16, 64), BF16) for tokens in (16, *ENCODER_TOKENS, 192)] + [
            ((160, 16, 64), FP16),
            ((1568, 16, 64), FP16),
        ]
    return [
        Run(
            f"attention {_name(dtype)} N={tokens} {heads}x{width}",
            partial(_attend, tokens, heads, width, dtype),
        )
        for (tokens, heads, width), dtype in dict.fromkeys(dtypes)
    ]


def _clip_runs(arch: int) -> list[Run]:
    others = [(GIANT, 3), (STILL, 3), (BASE, 1), (BASE, 5)]  # tubelets and channels
    runs = [
        Run(
            f"gather {_name(clip)} to {_name(out)} 2x16x16 3 channels",
            partial(_gather, clip, out),
            ANY,
        )
        for clip, out in product(CLIP_TYPES, FLOAT_TYPES)
        if out == BF16 or (arch == 90 and clip == torch.uint8)
    ]
    runs += [
        Run(
            f"gather uint8 to bf16 {'x'.join(map(str, tubelet))} {channels} channels",
            partial(_gather, torch.uint8, BF16, tubelet, channels),
            ANY,
        )
        for tubelet, channels in others
    ]
    # The first pixel is read by itself; the rows of giant's tubelets, 42 bytes each, lie at odd
    # places of the clip.
    ways: list[tuple[Normalize, torch.dtype]] = [
        ("channel", BF16),
        ("tubelet", BF16),
        ("none", BF16),
        ("channel", FP16),
        ("tubelet", FP32),
    ]
    runs += [
        Run(
            f"reconstruction uint8 {_name(dtype)} {way} 2x16x16 3 channels residual",
            partial(_reconstruct, torch.uint8, dtype, way),
            3,
        )
        for way, dtype in ways
    ]
    runs += [
        Run(
            f"reconstruction {_name(clip)} bf16 channel 2x16x16 3 channels residual target",
            partial(_reconstruct, clip, BF16, targets=True),
            3,
        )
        for clip in CLIP_TYPES
        if arch == 90 or clip == torch.uint8
    ]
    runs += [
        Run(
            f"reconstruction uint8 bf16 channel {'x'.join(map(str, tubelet))} {channels} channels residual",
            partial(_reconstruct, torch.uint8, BF16, "channel", tubelet, channels),
            64 if tubelet == GIANT else channels,
        )
        for tubelet, channels in others
    ]
    runs.append(
        Run(
            "reconstruction uint8 bf16 channel 2x16x16 3 channels",
            partial(_reconstruct, torch.uint8, BF16, gradient=False),
            3,
        )
    )
    scales = [
        (BF16, BF16, 1536),
        (FP16, FP16, 1536),
        (FP32, FP32, 1536),
        (FP32, FP16, 1536),
        (BF16, BF16, 1176),
    ]
    return runs + [
        Run(
            f"reconstruction scale {_name(values)} to {_name(out)} {count} values",
            partial(_scale, values, out, count),
        )
        for values, out, count in scales
    ]


def _contrastive_runs() -> list[Run]:
    runs = [
        Run(
            f"contrastive {_name(dtype)} M={masked} P=1536",
            partial(_contrast, dtype, masked, 1536),
            0 if masked % 8 == 0 else ANY,
        )
        for dtype, masked in product(FLOAT_TYPES, (MASKED, 147))
    ]
    runs.append(
        Run(
            f"contrastive bf16 M={MASKED} P=1536 without gradient",
            partial(_contrast, BF16, MASKED, 1536, gradient=False),
        )
    )
    runs += [
        Run(
            f"contrastive {_name(dtype)} M={MASKED} P=1536 least memory",
            partial(_contrast_in_little_memory, dtype, MASKED, 1536),
        )
        for dtype in FLOAT_TYPES
    ]
    return runs + [
        Run(f"contrastive joint {_name(dtype)} P=1536", partial(_join, dtype), 3)
        for dtype in FLOAT_TYPES
    ]


def compile_runs(arch: int) -> list[Run]:
    """What is compiled for sm_ARCH, less for the older GPU; of a compilation that several runs lead
    to, compile_check keeps the first.
    """
    return _attention_runs(arch) + _clip_runs(arch) + _contrastive_runs()
