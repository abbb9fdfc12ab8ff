"""Labelled clips: lists whose labels are checked, clips for training with augmentation, clips for
validation, shared over ranks.

T frames, H W pixels, C channels.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from video_mae.config import ClassifierConfig, FinetuneConfig
from video_mae.data.augment import strengthen_clip
from video_mae.data.dataset import ClipDataset, Failure, Sample
from video_mae.data.labels import read_labeled
from video_mae.data.sampling import sample_seed
from video_mae.data.sources import Sources
from video_mae.data.videos import VideoList
from video_mae.decoding import Choose, VideoDecodeError
from video_mae.decoding.choices import dense_indices, part_indices, uniform_indices


def read_training_videos(config: FinetuneConfig) -> tuple[VideoList, ClassifierConfig]:
    """The training list with every label checked, and the head with the names of its classes, where
    anybody names them.

    Raises: ValueError or FileNotFoundError with one line that names the list or key, and the
    remedy.
    """
    classifier, source = config.classifier, config.data.source
    videos = read_labeled(
        "data.source",
        source,
        config.data.root,
        names=classifier.class_names,
        list_format=config.data.list_format,
    )
    if videos.class_names and len(videos.class_names) != classifier.num_classes:
        raise ValueError(
            f"classifier.num_classes: {classifier.num_classes} is not the number of classes that {source} has names for; set "
            f"classifier.num_classes={len(videos.class_names)}"
        )
    if videos.num_classes > classifier.num_classes:
        path, label = videos.paths[int(videos.videos.label_M.argmax())], videos.num_classes - 1
        raise ValueError(
            f"data.source: {path} has the label {label}, classifier.num_classes = "
            f"{classifier.num_classes} allows 0 to {classifier.num_classes - 1}; correct {source}, or set "
            f"classifier.num_classes={label + 1}"
        )
    return videos.videos, replace(classifier, class_names=videos.class_names)


def read_validation_videos(config: FinetuneConfig) -> VideoList:
    """The validation list, every label checked against the classes of config.classifier. Raises: as
    `read_training_videos`.
    """
    classifier, validation = config.classifier, config.validation
    return read_labeled(
        "validation.source",
        validation.source,
        validation.root,
        classifier.num_classes,
        classifier.class_names,
        validation.list_format,
    ).videos


def frame_choice(
    classifier: ClassifierConfig, num_frames: int, rng: np.random.Generator | None = None
) -> Choose:
    """How the frames of a clip are chosen: drawn with rng, the middle without."""
    if classifier.sampling == "dense":
        return partial(dense_indices, num_frames=num_frames, stride=classifier.stride, rng=rng)
    if classifier.sampling == "uniform":
        return partial(uniform_indices, num_frames=num_frames, rng=rng)
    return partial(
        part_indices,
        num_frames=num_frames,
        short="all" if classifier.sampling == "parts_v2" else "first",
        rng=rng,
    )


class LabelledClips(ClipDataset):
    """Clips to train on: dataset[epoch, index] is a function of (seed, epoch, index) alone, and so
    is what augments it.
    """

    def __init__(self, paths: VideoList | Sources, config: FinetuneConfig) -> None:
        model = config.model
        super().__init__(
            paths,
            config.data,
            model.num_frames,
            model.height,
            model.width,
            config.seed,
            model.in_channels,
        )
        self.config = config
        self.antialias = config.classifier.antialias

    def _choice(self, rng: np.random.Generator, stride: int) -> Choose:
        return frame_choice(self.config.classifier, self.num_frames, rng)

    def _finish(self, clip_THWC: torch.Tensor, epoch: int, index: int, draw: int) -> torch.Tensor:
        config = self.config
        if config.augment.where == "device":
            return clip_THWC
        return strengthen_clip(
            clip_THWC,
            config.augment,
            config.model.mean,
            config.model.std,
            sample_seed(self.seed, epoch, index, draw),
        )


class ValidationClips(Dataset[Sample]):
    """Clips to validate on: dataset[index] is the middle of a video, its central crop, nothing
    drawn.

    A video that cannot be decoded, and the index -1 that fills a batch up, give a black clip with
    index -1: it does not count.
    """

    def __init__(self, paths: VideoList, config: FinetuneConfig) -> None:
        data, model = (
            replace(config.data, clips_per_video=1, crop="center", flip=False, crop_where="worker"),
            config.model,
        )
        self.clips = ClipDataset(
            paths, data, model.num_frames, model.height, model.width, 0, model.in_channels
        )
        self.clips.antialias = config.classifier.antialias
        self.choose = frame_choice(config.classifier, model.num_frames)
        self.black_THWC = torch.zeros(
            model.num_frames,
            model.height,
            model.width,
            model.in_channels,
            dtype=torch.uint16 if data.sixteen_bit else torch.uint8,
        )

    def __getitem__(self, index: int) -> Sample:
        failures = ()
        if index >= 0:
            try:
                return self.clips.sample(self.clips.read(index, self.choose), 0, index, index)
            except VideoDecodeError as error:
                failures = (Failure.of(error),)
        return Sample((self.black_THWC,), torch.zeros(1, dtype=torch.int64), 0, -1, failures)


class ShareSampler(Sampler[list[int]]):
    """Batches of one rank that visit `num_videos` once over all ranks, equally many and equally
    long on each: -1 fills them up.
    """

    def __init__(self, num_videos: int, batch: int, rank: int, world_size: int) -> None:
        self.num_videos, self.batch, self.rank, self.world_size = (
            num_videos,
            batch,
            rank,
            world_size,
        )

    def __len__(self) -> int:
        return -(-self.num_videos // (self.batch * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for turn in range(len(self)):
            first = (turn * self.world_size + self.rank) * self.batch
            yield [
                index if index < self.num_videos else -1
                for index in range(first, first + self.batch)
            ]
