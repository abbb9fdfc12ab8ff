"""Augmentation of uint8 clips: one box, one flip, the same operations for all frames of a clip; and
the mixing of a batch.

Everything drawn for a clip comes from its own random numbers, so it is the same in a worker, on the
device, and after a restart. B clips, T frames, H W pixels, C channels, K classes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from video_mae.config import AugmentConfig, DataConfig

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""

BILINEAR = InterpolationMode.BILINEAR
SNAP = 2  # pixels
# Quarters of the free space (down, right): corners, centre, middles of the edges, quarter points.
PLACES = (
    (0, 0),
    (0, 4),
    (4, 0),
    (4, 4),
    (2, 2),
    (2, 0),
    (2, 4),
    (4, 2),
    (0, 2),
    (1, 1),
    (1, 3),
    (3, 1),
    (3, 3),
)
CROP_RATIOS = (3 / 4, 4 / 3)
ERASED_AREAS, ERASED_RATIOS = (0.02, 1 / 3), (0.3, 1 / 0.3)
OPERATION_PROBABILITY = 0.5


def crop_box(
    config: DataConfig,
    height: int,
    width: int,
    target_height: int,
    target_width: int,
    rng: np.random.Generator,
) -> Box:
    """Draws the box (top, left, height, width) of a frame that becomes a picture of the target
    size.

    multiscale: sides are scales of the largest box with the target's aspect ratio that fits, the
    scales of height and width at most one step of data.crop_scales apart; a side within 2 pixels of
    the target's is the target's, as far as it fits in; at one of 13 places, whole quarters of the
    free space (Source: VideoMAE, after TSN). random_resized: area and ratio are drawn (Source:
    Inception, torchvision's RandomResizedCrop). center: the largest box in the middle, nothing is
    drawn.
    """
    ratio = target_width / target_height
    if config.crop == "random_resized":
        box = _random_box(config.crop_scales, CROP_RATIOS, height, width, rng)
        if box is not None:
            return box
        ratio = min(max(width / height, CROP_RATIOS[0]), CROP_RATIOS[1])
    central = central_box(height, width, ratio)
    if config.crop != "multiscale":
        return central
    scales = config.crop_scales
    pairs = [(i, j) for i in range(len(scales)) for j in range(len(scales)) if abs(i - j) <= 1]
    i, j = pairs[rng.integers(len(pairs))]
    down, right = PLACES[rng.integers(len(PLACES))]
    box_height = _side(central[2] * scales[i], target_height, height)
    box_width = _side(central[3] * scales[j], target_width, width)
    top, left = down * ((height - box_height) // 4), right * ((width - box_width) // 4)
    return top, left, box_height, box_width


def _side(scaled: float, target: int, available: int) -> int:
    side = max(int(scaled), 1)
    return target if abs(side - target) <= SNAP and target <= available else side


def central_box(height: int, width: int, ratio: float) -> Box:
    """The largest box with ratio = width / height, in the middle."""
    box_height = max(min(height, round(width / ratio)), 1)
    box_width = max(min(width, round(height * ratio)), 1)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _random_box(
    areas: tuple[float, ...],
    ratios: tuple[float, float],
    height: int,
    width: int,
    rng: np.random.Generator,
) -> Box | None:
    """A box whose share of the area and whose ratio = width / height are drawn; None where ten of
    them do not fit.
    """
    for _ in range(10):
        area = height * width * rng.uniform(areas[0], areas[1])
        ratio = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.integers((height - box_height + 1, width - box_width + 1)).tolist()
            return top, left, box_height, box_width
    return None


def crop_clip(
    clip_THWC: Tensor, box: Box, size: tuple[int, int], flip: bool, *, antialias: bool = True
) -> Tensor:
    """Cuts one box out of every frame, resizes it to size = (height, width), mirrors it if asked:
    clip_THWC, contiguous, of its type.

    Resizing is bilinear between the centres of pixels. Where it makes smaller, antialias averages
    all pixels that a new one covers, as Pillow does; without it only the four around its centre are
    read, as OpenCV does. A clip is uint8 or uint16; torch resizes the latter as float32.
    """
    if clip_THWC.stride(0) == 0 and len(clip_THWC) > 1:  # a picture shown T times is cut once
        cut_THWC = crop_clip(clip_THWC[:1], box, size, flip, antialias=antialias)
        return cut_THWC.expand(len(clip_THWC), -1, -1, -1).contiguous()
    dtype = clip_THWC.dtype
    if dtype == torch.uint16:
        top, left, rows, columns = box
        clip_THWC = clip_THWC[:, top : top + rows, left : left + columns].float()
        box = (0, 0, rows, columns)
    # The permuted view is what channels_last means to torch: it resizes uint8 in that order,
    # without floats and without a copy.
    video_TCHW = tv_tensors.Video(clip_THWC.permute(0, 3, 1, 2))
    video_TCHW = F.resized_crop(
        video_TCHW, *box, size=list(size), interpolation=BILINEAR, antialias=antialias
    )
    if flip:
        video_TCHW = F.horizontal_flip(video_TCHW)
    if dtype == torch.uint16:
        video_TCHW = video_TCHW.round().to(dtype)
    return video_TCHW.as_subclass(Tensor).permute(0, 2, 3, 1).contiguous()


PixelChange = Callable[..., Tensor]
"""From video_TCHW, a strength in [-1, 1] and the filling of empty corners to the changed video; of
torchvision's some take less.
"""


def _plain(change: PixelChange) -> PixelChange:
    return lambda video, level, fill: change(video)


def _adjust(adjust: PixelChange) -> PixelChange:
    return lambda video, level, fill: adjust(video, max(0.1, 1 + 0.9 * level))


def _move(shear: tuple[float, float] = (0, 0), shift: tuple[float, float] = (0, 0)) -> PixelChange:
    """At full strength, along x and y: slopes, and shares of the sides."""

    def move(video: Tensor, level: float, fill: list[float]) -> Tensor:
        height, width = video.shape[-2:]
        return F.affine(
            video,
            angle=0.0,
            translate=[level * shift[0] * width, level * shift[1] * height],
            scale=1.0,
            shear=[math.degrees(math.atan(level * slope)) for slope in shear],
            interpolation=BILINEAR,
            fill=fill,
            center=[0.0, 0.0] if any(shear) else None,
        )

    return move


def _solarize(video: Tensor, level: float, fill: list[float]) -> Tensor:
    threshold = 256 - int(256 * abs(level))
    return F.solarize(video, threshold) if threshold < 256 else video


def _solarize_add(video: Tensor, level: float, fill: list[float]) -> Tensor:
    added = (video.int() + int(110 * abs(level))).clamp(max=255).to(video.dtype)
    return torch.where(video < 128, added, video)


# Stronger with the level, all of them ("inc1"). Source: timm's table; translations and shears are
# bilinear here, bicubic there.
OPERATIONS: dict[str, PixelChange] = {
    "autocontrast": _plain(F.autocontrast),
    "equalize": _plain(F.equalize),
    "invert": _plain(F.invert),
    "rotate": lambda video, level, fill: F.rotate(video, 30 * level, BILINEAR, fill=fill),
    "posterize": lambda video, level, fill: F.posterize(video, 4 - int(4 * abs(level))),
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _adjust(F.adjust_saturation),
    "contrast": _adjust(F.adjust_contrast),
    "brightness": _adjust(F.adjust_brightness),
    "sharpness": _adjust(F.adjust_sharpness),
    "shear_x": _move(shear=(0.3, 0)),
    "shear_y": _move(shear=(0, 0.3)),
    "translate_x": _move(shift=(0.45, 0)),
    "translate_y": _move(shift=(0, 0.45)),
}


def strengthen_clip(
    clip_THWC: Tensor,
    config: AugmentConfig,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> Tensor:
    """RandAugment, then random erasing, of a clip that is cropped: uint8 clip_THWC on its own
    device, a function of clip and seed.

    mean, std: of the model's channels, for the filling of empty corners and the noise. Raises:
    ValueError for what RandAugment cannot do.
    """
    rng = np.random.default_rng(seed)
    if config.randaugment_ops > 0:
        clip_THWC = _rand_augment(clip_THWC, config, mean, rng)
    return _erase(clip_THWC, mean, std, rng) if rng.random() < config.erasing else clip_THWC


def _rand_augment(
    clip_THWC: Tensor, config: AugmentConfig, mean: Sequence[float], rng: np.random.Generator
) -> Tensor:
    """augment.randaugment_ops operations, each drawn, done with probability 0.5, at a strength
    normal around the given one.

    Source: RandAugment (Cubuk et al., 2019) as timm's rand-m7-n4-mstd0.5-inc1. torchvision's class
    of that name does every operation, always at one strength, and lacks invert and solarize_add;
    its operations on videos are used here.
    """
    channels = clip_THWC.shape[-1]
    if clip_THWC.dtype != torch.uint8 or channels not in (1, 3):
        raise ValueError(
            f"augment.randaugment_ops: {config.randaugment_ops} operations need uint8 clips of 1 "
            f"or 3 channels, these are {clip_THWC.dtype} of {channels}; set it to 0"
        )
    fill = [float(round(255 * value)) for value in mean] * (channels if len(mean) == 1 else 1)
    video_TCHW, operations = clip_THWC.permute(0, 3, 1, 2), list(OPERATIONS.values())
    for _ in range(config.randaugment_ops):
        operation = operations[rng.integers(len(operations))]
        is_done, sign = rng.random() < OPERATION_PROBABILITY, 1 if rng.random() < 0.5 else -1
        strength = rng.normal(config.randaugment_magnitude, config.randaugment_std)
        if is_done:
            video_TCHW = operation(video_TCHW, sign * min(max(strength, 0.0), 10.0) / 10, fill)
    return video_TCHW.permute(0, 2, 3, 1).contiguous()


def _erase(
    clip_THWC: Tensor, mean: Sequence[float], std: Sequence[float], rng: np.random.Generator
) -> Tensor:
    """One box of all frames becomes noise, new in each frame, as normal as the normalised pixels
    are meant to be (kept in [0, 255]).

    Source: random erasing (Zhong et al., 2017), mode pixel, as SlowFast does it for clips.
    torchvision's has one noise for all frames and writes it unscaled, which uint8 cannot hold.
    """
    num_frames, height, width, channels = clip_THWC.shape
    box = _random_box(ERASED_AREAS, ERASED_RATIOS, height, width, rng)
    if box is None:
        return clip_THWC
    top, left, rows, columns = box
    noise = rng.standard_normal((num_frames, rows, columns, channels), dtype=np.float32)
    noise = noise * np.array(std, np.float32) + np.array(mean, np.float32)
    white = 1.0 if clip_THWC.is_floating_point() else torch.iinfo(clip_THWC.dtype).max
    clip_THWC = clip_THWC.clone()
    region_THWC = clip_THWC[:, top : top + rows, left : left + columns]
    region_THWC.copy_(torch.from_numpy(noise.clip(0, 1) * white))
    return clip_THWC


def mix_batch(
    clip_BTHWC: Tensor, target_BK: Tensor, config: AugmentConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix of each clip with the one before it in the batch, and of their targets: one
    draw for all, from `seed` alone.

    target_BK: probabilities. A uint8 clip stays one: its mixture is rounded. Source: mixup (Zhang
    et al., 2018), CutMix (Yun et al., 2019), torchvision's implementation; which of the two and
    whether at all as timm draws it. The partner is the previous clip, timm's is the one as far from
    the batch's end.
    """
    kinds, weights = list[v2.Transform](), list[float]()
    if config.mixup > 0:
        kinds.append(v2.MixUp(alpha=config.mixup))
        weights.append(1 - config.switch_probability)
    if config.cutmix > 0:
        kinds.append(v2.CutMix(alpha=config.cutmix))
        weights.append(config.switch_probability)
    choice = v2.RandomChoice(kinds, weights if len(kinds) == 2 else None)
    # torchvision draws from the global generator of the CPU
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        video_BTCHW = tv_tensors.Video(clip_BTHWC.permute(0, 1, 4, 2, 3).float())
        video_BTCHW, target_BK = v2.RandomApply([choice], config.mix_probability)(
            video_BTCHW, target_BK
        )
    mixed_BTHWC = video_BTCHW.as_subclass(Tensor).permute(0, 1, 3, 4, 2)
    if not clip_BTHWC.is_floating_point():
        mixed_BTHWC = mixed_BTHWC.round_()
    return mixed_BTHWC.to(clip_BTHWC.dtype).contiguous(), target_BK
