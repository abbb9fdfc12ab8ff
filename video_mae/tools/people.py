"""People in action before photographs, rendered from motion captures: videos that look like those
the models are for.

The captures (DeepMimic, Peng et al., 2018, MIT licence) and the humanoid lie inside pybullet's
wheel, whose TinyRenderer draws on a CPU without a display. Each action is one capture of one
performer: what a model has to see through is camera, clothes, light, background, speed, phase and
mirror. Training and validation share neither photographs nor directions of the camera.

Letters: T frames, H W pixels, C channels, I J pixels of a photograph, Q numbers of a pose.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from video_mae.config.tools import ACTIONS
from video_mae.extras import require_package

# Links of the humanoid in the order in which a pose has their joints: chest, neck, right hip, knee,
# ankle, shoulder, elbow, and those at the left. Hinges have an angle, the others a quaternion.
LINKS = (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13)
HINGES = (4, 7, 10, 13)
UPRIGHT = (0.5**0.5, 0.0, 0.0, 0.5**0.5)  # a capture's y points up, Bullet's z: a quarter turn
# links that are of one colour: skin, shirt, trousers
DRESS = ((2, 7, 8, 13, 14), (0, 1, 6, 12), (3, 4, 5, 9, 10, 11))
# Directions of the camera, in degrees of each 45 around the performer.
YAWS = {"train": (0.0, 30.0), "val": (35.0, 45.0)}
PITCHES = (-30.0, 5.0)
DISTANCES = (1.7, 2.3)  # a person is as high as 1 to 1.7
FIELDS = (42.0, 52.0)  # degrees that a frame shows
DRIFT = 30.0  # degrees that the camera turns in a video, at most
SPEEDS = (0.85, 1.2)
LOCK = threading.Lock()  # there is one studio
COLOURS, BRIGHTNESS = (0.5, 1.0), (0.05, 0.25)  # of clothes, of the photograph behind


class Motion(NamedTuple):
    """A capture: poses [T, Q] and their times; whether the last is followed by the first."""

    second_T: NDArray[np.float64]
    pose_TQ: NDArray[np.float64]
    loops: bool


class Studio:
    """A humanoid, its motions, and a camera: one serves all scenes of a process."""

    def __init__(self) -> None:
        require_package("pybullet")
        with _silence():
            bullet: Any = import_module("pybullet")
            data = Path(import_module("pybullet_data").getDataPath())
            bullet.connect(bullet.DIRECT)
            self.body: int = bullet.loadURDF(
                str(data / "humanoid" / "humanoid.urdf"),
                globalScaling=0.25,
                flags=bullet.URDF_MAINTAIN_LINK_ORDER,
            )
        self.bullet = bullet
        self.motions: dict[str, Motion] = {}
        for action in ACTIONS["people"]:
            facts = json.loads((data / f"data/motions/humanoid3d_{action}.txt").read_text())
            frames = np.array(facts["Frames"])
            # a frame says how long it lasts, then its pose
            second_T = np.cumsum([0.0, *frames[:-1, 0]])
            self.motions[action] = Motion(second_T, frames[:, 1:], facts["Loop"] == "wrap")

    def pose(self, motion: Motion, second: float) -> NDArray[np.float64]:
        """Poses the body as it was captured last before a time of its motion; returns the place of
        its pelvis.
        """
        travel = np.zeros(3)
        if motion.loops:
            rounds, second = divmod(second, motion.second_T[-1])
            travel = rounds * (motion.pose_TQ[-1, :3] - motion.pose_TQ[0, :3])
            travel[1] = 0.0
        pose_Q = motion.pose_TQ[np.searchsorted(motion.second_T, second, side="right") - 1]
        # a capture has w of a quaternion first, Bullet last
        rotation = np.roll(pose_Q[3:7], -1).tolist()
        place, rotation = self.bullet.multiplyTransforms(
            (0, 0, 0), UPRIGHT, (pose_Q[:3] + travel).tolist(), rotation
        )
        self.bullet.resetBasePositionAndOrientation(self.body, place, rotation)
        begin = 7
        for link in LINKS:
            end = begin + (1 if link in HINGES else 4)
            value = np.roll(pose_Q[begin:end], -1).tolist()
            self.bullet.resetJointStateMultiDof(self.body, link, value)
            begin = end
        return np.array(place)


class PeopleScene:
    """Everything about a video but its action."""

    def __init__(
        self,
        random: np.random.Generator,
        split: str,
        photographs: Sequence[Tensor],
        size: tuple[int, int, int],
        fps: float,
    ) -> None:
        """photographs: [C, I, J] in [0, 1], higher than the video; size: frames, height, width."""
        self.size = size
        photograph_CIJ = photographs[int(random.integers(len(photographs)))]
        self.photograph_IJC = 255 * photograph_CIJ.permute(1, 2, 0).numpy()
        rows, columns = self.photograph_IJC.shape[:2]
        self.top, self.left = random.integers(0, [rows - size[1] + 1, columns]).tolist()
        self.brightness = random.uniform(*BRIGHTNESS)
        self.seconds_per_frame = random.uniform(*SPEEDS) / fps
        self.phase = random.random()
        self.yaw = 45 * random.integers(8) + random.uniform(*YAWS[split])
        self.pitch, self.distance = random.uniform(*PITCHES), random.uniform(*DISTANCES)
        self.field, self.drift = random.uniform(*FIELDS), random.uniform(-DRIFT, DRIFT) / size[0]
        self.beside = random.normal(0, 0.05, 3)  # where the camera aims, off the pelvis
        self.light = [*random.uniform(-2, 2, 2).tolist(), 2.0]
        self.colours = random.uniform(*COLOURS, (len(DRESS), 3)).tolist()
        self.is_mirrored = random.random() < 0.5

    def render(self, action: str) -> NDArray[np.uint8]:
        """clip_THWC of an action, from a place in its capture that the scene has drawn."""
        with LOCK:
            clip_THWC = self._film(_studio(), action)
        return clip_THWC[:, :, ::-1].copy() if self.is_mirrored else clip_THWC

    def _film(self, studio: Studio, action: str) -> NDArray[np.uint8]:
        bullet, motion = studio.bullet, studio.motions[action]
        num_frames, height, width = self.size
        for links, colour in zip(DRESS, self.colours, strict=True):
            for link in links:
                bullet.changeVisualShape(studio.body, link, rgbaColor=[*colour, 1.0])
        latest = motion.second_T[-1]
        if not motion.loops:
            latest = max(latest - num_frames * self.seconds_per_frame, 0.0)
        lens = bullet.computeProjectionMatrixFOV(self.field, width / height, 0.1, 20)
        clip_THWC = np.empty((num_frames, height, width, 3), np.uint8)
        aim = None
        for frame in range(num_frames):
            place = studio.pose(motion, self.phase * latest + frame * self.seconds_per_frame)
            # whoever holds the camera follows a little late
            aim = place if aim is None else (aim + place) / 2
            yaw = self.yaw + frame * self.drift
            view = bullet.computeViewMatrixFromYawPitchRoll(
                (aim + self.beside).tolist(), self.distance, yaw, self.pitch, 0, 2
            )
            _, _, pixels, _, parts = bullet.getCameraImage(
                width,
                height,
                view,
                lens,
                shadow=0,
                lightDirection=self.light,
                renderer=bullet.ER_TINY_RENDERER,
            )
            person_HWC = np.reshape(pixels, (height, width, 4))[:, :, :3]
            is_person_HW1 = np.reshape(parts, (height, width, 1)) >= 0
            clip_THWC[frame] = np.where(is_person_HW1, person_HWC, self._behind(frame))
        return clip_THWC

    def _behind(self, frame: int) -> NDArray[np.uint8]:
        """The part of the photograph that the camera has turned to, mirrored at its edges."""
        _, height, width = self.size
        length = self.photograph_IJC.shape[1]
        turned = frame * self.drift * width / self.field
        columns_W = (np.arange(width) + round(self.left + turned)) % (2 * length)
        columns_W = np.minimum(columns_W, 2 * length - 1 - columns_W)
        part_HWC = self.photograph_IJC[self.top : self.top + height, columns_W]
        return (part_HWC * self.brightness).astype(np.uint8)


@lru_cache(maxsize=1)
def _studio() -> Studio:
    return Studio()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Bullet's C code warns on standard output of what is as it should be."""
    kept = os.dup(1)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
