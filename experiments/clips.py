"""The clips that the experiment trains on and is scored on: people in action where pybullet is
installed, else cut-outs of eight shapes.

Letters: N B clips, T frames, H W pixels, C channels.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
from shapes import SHAPES, ShapeClipsConfig, render_clips
from torch import Tensor

from video_mae import ModelConfig
from video_mae.config.tools import ACTIONS
from video_mae.tools.demo import PHOTOGRAPH_SIDES, PHOTOGRAPHS, load_photograph
from video_mae.tools.people import PeopleScene

NUM_FRAMES = 8
PEOPLE = ACTIONS["people"]
PEOPLE_SIDE, PEOPLE_FPS = 52, 8.0
# of the training photographs: all choices are made by scores on these
TUNING_PHOTOGRAPHS = ("coffee.png", "grass.png")
# streams of random numbers
TRAINING, SCORED, LABELLED = range(3)


class Subject(NamedTuple):
    """What is seen in the clips.

    side: pixels of a clip, from which the frame of the model is cut; render(photographs, stream,
    number of clips, seed) gives clips_NTHWC uint8 and label_N; vary(clips_BTHWC, random) changes
    what says nothing about the class.
    """

    classes: tuple[str, ...]
    side: int
    model: ModelConfig
    render: Callable[[Sequence[str], int, int, int], tuple[Tensor, Tensor]]
    vary: Callable[[Tensor, np.random.Generator], Tensor]


def render_people(
    photographs: Sequence[str], stream: int, num_clips: int, seed: int
) -> tuple[Tensor, Tensor]:
    """clips_NTHWC uint8 and label_N of people before the named photographs; clip n shows action n
    mod 15, from directions of the camera that belong to training, or, to be SCORED, from those
    between these.

    Clip n is a function of (seed, stream, n) alone: more clips extend fewer.
    """
    shorter_side = round(PHOTOGRAPH_SIDES[1] * PEOPLE_SIDE)
    pictures = [load_photograph(name, shorter_side) for name in photographs]
    split = "val" if stream == SCORED else "train"
    size = NUM_FRAMES, PEOPLE_SIDE, PEOPLE_SIDE
    clips_NTHWC = torch.empty(num_clips, *size, 3, dtype=torch.uint8)
    for index in range(num_clips):
        random = np.random.default_rng([seed, stream, index])
        scene = PeopleScene(random, split, pictures, size, PEOPLE_FPS)
        clips_NTHWC[index] = torch.from_numpy(scene.render(PEOPLE[index % len(PEOPLE)]))
    return clips_NTHWC, torch.arange(num_clips) % len(PEOPLE)


def mirror(clips_BTHWC: Tensor, random: np.random.Generator) -> Tensor:
    """Half of the clips mirrored."""
    is_mirrored_B = torch.from_numpy(random.random(len(clips_BTHWC)) < 0.5)
    is_mirrored_B = is_mirrored_B.to(clips_BTHWC.device)
    return torch.where(is_mirrored_B[:, None, None, None, None], clips_BTHWC.flip(3), clips_BTHWC)


def render_shapes(
    photographs: Sequence[str], stream: int, num_clips: int, seed: int
) -> tuple[Tensor, Tensor]:
    """clips_NTHWC uint8 and label_N of cut-outs (shapes.py); clip n shows shape n mod 8."""
    return render_clips(photographs, stream, num_clips, ShapeClipsConfig(seed=seed))


def recolour(clips_BTHWC: Tensor, random: np.random.Generator) -> Tensor:
    """Floats in [0, 1]: channels in any order, half of the clips negatives, contrast and brightness
    by channel; alike for all frames.
    """
    num, device = len(clips_BTHWC), clips_BTHWC.device
    order_BC = torch.from_numpy(random.permuted(np.tile(np.arange(3), (num, 1)), axis=1)).to(device)
    negative_B = torch.from_numpy(random.random(num) < 0.5).to(device)
    gain_BC = torch.from_numpy(np.exp(random.uniform(-0.5, 0.5, (num, 3)))).float().to(device)
    offset_BC = torch.from_numpy(random.uniform(-0.3, 0.3, (num, 3))).float().to(device)
    x = clips_BTHWC.float() / 255 - 0.5
    x = x.gather(-1, order_BC[:, None, None, None].expand(x.shape))
    x = torch.where(negative_B[:, None, None, None, None], -x, x)
    return (x * gain_BC[:, None, None, None] + offset_BC[:, None, None, None] + 0.5).clamp(0, 1)


def random_crop(clips_BTHWC: Tensor, random: np.random.Generator, side: int) -> Tensor:
    """One box of side x side pixels out of all frames of a clip."""
    room = clips_BTHWC.shape[2] - side
    corners_B2 = random.integers(0, room + 1, (len(clips_BTHWC), 2)).tolist()
    return torch.stack(
        [
            clip_THWC[:, y : y + side, x : x + side]
            for clip_THWC, (y, x) in zip(clips_BTHWC, corners_B2, strict=True)
        ]
    )


def middle(clips_NTHWC: Tensor, side: int) -> Tensor:
    """The box of side x side pixels in the middle."""
    start = (clips_NTHWC.shape[2] - side) // 2
    return clips_NTHWC[:, :, start : start + side, start : start + side].contiguous()


def _model(side: int, patch_size: int, mean: float) -> ModelConfig:
    return ModelConfig(
        num_frames=NUM_FRAMES,
        height=side,
        width=side,
        tubelet_size=2,
        patch_size=patch_size,
        embed_dim=96,
        depth=4,
        num_heads=3,
        decoder_embed_dim=64,
        decoder_depth=2,
        decoder_num_heads=2,
        mean=(mean,),
        std=(0.25,),
    )


SUBJECTS = {
    "people": Subject(PEOPLE, PEOPLE_SIDE, _model(48, 12, 0.2), render_people, mirror),
    "shapes": Subject(SHAPES, ShapeClipsConfig().side, _model(32, 8, 0.5), render_shapes, recolour),
}


def default_subject() -> str:
    """People, where they can be rendered."""
    return "people" if find_spec("pybullet") else "shapes"


def photographs(scored_on: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the photographs to train on, and of those that give the figures: `validation`, or
    `tuning`, two of those that train otherwise.
    """
    train = PHOTOGRAPHS["train"]
    if scored_on == "validation":
        return train, PHOTOGRAPHS["val"]
    return tuple(name for name in train if name not in TUNING_PHOTOGRAPHS), TUNING_PHOTOGRAPHS
