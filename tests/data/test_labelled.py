"""Labelled clips: what is augmented where, what validates, and how ranks share it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from video_mae.config import ClassifierConfig, FinetuneConfig
from video_mae.config.model import Sampling
from video_mae.data.augment import crop_clip
from video_mae.data.dataset import (
    ClipDataset,
    ValidationClips,
    collate,
    frame_choice,
    labelled_clips,
    share_batches,
)
from video_mae.data.device_crop import Crop, cut
from video_mae.data.videos import read_training_videos, read_validation_videos
from video_mae.model.vit import VideoClassifier

WHOLE = Crop((0, 0, 48, 48), flip=False)
Tiny = Callable[..., FinetuneConfig]


@pytest.mark.parametrize(
    ("num_videos", "batch", "world_size"),
    [(8, 3, 1), (8, 3, 2), (7, 2, 3), (1, 4, 3), (12, 3, 2), (13, 1, 4)],
)
def test_every_video_is_visited_once_by_ranks_of_equal_length(
    num_videos: int, batch: int, world_size: int
) -> None:
    ranks = [share_batches(num_videos, batch, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(indices) == batch for batches in ranks for indices in batches)
    visited = [
        index for batches in ranks for indices in batches for index in indices if index != -1
    ]
    assert sorted(visited) == list(range(num_videos))
    assert len(ranks[0]) == -(-num_videos // (batch * world_size))  # and no more


def clips(config: FinetuneConfig) -> ClipDataset:
    return labelled_clips(read_training_videos(config)[0], config)


def test_a_training_sample_is_a_function_of_its_key_and_its_clips_differ(
    tiny_finetune: Tiny,
) -> None:
    config = tiny_finetune("data.clips_per_video=3")
    sample, again = clips(config)[2, 5], clips(config)[2, 5]
    assert torch.stack(sample.clips).shape == (3, 4, 32, 32, 3)
    assert torch.equal(torch.stack(sample.clips), torch.stack(again.clips))
    assert len({clip.numpy().tobytes() for clip in torch.stack(sample.clips)}) == 3
    assert not torch.equal(torch.stack(sample.clips), torch.stack(clips(config)[3, 5].clips))
    assert (sample.label, clips(config)[0, 9].label) == (0, 1)


def test_a_worker_strengthens_clips_unless_the_device_does(tiny_finetune: Tiny) -> None:
    plain = clips(tiny_finetune("augment.randaugment_ops=0", "augment.erasing=0"))
    device, worker = (
        clips(tiny_finetune(f"augment.where={where}", "augment.erasing=1"))
        for where in ("device", "worker")
    )
    for key in ((0, 0), (1, 7)):
        assert torch.equal(torch.stack(device[key].clips), torch.stack(plain[key].clips))
        assert not torch.equal(torch.stack(worker[key].clips), torch.stack(plain[key].clips))


@pytest.mark.parametrize("where", ["worker", "device"])
def test_training_and_validation_resize_as_the_classifier_says(
    tiny_finetune: Tiny, where: str
) -> None:
    plain = (
        "augment.randaugment_ops=0",
        "augment.erasing=0",
        "model.height=16",
        "model.width=16",
        f"data.crop_where={where}",
    )
    found = []
    for antialias in (True, False):
        config = tiny_finetune(*plain, f"classifier.antialias={antialias}")
        validation = ValidationClips(read_validation_videos(config), config)
        training = collate([clips(config)[0, index] for index in range(3)]).to("cpu")
        whole = clips(config).read(0, slice(4)).clip_THWC
        expected = crop_clip(
            torch.from_numpy(whole), (0, 0, 48, 48), (16, 16), flip=False, antialias=antialias
        )
        assert torch.equal(
            cut(torch.from_numpy(whole), WHOLE, clips(config).size),
            expected,
        )
        found.append((training.clip_BTHWC.float(), torch.stack(validation[2].clips).float()))
    for smooth, sharp in zip(*found, strict=True):
        assert 0.5 < (smooth - sharp).abs().mean() < 20


@pytest.mark.parametrize("sampling", ["dense", "uniform", "parts", "parts_v2"])
def test_validation_draws_nothing_and_sees_the_middle(tiny_finetune: Tiny, sampling: str) -> None:
    config = tiny_finetune(
        "data.clips_per_video=3",
        "data.flip=true",
        f"classifier.sampling={sampling}",
        "model.height=48",
        "model.width=48",
    )
    validation = ValidationClips(read_validation_videos(config), config)
    batch = collate([validation[index] for index in (0, 5, -1, 5)])
    assert batch.clip_BTHWC.shape == (4, 4, 48, 48, 3)
    assert batch.index_B.tolist() == [0, 5, -1, 5]
    assert torch.equal(batch.clip_BTHWC[1], batch.clip_BTHWC[3])
    assert not batch.clip_BTHWC[2].any()
    # 16 frames of 48 x 48 pixels: 4 dense ones 2 apart start at 4; the crop is the frame itself.
    indices = {"dense": [4, 6, 9, 11]}.get(sampling, [2, 6, 10, 14])
    frames_THWC = validation.clips.read(5, indices).clip_THWC
    assert np.array_equal(batch.clip_BTHWC[1], frames_THWC)


@pytest.mark.parametrize(
    ("sampling", "middle", "short"),
    [
        ("uniform", [2, 7, 11, 16], [0, 1, 1, 2]),
        ("parts", [2, 6, 10, 14], [0, 0, 0, 0]),
        ("parts_v2", [2, 6, 10, 14], [0, 0, 1, 2]),
    ],
)
def test_each_kind_of_sampling_has_its_frames(
    sampling: Sampling, middle: list[int], short: list[int]
) -> None:
    classifier = ClassifierConfig(sampling=sampling)
    assert [frame_choice(classifier, 4)(length).tolist() for length in (19, 3)] == [middle, short]
    drawn = np.stack(
        [frame_choice(classifier, 4, np.random.default_rng(seed))(19) for seed in range(200)]
    )
    assert drawn.max() == (18 if sampling == "uniform" else 15)


def test_a_broken_validation_video_is_named_and_marked(tiny_finetune: Tiny, tmp_path: Path) -> None:
    (tmp_path / "junk.mp4").write_bytes(b"not a video")
    (tmp_path / "val.txt").write_text("junk.mp4 1\n")
    config = tiny_finetune(f"validation.source={tmp_path / 'val.txt'}")
    sample = ValidationClips(read_validation_videos(config), config)[0]
    assert sample.index == -1
    assert [Path(failure.path).name for failure in sample.failures] == ["junk.mp4"]


def listed(tmp_path: Path, video: Path, names: list[str], labels: list[int]) -> Path:
    """A list of videos whose folders have these names."""
    lines = ""
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name / f"{i}.mp4").symlink_to(video)
        lines += f"{tmp_path / 'set' / name / f'{i}.mp4'} {label}\n"
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text(lines)
    return tmp_path / "lists" / "train.txt"


@pytest.mark.parametrize(
    ("folders", "labels", "named"),
    [
        (["run", "swim", "fly", "swim"], [1, 0, 2, 0], ("swim", "run", "fly")),
        (["run", "run", "fly", "swim"], [1, 0, 2, 0], ()),  # two classes in one folder
        (["run", "swim", "fly", "dive"], [1, 0, 2, 0], ()),  # one class in two
        (["all", "all", "all", "all"], [0, 0, 0, 0], ()),
        (["run", "swim", "fly", "fly"], [1, 0, 3, 3], ()),  # no video of class 2
    ],
)
def test_classes_and_their_names_are_those_of_the_data(
    tiny_finetune: Tiny,
    demo_folder: Path,
    tmp_path: Path,
    folders: list[str],
    labels: list[int],
    named: tuple[str, ...],
) -> None:
    video = next(demo_folder.rglob("*.mp4"))
    source = listed(tmp_path, video, folders, labels)
    config = tiny_finetune(f"data.source={source}", "classifier.num_classes=null")
    assert config.classifier.num_classes is None
    videos, head = read_training_videos(config)
    assert (head.num_classes, head.class_names) == (max(labels) + 1, named)
    assert videos.notes == ()
    # a classes.txt beside the list wins
    (source.parent / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    videos, head = read_training_videos(config)
    assert (head.num_classes, head.class_names) == (5, tuple("abcde"))


def test_outputs_that_no_video_trains_are_told(
    tiny_finetune: Tiny, demo_folder: Path, tmp_path: Path
) -> None:
    video = next(demo_folder.rglob("*.mp4"))
    source = listed(tmp_path, video, ["run", "swim"], [1, 4])
    videos, head = read_training_videos(tiny_finetune(f"data.source={source}"))
    (note,) = videos.notes
    assert note.endswith(
        "train.txt: has the labels 0 to 4 alone, and classifier.num_classes = 8 outputs are "
        "trained; null has as many as there are"
    )
    assert (head.num_classes, head.class_names) == (8, ())
    _, head = read_training_videos(
        tiny_finetune(f"data.source={source}", "classifier.num_classes=5")
    )
    assert head.num_classes == 5


def test_a_classifier_itself_needs_a_number_of_classes(tiny_finetune: Tiny) -> None:
    with pytest.raises(ValueError, match=r"^classifier\.num_classes: null"):
        VideoClassifier(tiny_finetune().model, ClassifierConfig(num_classes=None))
