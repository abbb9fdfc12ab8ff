"""The launches that compile_check compiles: every operation at the presets' shapes, in every type,
and what else has tiles of its own.

Letters: B clips, N tokens, H heads, D head width.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

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

VISIBLE, MASKED, VALUES = 160, 1408, 1536
BF16, FP16, FP32, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
ANY = -1  # of the instructions that move 1 or 2 bytes
# a tubelet and its channels: of presets; of images, which are clips of one frame; of other videos
BASE, GIANT = (2, 16, 16, 3), (2, 14, 14, 3)
OTHER_CUTS = (GIANT, (1, 16, 16, 3), (2, 16, 16, 1), (2, 16, 16, 5))
# tokens, heads, width: every length that is cut in its own way; a head of each width class; few
# heads, whose clips start at odd places
OTHER_ATTENTION = (
    (256, 16, 64),
    (256, 16, 80),
    (197, 3, 88),
    (197, 3, 40),
    (160, 8, 128),
    (1568, 8, 128),
)


def _empty(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    """Of 32 clips."""
    return torch.empty(32, *shape, dtype=dtype, device="cuda")


def _clip(dtype: torch.dtype, t: int, p: int, q: int, channels: int) -> Tensor:
    return _empty(8 * t, 14 * p, 14 * q, channels, dtype=dtype)


def _words(*values: object) -> str:
    """E.g. bf16 2x16x16x3."""
    words = []
    for value in values:
        word = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words.append(word.removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp"))
    return " ".join(words)


def _attention(arch: int) -> Iterator[Run]:
    # The presets, once for each width where the number of heads or, beyond the short kernels, of
    # tokens alone differs.
    by_code = {}
    for _, tokens, heads, width in attention_shapes():
        by_code[min(tokens, attention_short.MAX_TOKENS + 1), width] = tokens, heads, width
    ways = [(BF16, *shape) for shape in (*by_code.values(), *OTHER_ATTENTION)]
    ways.append((FP32, 1568, 6, 64))
    if arch == 90:
        ways += [(BF16, tokens, 16, 64) for tokens in (16, *ENCODER_TOKENS, 192)]
        ways += [(FP16, tokens, 16, 64) for tokens in (160, 1568)]
    for dtype, tokens, heads, width in ways:
        qkv = _empty(tokens, 3, heads, width, dtype=dtype)
        program = kernels(qkv)
        out, lse = program.forward(qkv)
        program.backward(qkv, out, lse, torch.empty_like(out))
        yield Run(f"attention {_words(dtype)} N={tokens} {heads}x{width}")


def _gather(arch: int) -> Iterator[Run]:
    ways = [(clip, BF16, BASE) for clip in CLIP_TYPES]
    ways += [(UINT8, BF16, cut) for cut in OTHER_CUTS]
    if arch == 90:
        ways += [(UINT8, FP16, BASE), (UINT8, FP32, BASE)]
    index_BV = _empty(VISIBLE, dtype=torch.int64)
    for clip, out, cut in ways:
        mean, std = (0.5,) * cut[3], (0.25,) * cut[3]
        gather_tubelets(_clip(clip, *cut), index_BV, cut[:3], mean, std, out)
        yield Run(f"gather {_words(clip, out, cut)}", ANY)


def _losses_of_clips(arch: int) -> Iterator[Run]:
    """The first pixel of each channel is read by itself; the rows of giant's tubelets, 42 bytes
    each, lie at odd places of the clip.
    """
    ways: list[Any] = [
        (UINT8, BF16, BASE, normalize, "residual") for normalize in ("tubelet", "none")
    ]
    ways += [(UINT8, BF16, cut, "channel", "residual") for cut in (BASE, *OTHER_CUTS)]
    ways += [(UINT8, FP16, BASE, "channel", "residual"), (UINT8, FP32, BASE, "tubelet", "residual")]
    clips = CLIP_TYPES if arch == 90 else (UINT8,)
    ways += [(clip, BF16, BASE, "channel", "residual and target") for clip in clips]
    ways.append((UINT8, BF16, BASE, "channel", "error alone"))
    ways += [(UINT8, dtype, BASE, "channel", "joint") for dtype in FLOAT_TYPES]
    index_BM = _empty(MASKED, dtype=torch.int64)
    for clip, dtype, cut, normalize, wanted in ways:
        predicted_BMP = _empty(MASKED, math.prod(cut), dtype=dtype)
        predicted_BMP.requires_grad_(wanted != "error alone")
        compared = predicted_BMP, _clip(clip, *cut), index_BM, cut[:3], normalize
        if wanted == "joint":
            joint_loss(*compared, 0.1, "clip", 0.1)
        else:
            target = BF16 if wanted == "residual and target" else None
            reconstruction_loss_and_targets(*compared, "auto", target)
        name = f"reconstruction {_words(clip, dtype, cut, normalize, wanted)}"
        yield Run(name, 64 if cut == GIANT else cut[3])


def _scale() -> Iterator[Run]:
    ways = [(dtype, dtype, VALUES) for dtype in FLOAT_TYPES]
    for values, out, count in (*ways, (FP32, FP16, VALUES), (BF16, BF16, 1176)):
        scale_tokens(_empty(MASKED, count, dtype=values), _empty(MASKED), 1.0, out)
        yield Run(f"scale {_words(values, out, count)}")


def _contrastive() -> Iterator[Run]:
    ways = [*product(FLOAT_TYPES, (MASKED, 147), ("gradient",)), (BF16, MASKED, "no gradient")]
    for dtype, masked, wanted in ways:
        predicted_BMP = _empty(masked, VALUES, dtype=dtype)
        predicted_BMP.requires_grad_(wanted == "gradient")
        contrastive_loss(predicted_BMP, torch.empty_like(predicted_BMP), 0.1)
        name = f"contrastive {_words(dtype)} M={masked} {wanted}"
        yield Run(name, 0 if masked % 8 == 0 else ANY)
    for dtype in FLOAT_TYPES:
        predicted_BMP, target_BMP = (_empty(MASKED, VALUES, dtype=dtype) for _ in range(2))
        given = predicted_BMP, target_BMP, torch.empty(1, device="cuda")
        _, _, *kept = streaming.forward(*given)
        streaming.backward(*given, *kept)
        yield Run(f"contrastive {_words(dtype)} M={MASKED} least memory")


def compile_runs(arch: int) -> Iterator[Run]:
    """What is compiled for sm_ARCH, less for the older GPU: launches, and then what they are. Of a
    compilation that several runs lead to, compile_check keeps the first.
    """
    yield from _attention(arch)
    yield from _gather(arch)
    yield from _scale()
    yield from _contrastive()
    yield from _losses_of_clips(arch)
