"""Samples and batches: decode once, crop R times; a broken video is replaced by another, always the same one.

R crops of a video, B = videos x R clips of a batch, T frames, H W pixels, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths
from torch.utils.data import Dataset

from video_mae.augment import crop_box, crop_clip
from video_mae.config import DataConfig
from video_mae.data.sampling import Key, clip_indices, sample_rng, sample_seed
from video_mae.data.sources import Sources
from video_mae.decoding import Choose, Reading, VideoDecodeError, decode

MAX_ATTEMPTS = 20
# Draws of a sample: 0, 1, ... belong to its crops and masks, this one and those above to the video and the frames of each attempt.
FIRST_ATTEMPT = 2**31


@dataclass(frozen=True)
class Failure:
    """A video that could not be decoded, as the journal records it."""

    path: str
    decoder: str
    reason: str


@dataclass(frozen=True)
class Sample:
    """R crops of one video; index is the video really read, failures are those tried before it."""

    clip_RTHWC: torch.Tensor
    seeds_R: torch.Tensor
    label: int
    index: int
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Batch:
    """A micro-batch: clips uint8 (uint16 with data.value_range), mask seeds, labels and indices int64; a video's R crops are neighbours."""

    clip_BTHWC: torch.Tensor
    seeds_B: torch.Tensor
    label_B: torch.Tensor
    index_B: torch.Tensor
    failures: tuple[Failure, ...]

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, for `to` not to wait; the DataLoader calls it."""
        return replace(self, clip_BTHWC=self.clip_BTHWC.pin_memory(), seeds_B=self.seeds_B.pin_memory(), label_B=self.label_B.pin_memory())

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, copied without waiting; index_B stays where it is, only logs want it."""
        return replace(
            self,
            clip_BTHWC=self.clip_BTHWC.to(device, non_blocking=True),
            seeds_B=self.seeds_B.to(device, non_blocking=True),
            label_B=self.label_B.to(device, non_blocking=True),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Joins samples into a batch."""
    counts = torch.tensor([len(sample.seeds_R) for sample in samples])
    return Batch(
        clip_BTHWC=torch.cat([sample.clip_RTHWC for sample in samples]),
        seeds_B=torch.cat([sample.seeds_R for sample in samples]),
        label_B=torch.tensor([sample.label for sample in samples]).repeat_interleave(counts),
        index_B=torch.tensor([sample.index for sample in samples]).repeat_interleave(counts),
        failures=tuple(failure for sample in samples for failure in sample.failures),
    )


class ClipDataset(Dataset[Sample]):
    """Clips for pretraining: dataset[epoch, index] is a function of (seed, epoch, index) alone, whatever the worker, rank and batch."""

    def __init__(self, paths: LabeledVideoPaths | Sources, data: DataConfig, num_frames: int, height: int, width: int, seed: int,
                 in_channels: int = 3) -> None:
        self.paths = paths if isinstance(paths, Sources) else Sources([("data", data, paths)])
        self.data = data
        self.in_channels = in_channels
        self.num_frames = num_frames
        self.height = height
        self.width = width
        self.seed = seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> Sample:
        """Raises: RuntimeError when the video and its 19 substitutes cannot be decoded."""
        epoch, index = key
        failures: list[Failure] = []
        for attempt in range(MAX_ATTEMPTS):
            rng = sample_rng(self.seed, epoch, index, FIRST_ATTEMPT + attempt)
            source = self.paths.at(index)
            used = source.first + int(rng.integers(len(source.videos))) if attempt else index
            try:
                frames_THWC = self.read(used, self._choice(rng, source.config.stride))
            except VideoDecodeError as error:
                failures.append(Failure(error.path, error.decoder, error.reason))
                continue
            draws = range(self.data.clips_per_video)
            return Sample(
                clip_RTHWC=torch.stack([self._crop(frames_THWC, epoch, index, draw) for draw in draws]),
                seeds_R=torch.tensor([sample_seed(self.seed, epoch, index, draw) for draw in draws]),
                label=self.paths[used][1]["label"],
                index=used,
                failures=tuple(failures),
            )
        raise RuntimeError(f"data.source: {MAX_ATTEMPTS} videos in a row cannot be decoded, check the disk and the files; "
                           f"the last was {failures[-1].path}: {failures[-1].decoder}: {failures[-1].reason}")

    def read(self, index: int, choose: Choose) -> torch.Tensor:
        """The chosen frames of a video, frames_THWC, read as its source says. Raises: VideoDecodeError."""
        return torch.from_numpy(decode(self.paths[index][0], choose, Reading.of(self.data, self.in_channels, self.paths.at(index).config)))

    def _choice(self, rng: np.random.Generator, stride: int) -> Choose:
        return partial(clip_indices, num_frames=self.num_frames, stride=stride, rng=rng)

    def _crop(self, frames_THWC: torch.Tensor, epoch: int, index: int, draw: int) -> torch.Tensor:
        rng = sample_rng(self.seed, epoch, index, draw)
        box = crop_box(self.data, frames_THWC.shape[1], frames_THWC.shape[2], self.height, self.width, rng)
        clip_THWC = crop_clip(frames_THWC, box, (self.height, self.width), flip=self.data.flip and rng.random() < 0.5)
        # The clips of a run have one type; 257 = 65535 / 255.
        return clip_THWC.to(torch.uint16) * 257 if self.data.sixteen_bit and clip_THWC.dtype == torch.uint8 else clip_THWC
