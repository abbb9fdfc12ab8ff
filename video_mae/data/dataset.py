"""Samples and batches: decode once, crop R times, or leave that to the device; a broken video is
replaced by another, always the same.

R crops of a video, B = videos x R clips of a batch, T frames, H W pixels, C channels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

from video_mae.config import DataConfig
from video_mae.data.advice import Costs
from video_mae.data.augment import crop_box, crop_clip
from video_mae.data.device_crop import Crop, CropSize, UncutClips, for_trainer
from video_mae.data.sampling import Key, sample_rng, sample_seed
from video_mae.data.sources import Sources
from video_mae.data.videos import VideoList
from video_mae.data.workers import plan_workers
from video_mae.decoding import Choose, Decoded, Reading, VideoDecodeError, read_clip
from video_mae.decoding.choices import clip_indices

MAX_ATTEMPTS = 20
# Draws of a sample: 0, 1, ... belong to its crops and masks, this one and those above to the video
# and the frames of each attempt.
FIRST_ATTEMPT = 2**31


@dataclass(frozen=True)
class Failure:
    """A video that could not be decoded, or that another decoder had to read, as the journal
    records it.
    """

    path: str
    decoder: str
    reason: str

    @classmethod
    def of(cls, error: VideoDecodeError) -> "Failure":
        """What went wrong."""
        return cls(error.path, error.decoder, error.reason)


@dataclass(frozen=True)
class Sample:
    """R crops of one video, `clips`; index is the video really read, failures are those tried
    before it.

    Where `crops` are given they are still to be cut, and the only clip is the whole frames.
    fallback: where the video was not read by the run's decoder.
    """

    clips: tuple[torch.Tensor, ...]
    seeds_R: torch.Tensor
    label: int
    index: int
    failures: tuple[Failure, ...]
    fallback: Failure | None = None
    costs: Costs = Costs()
    crops: tuple[Crop, ...] = ()
    crop_size: CropSize | None = None

    @property
    def clip_RTHWC(self) -> torch.Tensor:  # noqa: N802  (shape letters)
        """The clips as one tensor."""
        return torch.stack(self.clips)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: clips uint8 (uint16 with data.value_range), mask seeds, labels and indices
    int64; a video's R crops are neighbours.

    index_B and host_seeds_B stay on the host. costs: of all its clips together.
    """

    clip_BTHWC: torch.Tensor
    seeds_B: torch.Tensor
    label_B: torch.Tensor
    index_B: torch.Tensor
    host_seeds_B: torch.Tensor
    failures: tuple[Failure, ...]
    fallbacks: tuple[Failure, ...] = ()
    costs: Costs = Costs()

    @property
    def on_device(self) -> tuple[torch.Tensor, ...]:
        """The tensors that `to` moves."""
        return self.clip_BTHWC, self.seeds_B, self.label_B

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, for `to` not to wait."""
        return replace(
            self,
            clip_BTHWC=self.clip_BTHWC.pin_memory(),
            seeds_B=self.seeds_B.pin_memory(),
            label_B=self.label_B.pin_memory(),
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, copied without waiting."""
        return replace(
            self,
            clip_BTHWC=self.clip_BTHWC.to(device, non_blocking=True),
            seeds_B=self.seeds_B.to(device, non_blocking=True),
            label_B=self.label_B.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class UncutBatch(Batch):
    """A micro-batch whose clips are cut where `to` brings it; until then clip_BTHWC is empty."""

    uncut: UncutClips

    def pin_memory(self) -> "UncutBatch":
        """The batch in page-locked memory, for `to` not to wait."""
        return replace(
            self,
            uncut=self.uncut.pin_memory(),
            seeds_B=self.seeds_B.pin_memory(),
            label_B=self.label_B.pin_memory(),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, its clips cut there."""
        rest = {f.name: getattr(self, f.name) for f in fields(Batch)}
        return replace(Batch(**rest).to(device), clip_BTHWC=self.uncut.to(device).cut())


def collate(samples: Sequence[Sample]) -> Batch:
    """Joins samples into a batch."""
    begin = time.perf_counter()
    counts = torch.tensor([len(sample.seeds_R) for sample in samples])
    seeds_B, size = torch.cat([sample.seeds_R for sample in samples]), samples[0].crop_size
    rest = {
        "seeds_B": seeds_B,
        "host_seeds_B": seeds_B,
        "label_B": torch.tensor([sample.label for sample in samples]).repeat_interleave(counts),
        "index_B": torch.tensor([sample.index for sample in samples]).repeat_interleave(counts),
        "failures": tuple(failure for sample in samples for failure in sample.failures),
        "fallbacks": tuple(sample.fallback for sample in samples if sample.fallback is not None),
    }
    if size is None:
        clips = [clip for sample in samples for clip in sample.clips]
        clip_BTHWC = for_trainer((len(clips), *clips[0].shape), clips[0].dtype)
        batch = Batch(clip_BTHWC=torch.stack(clips, out=clip_BTHWC), **rest)
    else:
        uncut = UncutClips.gather(
            [sample.clips[0] for sample in samples], [sample.crops for sample in samples], size
        )
        batch = UncutBatch(clip_BTHWC=torch.empty(0, dtype=torch.uint8), uncut=uncut, **rest)
    costs = Costs.total(
        [*(sample.costs for sample in samples), Costs(collating=time.perf_counter() - begin)]
    )
    return replace(batch, costs=costs)


class ClipDataset(Dataset[Sample]):
    """Clips for pretraining: dataset[epoch, index] is a function of (seed, epoch, index) alone,
    whatever the worker, rank and batch.
    """

    antialias = True
    """Of the pixels that resizing leaves out, whether they are averaged in, or not looked at."""

    def __init__(
        self,
        paths: VideoList | Sources,
        data: DataConfig,
        num_frames: int,
        height: int,
        width: int,
        seed: int,
        in_channels: int = 3,
    ) -> None:
        self.paths = paths if isinstance(paths, Sources) else Sources([("data", data, paths)])
        self.data = data
        self.in_channels = in_channels
        self.num_frames = num_frames
        self.height = height
        self.width = width
        self.seed = seed
        self.threads = plan_workers(data.num_workers, data.decoder_threads).threads

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> Sample:
        """Raises: RuntimeError when the video and its 19 substitutes cannot be decoded."""
        epoch, index = key
        failures: list[Failure] = []
        reading = decoding = 0.0
        for attempt in range(MAX_ATTEMPTS):
            rng = sample_rng(self.seed, epoch, index, FIRST_ATTEMPT + attempt)
            source = self.paths.at(index)
            used = source.first + int(rng.integers(len(source.videos))) if attempt else index
            begin = time.perf_counter()
            try:
                decoded = self.read(used, self._choice(rng, source.config.stride))
            except VideoDecodeError as error:
                failures.append(Failure.of(error))
                decoding += time.perf_counter() - begin
                continue
            done = time.perf_counter()
            waiting = min(decoded.waiting_seconds, done - begin)
            reading, decoding = reading + waiting, decoding + done - begin - waiting
            sample = self.sample(decoded, epoch, index, used)
            return replace(
                sample,
                failures=tuple(failures),
                costs=Costs(reading, decoding, time.perf_counter() - done),
            )
        raise RuntimeError(
            f"data.source: {MAX_ATTEMPTS} videos in a row cannot be decoded, check the disk and the files; "
            f"the last was {failures[-1].path}: {failures[-1].decoder}: {failures[-1].reason}"
        )

    def read(self, index: int, choose: Choose) -> Decoded:
        """The chosen frames of a video, read as its source says. Raises: VideoDecodeError."""
        reading = Reading.of(self.data, self.in_channels, self.paths.at(index).config, self.threads)
        return read_clip(self.paths[index][0], choose, reading)

    def sample(self, decoded: Decoded, epoch: int, index: int, used: int) -> Sample:
        """The crops of the frames of the video `used`, for the place (epoch, index) of the stream."""
        frames_THWC, draws = torch.from_numpy(decoded.clip_THWC), range(self.data.clips_per_video)
        crops = tuple(self._draw(frames_THWC, epoch, index, draw) for draw in draws)
        place, label = self.paths[used]
        fallback = (
            Failure(str(place), decoded.decoder, decoded.fallback) if decoded.fallback else None
        )
        seeds_R = torch.tensor([sample_seed(self.seed, epoch, index, draw) for draw in draws])
        sample = Sample((frames_THWC,), seeds_R, label["label"], used, (), fallback)
        if self.data.crop_where == "device":
            size = CropSize(
                self.num_frames, self.height, self.width, self.data.sixteen_bit, self.antialias
            )
            return replace(sample, crops=crops, crop_size=size)
        return replace(
            sample,
            clips=tuple(
                self._finish(self._cut(frames_THWC, crop), epoch, index, draw)
                for draw, crop in enumerate(crops)
            ),
        )

    def _choice(self, rng: np.random.Generator, stride: int) -> Choose:
        return partial(
            clip_indices,
            num_frames=self.num_frames,
            stride=stride,
            rng=rng,
            reach_end=self.data.reach_end,
        )

    def _draw(self, frames_THWC: torch.Tensor, epoch: int, index: int, draw: int) -> Crop:
        rng = sample_rng(self.seed, epoch, index, draw)
        box = crop_box(
            self.data, frames_THWC.shape[1], frames_THWC.shape[2], self.height, self.width, rng
        )
        return Crop(box, self.data.flip and bool(rng.random() < 0.5))

    def _cut(self, frames_THWC: torch.Tensor, crop: Crop) -> torch.Tensor:
        clip_THWC = crop_clip(
            frames_THWC, crop.box, (self.height, self.width), crop.flip, antialias=self.antialias
        )
        # The clips of a run have one type; 257 = 65535 / 255.
        return (
            clip_THWC.to(torch.uint16) * 257
            if self.data.sixteen_bit and clip_THWC.dtype == torch.uint8
            else clip_THWC
        )

    def _finish(self, clip_THWC: torch.Tensor, epoch: int, index: int, draw: int) -> torch.Tensor:
        """What a worker does to a clip that is cut."""
        return clip_THWC
