"""The embedded default data set, rendered to H.264 files from real photographs: people in action
(people.py), or eight motions of a cut-out that one frame does not tell apart.

The photographs lie inside scikit-image's wheel, so nothing is downloaded. Their licences, as
scikit-image's documentation states them: CC0: brick (cc0textures.com), camera (L. Varshney),
chelsea (S. van der Walt), coffee (R. Michetti), grass (linolafett), gravel (cc0textures.com),
retina (M. Haggstrom). Public domain: astronaut and hubble_deep_field (NASA), rocket (SpaceX). No
known copyright restrictions: coins (Brooklyn Museum), ihc (CMMI). Pictures of the wheel without
such a statement (moon, motorcycle) are not used.

Why one frame of a cut-out says nothing: a frame is a function of a pose (place on a torus, angle),
and eight videos, one an action, start from each pose that is drawn, so their first frames are
equal. Place and angle are drawn uniformly, and every action moves them by adding something that
does not depend on them: so frame t has the same distribution for every t and every action.
Mirroring a video changes its action: train on it with `data.flip=false`. People may be mirrored.

Letters: T frames, H W pixels of a frame, C channels, I J pixels of a photograph.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate
from torchvision.transforms.functional import to_tensor

from video_mae.config.schema import to_dict
from video_mae.config.tools import DemoConfig
from video_mae.decoding.transcode import write_video
from video_mae.extras import require_package
from video_mae.files import say, write_json, write_whole
from video_mae.progress_bar import ProgressBar
from video_mae.results import check_made_with
from video_mae.tools import people

PHOTOGRAPHS = {
    "train": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "coffee.png",
        "grass.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "retina.jpg",
    ),
    "val": ("chelsea.png", "coins.png", "gravel.png", "rocket.jpg"),
}
# of the cut-out, in shorter frame sides: long enough to show its angle, short enough to fit on the
# torus
HALF_AXES = (0.34, 0.22)
ORBIT_RADIUS = 0.25  # in frame sides
# a full turn, or one frame side of travel: 1 to 2 pixels a frame at 64 pixels
PERIOD_FRAMES = (32.0, 64.0)
PHOTOGRAPH_SIDES = (1.2, 1.8)  # the photograph's shorter side over the frame's
EASY_CUTOUT_FLOOR = 0.35  # the darkest cut-out over the brightest background


def start(folder: str, config: DemoConfig) -> int:
    """The stage as the command line starts it."""
    make_demo_data(folder, config)
    say(f"demo data {folder}")
    return 0


def make_demo_data(folder: str | Path, config: DemoConfig) -> None:
    """Renders the data set into `folder`, all of it or nothing; a folder that holds the same data
    set is left as it is.

    Writes train.txt and val.txt (lines `PATH LABEL`, paths relative to the folder), classes.txt
    (line k names label k), train/ACTION/*.mp4, val/ACTION/*.mp4 and demo.json (config, photographs,
    versions). Lines take the actions in turn, and the videos of one turn differ in nothing but the
    action. Equal configs give equal pixels.
    Raises: ValueError if `folder` holds anything else; nothing is overwritten.
    """
    folder = Path(folder).absolute()
    facts = folder / "demo.json"
    # a folder of before there were people does not say what moves
    check_made_with(facts, to_dict(config), section="config", earlier={"subject": "cutouts"})
    if facts.is_file():
        return
    if folder.is_dir():
        folder.rmdir()  # an empty one; no other is removed

    def render(made: Path) -> None:
        for split, num_clips in (("train", config.train_clips), ("val", config.validation_clips)):
            _render_split(made, split, num_clips, config)
        (made / "classes.txt").write_text("".join(f"{action}\n" for action in config.actions))
        packages = ["scikit-image", "pillow", "torch", "av", "numpy"]
        if config.subject == "people":
            packages.append("pybullet")
        told = {
            "config": to_dict(config),
            "photographs": PHOTOGRAPHS,
            "versions": {name: version(name) for name in packages},
        }
        write_json(made / "demo.json", told)

    write_whole(folder, render)


def _render_split(folder: Path, split: str, num_clips: int, config: DemoConfig) -> None:
    # the largest that a scene asks for
    side = round(PHOTOGRAPH_SIDES[1] * min(config.height, config.width))
    photographs = [load_photograph(name, side) for name in PHOTOGRAPHS[split]]
    actions = config.actions
    for action in actions:
        (folder / split / action).mkdir(parents=True)

    def render(turn: int) -> str:
        random = np.random.default_rng([config.seed, sorted(PHOTOGRAPHS).index(split), turn])
        lines = ""
        if config.subject == "people":
            size = config.num_frames, config.height, config.width
            scene = people.PeopleScene(random, split, photographs, size, config.fps)
        else:
            scene = _Scene(random, turn, photographs, config)
        for label, action in enumerate(actions):
            path = f"{split}/{action}/{turn * len(actions) + label:05d}.mp4"
            write_video(folder / path, scene.render(action), config.fps)
            lines += f"{path} {label}\n"
        return lines

    text = ""
    # the encoder and torch release the interpreter lock
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        ProgressBar(num_clips, desc=split) as progress,
    ):
        for lines in threads.map(render, range(num_clips // len(actions))):
            text += lines
            progress.update(len(actions))
    (folder / f"{split}.txt").write_text(text)


def load_photograph(name: str, shorter_side: int) -> Tensor:
    """photograph_CIJ in [0, 1], its shorter side in pixels. Raises: FileNotFoundError where
    scikit-image lacks it.
    """
    require_package("skimage")
    import skimage

    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the installed scikit-image lacks this photograph: install scikit-image 0.26"
        )
    # Pillow, as torchvision's PNG decoder fails in a process that has loaded decord (whose own zlib
    # it meets)
    return resize_photograph(to_tensor(Image.open(path).convert("RGB")), shorter_side)


def resize_photograph(photograph_CIJ: Tensor, shorter_side: int) -> Tensor:
    """The photograph at another scale, its shorter side in pixels."""
    scale = shorter_side / min(photograph_CIJ.shape[1:])
    size = [round(side * scale) for side in photograph_CIJ.shape[1:]]
    return interpolate(photograph_CIJ[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


class _Scene:
    """Everything about a video but its action, drawn for a turn. Places are (x, y)."""

    def __init__(
        self, random: np.random.Generator, turn: int, photographs: list[Tensor], config: DemoConfig
    ) -> None:
        moving = turn % len(photographs)
        still = (moving + random.integers(1, len(photographs))) % len(photographs)
        self.config, self.side = config, min(config.height, config.width)

        def resized(photograph_CIJ: Tensor) -> Tensor:
            shorter_side = round(random.uniform(*PHOTOGRAPH_SIDES) * self.side)
            return resize_photograph(photograph_CIJ, shorter_side)

        self.moving_CIJ, self.still_CIJ = resized(photographs[moving]), resized(photographs[still])
        # pixels of `moving` that lie at `place`, of `still` in the middle of the screen; 2 sides,
        # as grid_sample mirrors at the edges: a photograph is a torus of twice its size
        self.anchor, self.still_anchor = (
            torch.tensor(random.uniform(0, [2 * width, 2 * height]).tolist())
            for _, height, width in (self.moving_CIJ.shape, self.still_CIJ.shape)
        )
        # frame sides from the middle of the screen
        self.place = torch.tensor(random.uniform(-0.5, 0.5, 2).tolist())
        self.angle, self.orbit_angle = random.uniform(0, 2 * math.pi, 2).tolist()
        self.period_frames = random.uniform(*PERIOD_FRAMES)

    def path(self, action: str) -> tuple[Tensor, Tensor]:
        """place_T2 in frame sides and angle_T in radians; y points down, so that angles grow
        clockwise.
        """
        turns_T = torch.arange(self.config.num_frames) / self.period_frames
        if action in ("left", "up") or action.endswith("counterclockwise"):
            turns_T = -turns_T
        place_T2 = self.place.repeat(len(turns_T), 1)
        angle_T = torch.full_like(turns_T, self.angle)
        if action.startswith("roll"):
            angle_T = angle_T + 2 * math.pi * turns_T
        elif action.startswith("orbit"):
            around_T = self.orbit_angle + 2 * math.pi * turns_T
            circle_T2 = torch.stack([around_T.cos(), around_T.sin()], 1)
            place_T2 = place_T2 + ORBIT_RADIUS * (circle_T2 - circle_T2[:1])
        else:
            place_T2[:, 0 if action in ("left", "right") else 1] += turns_T
        return place_T2, angle_T

    def render(self, action: str) -> np.ndarray:
        """clip_THWC uint8."""
        config, is_hard = self.config, self.config.difficulty == "hard"
        sides = torch.tensor([config.width, config.height])
        place_T2, angle_T = self.path(action)
        x_W, y_H = torch.arange(config.width) + 0.5, torch.arange(config.height) + 0.5
        screen_HW2 = torch.stack(torch.meshgrid(x_W, y_H, indexing="xy"), -1) - sides / 2
        from_place_THW2 = screen_HW2 - (place_T2 * sides)[:, None, None]
        if not is_hard:
            # who leaves on one side enters on the other
            from_place_THW2 = (from_place_THW2 + sides / 2) % sides - sides / 2
        cos_T11, sin_T11 = angle_T.cos()[:, None, None], angle_T.sin()[:, None, None]
        x_THW, y_THW = from_place_THW2.unbind(-1)
        cutout_THW2 = torch.stack(
            [cos_T11 * x_THW + sin_T11 * y_THW, cos_T11 * y_THW - sin_T11 * x_THW], -1
        )
        clip_TCHW = sample_photograph(self.moving_CIJ, cutout_THW2 + self.anchor)
        if not is_hard:
            still_1CHW = sample_photograph(self.still_CIJ, (screen_HW2 + self.still_anchor)[None])
            if config.difficulty == "easy":
                clip_TCHW = EASY_CUTOUT_FLOOR + (1 - EASY_CUTOUT_FLOOR) * clip_TCHW
                still_1CHW = EASY_CUTOUT_FLOOR * still_1CHW
            clip_TCHW = torch.lerp(still_1CHW, clip_TCHW, _cover(cutout_THW2, self.side)[:, None])
        clip_TCHW = (clip_TCHW * 255).round().clamp(0, 255).byte()
        return clip_TCHW.permute(0, 2, 3, 1).contiguous().numpy()


def _cover(cutout_THW2: Tensor, side: int) -> Tensor:
    """Opacity of the cut-out: a rectangle with round corners (a superellipse) and an edge about a
    pixel wide.
    """
    half_axes = torch.tensor(HALF_AXES) * side
    radius_THW = ((cutout_THW2 / half_axes) ** 4).sum(-1) ** 0.25
    return ((1 - radius_THW) * half_axes.min() + 0.5).clamp(0, 1)


def sample_photograph(photograph_CIJ: Tensor, place_THW2: Tensor) -> Tensor:
    """The photograph, mirrored at its edges without end, at places in its pixels."""
    sides = torch.tensor([photograph_CIJ.shape[2], photograph_CIJ.shape[1]])
    grid_THW2 = 2 * place_THW2 / sides - 1
    batch_TCIJ = photograph_CIJ.expand(len(grid_THW2), -1, -1, -1)
    return grid_sample(
        batch_TCIJ, grid_THW2, mode="bilinear", padding_mode="reflection", align_corners=False
    )
