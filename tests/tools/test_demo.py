# Letters: S videos, T frames, H W pixels, C channels, F features.
import dataclasses
import json
import math
import shutil
from pathlib import Path

import decord
import numpy as np
import pytest
import skimage
import torch
from torch import Tensor

from video_mae.config.tools import ACTIONS as ACTIONS_OF
from video_mae.tools.demo import PHOTOGRAPHS, DemoConfig, make_demo_data

ACTIONS = ACTIONS_OF["cutouts"]
CONFIG = DemoConfig(train_clips=320, validation_clips=160, num_frames=24, height=48, width=64)
TINY = DemoConfig(train_clips=8, validation_clips=8, num_frames=4, height=32, width=34)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "easy"
    make_demo_data(folder, CONFIG)
    return folder


def read_list(folder: Path, split: str) -> tuple[list[str], Tensor]:
    lines = [line.split() for line in (folder / f"{split}.txt").read_text().splitlines()]
    return [path for path, _ in lines], torch.tensor([int(label) for _, label in lines])


def read_videos(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """videos_STHWC in [0, 1] and labels_S."""
    paths, labels_S = read_list(folder, split)
    videos = []
    for path in paths:
        reader = decord.VideoReader(str(folder / path), num_threads=1)
        videos.append(reader.get_batch(range(len(reader))).asnumpy())
    return torch.from_numpy(np.stack(videos)).float() / 255, labels_S


@pytest.fixture(scope="module")
def videos(data: Path) -> dict[str, tuple[Tensor, Tensor]]:
    return {split: read_videos(data, split) for split in ("train", "val")}


def neighbours_accuracy(
    train_SF: Tensor, train_labels_S: Tensor, val_SF: Tensor, val_labels_S: Tensor, k: int = 5
) -> float:
    mean_F, std_F = train_SF.mean(0), train_SF.std(0) + 1e-6
    nearest = (
        torch.cdist((val_SF - mean_F) / std_F, (train_SF - mean_F) / std_F)
        .topk(k, largest=False)
        .indices
    )
    return (train_labels_S[nearest].mode(1).values == val_labels_S).float().mean().item()


def logistic_accuracy(
    train_SF: Tensor, train_labels_S: Tensor, val_SF: Tensor, val_labels_S: Tensor
) -> float:
    mean_F, std_F = train_SF.mean(0), train_SF.std(0) + 1e-6
    train_SF, val_SF = (train_SF - mean_F) / std_F, (val_SF - mean_F) / std_F
    weight = torch.zeros(train_SF.shape[1], len(ACTIONS), requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.01, weight_decay=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(train_SF @ weight, train_labels_S).backward()
        optimizer.step()
    return ((val_SF @ weight).argmax(1) == val_labels_S).float().mean().item()


def frame_features(videos_STHWC: Tensor, frame_S: Tensor) -> Tensor:
    frames_SCHW = videos_STHWC[torch.arange(len(frame_S)), frame_S].permute(0, 3, 1, 2)
    return torch.nn.functional.adaptive_avg_pool2d(frames_SCHW, 8).flatten(1)


def motion_features(videos_STHWC: Tensor) -> Tensor:
    """Mean velocity, mean turning of the velocity and mean rotation of what is brighter than any
    background.
    """
    bright_STHW = (videos_STHWC.mean(-1) - 0.36).clamp(0, 0.02)
    height, width = bright_STHW.shape[2:]
    y_H, x_W = torch.arange(height) / height, torch.arange(width) / width
    # the screen is a torus: the mean place is the angle of a mean on the circle
    place_ST2 = torch.stack(
        [
            (torch.exp(2j * math.pi * along) * bright_STHW.sum(other)).sum(-1).angle()
            / (2 * math.pi)
            for along, other in ((x_W, 2), (y_H, 3))
        ],
        -1,
    )
    dx_STHW = ((x_W - place_ST2[..., :1] + 0.5) % 1 - 0.5)[:, :, None, :] * width
    dy_STHW = ((y_H - place_ST2[..., 1:] + 0.5) % 1 - 0.5)[:, :, :, None] * height
    long_axis_ST = torch.atan2(
        (2 * bright_STHW * dx_STHW * dy_STHW).sum((2, 3)),
        (bright_STHW * (dx_STHW**2 - dy_STHW**2)).sum((2, 3)),
    )
    velocity_ST2 = (place_ST2.diff(dim=1) + 0.5) % 1 - 0.5
    before, after = velocity_ST2[:, :-8], velocity_ST2[:, 8:]
    turning_S = (before[..., 0] * after[..., 1] - before[..., 1] * after[..., 0]).mean(1)
    rotation_S = ((long_axis_ST.diff(dim=1) + math.pi) % (2 * math.pi) - math.pi).mean(1)
    return torch.cat([velocity_ST2.mean(1), turning_S[:, None], rotation_S[:, None]], 1)


def test_the_lists_are_balanced_and_their_files_decode_to_the_size_asked_for(data: Path) -> None:
    assert tuple((data / "classes.txt").read_text().split()) == ACTIONS
    for split, clips in (("train", CONFIG.train_clips), ("val", CONFIG.validation_clips)):
        paths, labels_S = read_list(data, split)
        assert len(set(paths)) == clips
        assert labels_S.bincount().tolist() == [clips // len(ACTIONS)] * len(ACTIONS)
        assert all(
            Path(path).parts[:2] == (split, ACTIONS[label])
            for path, label in zip(paths, labels_S.tolist(), strict=True)
        )
        assert len(list((data / split).rglob("*.mp4"))) == clips
    reader = decord.VideoReader(str(data / "train" / "up" / "00002.mp4"))
    assert len(reader) == CONFIG.num_frames
    assert reader[0].shape == (CONFIG.height, CONFIG.width, 3)
    assert reader.get_avg_fps() == CONFIG.fps


def test_training_and_validation_share_no_photograph(data: Path) -> None:
    photographs = json.loads((data / "demo.json").read_text())["photographs"]
    assert photographs == {split: list(names) for split, names in PHOTOGRAPHS.items()}
    folder = Path(skimage.__file__).parent / "data"
    contents = [(folder / name).read_bytes() for names in photographs.values() for name in names]
    assert len(set(contents)) == len(contents) == 12


def test_every_action_starts_from_the_same_frames(videos: dict[str, tuple[Tensor, Tensor]]) -> None:
    for videos_STHWC, _ in videos.values():
        first_GA = videos_STHWC[:, 0].unflatten(0, (-1, len(ACTIONS)))
        assert (first_GA == first_GA[:, :1]).all()
        assert (first_GA[0, 0] != first_GA[1, 0]).any()


def test_one_frame_says_nothing_about_the_action(videos: dict[str, tuple[Tensor, Tensor]]) -> None:
    generator = torch.Generator().manual_seed(0)
    chance, clips = 1 / len(ACTIONS), CONFIG.validation_clips
    for which in ("any", "last"):
        features_and_labels = []
        for videos_STHWC, labels_S in (videos["train"], videos["val"]):
            frame_S = (
                torch.randint(CONFIG.num_frames, labels_S.shape, generator=generator)
                if which == "any"
                else torch.full_like(labels_S, CONFIG.num_frames - 1)
            )
            features_and_labels += [frame_features(videos_STHWC, frame_S), labels_S]
        for accuracy in (neighbours_accuracy, logistic_accuracy):
            assert accuracy(*features_and_labels) < chance + 3 * math.sqrt(
                chance * (1 - chance) / clips
            ), (which, accuracy)


def test_motion_says_which_action_it_is_on_photographs_never_seen(
    videos: dict[str, tuple[Tensor, Tensor]],
) -> None:
    (train_STHWC, train_labels_S), (val_STHWC, val_labels_S) = videos["train"], videos["val"]
    accuracy = neighbours_accuracy(
        motion_features(train_STHWC), train_labels_S, motion_features(val_STHWC), val_labels_S
    )
    assert accuracy > 0.8


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_the_same_config_gives_the_same_pixels_and_another_seed_gives_others(
    tmp_path: Path, difficulty: str
) -> None:
    config = dataclasses.replace(TINY, difficulty=difficulty)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_demo_data(tmp_path / name, dataclasses.replace(config, seed=seed))
    a, b, c = (read_videos(tmp_path / name, "train")[0] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert all(video_THWC.diff(dim=0).abs().mean() > 1e-3 for video_THWC in a)


def test_a_data_set_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "demo"
    make_demo_data(folder, TINY)
    (folder / "train.txt").write_text("mine")
    make_demo_data(folder, TINY)
    assert (folder / "train.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["demo"]
    with pytest.raises(
        ValueError,
        match=r"demo/demo\.json: was made with seed = 0, now 7; choose another folder, or remove",
    ):
        make_demo_data(folder, dataclasses.replace(TINY, seed=7))
    assert (folder / "train.txt").read_text() == "mine"


def test_a_foreign_folder_is_refused_and_an_empty_one_is_filled(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    make_demo_data(folder, TINY)
    assert (folder / "demo.json").is_file()
    (folder / "demo.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"demo/demo\.json: is not readable; choose another folder",
    ):
        make_demo_data(folder, TINY)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(
        ValueError,
        match=r"demo: is not empty and has no demo\.json; choose another folder",
    ):
        make_demo_data(folder, TINY)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_a_render_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PHOTOGRAPHS, "val", ("missing.png", "chelsea.png"))
    with pytest.raises(FileNotFoundError, match=r"missing\.png.*install scikit-image"):
        make_demo_data(tmp_path / "demo", TINY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_clips", 12),
        ("validation_clips", 0),
        ("height", 63),
        ("width", 30),
        ("num_frames", 1),
        ("fps", 0),
        ("seed", -1),
    ],
)
def test_a_knob_out_of_range_is_named(key: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{key}: {value} must be"):
        dataclasses.replace(TINY, **{key: value})
