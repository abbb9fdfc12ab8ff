"""Which frames and crops a test view is, against values worked out by hand from the published
definition.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from video_mae.data import views as module
from video_mae.data.augment import crop_clip
from video_mae.data.views import Views, load_views
from video_mae.decoding import Decoded, Reading, decode, read_clip


def views(**changes: object) -> Views:
    fields: dict[str, object] = {
        "num_frames": 16,
        "height": 224,
        "width": 224,
        "sampling": "dense",
        "stride": 4,
        "num_clips": 5,
        "num_crops": 3,
    }
    return Views(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def test_five_dense_clips_of_300_frames_are_the_published_ones():
    # 75 frames of stride 4, step (75 - 16) / 4 = 14.75: starts 0 14 29 44 59
    frames_ST = views().frames(300)
    assert frames_ST[:, 0].tolist() == [0, 56, 116, 176, 236]
    assert frames_ST[4].tolist() == list(range(236, 300, 4))
    assert frames_ST.shape == (5, 16)


@pytest.mark.parametrize(
    ("num_clips", "num_frames", "stride"),
    [(5, 16, 4), (2, 16, 2), (4, 32, 3), (10, 16, 5), (7, 8, 1)],
)
def test_dense_starts_follow_the_formula_for_every_length(
    num_clips: int, num_frames: int, stride: int
) -> None:
    chosen = views(num_clips=num_clips, num_frames=num_frames, stride=stride)
    for length in range(1, 400):
        strided = list(range(0, length, stride))
        strided += [strided[-1]] * (num_frames - len(strided))
        step = max((len(strided) - num_frames) / (num_clips - 1), 0)
        expected = [
            strided[int(clip * step) : int(clip * step) + num_frames] for clip in range(num_clips)
        ]
        assert chosen.frames(length).tolist() == expected, length


def test_a_video_shorter_than_a_clip_repeats_its_last_strided_frame():
    assert views(num_frames=6, num_clips=2).frames(10).tolist() == [[0, 4, 8, 8, 8, 8]] * 2
    assert views(num_frames=3, num_clips=1).frames(1).tolist() == [[0, 0, 0]]
    assert views(num_frames=3, num_clips=2, sampling="uniform").frames(2).tolist() == [
        [0, 0, 1],
        [0, 1, 1],
    ]


def test_uniform_clips_are_interleaved_sets_of_one_sorted_list():
    # 50 frames in 16 parts of 3.125: int(3.125 x) and int(1.5625 + 3.125 x)
    first = [0, 3, 6, 9, 12, 15, 18, 21, 25, 28, 31, 34, 37, 40, 43, 46]
    second = [1, 4, 7, 10, 14, 17, 20, 23, 26, 29, 32, 35, 39, 42, 45, 48]
    frames_ST = views(sampling="uniform", num_clips=2).frames(50)
    assert frames_ST.tolist() == [first, second]
    merged = sorted(first + second)
    assert (merged[0::2], merged[1::2]) == (first, second)
    for length in range(1, 300):
        tick = length / 16
        expected = [
            [int(tick * x) for x in range(16)],
            [int(tick / 2 + tick * x) for x in range(16)],
        ]
        assert views(sampling="uniform", num_clips=2).frames(length).tolist() == expected


@pytest.mark.parametrize("num_clips", [1, 2, 3])
def test_a_test_sees_the_same_frames_however_those_of_training_are_counted(num_clips: int) -> None:
    for length in range(1, 301):
        uniform, *others = (
            views(sampling=kind, num_clips=num_clips).frames(length).tolist()
            for kind in ("uniform", "parts", "parts_v2")
        )
        assert others == [uniform, uniform]


def test_one_view_is_the_middle():
    assert views(num_clips=1, stride=1, num_frames=4).frames(11).tolist() == [[3, 4, 5, 6]]
    assert views(num_clips=1, sampling="uniform", num_frames=4).frames(16).tolist() == [
        [2, 6, 10, 14]
    ]
    assert views(num_crops=1, height=4, width=4).corners(4, 9) == ((0, 2),)


@pytest.mark.parametrize(
    ("height", "width", "size", "corners"),
    [
        (
            256,
            340,
            (224, 297),
            [(0, 0), (0, 36), (0, 73)],
        ),  # 340 * 224 / 256 = 297.5; 73 / 2 = 36.5
        (340, 256, (297, 224), [(0, 0), (36, 0), (73, 0)]),
        (240, 320, (224, 298), [(0, 0), (0, 37), (0, 74)]),
        (100, 100, (224, 224), [(0, 0)] * 3),
    ],
)
def test_crops_lie_along_the_longer_side(
    height: int, width: int, size: tuple[int, int], corners: list[tuple[int, int]]
) -> None:
    assert views().resized(height, width) == size
    assert list(views().corners(*size)) == corners


def test_a_model_that_is_not_square_is_covered_by_the_frame():
    wide = views(height=16, width=32)
    for height, width in ((48, 64), (30, 90), (1000, 3), (16, 32), (17, 33)):
        resized = wide.resized(height, width)
        assert resized[0] >= 16
        assert resized[1] >= 32
        assert resized[0] == 16 or resized[1] == 32


def test_views_are_cut_from_one_decode_of_the_frames_they_share(
    tmp_path: Path, write_video: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
    path, calls = write_video(tmp_path / "video.mp4", frames), []

    def counting(path: str, choose: Callable, reading: Reading) -> Decoded:
        calls.append(path)
        return read_clip(path, choose, reading)

    monkeypatch.setattr(module, "read_clip", counting)
    chosen = views(num_frames=4, height=16, width=16, num_clips=3, num_crops=2)
    video = chosen.read(str(path))
    assert calls == [str(path)]
    assert len(video.frames_FHWC) == len(np.unique(chosen.frames(40)))
    clip_VTHWC = video.clips()
    assert clip_VTHWC.shape == (6, 4, 16, 16, 3)
    for view, (clip, crop) in enumerate((clip, crop) for clip in range(3) for crop in range(2)):
        alone_THWC = torch.from_numpy(decode(str(path), chosen.frames(40)[clip]))
        resized_THWC = crop_clip(alone_THWC, (0, 0, 32, 48), (16, 24), flip=False)
        assert torch.equal(clip_VTHWC[view], resized_THWC[:, :, 8 * crop : 8 * crop + 16])


@pytest.mark.parametrize(("height", "width"), [(240, 320), (720, 1280), (100, 90), (448, 448)])
def test_frames_are_resized_as_opencv_does_it_where_that_is_asked_for(
    tmp_path: Path, height: int, width: int
) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    np.save(tmp_path / "frame.npy", frame[None])
    found = {
        antialias: views(num_clips=1, num_frames=1, antialias=antialias)
        .read(str(tmp_path / "frame.npy"))
        .frames_FHWC
        for antialias in (False, True)
    }
    size = views().resized(height, width)
    video = torch.from_numpy(frame).permute(2, 0, 1)[None].double()
    expected = F.interpolate(video, size, mode="bilinear", align_corners=False, antialias=False)[
        0
    ].permute(1, 2, 0)
    for definition in (expected, torch.from_numpy(bilinear(frame, size))):
        assert (found[False][0].double() - definition.round()).abs().max() <= 1
    # Averaging noise makes it flatter; a frame that grows is the same.
    difference = (found[True].double() - found[False].double()).abs().mean()
    assert difference < 0.1 if min(height, width) <= 224 else difference > 2


def bilinear(frame_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """What OpenCV documents of INTER_LINEAR: centres at half pixels, two neighbours along each
    axis, the border repeated.
    """
    for axis, num in enumerate(size):
        place = np.clip(
            (np.arange(num) + 0.5) * frame_HWC.shape[axis] / num - 0.5, 0, frame_HWC.shape[axis] - 1
        )
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, frame_HWC.shape[axis] - 1)
        weight = (place - low).reshape([-1 if a == axis else 1 for a in range(3)])
        frame_HWC = frame_HWC.take(low, axis) * (1 - weight) + frame_HWC.take(high, axis) * weight
    return frame_HWC


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_each_video_once_in_order_and_names_the_bad_one(
    tmp_path: Path, write_video: Callable[..., Path], workers: int
) -> None:
    pixels = np.full((5, 16, 16, 3), 99, dtype=np.uint8)
    paths = [str(write_video(tmp_path / f"{i}.mp4", pixels)) for i in range(4)]
    Path(paths[2]).write_bytes(b"no video at all")
    found: list[Any] = list(
        load_views(paths, [3, 2, 0], views(num_frames=2, height=16, width=16), workers)
    )
    assert [video for video, _, _ in found] == [3, 2, 0]
    _, nothing, failure = found[1]
    assert nothing is None
    assert (failure.path, failure.decoder) == (paths[2], "pyav")
    assert found[2][1].clips().shape == (15, 2, 16, 16, 3)
