"""Videos of people. Letters: N clips, T frames, H W pixels, C channels, F features, Q of a pose."""

import json
import math
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_mae.config.tools import ACTIONS as ACTIONS_OF
from video_mae.tools.demo import PHOTOGRAPHS, DemoConfig, load_photograph, make_demo_data
from video_mae.tools.people import HINGES, LINKS, YAWS, PeopleScene, Studio

pytest.importorskip("pybullet")
ACTIONS = ACTIONS_OF["people"]
SIZE = (8, 32, 48)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio()


@pytest.fixture(scope="module")
def photographs() -> dict[str, list[Tensor]]:
    return {
        split: [load_photograph(name, 64) for name in names] for split, names in PHOTOGRAPHS.items()
    }


def frames_of(action: str) -> NDArray[np.float64]:
    """A capture as it is stored: durations, then poses."""
    folder = Path(import_module("pybullet_data").getDataPath()) / "data" / "motions"
    return np.array(json.loads((folder / f"humanoid3d_{action}.txt").read_text())["Frames"])


def joints(studio: Studio) -> list[float]:
    """The joints that the body is in, in the order and form of a capture, w of a quaternion first."""
    values: list[float] = []
    for link in LINKS:
        value = studio.bullet.getJointStateMultiDof(studio.body, link)[0]
        values += [value[3], *value[:3]] if link not in HINGES else value
    return values


