"""Crops cut on the device are those that workers would cut: the same boxes, pixels within 1 level
of torchvision's.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from video_mae.config import DataConfig, FinetuneConfig
from video_mae.config.schema import parse
from video_mae.data import ClipDataset, StepSampler, collate, make_loader, read_annotations
from video_mae.data.augment import crop_clip
from video_mae.data.dataset import ValidationClips, labelled_clips
from video_mae.data.device_crop import Crop, CropSize, UncutClips, cut
from video_mae.data.loader import DevicePrefetcher
from video_mae.data.videos import read_training_videos, read_validation_videos

SHAPES = ((37, 51), (240, 320), (37, 51), (64, 33), (20, 19), (37, 51))
STILL = 3  # the place of a picture
SIZE = (32, 48)


def videos_and_crops(
    dtypes: tuple[Any, ...], num_crops: int, channels: int = 3
) -> tuple[list[torch.Tensor], list[list[Crop]]]:
    """Frames of odd sizes, three of them the same, and boxes that enlarge and shrink them and touch
    their borders.
    """
    rng = np.random.default_rng(0)
    frames: list[torch.Tensor] = []
    crops: list[list[Crop]] = []
    for place, (height, width) in enumerate(SHAPES):
        dtype = dtypes[place % len(dtypes)]
        frames_THWC = torch.from_numpy(
            rng.integers(np.iinfo(dtype).max + 1, size=(5, height, width, channels)).astype(dtype)
        )
        frames.append(frames_THWC[:1].expand(5, -1, -1, -1) if place == STILL else frames_THWC)
        boxes = [(0, 0, height, width), (height - 1, 0, 1, width)]
        for _ in range(num_crops - len(boxes)):
            rows, columns = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
            boxes.append(
                (
                    int(rng.integers(height - rows + 1)),
                    int(rng.integers(width - columns + 1)),
                    rows,
                    columns,
                )
            )
        crops.append(
            [Crop(box, bool(place + draw & 1)) for draw, box in enumerate(boxes[:num_crops])]
        )
    return frames, crops


def cut_one_by_one(
    frames: list[torch.Tensor], crops: list[list[Crop]], sixteen_bit: bool, antialias: bool
) -> torch.Tensor:
    """What workers do."""
    clips = [
        crop_clip(frames_THWC, crop.box, SIZE, crop.flip, antialias=antialias)
        for frames_THWC, of_video in zip(frames, crops, strict=True)
        for crop in of_video
    ]
    return torch.stack(
        [
            clip.to(torch.uint16) * 257 if sixteen_bit and clip.dtype == torch.uint8 else clip
            for clip in clips
        ]
    )


@pytest.mark.parametrize(
    ("dtypes", "sixteen_bit"),
    [((np.uint8,), False), ((np.uint16,), True), ((np.uint8, np.uint16), True)],
)
@pytest.mark.parametrize(
    ("num_crops", "chunk_bytes"), [(1, 2**28), (3, 2**28), (3, 300_000), (2, 1)]
)
@pytest.mark.parametrize("antialias", [True, False])
def test_crops_on_the_device_are_those_of_torchvision(
    monkeypatch: pytest.MonkeyPatch,
    dtypes: tuple[Any, ...],
    sixteen_bit: bool,
    num_crops: int,
    chunk_bytes: int,
    antialias: bool,
) -> None:
    monkeypatch.setattr("video_mae.data.device_crop.CHUNK_BYTES", chunk_bytes)
    frames, crops = videos_and_crops(dtypes, num_crops)
    expected = cut_one_by_one(frames, crops, sixteen_bit, antialias).int()
    clip_BTHWC = UncutClips.gather(frames, crops, CropSize(5, *SIZE, sixteen_bit, antialias)).to(
        "cpu"
    )
    assert clip_BTHWC.dtype == (torch.uint16 if sixteen_bit else torch.uint8)
    assert clip_BTHWC.is_contiguous()
    difference = (clip_BTHWC.int() - expected).abs()
    for place in range(len(frames)):
        level = 257 if sixteen_bit and frames[place].dtype == torch.uint8 else 1
        mine = slice(place * num_crops, (place + 1) * num_crops)
        assert difference[mine].max() <= level, place
        # and most are the same
        assert difference[mine].float().mean() < (0.25 if antialias else 0.35) * level


def test_one_channel_and_a_crop_of_the_size_itself_are_exact() -> None:
    frames, _ = videos_and_crops((np.uint8,), 1, channels=1)
    clips = UncutClips.gather(
        frames[:1],
        [[Crop((2, 3, *SIZE), False), Crop((2, 3, *SIZE), True)]],
        CropSize(5, *SIZE, False),
    ).to("cpu")
    part_THWC = frames[0][:, 2 : 2 + SIZE[0], 3 : 3 + SIZE[1]]
    assert torch.equal(clips, torch.stack([part_THWC, part_THWC.flip(2)]))


def test_what_cutting_takes_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from video_mae.data import device_crop

    largest = 0

    def watch(frames_FHWC: torch.Tensor, crop: Crop, size: CropSize) -> torch.Tensor:
        nonlocal largest
        num, _, _, channels = frames_FHWC.shape
        _, _, rows, columns = crop.box
        # as float32, once more for torch to resize them
        num_bytes = 8 * num * channels * (rows * columns + size.height * size.width)
        largest = max(largest, num_bytes)
        return cut(frames_FHWC, crop, size)

    monkeypatch.setattr(device_crop, "cut", watch)
    monkeypatch.setattr(device_crop, "CHUNK_BYTES", 4_000_000)
    frames, crops = videos_and_crops((np.uint8,), 3)
    UncutClips.gather(frames, crops, CropSize(5, *SIZE, False)).to("cpu")
    assert 2_500_000 < largest <= 4_000_000


@pytest.fixture
def mixed(tmp_path: Path, demo_folder: Path, write_video: Callable[..., Path]) -> DataConfig:
    """Videos of two sizes and a picture."""
    from PIL import Image

    rng = np.random.default_rng(1)
    names = [
        str(demo_folder / line.rsplit(" ", 1)[0])
        for line in (demo_folder / "train.txt").read_text().splitlines()[:4]
    ]
    for number in range(3):
        path = write_video(
            tmp_path / f"{number}.mp4",
            rng.integers(256, size=(20, 5, 7, 3), dtype=np.uint8).repeat(8, 1).repeat(10, 2),
        )
        names.append(str(path))
    Image.fromarray(rng.integers(256, size=(41, 53, 3), dtype=np.uint8)).save(
        tmp_path / "still.png"
    )
    names.append(str(tmp_path / "still.png"))
    (tmp_path / "list.txt").write_text(
        "".join(f"{name} {number}\n" for number, name in enumerate(names))
    )
    return DataConfig(
        source=str(tmp_path / "list.txt"), stride=2, num_workers=0, clips_per_video=2, flip=True
    )


def test_a_batch_that_is_cut_on_the_device_is_the_batch_of_the_workers(mixed: DataConfig) -> None:
    batches = {}
    for where, workers in (("worker", 0), ("device", 0), ("device", 1)):
        data = replace(mixed, crop_where=where, num_workers=workers)  # pyright: ignore[reportArgumentType]
        clips = ClipDataset(read_annotations(data), data, 4, 32, 48, seed=3)
        loader = make_loader(clips, StepSampler(len(clips), 4, 1, 0, 1, 3, 0, 3), data)
        assert isinstance(next(iter(loader)).clip_BTHWC, UncutClips) == (where == "device")
        batches[where, workers] = list(DevicePrefetcher(loader, torch.device("cpu")))
    for one, device, worker in zip(
        batches["worker", 0], batches["device", 0], batches["device", 1], strict=True
    ):
        assert one.clip_BTHWC.shape == device.clip_BTHWC.shape == (8, 4, 32, 48, 3)
        assert (one.clip_BTHWC.int() - device.clip_BTHWC.int()).abs().max() <= 1
        assert torch.equal(device.clip_BTHWC, worker.clip_BTHWC)
        for name in ("seeds_B", "host_seeds_B", "label_B", "index_B"):
            assert torch.equal(getattr(one, name), getattr(device, name))


def test_eight_bits_beside_sixteen_become_sixteen_on_the_device_as_well(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for number, dtype in enumerate((np.uint8, np.uint16)):
        np.save(
            tmp_path / f"{number}.npy",
            rng.integers(np.iinfo(dtype).max + 1, size=(9, 40, 44, 3)).astype(dtype),
        )
    sources = ", ".join(
        f"{name}: {{source: {tmp_path / name}.txt, stride: 1{extra}}}"
        for name, extra in (("a", ""), ("b", ", value_range: [0, 65535]"))
    )
    for name, file in (("a", "0.npy"), ("b", "1.npy")):
        (tmp_path / f"{name}.txt").write_text(f"{file}\n")
    from video_mae.data import read_sources

    clips = []
    for where in ("worker", "device"):
        data = parse(
            None, [f"sources={{{sources}}}", f"crop_where={where}", "num_workers=0"], DataConfig
        )
        dataset = ClipDataset(read_sources(data, 3), data, 4, 32, 32, seed=3)
        clips.append(collate([dataset[0, 0], dataset[0, 1]]).to("cpu").clip_BTHWC)
    assert clips[0].dtype == clips[1].dtype == torch.uint16
    assert (clips[0].int() - clips[1].int()).abs().max() <= 257


def test_fine_tuning_cuts_on_the_device_and_validates_as_ever(
    tiny_finetune: Callable[..., FinetuneConfig],
) -> None:
    with pytest.raises(
        ValueError, match=r"augment.where: .*comes after the crop: set it to device as well"
    ):
        tiny_finetune("data.crop_where=device")
    batches, validations = [], []
    for changes in (["augment.where=device"], ["augment.where=device", "data.crop_where=device"]):
        config = tiny_finetune(*changes)
        clips = labelled_clips(read_training_videos(config)[0], config)
        batches.append(collate([clips[1, index] for index in (0, 5)]).to("cpu"))
        validation = ValidationClips(read_validation_videos(config), config)
        validations.append(collate([validation[2], validation[-1]]).clip_BTHWC)
    assert (batches[0].clip_BTHWC.int() - batches[1].clip_BTHWC.int()).abs().max() <= 1
    assert torch.equal(batches[0].host_seeds_B, batches[1].host_seeds_B)
    assert torch.equal(*validations)


@pytest.mark.trains_here
@pytest.mark.usefixtures("quiet_process")
def test_runs_train_and_draw_with_crops_on_the_device(
    tiny: Callable[..., Any], tiny_finetune: Callable[..., Any], tmp_path: Path
) -> None:
    from video_mae.files import read_jsonl
    from video_mae.training import finetune, pretrain

    for module, make, extra in (
        (pretrain, tiny, []),
        (finetune, tiny_finetune, ["augment.where=device", "data.num_workers=1"]),
    ):
        losses = []
        for where in ("worker", "device"):
            folder = tmp_path / f"{module.__name__}_{where}"
            config = make(f"output={folder}", f"data.crop_where={where}", *extra)
            assert module.run(module.prepare(config)) == 0
            losses.append(
                [line["loss"] for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
            )
        assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert list((tmp_path / "video_mae.training.pretrain_device" / "reconstructions").glob("*.png"))
