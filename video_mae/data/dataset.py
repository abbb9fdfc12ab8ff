"""Samples and batches, to pretrain, to fine-tune and to validate: decode once, crop R times, or
leave that to the device; a broken video is replaced by another, always the same.

R crops of a video, B = videos x R clips of a batch, T frames, H W pixels, C channels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from video_mae.config import ClassifierConfig, DataConfig, FinetuneConfig, ModelConfig
from video_mae.data.augment import crop_box, strengthen_clip
from video_mae.data.device_crop import Crop, CropSize, UncutClips, cut, for_trainer
from video_mae.data.sampling import Key, sample_rng, sample_seed
from video_mae.data.sources import Sources
from video_mae.data.videos import VideoList
from video_mae.data.workers import Costs, plan_workers
from video_mae.decoding import Choose, Decoded, Reading, VideoDecodeError, read_clip
from video_mae.decoding.choices import (
    Wanted,
    clip_indices,
    dense_indices,
    part_indices,
    uniform_indices,
)

MAX_ATTEMPTS = 20
# Draws of a sample: 0, 1, ... belong to its crops and masks, this one and those above to the video
# and the frames of each attempt.
FIRST_ATTEMPT = 2**31


class UndecodableError(ValueError):
    """A video and all its substitutes cannot be decoded: one line, also where a DataLoader has put
    a traceback before it.
    """

    def __str__(self) -> str:
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].rstrip()


class Failure(NamedTuple):
    """A video that could not be decoded, or that another decoder had to read, as the journal
    records it: the words of a VideoDecodeError.
    """

    path: str
    decoder: str
    reason: str


@dataclass
class Sample:
    """R crops of one video, `clips`; index is the video really read, failures are those tried
    before it.

    Where `crops` are given they are still to be cut, and the only clip is the whole frames.
    fallback: where the video was not read by the run's decoder.
    """

    clips: tuple[Tensor, ...]
    seeds_R: Tensor
    label: int
    index: int
    failures: tuple[Failure, ...] = ()
    fallback: Failure | None = None
    costs: Costs = Costs()
    crops: tuple[Crop, ...] = ()
    crop_size: CropSize | None = None


@dataclass(kw_only=True)
class Batch:
    """A micro-batch: clips uint8 (uint16 with data.value_range), mask seeds, labels and indices
    int64; a video's R crops are neighbours.

    index_B and host_seeds_B stay on the host. Clips that the device cuts are UncutClips until `to`
    brings them there. costs: of all its clips together.
    """

    clip_BTHWC: Tensor
    seeds_B: Tensor
    label_B: Tensor
    index_B: Tensor
    host_seeds_B: Tensor
    failures: tuple[Failure, ...]
    fallbacks: tuple[Failure, ...] = ()
    costs: Costs = Costs()

    @property
    def on_device(self) -> tuple[Tensor, ...]:
        """The tensors that `to` moves."""
        return self.clip_BTHWC, self.seeds_B, self.label_B

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, for `to` not to wait."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device, copied without waiting, its clips cut there."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        clip_BTHWC, seeds_B, label_B = map(move, self.on_device)
        return replace(self, clip_BTHWC=clip_BTHWC, seeds_B=seeds_B, label_B=label_B)


def collate(samples: Sequence[Sample]) -> Batch:
    """Joins samples into a batch."""
    begin = time.perf_counter()
    seeds_B = torch.cat([sample.seeds_R for sample in samples])
    clips = [clip for sample in samples for clip in sample.clips]
    size, num_crops = samples[0].crop_size, len(samples[0].seeds_R)
    if size is not None:
        clip_BTHWC: Any = UncutClips.gather(clips, [sample.crops for sample in samples], size)
    else:
        clip_BTHWC = for_trainer((len(clips), *clips[0].shape), clips[0].dtype)
        torch.stack(clips, out=clip_BTHWC)
    collating = Costs(collating=time.perf_counter() - begin)
    return Batch(
        clip_BTHWC=clip_BTHWC,
        seeds_B=seeds_B,
        host_seeds_B=seeds_B,
        label_B=torch.tensor([sample.label for sample in samples]).repeat_interleave(num_crops),
        index_B=torch.tensor([sample.index for sample in samples]).repeat_interleave(num_crops),
        failures=tuple(failure for sample in samples for failure in sample.failures),
        fallbacks=tuple(sample.fallback for sample in samples if sample.fallback is not None),
        costs=Costs.total([*(sample.costs for sample in samples), collating]),
    )


@dataclass(eq=False)
class ClipDataset(Dataset[Sample]):
    """Clips for pretraining: dataset[epoch, index] is a function of (seed, epoch, index) alone,
    whatever the worker, rank and batch.

    classifier: how frames are chosen and clips resized to be classified; None: to pretrain.
    finish: what a worker does to a clip that is cut, with a seed.
    """

    videos: InitVar[VideoList | Sources]
    data: DataConfig
    num_frames: int
    height: int
    width: int
    seed: int
    in_channels: int = 3
    classifier: ClassifierConfig | None = None
    finish: Callable[..., Tensor] | None = None

    def __post_init__(self, videos: VideoList | Sources) -> None:
        is_list = isinstance(videos, VideoList)
        self.paths = Sources([("data", self.data, videos)]) if is_list else videos
        antialias = self.classifier is None or self.classifier.antialias
        self.size = CropSize(
            self.num_frames, self.height, self.width, self.data.sixteen_bit, antialias
        )
        self.threads = plan_workers(self.data.num_workers, self.data.decoder_threads).threads

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> Sample:
        """Raises: UndecodableError for the video and its 19 substitutes."""
        epoch, index = key
        begin, failures = time.perf_counter(), list[Failure]()
        for attempt in range(MAX_ATTEMPTS):
            rng = sample_rng(self.seed, epoch, index, FIRST_ATTEMPT + attempt)
            source = self.paths.at(index)
            used = source.first + int(rng.integers(len(source.videos))) if attempt else index
            try:
                decoded = self.read(used, self._choice(rng, source.config.stride))
            except VideoDecodeError as error:
                failures.append(Failure(*error.args))
                continue
            done = time.perf_counter()
            sample = self.sample(decoded, epoch, index, used)
            reading = min(decoded.waiting_seconds, done - begin)
            augmenting = time.perf_counter() - done
            sample.failures = tuple(failures)
            sample.costs = Costs(reading, done - begin - reading, augmenting)
            return sample
        raise UndecodableError(
            f"data.source: {MAX_ATTEMPTS} videos in a row cannot be decoded, check the disk and "
            f"the files; the last was {': '.join(failures[-1])}"
        )

    def read(self, index: int, choose: Wanted) -> Decoded:
        """The chosen frames of a video, read as its source says. Raises: VideoDecodeError."""
        reading = Reading.of(self.data, self.in_channels, self.paths.at(index).config, self.threads)
        return read_clip(self.paths[index][0], choose, reading)

    def sample(self, decoded: Decoded, epoch: int, index: int, used: int) -> Sample:
        """The crops of the frames of the video `used`, for the place (epoch, index) in the
        stream.
        """
        data, frames_THWC = self.data, torch.from_numpy(decoded.clip_THWC)
        _, height, width, _ = frames_THWC.shape
        seeds, crops = list[int](), list[Crop]()
        for draw in range(data.clips_per_video):
            seeds.append(sample_seed(self.seed, epoch, index, draw))
            rng = sample_rng(self.seed, epoch, index, draw)
            box = crop_box(data, height, width, self.height, self.width, rng)
            crops.append(Crop(box, data.flip and bool(rng.random() < 0.5)))
        place, info = self.paths[used]
        sample = Sample((frames_THWC,), torch.tensor(seeds), info["label"], used)
        if decoded.fallback:
            sample.fallback = Failure(str(place), decoded.decoder, decoded.fallback)
        if data.crop_where == "device":
            sample.crops = tuple(crops)
            sample.crop_size = self.size
        else:
            clips = [cut(frames_THWC, crop, self.size) for crop in crops]
            if self.finish is not None:
                pairs = zip(clips, seeds, strict=True)
                clips = [self.finish(clip_THWC, seed=seed) for clip_THWC, seed in pairs]
            sample.clips = tuple(clips)
        return sample

    def _choice(self, rng: np.random.Generator, stride: int) -> Choose:
        if self.classifier is not None:
            return frame_choice(self.classifier, self.num_frames, rng)
        return partial(
            clip_indices,
            num_frames=self.num_frames,
            stride=stride,
            rng=rng,
            reach_end=self.data.reach_end,
        )


def frame_choice(
    classifier: ClassifierConfig, num_frames: int, rng: np.random.Generator | None = None
) -> Choose:
    """How the frames of a clip are chosen: drawn with rng, the middle without."""
    if classifier.sampling == "dense":
        return partial(dense_indices, num_frames=num_frames, stride=classifier.stride, rng=rng)
    if classifier.sampling == "uniform":
        return partial(uniform_indices, num_frames=num_frames, rng=rng)
    short = "all" if classifier.sampling == "parts_v2" else "first"
    return partial(part_indices, num_frames=num_frames, short=short, rng=rng)


def labelled_clips(videos: VideoList | Sources, config: FinetuneConfig) -> ClipDataset:
    """Clips to train on: dataset[epoch, index] is a function of (seed, epoch, index) alone, and so
    is what augments it.
    """
    c, augment, finish = config.model, config.augment, None
    if augment.where == "worker":
        finish = partial(strengthen_clip, config=augment, mean=c.mean, std=c.std)
    return ClipDataset(
        videos,
        config.data,
        c.num_frames,
        c.height,
        c.width,
        config.seed,
        c.in_channels,
        config.classifier,
        finish,
    )


class MiddleClips(Dataset[Sample]):
    """Clips to measure with: dataset[index] is the middle of a video, its central crop, nothing
    drawn; its seed depends on the index alone. choose: the frames.

    A video that cannot be decoded, and the index -1 that fills a batch up, give a black clip with
    index -1: it does not count.
    """

    def __init__(
        self,
        videos: VideoList | Sources,
        data: DataConfig,
        model: ModelConfig,
        choose: Choose,
        classifier: ClassifierConfig | None = None,
    ) -> None:
        plain = replace(data, clips_per_video=1, crop="center", flip=False, crop_where="worker")
        size = model.num_frames, model.height, model.width
        self.clips = ClipDataset(videos, plain, *size, 0, model.in_channels, classifier)
        self.choose = choose

    def __getitem__(self, index: int) -> Sample:
        clips, failures = self.clips, list[Failure]()
        if index >= 0:
            try:
                return clips.sample(clips.read(index, self.choose), 0, index, index)
            except VideoDecodeError as error:
                failures.append(Failure(*error.args))
        black_THWC = torch.zeros(*clips.size[:3], clips.in_channels, dtype=clips.size.dtype)
        return Sample((black_THWC,), torch.zeros(1, dtype=torch.int64), 0, -1, tuple(failures))


class ValidationClips(MiddleClips):
    """The validation clips of a fine-tuning run."""

    def __init__(self, videos: VideoList, config: FinetuneConfig) -> None:
        choose = frame_choice(config.classifier, config.model.num_frames)
        super().__init__(videos, config.data, config.model, choose, config.classifier)


def share_batches(num_videos: int, batch: int, rank: int, world_size: int) -> list[list[int]]:
    """Batches of one rank that visit `num_videos` once over all ranks, equally many and equally
    long on each: -1 fills them up.
    """
    turns = -(-num_videos // (batch * world_size))
    index = np.arange(turns * world_size * batch).reshape(turns, world_size, batch)[:, rank]
    return np.where(index < num_videos, index, -1).tolist()