def as_rotations(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each joint: q, -q and 2 q are one rotation."""
    parts, at = [], 0
    for link in LINKS:
        part = values[at : at + (1 if link in HINGES else 4)]
        at += len(part)
        if link not in HINGES:
            part = part * np.sign(part[np.abs(part).argmax()]) / np.linalg.norm(part)
        parts.append(part)
    return np.concatenate(parts)


@pytest.mark.parametrize("action", ["walk", "kick", "cartwheel"])
def test_the_body_stands_as_it_was_captured(studio: Studio, action: str) -> None:
    frames = frames_of(action)
    for frame in (0, 7, len(frames) - 2):
        place = studio.pose(studio.motions[action], frames[:frame, 0].sum() + 1e-9)
        x, y, z = frames[frame, 1:4]
        assert place == pytest.approx([x, -z, y], abs=1e-5)
        found, captured = as_rotations(np.array(joints(studio))), as_rotations(frames[frame, 8:])
        assert found == pytest.approx(captured, abs=1e-4)


def test_between_two_poses_the_body_is_in_the_first(studio: Studio) -> None:
    frames, knee = frames_of("run"), 8 + 12  # durations, place, rotation; chest, neck, right hip
    studio.pose(studio.motions["run"], frames[:5, 0].sum() + 0.75 * frames[5, 0])
    angle = studio.bullet.getJointStateMultiDof(studio.body, 4)[0][0]
    assert angle == pytest.approx(frames[5, knee], abs=1e-6)


def test_who_walks_walks_on(studio: Studio) -> None:
    motion = studio.motions["walk"]
    seconds = motion.second_T[-1]
    places = [studio.pose(motion, 0.3 + rounds * seconds) for rounds in range(4)]
    steps = [after - before for before, after in pairwise(places)]
    assert math.hypot(*steps[0][:2]) > 0.5
    for step in steps:
        assert step == pytest.approx(steps[0], abs=1e-5)
        assert step[2] == pytest.approx(0, abs=1e-5)


def test_a_capture_that_does_not_loop_ends_in_its_last_pose(studio: Studio) -> None:
    motion = studio.motions["kick"]
    last = studio.pose(motion, motion.second_T[-1])
    assert studio.pose(motion, motion.second_T[-1] + 9) == pytest.approx(last)


def clips(
    photographs: dict[str, list[Tensor]], split: str, turns: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """clips_NTHWC and label_N of scenes that are not the same for two actions."""
    films = []
    for number in range(turns * len(ACTIONS)):
        random = np.random.default_rng([5, split == "val", number])
        scene = PeopleScene(random, split, photographs[split], SIZE, fps=8)
        films.append(scene.render(ACTIONS[number % len(ACTIONS)]))
    return np.stack(films), np.arange(len(films)) % len(ACTIONS)


def test_one_frame_gives_an_action_away_less_than_its_clip(
    photographs: dict[str, list[Tensor]],
) -> None:
    """Each frame of unseen clips votes by the outlines nearest to its own."""
    outlines, labels = {}, {}
    for split, turns in (("train", 30), ("val", 10)):
        clips_NTHWC, label_N = clips(photographs, split, turns)
        # who is dressed brightly stands before a dark photograph
        bright_NTHW = torch.from_numpy(clips_NTHWC).float().mean(4).gt(70).float()
        small_NTHW = torch.nn.functional.adaptive_avg_pool2d(bright_NTHW, (8, 12))
        outlines[split] = small_NTHW.flatten(2).flatten(0, 1)
        labels[split] = torch.from_numpy(label_N).repeat_interleave(SIZE[0])
    nearest = torch.cdist(outlines["val"], outlines["train"]).topk(5, largest=False).indices
    votes = torch.nn.functional.one_hot(labels["train"][nearest], len(ACTIONS)).float().mean(1)
    votes_NTK = votes.unflatten(0, (-1, SIZE[0]))
    label_N1 = labels["val"].unflatten(0, (-1, SIZE[0]))[:, :1]
    of_a_frame = (votes_NTK.argmax(2) == label_N1).float().mean().item()
    of_a_clip = (votes_NTK.mean(1).argmax(1) == label_N1[:, 0]).float().mean().item()
    assert 2 / len(ACTIONS) < of_a_frame
    assert of_a_frame + 0.1 < of_a_clip


def test_a_scene_is_the_same_for_every_action_and_every_time(
    photographs: dict[str, list[Tensor]],
) -> None:
    scenes = [
        PeopleScene(np.random.default_rng(3), "train", photographs["train"], SIZE, fps=8)
        for _ in range(2)
    ]
    first, again = (scene.render("walk") for scene in scenes)
    assert np.array_equal(first, again)
    other = scenes[0].render("punch")
    assert not np.array_equal(first, other)
    # a column where nobody is shows the same background
    assert np.array_equal(first[:, 0], other[:, 0]) or np.array_equal(
        first[:, :, 0], other[:, :, 0]
    )


def test_training_and_validation_share_neither_photographs_nor_directions(
    photographs: dict[str, list[Tensor]],
) -> None:
    yaws = {}
    for split in ("train", "val"):
        scenes = [
            PeopleScene(np.random.default_rng(n), split, photographs[split], SIZE, fps=8)
            for n in range(200)
        ]
        low, high = YAWS[split]
        yaws[split] = {int(scene.yaw % 45) for scene in scenes}
        assert all(low <= scene.yaw % 45 <= high for scene in scenes)
        assert len({scene.yaw // 45 for scene in scenes}) == 8
    assert not yaws["train"] & yaws["val"]
    assert not set(PHOTOGRAPHS["train"]) & set(PHOTOGRAPHS["val"])


def test_the_data_set_is_balanced_and_equal_settings_give_equal_files(tmp_path: Path) -> None:
    config = DemoConfig(
        subject="people", train_clips=30, validation_clips=15, num_frames=6, height=32, width=34
    )
    for name in ("one", "two"):
        make_demo_data(tmp_path / name, config)
    assert tuple((tmp_path / "one" / "classes.txt").read_text().split()) == ACTIONS
    for split, num in (("train", 30), ("val", 15)):
        lines = (tmp_path / "one" / f"{split}.txt").read_text().splitlines()
        assert [int(line.split()[1]) for line in lines] == [n % len(ACTIONS) for n in range(num)]
        for line in lines:
            path = line.split()[0]
            assert Path(path).parts[1] == ACTIONS[int(line.split()[1])]
            assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()
    facts = json.loads((tmp_path / "one" / "demo.json").read_text())
    assert facts["config"]["subject"] == "people"
    assert "pybullet" in facts["versions"]


def test_a_number_of_clips_that_does_not_fit_the_actions_is_refused() -> None:
    with pytest.raises(ValueError, match="train_clips: 1024 must be a multiple of the 15 actions"):
        DemoConfig(subject="people", train_clips=1024)
