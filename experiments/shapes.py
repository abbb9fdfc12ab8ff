"""The data of the experiment: what moves is the label. A cut-out of one photograph, of one of eight
shapes, crosses another photograph.

The cut-out is bright over a dimmed background, or, in half of the clips, which are negatives, dark
over a pale one. Why appearance alone says little: all eight shapes have the same area and are
centred on their centroid, and their texture, colours, size, place, angle, direction and speed are
drawn without regard to the label. A cut-out that leaves on one side enters on the other. All is
drawn on the CPU, so a clip is the same on every machine with the same versions of torch and numpy.

Letters: N clips, T frames, H W pixels of a frame, C channels, I J pixels of a photograph, R pixels
of a stencil, K shapes.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from video_mae.config.schema import Knobs, knob, require
from video_mae.tools.demo import (
    PHOTOGRAPH_SIDES,
    load_photograph,
    resize_photograph,
    sample_photograph,
)

SHAPES = ("disk", "square", "triangle", "cross", "star", "ring", "crescent", "bar")
STENCIL_PIXELS = 80  # side of a shape's picture
# half of that side, in radii of the disk of the same area: the bar, the longest, reaches 1.7
STENCIL_REACH = 2.0


class ShapeClipsConfig(Knobs):
    """What `render_clips` renders."""

    seed: int = knob(0, "of everything drawn")
    num_frames: int = knob(8, "frames of a clip")
    side: int = knob(40, "pixels, height and width of a clip, from which training cuts the frame")
    frame_side: int = knob(
        32, "pixels, height and width of what a model sees: sizes and speeds are relative to it"
    )
    speed: tuple[float, float] = knob(
        (1 / 32, 2.5 / 32), "smallest and largest travel, frame sides a frame"
    )
    radius: tuple[float, float] = knob(
        (0.22, 0.30), "smallest and largest radius, frame sides, of the disk of a shape's area"
    )
    floor: float = knob(
        0.35,
        "the darkest cut-out and the brightest background (before half of the clips become negatives): the "
        "dial of difficulty, small is easy",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2**63)")
        require(self.num_frames >= 1, "num_frames", self.num_frames, "must be at least 1")
        require(
            32 <= self.frame_side <= self.side,
            "frame_side",
            self.frame_side,
            f"must be at least 32, at most side = {self.side}",
        )
        for name in ("speed", "radius"):
            least, most = getattr(self, name)
            require(
                0 < least <= most,
                name,
                (least, most),
                "must be the smallest and the largest, above 0",
            )
        require(
            self.radius[1] * self.frame_side * 2 * STENCIL_REACH <= 2 * self.side,
            "radius",
            self.radius,
            "is too large for the screen, on which a cut-out must not meet itself",
        )
        require(0 < self.floor < 1, "floor", self.floor, "must be between 0 and 1")


def render_clips(
    photographs: Sequence[str], stream: int, num_clips: int, config: ShapeClipsConfig
) -> tuple[Tensor, Tensor]:
    """clips_NTHWC uint8 and label_N of scenes made of the named photographs (two or more); clip n
    shows shape n mod 8.

    Clip n is a function of (config.seed, stream, n) alone: more clips extend fewer. Use one stream
    a purpose (unlabelled, labels of each seed, validation). Raises: FileNotFoundError for a
    photograph that scikit-image lacks.
    """
    assert len(photographs) >= 2, "a photograph moves over another"
    textures = [
        load_photograph(name, round(PHOTOGRAPH_SIDES[1] * config.frame_side))
        for name in photographs
    ]
    clips_NTHWC = torch.empty(
        num_clips, config.num_frames, config.side, config.side, 3, dtype=torch.uint8
    )
    for index in range(num_clips):
        random = np.random.default_rng([config.seed, stream, index])
        clips_NTHWC[index] = render_clip(random, index % len(SHAPES), textures, config)
    return clips_NTHWC, torch.arange(num_clips) % len(SHAPES)


def render_clip(
    random: np.random.Generator, label: int, textures: Sequence[Tensor], config: ShapeClipsConfig
) -> Tensor:
    """clip_THWC uint8 of a scene made of two of the photographs; the label decides the shape and
    nothing else.
    """
    moving, still = random.permutation(len(textures))[:2]
    axis = torch.arange(config.side) + 0.5 - config.side / 2
    screen_HW2 = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    heading = random.uniform(0, 2 * math.pi)
    travel = torch.tensor([math.cos(heading), math.sin(heading)]) * (
        random.uniform(*config.speed) * config.frame_side
    )
    start = torch.from_numpy(random.uniform(-0.5, 0.5, 2)).float() * config.side
    place_T2 = (
        start + travel * (torch.arange(config.num_frames) - (config.num_frames - 1) / 2)[:, None]
    )
    from_place_THW2 = screen_HW2 - place_T2[:, None, None]
    # who leaves on one side enters on the other
    from_place_THW2 = (from_place_THW2 + config.side / 2) % config.side - config.side / 2
    cutout_THW2 = from_place_THW2 @ _turn(random)
    moving_TCHW = _textured(random, textures[moving], cutout_THW2, config)
    still_1CHW = _textured(random, textures[still], (screen_HW2 @ _turn(random))[None], config)
    moving_TCHW, still_1CHW = (
        config.floor + (1 - config.floor) * moving_TCHW,
        config.floor * still_1CHW,
    )
    reach = random.uniform(*config.radius) * config.frame_side * STENCIL_REACH
    stencil_TCRR = stencils()[label].expand(config.num_frames, 1, -1, -1)
    cover_TCHW = grid_sample(
        stencil_TCRR,
        cutout_THW2 / reach,
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    clip_TCHW = torch.lerp(still_1CHW, moving_TCHW, cover_TCHW)
    if random.uniform() < 0.5:
        clip_TCHW = 1 - clip_TCHW
    return (clip_TCHW * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def _turn(random: np.random.Generator) -> Tensor:
    angle = random.uniform(0, 2 * math.pi)
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def _textured(
    random: np.random.Generator,
    photograph_CIJ: Tensor,
    place_THW2: Tensor,
    config: ShapeClipsConfig,
) -> Tensor:
    """A random part of the photograph at a random scale and in random colours, in [0, 1]."""
    photograph_CIJ = resize_photograph(
        photograph_CIJ, round(random.uniform(*PHOTOGRAPH_SIDES) * config.frame_side)
    )
    anchor = torch.tensor(
        [
            random.uniform(0, 2 * length)
            for length in (photograph_CIJ.shape[2], photograph_CIJ.shape[1])
        ]
    ).float()
    return _recoloured(random, sample_photograph(photograph_CIJ, place_THW2 + anchor))


def _recoloured(random: np.random.Generator, picture_TCHW: Tensor) -> Tensor:
    """Channels in random order and half mixed, a random gamma, half of the pictures negatives:
    eight photographs look like more.
    """
    mix_CC = torch.from_numpy(random.uniform(0, 1, (3, 3))).float()
    mix_CC = 0.5 * torch.eye(3)[random.permutation(3)] + 0.5 * mix_CC / mix_CC.sum(1, keepdim=True)
    picture_TCHW = torch.einsum("dc,tchw->tdhw", mix_CC, picture_TCHW).clamp(1e-4, 1) ** math.exp(
        random.uniform(-0.7, 0.7)
    )
    return 1 - picture_TCHW if random.uniform() < 0.5 else picture_TCHW


@lru_cache(maxsize=1)
def stencils() -> Tensor:
    """stencil_KRR in [0, 1]: the shapes with the area of the unit disk, centroids in the middle,
    over [-STENCIL_REACH, STENCIL_REACH]^2.
    """
    fine, oversampling = STENCIL_REACH * _centres(2000), 8
    x, y = torch.meshgrid(fine, fine, indexing="xy")
    pictures = []
    for shape in SHAPES:
        drawn = _inside(shape, x, y)
        centre_x, centre_y = x[drawn].mean(), y[drawn].mean()
        unit = (drawn.float().mean() * (2 * STENCIL_REACH) ** 2 / math.pi).sqrt()
        grid = STENCIL_REACH * _centres(STENCIL_PIXELS * oversampling)
        grid_x, grid_y = torch.meshgrid(grid, grid, indexing="xy")
        fine_RR = _inside(shape, grid_x * unit + centre_x, grid_y * unit + centre_y).float()
        pictures.append(
            fine_RR.unfold(0, oversampling, oversampling)
            .unfold(1, oversampling, oversampling)
            .mean((2, 3))
        )
    return torch.stack(pictures)


def _centres(count: int) -> Tensor:
    """Middles of `count` equal parts of [-1, 1]."""
    return (2 * torch.arange(count, dtype=torch.float64) + 1) / count - 1


def _inside(shape: str, x: Tensor, y: Tensor) -> Tensor:
    match shape:
        case "disk":
            return x**2 + y**2 < 1
        case "square":
            return (x.abs() < 1) & (y.abs() < 1)
        case "triangle":  # equilateral
            return (y < 0.5) & (y > math.sqrt(3) * x.abs() - 1)
        case "cross":
            return torch.minimum(x.abs(), y.abs()).lt(0.33) & torch.maximum(x.abs(), y.abs()).lt(1)
        case "star":
            return torch.hypot(x, y) < 1 + 0.45 * torch.cos(5 * torch.atan2(y, x))
        case "ring":
            return (torch.hypot(x, y) < 1) & (torch.hypot(x, y) > 0.6)
        case "crescent":
            return (torch.hypot(x, y) < 1) & (torch.hypot(x - 0.45, y) > 0.8)
        case "bar":
            return (x.abs() < 1) & (y.abs() < 0.3)
    raise AssertionError(shape)
