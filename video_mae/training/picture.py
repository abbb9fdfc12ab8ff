"""Reconstruction pictures: what a clip was, what the encoder saw of it, and what the decoder made
of the rest.

Letters: B clips, T frames, H W pixels, C channels, N tokens (raster order: time, row, column), V
visible, M predicted, P values of a tubelet (frame, row, column, channel: channel fastest), G groups
of values that share a mean and a deviation.
"""

import math
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont

from video_mae.files import one_line, write_whole

Tubelet = tuple[int, int, int]
Normalize = Literal["channel", "tubelet", "none"]
Statistics = Literal["visible", "truth"]
# (mean, std) of the channels, where a model predicts pixels normalised by them
PixelScale = tuple[tuple[float, ...], tuple[float, ...]]

GREY = 128  # of pixels that nobody saw or predicted
# a step in time counts as half a step in height or width: neighbouring frames are alike
TIME_SHARE = 0.5
# frames of a row; pixels of a row of frames; pixels a frame is enlarged to
MAX_FRAMES, MAX_STRIP, MIN_TILE = 8, 1480, 128
# pixels: row names at the left, between frames, height of a line of text
MARGIN, GAP, LINE = 84, 2, 20

NOTES = {
    "visible": "normalisation undone with statistics of the visible tubelets",
    "truth": "normalisation undone with statistics of the true hidden tubelets (not available to a model)",
    "raw": "raw pixels predicted: nothing undone",
}


class Frames(NamedTuple):
    """The three rows of a picture, uint8 [B, T, H, W, C] each."""

    original: torch.Tensor
    visible: torch.Tensor
    predicted: torch.Tensor


def tokenize(clip_BTHWC: torch.Tensor, tubelet: Tubelet) -> torch.Tensor:
    """Cuts a clip into its tubelets [B, N, P]."""
    p, q, r = tubelet
    return rearrange(clip_BTHWC, "B (t p) (h q) (w r) C -> B (t h w) (p q r C)", p=p, q=q, r=r)


def untokenize(
    tubelets_BNP: torch.Tensor, grid: tuple[int, int, int], tubelet: Tubelet
) -> torch.Tensor:
    """Puts the tubelets of a grid (time, height, width) together again: the inverse of `tokenize`,
    [B, T, H, W, C].
    """
    t, h, w = grid
    p, q, r = tubelet
    return rearrange(
        tubelets_BNP, "B (t h w) (p q r C) -> B (t p) (h q) (w r) C", t=t, h=h, w=w, p=p, q=q, r=r
    )


def reconstruction_frames(
    clip_BTHWC: torch.Tensor,
    visible_BV: torch.Tensor,
    masked_BM: torch.Tensor,
    predicted_BMP: torch.Tensor,
    tubelet: Tubelet,
    normalize: Normalize,
    statistics: Statistics = "visible",
    pixel_scale: PixelScale | None = None,
) -> Frames:
    """The frames of a picture: the uint8 clip, its visible tubelets, and those with the
    predictions; the rest is grey.

    A prediction is of normalised pixels, so drawing it takes a mean and a deviation for each hidden
    tubelet. With statistics="visible" they come from the visible tubelets of the clip alone,
    weighted by 1 / distance^4 on the token grid: nothing of the hidden pixels reaches the last row.
    "truth" takes the hidden tubelets' own, as most published pictures do. pixel_scale: of a model
    whose objective.pixels is normalized. On 5 real clips, tube-masked by 90 %, perfect predictions
    drawn with "visible" differ from the truth by 0.16 (rms, of 1).
    """
    clip_BTHWC, visible_BV, masked_BM = clip_BTHWC.cpu(), visible_BV.cpu(), masked_BM.cpu()
    if clip_BTHWC.dtype == torch.uint16:  # a picture has 8 bits
        clip_BTHWC = (clip_BTHWC.float() / 257).round().to(torch.uint8)
    _, T, H, W, C = clip_BTHWC.shape
    grid = T // tubelet[0], H // tubelet[1], W // tubelet[2]
    true_BNP = tokenize(clip_BTHWC, tubelet)
    pixels_BMP = predicted_BMP.detach().double().cpu()
    mean_P, std_P = (
        torch.tensor(values, dtype=torch.float64).expand(C).repeat(math.prod(tubelet))
        for values in pixel_scale or ((0.0,), (1.0,))
    )
    if normalize != "none":
        num_groups = C if normalize == "channel" else 1
        if statistics == "truth":
            mean_BMG, deviation_BMG = _statistics(
                (_take(true_BNP, masked_BM).double() / 255 - mean_P) / std_P, num_groups, normalize
            )
        else:
            weight_BMV = _weights(visible_BV, masked_BM, grid)
            mean_BMG, deviation_BMG = (
                weight_BMV @ of_visible
                for of_visible in _statistics(
                    (_take(true_BNP, visible_BV).double() / 255 - mean_P) / std_P,
                    num_groups,
                    normalize,
                )
            )
        grouped = rearrange(pixels_BMP, "B M (S G) -> B M S G", G=num_groups)
        pixels_BMP = (grouped * deviation_BMG[:, :, None] + mean_BMG[:, :, None]).flatten(2)
    pixels_BMP = pixels_BMP * std_P + mean_P
    # a prediction that is not finite has no colour: black
    bytes_BMP = (pixels_BMP.nan_to_num(0) * 255).round().clamp(0, 255).to(torch.uint8)
    seen_BNP = _put(torch.full_like(true_BNP, GREY), visible_BV, _take(true_BNP, visible_BV))
    return Frames(
        clip_BTHWC,
        untokenize(seen_BNP, grid, tubelet),
        untokenize(_put(seen_BNP, masked_BM, bytes_BMP), grid, tubelet),
    )


