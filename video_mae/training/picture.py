"""Reconstruction pictures: what a clip was, what the encoder saw of it, and what the decoder made
of the rest.

Letters: B clips, T frames, H W pixels, C channels, N tokens (raster order: time, row, column), V
visible, M predicted, P values of a tubelet (frame, row, column, channel: channel fastest), G groups
of values that share a mean and a deviation.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont

from video_mae.config.clips import Statistics
from video_mae.files import one_line, write_whole
from video_mae.kernels.reference import EPSILON, Normalize

Tubelet = tuple[int, int, int]
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
    "truth": "normalisation undone with statistics of the true hidden tubelets "
    "(not available to a model)",
    "raw": "the model predicts pixels as they are",
}
FRAMES_PER_SECOND = 8  # of an animation: a clip of 16 takes two seconds


class PictureFrames(NamedTuple):
    """The rows of a picture by their names, uint8 [B, T, H, W, C] each, and two lines that tell
    whose statistics were used, and how much is hidden.
    """

    original: torch.Tensor
    visible: torch.Tensor
    predicted: torch.Tensor
    notes: str


class LookFrames(NamedTuple):
    """The rows of a picture of features, uint8 or in [0, 1] [B, T, H, W, C] each, and a line on
    each of the last two.
    """

    video: torch.Tensor
    features: torch.Tensor
    attention: torch.Tensor
    notes: str


Frames = PictureFrames | LookFrames


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
) -> PictureFrames:
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
    B, T, H, W, C = clip_BTHWC.shape
    grid = T // tubelet[0], H // tubelet[1], W // tubelet[2]
    true_BNP, batch_B1 = tokenize(clip_BTHWC, tubelet), torch.arange(B)[:, None]
    pixels_BMP = predicted_BMP.detach().double().cpu()
    mean_P, std_P = (
        torch.tensor(values, dtype=torch.float64).expand(C).repeat(math.prod(tubelet))
        for values in pixel_scale or ((0.0,), (1.0,))
    )
    if normalize != "none":
        known = masked_BM if statistics == "truth" else visible_BV
        pixels = (true_BNP[batch_B1, known].double() / 255 - mean_P) / std_P
        # as the losses define them
        num_groups = C if normalize == "channel" else 1
        values = rearrange(pixels, "B V (S G) -> B V S G", G=num_groups)
        variance_G, mean_G = torch.var_mean(values, dim=2)
        deviation_G = (variance_G + EPSILON).sqrt()
        if normalize == "channel":
            deviation_G = variance_G.sqrt() + EPSILON
        if statistics == "visible":
            weight_BMV = _weights(visible_BV, masked_BM, grid)
            mean_G, deviation_G = weight_BMV @ mean_G, weight_BMV @ deviation_G
        grouped = rearrange(pixels_BMP, "B M (S G) -> B M S G", G=num_groups)
        pixels_BMP = (grouped * deviation_G[:, :, None] + mean_G[:, :, None]).flatten(2)
    # a prediction that is not finite has no colour: black
    pixels_BMP = (pixels_BMP * std_P + mean_P).nan_to_num(0) * 255
    shown_BNP = torch.full_like(true_BNP, GREY)
    shown_BNP[batch_B1, visible_BV] = true_BNP[batch_B1, visible_BV]
    visible_BTHWC = untokenize(shown_BNP, grid, tubelet)
    shown_BNP[batch_B1, masked_BM] = pixels_BMP.round().clamp(0, 255).to(torch.uint8)
    note = NOTES["raw" if normalize == "none" else statistics]
    counts = (
        f"{visible_BV.shape[1]} of {math.prod(grid)} tubelets visible, "
        f"{masked_BM.shape[1]} predicted"
    )
    predicted_BTHWC = untokenize(shown_BNP, grid, tubelet)
    return PictureFrames(clip_BTHWC, visible_BTHWC, predicted_BTHWC, f"{note}\n{counts}")


def draw_reconstruction(path: Path, frames: Frames, titles: Sequence[str]) -> None:
    """Writes a PNG with three rows of frames a clip, original, visible and predicted, under the
    title of the clip; or those of a look.

    Frames are shown pixel for pixel or enlarged by a whole factor: at most 8 a clip, evenly chosen,
    fewer where they would be wider than about 1,600 pixels.
    """
    *rows, notes = frames
    T, W = rows[0].shape[1::2]
    count = max(1, min(MAX_FRAMES, T, MAX_STRIP // (max(W, MIN_TILE) + GAP)))
    shown = middles(T, count)
    numbers = ", ".join(str(frame) for frame in shown)
    chosen = [row[:, shown] for row in rows]
    canvas = arrange(
        chosen, frames._fields[:-1], f"{notes}; frames {numbers} of {T}", [[t] for t in titles]
    )
    write_whole(path, partial(canvas.save, format="PNG"))


def middles(num_frames: int, count: int) -> list[int]:
    """The frames in the middles of `count` equal parts of a clip."""
    return [(2 * i + 1) * num_frames // (2 * count) for i in range(count)]


def arrange(
    rows: Sequence[torch.Tensor],
    names: Sequence[str],
    notes: str,
    titles: Sequence[Sequence[str]],
) -> Image.Image:
    """A picture of all frames [B, T, H, W, C] of each row beside its name, one clip after another,
    under the notes; its sides are even, as a video wants them. titles: of each clip those above its
    first columns.
    """
    tiles = _tiles(rows, gap=255)
    strips = rearrange(tiles, "r b n h w c -> b (r h) (n w) c")
    strips = F.pad(strips, (0, 0, MARGIN, 0, LINE, 0), value=255)
    header, font = [*notes.splitlines(), ""], ImageFont.load_default(13)
    texts = max(math.ceil(font.getlength(line)) for line in header)
    pixels = strips.flatten(0, 1)
    height, width, _ = pixels.shape
    space = max(0, MARGIN + texts - width)
    space += (width + space) % 2
    pixels = F.pad(pixels, (0, 0, 0, space, len(header) * LINE, height % 2), value=255)
    canvas = Image.fromarray(pixels.numpy())
    pen = ImageDraw.Draw(canvas)

    def write(x: int, y: int, text: str) -> None:
        pen.text((x, y), text, fill="black", font=font)

    for i, line in enumerate(header):
        write(MARGIN, 8 + i * LINE, line)
    for b, columns in enumerate(titles):
        top = len(header) * LINE + b * strips.shape[1]
        for i, text in enumerate(map(one_line, columns)):
            # of a path that is too long the end tells most: its beginning is left of the picture
            most = canvas.width - math.ceil(font.getlength(text))
            write(min(MARGIN + i * tiles.shape[4], most), top + 2, text)
        for i, name in enumerate(names):
            write(8, top + LINE + i * tiles.shape[3] + tiles.shape[3] // 2 - 8, name)
    return canvas


def _tiles(rows: Sequence[torch.Tensor], gap: int) -> torch.Tensor:
    """All frames of some rows as a screen shows them, pixel for pixel or enlarged by a whole
    factor, with a gap of that grey behind each: [rows, B, T, H, W, 3].
    """
    tiles = torch.stack([in_colors(row) for row in rows])
    W = tiles.shape[4]
    scale = math.ceil(MIN_TILE / W) if W < MIN_TILE * 3 // 4 else 1
    tiles = repeat(tiles, "r b n h w c -> r b n (h y) (w x) c", y=scale, x=scale)
    return F.pad(tiles, (0, 0, 0, GAP, 0, GAP), value=gap)


def in_colors(clip: torch.Tensor) -> torch.Tensor:
    """Of a clip [..., C], uint8, uint16 or in [0, 1], the first three channels as red, green and
    blue, or the first as grey: uint8 [..., 3].
    """
    shown = clip[..., : 3 if clip.shape[-1] >= 3 else 1]
    if shown.dtype == torch.uint16:
        shown = shown.float() / 65535
    if shown.is_floating_point():
        shown = (shown * 255).round().to(torch.uint8)
    return shown.expand(*clip.shape[:-1], 3)


def animate_reconstruction(path: Path, frames: PictureFrames) -> None:
    """Writes an animated WebP with a row of moving pictures a clip, in four columns of one width:
    original, visible, predicted, and the size of the difference between predicted and original.

    Frames are shown pixel for pixel or enlarged by a whole factor.
    """
    original, visible, predicted, _ = frames
    difference = (predicted.short() - original.short()).abs().to(torch.uint8)
    tiles = _tiles([original, visible, predicted, difference], gap=GREY)
    pictures = rearrange(tiles, "k b t h w c -> t (b h) (k w) c").numpy()
    first, *others = [Image.fromarray(picture) for picture in pictures]
    save = partial(
        first.save,
        format="WEBP",
        save_all=True,
        append_images=others,
        duration=1000 // FRAMES_PER_SECOND,
        loop=0,
        quality=85,
    )
    write_whole(path, save)


def _weights(
    visible_BV: torch.Tensor, masked_BM: torch.Tensor, grid: tuple[int, int, int]
) -> torch.Tensor:
    """How much each visible token tells about each masked one [B, M, V]: 1 / distance^4, rows sum
    to 1.

    The power and TIME_SHARE were the best of a small search over tube and random masks of real
    clips (powers 2, 3, 4, 6).
    """
    scale = torch.tensor([TIME_SHARE, 1, 1], dtype=torch.float64)
    visible, masked = (
        torch.stack(torch.unravel_index(index, grid), dim=2) * scale
        for index in (visible_BV, masked_BM)
    )
    squares_BMV = (masked[:, :, None] - visible[:, None]).square().sum(dim=3)
    weight_BMV = squares_BMV**-2
    return weight_BMV / weight_BMV.sum(dim=2, keepdim=True)
