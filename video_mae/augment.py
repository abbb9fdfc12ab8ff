"""Spatial augmentation of uint8 clips: one box, one flip, for all frames of a clip.

T frames, H W pixels, C channels.
"""

import math

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from video_mae.config import DataConfig

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""

# Quarters of the free space (down, right): corners, centre, middles of the edges, quarter points.
PLACES = ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1), (3, 3))
MIN_RATIO, MAX_RATIO = 3 / 4, 4 / 3


def crop_box(config: DataConfig, height: int, width: int, target_height: int, target_width: int, rng: np.random.Generator) -> Box:
    """Draws the box (top, left, height, width) of a frame that becomes a picture of the target size.

    multiscale: sides are scales of the largest box with the target's aspect ratio that fits, the scales of height and width at most
    one step of data.crop_scales apart, at one of 13 places (Source: VideoMAE, after TSN). random_resized: area and ratio are drawn
    (Source: Inception, torchvision's RandomResizedCrop). center: the largest box in the middle, nothing is drawn.
    """
    if config.crop == "center":
        return _central_box(height, width, target_width / target_height)
    if config.crop == "random_resized":
        return _random_resized_box(config.crop_scales, height, width, rng)
    scales = config.crop_scales
    pairs = [(i, j) for i in range(len(scales)) for j in range(len(scales)) if abs(i - j) <= 1]
    i, j = pairs[rng.integers(len(pairs))]
    down, right = PLACES[rng.integers(len(PLACES))]
    _, _, full_height, full_width = _central_box(height, width, target_width / target_height)
    box_height, box_width = max(int(full_height * scales[i]), 1), max(int(full_width * scales[j]), 1)
    return down * (height - box_height) // 4, right * (width - box_width) // 4, box_height, box_width


def _central_box(height: int, width: int, ratio: float) -> Box:
    """The largest box with ratio = width / height, in the middle."""
    box_height = max(min(height, round(width / ratio)), 1)
    box_width = max(min(width, round(height * ratio)), 1)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _random_resized_box(areas: tuple[float, ...], height: int, width: int, rng: np.random.Generator) -> Box:
    for _ in range(10):
        area = height * width * rng.uniform(areas[0], areas[1])
        ratio = math.exp(rng.uniform(math.log(MIN_RATIO), math.log(MAX_RATIO)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            return int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1)), box_height, box_width
    return _central_box(height, width, min(max(width / height, MIN_RATIO), MAX_RATIO))


def crop_clip(clip_THWC: torch.Tensor, box: Box, size: tuple[int, int], flip: bool) -> torch.Tensor:
    """Cuts one box out of every frame, resizes it to size = (height, width), mirrors it if asked: uint8 clip_THWC, contiguous."""
    # The permuted view is what channels_last means to torch: it resizes uint8 in that order, without floats and without a copy.
    video_TCHW = tv_tensors.Video(clip_THWC.permute(0, 3, 1, 2))
    video_TCHW = F.resized_crop(video_TCHW, *box, size=list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    if flip:
        video_TCHW = F.horizontal_flip(video_TCHW)
    return video_TCHW.as_subclass(torch.Tensor).permute(0, 2, 3, 1).contiguous()
