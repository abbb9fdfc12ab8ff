"""The launches that compile_check compiles: every operation at the presets' shapes, in every type,
and what else has tiles of its own.

Letters: B clips, N tokens, H heads, D head width.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from . import attention_short
from . import contrastive_streaming as streaming
from .attention import kernels
from .compile_check import Run
from .contrastive import contrastive_loss
from .joint import joint_loss
from .preset_shapes import ENCODER_TOKENS, attention_shapes
from .reconstruction import reconstruction_loss_and_targets
from .scaling import scale_tokens
from .tubelets import CLIP_TYPES, FLOAT_TYPES, gather_tubelets

BATCH, VISIBLE, MASKED, VALUES = 32, 160, 1408, 1536
BF16, FP16, FP32, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
ANY = -1  # of the instructions that move 1 or 2 bytes
Tubelet = tuple[int, int, int]
# of presets, and of images
BASE, GIANT, STILL = (2, 16, 16), (2, 14, 14), (1, 16, 16)
OTHER_TUBELETS = [(GIANT, 3), (STILL, 3), (BASE, 1), (BASE, 5)]  # and channels


def _empty(*shape: int, dtype: torch.dtype = FP32, gradient: bool = False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=gradient)


def _clip(tubelet: Tubelet, channels: int, dtype: torch.dtype) -> torch.Tensor:
    t, p, q = tubelet
    return _empty(BATCH, 8 * t, 14 * p, 14 * q, channels, dtype=dtype)


def _gather(clip: torch.dtype, out: torch.dtype, tubelet: Tubelet, channels: int) -> None:
    index_BV = _empty(BATCH, VISIBLE, dtype=torch.int64)
    mean, std = (0.5,) * channels, (0.25,) * channels
    gather_tubelets(_clip(tubelet, channels, clip), index_BV, tubelet, mean, std, out)


def _compare(
    loss: Callable[..., Any],
    clip: torch.dtype,
    predicted: torch.dtype,
    tubelet: Tubelet,
    channels: int,
    *arguments: Any,
    gradient: bool = True,
) -> None:
    """A loss of predictions and a clip."""
    values = math.prod(tubelet) * channels
    predicted_BMP = _empty(BATCH, MASKED, values, dtype=predicted, gradient=gradient)
    index_BM = _empty(BATCH, MASKED, dtype=torch.int64)
    loss(predicted_BMP, _clip(tubelet, channels, clip), index_BM, tubelet, *arguments)


def _scale(values: torch.dtype, out: torch.dtype, count: int) -> None:
    scale_tokens(_empty(BATCH, MASKED, count, dtype=values), _empty(BATCH, MASKED), 1.0, out)


def _contrast(dtype: torch.dtype, masked: int = MASKED, gradient: bool = True) -> None:
    predicted_BMP = _empty(BATCH, masked, VALUES, dtype=dtype, gradient=gradient)
    contrastive_loss(predicted_BMP, torch.empty_like(predicted_BMP), 0.1)


def _stream(dtype: torch.dtype) -> None:
    given = (*(_empty(BATCH, MASKED, VALUES, dtype=dtype) for _ in range(2)), _empty(1))
    _, _, *kept = streaming.forward(*given)
    streaming.backward(*given, *kept)


def _attend(tokens: int, heads: int, width: int, dtype: torch.dtype) -> None:
    qkv = _empty(BATCH, tokens, 3, heads, width, dtype=dtype)
    program = kernels(qkv)
    out, lse = program.forward(qkv)
    program.backward(qkv, out, lse, torch.empty_like(out))


def _name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}.get(dtype, str(dtype).removeprefix("torch."))


def _cut(tubelet: Tubelet, channels: int) -> str:
    return f"{'x'.join(map(str, tubelet))} {channels} channels"


def _attention_runs(arch: int) -> list[Run]:
    """The presets, once for each width where the number of heads or, beyond the short kernels, of
    tokens alone differs; every length that is cut in its own way; a head of each width class; few
    heads, whose clips start at odd places.
    """
    by_code = {
        (min(shape.tokens, attention_short.MAX_TOKENS + 1), shape.width): shape
        for shape in attention_shapes()
    }
    shapes = [(shape.tokens, shape.heads, shape.width, BF16) for shape in by_code.values()]
    others = [(256, 16, 64), (256, 16, 80), (197, 3, 88), (197, 3, 40), (160, 8, 128)]
    shapes += [(*other, BF16) for other in (*others, (1568, 8, 128))]
    shapes.append((1568, 6, 64, FP32))
    if arch == 90:
        shapes += [(tokens, 16, 64, BF16) for tokens in (16, *ENCODER_TOKENS, 192)]
        shapes += [(160, 16, 64, FP16), (1568, 16, 64, FP16)]
    return [
        Run(
            f"attention {_name(dtype)} N={tokens} {heads}x{width}",
            partial(_attend, tokens, heads, width, dtype),
        )
        for tokens, heads, width, dtype in dict.fromkeys(shapes)
    ]


def _gather_runs(arch: int) -> list[Run]:
    ways = [
        (clip, out, BASE, 3)
        for clip, out in product(CLIP_TYPES, FLOAT_TYPES)
        if out == BF16 or (arch == 90 and clip == UINT8)
    ]
    ways += [(UINT8, BF16, *other) for other in OTHER_TUBELETS]
    return [
        Run(
            f"gather {_name(clip)} to {_name(out)} {_cut(tubelet, channels)}",
            partial(_gather, clip, out, tubelet, channels),
            ANY,
        )
        for clip, out, tubelet, channels in ways
    ]


def _reconstruction_runs(arch: int) -> list[Run]:
    """The first pixel of each channel is read by itself; the rows of giant's tubelets, 42 bytes
    each, lie at odd places of the clip.
    """
    found = [(BF16, "channel"), (BF16, "tubelet"), (BF16, "none")]
    found += [(FP16, "channel"), (FP32, "tubelet")]
    ways = [(UINT8, dtype, BASE, 3, normalize, None) for dtype, normalize in found]
    clips = CLIP_TYPES if arch == 90 else (UINT8,)
    ways += [(clip, BF16, BASE, 3, "channel", BF16) for clip in clips]
    ways += [(UINT8, BF16, *other, "channel", None) for other in OTHER_TUBELETS]
    compare = partial(_compare, reconstruction_loss_and_targets)
    runs = []
    for clip, dtype, tubelet, channels, normalize, target in ways:
        name = f"reconstruction {_name(clip)} {_name(dtype)} {normalize} {_cut(tubelet, channels)}"
        name += " residual" if target is None else " residual target"
        call = partial(compare, clip, dtype, tubelet, channels, normalize, "auto", target)
        runs.append(Run(name, call, 64 if tubelet == GIANT else channels))
    call = partial(compare, UINT8, BF16, BASE, 3, "channel", "auto", None, gradient=False)
    runs.append(Run(f"reconstruction uint8 bf16 channel {_cut(BASE, 3)}", call, 3))
    scales = [(dtype, dtype, 1536) for dtype in FLOAT_TYPES]
    scales += [(FP32, FP16, 1536), (BF16, BF16, 1176)]
    for values, out, count in scales:
        name = f"reconstruction scale {_name(values)} to {_name(out)} {count} values"
        runs.append(Run(name, partial(_scale, values, out, count)))
    return runs


def _contrastive_runs() -> list[Run]:
    runs = []
    for dtype, masked in product(FLOAT_TYPES, (MASKED, 147)):
        name = f"contrastive {_name(dtype)} M={masked} P={VALUES}"
        runs.append(Run(name, partial(_contrast, dtype, masked), 0 if masked % 8 == 0 else ANY))
    name = f"M={MASKED} P={VALUES}"
    call = partial(_contrast, BF16, gradient=False)
    runs.append(Run(f"contrastive bf16 {name} without gradient", call))
    for dtype in FLOAT_TYPES:
        least = f"contrastive {_name(dtype)} {name} least memory"
        runs.append(Run(least, partial(_stream, dtype)))
    for dtype in FLOAT_TYPES:
        call = partial(_compare, joint_loss, UINT8, dtype, BASE, 3, "channel", 0.1, "clip", 0.1)
        runs.append(Run(f"contrastive joint {_name(dtype)} P={VALUES}", call, 3))
    return runs


def compile_runs(arch: int) -> list[Run]:
    """What is compiled for sm_ARCH, less for the older GPU; of a compilation that several runs lead
    to, compile_check keeps the first.
    """
    clips = _gather_runs(arch) + _reconstruction_runs(arch)
    return _attention_runs(arch) + clips + _contrastive_runs()