def draw_reconstruction(
    path: Path,
    clip_BTHWC: torch.Tensor,
    visible_BV: torch.Tensor,
    masked_BM: torch.Tensor,
    predicted_BMP: torch.Tensor,
    tubelet: Tubelet,
    normalize: Normalize,
    titles: list[str] | None = None,
    statistics: Statistics = "visible",
    pixel_scale: PixelScale | None = None,
) -> None:
    """Writes a PNG with three rows of frames a clip: original, visible, predicted (see
    `reconstruction_frames`).

    clip_BTHWC: uint8; indices int64. Frames are shown pixel for pixel or enlarged by a whole
    factor: at most 8 a clip, evenly chosen, fewer where they would be wider than about 1,600
    pixels. The first line says whose statistics were used.
    """
    frames = reconstruction_frames(
        clip_BTHWC,
        visible_BV,
        masked_BM,
        predicted_BMP,
        tubelet,
        normalize,
        statistics,
        pixel_scale,
    )
    B, T, H, W, _ = clip_BTHWC.shape
    scale = math.ceil(MIN_TILE / W) if W < MIN_TILE * 3 // 4 else 1
    tile_width, tile_height = W * scale, H * scale
    count = max(1, min(MAX_FRAMES, T, MAX_STRIP // (tile_width + GAP)))
    # the middles of `count` equal parts of the clip
    shown = [(2 * i + 1) * T // (2 * count) for i in range(count)]
    clip_height = LINE + 3 * (tile_height + GAP)
    num_tokens = math.prod(size // side for size, side in zip((T, H, W), tubelet, strict=True))
    header = [
        NOTES["raw" if normalize == "none" else statistics],
        f"{visible_BV.shape[1]} of {num_tokens} tubelets visible, {masked_BM.shape[1]} predicted, "
        f"frames {', '.join(str(frame) for frame in shown)} of {T}",
    ]
    font = ImageFont.load_default(13)
    width = MARGIN + max(
        [count * (tile_width + GAP), *(math.ceil(font.getlength(line)) for line in header)]
    )
    canvas = Image.new("RGB", (width, (len(header) + 1) * LINE + B * clip_height), "white")
    pen = ImageDraw.Draw(canvas)
    for i, line in enumerate(header):
        pen.text((MARGIN, 8 + i * LINE), line, fill="black", font=font)
    for b in range(B):
        top = (len(header) + 1) * LINE + b * clip_height
        pen.text(
            (MARGIN, top + 2),
            _fit(one_line(titles[b]) if titles else f"clip {b}", font, width - MARGIN),
            fill="black",
            font=font,
        )
        for row, (name, row_BTHWC) in enumerate(
            zip(("original", "visible", "predicted"), frames, strict=True)
        ):
            y = top + LINE + row * (tile_height + GAP)
            pen.text((8, y + tile_height // 2 - 8), name, fill="black", font=font)
            for column, frame in enumerate(shown):
                tile = Image.fromarray(_rgb(row_BTHWC[b, frame])).resize(
                    (tile_width, tile_height), Image.Resampling.NEAREST
                )
                canvas.paste(tile, (MARGIN + column * (tile_width + GAP), y))
    write_whole(path, partial(canvas.save, format="PNG"))


def _statistics(
    tubelets_BMP: torch.Tensor, num_groups: int, normalize: Normalize
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and divisor [B, M, G] of each tubelet's target, as the losses define them."""
    values = rearrange(tubelets_BMP, "B M (S G) -> B M S G", G=num_groups)
    variance = values.var(dim=2, unbiased=True)
    return values.mean(dim=2), variance.sqrt() + 1e-6 if normalize == "channel" else (
        variance + 1e-6
    ).sqrt()


def _weights(
    visible_BV: torch.Tensor, masked_BM: torch.Tensor, grid: tuple[int, int, int]
) -> torch.Tensor:
    """How much each visible token tells about each masked one [B, M, V]: 1 / distance^4, rows sum
    to 1.

    The power and TIME_SHARE were the best of a small search over tube and random masks of real
    clips (powers 2, 3, 4, 6).
    """
    squares_BMV = torch.zeros(())
    for index_V, index_M, share in zip(
        _places(visible_BV, grid), _places(masked_BM, grid), (TIME_SHARE, 1.0, 1.0), strict=True
    ):
        squares_BMV = squares_BMV + ((index_M[:, :, None] - index_V[:, None]) * share) ** 2
    weight_BMV = squares_BMV**-2
    return weight_BMV / weight_BMV.sum(dim=2, keepdim=True)


def _places(index_BV: torch.Tensor, grid: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    _, h, w = grid
    return tuple(place.double() for place in (index_BV // (h * w), index_BV // w % h, index_BV % w))


def _take(tubelets_BNP: torch.Tensor, index_BV: torch.Tensor) -> torch.Tensor:
    return tubelets_BNP.gather(1, index_BV[:, :, None].expand(-1, -1, tubelets_BNP.shape[2]))


def _put(
    tubelets_BNP: torch.Tensor, index_BV: torch.Tensor, values_BVP: torch.Tensor
) -> torch.Tensor:
    return tubelets_BNP.scatter(
        1, index_BV[:, :, None].expand(-1, -1, tubelets_BNP.shape[2]), values_BVP
    )


def _rgb(frame_HWC: torch.Tensor) -> np.ndarray:
    """Three channels to look at: the first three, or the first one as grey."""
    C = frame_HWC.shape[2]
    return (
        (frame_HWC[:, :, :3] if C >= 3 else frame_HWC[:, :, :1].expand(-1, -1, 3))
        .contiguous()
        .numpy()
    )


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The end of a text that is too long: of a path it tells most."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"
