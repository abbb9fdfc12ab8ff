"""Three ways from video files to batches of clips: ours, the official code's, pytorchvideo's. Each is measured in a process of its own.

Ours and the official one read the same frames and cut the same boxes out of them. Theirs are written from the descriptions of their
projects, with every choice in their favour.
Letters: B clips, T frames, H W pixels, C channels.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from video_mae.augment import crop_box
from video_mae.benchmark.memory import peak_growth
from video_mae.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from video_mae.data import ClipDataset, clip_indices, collate, read_annotations, sample_rng
from video_mae.data.dataset import FIRST_ATTEMPT
from video_mae.decoding import Choose

STAGES = ("decode", "crop", "floats", "collate")
SEED = 0


@dataclass(frozen=True)
class Job:
    """A list of videos (as data.source names it), and the clips to be made of them, one of each."""

    source: str
    num_frames: int
    stride: int
    side: int
    batch: int

    @property
    def data(self) -> DataConfig:
        return DataConfig(source=self.source, stride=self.stride)


class Stopwatch:
    """Seconds of each stage: a lap goes to a stage and begins where the last one ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


Pipeline = Callable[[Job, int, Stopwatch], Iterator[torch.Tensor]]
"""Batches of clips, one of each video, in one epoch; all the time of their making goes to the stopwatch."""


class _Watched(ClipDataset):
    def __init__(self, job: Job, watch: Stopwatch) -> None:
        super().__init__(read_annotations(job.data), job.data, job.num_frames, job.side, job.side, SEED)
        self.watch = watch

    def read(self, index: int, choose: Choose) -> torch.Tensor:
        frames_THWC = super().read(index, choose)
        self.watch.lap("decode")
        return frames_THWC


def ours(job: Job, epoch: int, watch: Stopwatch) -> Iterator[torch.Tensor]:
    """Our data set and collation: clip_BTHWC, uint8. The device makes floats of what the model needs."""
    dataset = _Watched(job, watch)
    for indices in _batches(len(dataset), job.batch):
        samples = []
        for index in indices:
            samples.append(dataset[epoch, index])
            watch.lap("crop")
        clip_BTHWC = collate(samples).clip_BTHWC
        watch.lap("collate")
        yield clip_BTHWC


def official(job: Job, epoch: int, watch: Stopwatch) -> Iterator[torch.Tensor]:
    """The official pretraining data set's: the clip's frames by decord, whole, one PIL image a frame, multi-scale crop and bilinear resize
    of each, a stack, float32, ImageNet normalisation: video_BCTHW. Source: VideoMAE (Tong et al., 2022)."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    videos = read_annotations(job.data)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for indices in _batches(len(videos), job.batch):
        clips = []
        for index in indices:
            reader = decord.VideoReader(videos[index][0], ctx=decord.cpu(0), num_threads=1)
            wanted = clip_indices(len(reader), job.num_frames, job.stride, sample_rng(SEED, epoch, index, FIRST_ATTEMPT))
            frames_THWC = reader.get_batch(wanted).asnumpy()
            watch.lap("decode")
            _, height, width, _ = frames_THWC.shape
            top, left, rows, columns = crop_box(job.data, height, width, job.side, job.side, sample_rng(SEED, epoch, index, 0))
            images = [Image.fromarray(frame_HWC).convert("RGB") for frame_HWC in frames_THWC]
            images = [image.crop((left, top, left + columns, top + rows)) for image in images]
            images = [image.resize((job.side, job.side), Image.Resampling.BILINEAR) for image in images]
            watch.lap("crop")
            video_TCHW = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
            clips.append(video_TCHW.float().div_(255).sub_(mean).div_(std).transpose(0, 1))
            watch.lap("floats")
        video_BCTHW = torch.stack(clips)
        watch.lap("collate")
        yield video_BCTHW


def pytorchvideo(job: Job, epoch: int, watch: Stopwatch) -> Iterator[torch.Tensor]:
    """LabeledVideoDataset with random clips, without audio, decord, and torchvision's transforms (its own cannot be imported any more):
    16 frames of each clip, a random resized crop, ImageNet normalisation: video_BCTHW, float32."""
    import decord
    from pytorchvideo.data import LabeledVideoDataset, RandomClipSampler

    videos = read_annotations(job.data)
    random.seed(epoch)
    torch.manual_seed(epoch)
    seconds = job.num_frames * job.stride / decord.VideoReader(videos[0][0], num_threads=1).get_avg_fps()
    crop, normalize = v2.RandomResizedCrop(job.side, antialias=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD, inplace=True)

    def transform(sample: dict[str, Any]) -> torch.Tensor:
        watch.lap("decode")
        video_CTHW = sample["video"]
        wanted = torch.linspace(0, video_CTHW.shape[1] - 1, job.num_frames).long()
        video_TCHW = crop(video_CTHW[:, wanted].transpose(0, 1))
        watch.lap("crop")
        video_CTHW = normalize(video_TCHW.div_(255)).transpose(0, 1)
        watch.lap("floats")
        return video_CTHW

    dataset = iter(LabeledVideoDataset(videos, RandomClipSampler(clip_duration=seconds),  # pyright: ignore[reportArgumentType]
                                       torch.utils.data.SequentialSampler, transform, decode_audio=False, decoder="decord"))
    decord.bridge.set_bridge("torch")  # for the whole process, which is how it wants its frames
    try:
        for indices in _batches(len(videos), job.batch):
            video_BCTHW = torch.stack([next(dataset) for _ in indices])  # pyright: ignore[reportArgumentType]
            watch.lap("collate")
            yield video_BCTHW
    finally:
        decord.bridge.set_bridge("native")


PIPELINES: dict[str, Pipeline] = {"ours": ours, "official (decord, PIL, floats)": official,
                                  "pytorchvideo LabeledVideoDataset": pytorchvideo}


@dataclass(frozen=True)
class Found:
    """What a pipeline says of itself: its clips, the memory of one epoch, or why it has none."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    bytes_a_clip: int = 0
    peak_bytes: int | None = None
    reason: str = ""


def serve(name: str, job: Job, core: int, connection: Connection) -> None:
    """The process of a pipeline, on one core: sends what it has `Found` in a first epoch, then for every epoch that it receives the
    milliseconds a clip of its stages. A `Found` with a reason is its last word."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        for answer in _answers(PIPELINES[name], job, connection):
            connection.send(answer)
    except Exception as error:  # whatever a competitor raises is its row's problem
        connection.send(Found(reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"))


def _answers(pipeline: Pipeline, job: Job, connection: Connection) -> Iterator[Found | dict[str, float]]:
    batches: list[Found] = []

    def first_epoch() -> None:
        for batch in pipeline(job, 0, Stopwatch()):
            batches.append(Found(tuple(batch.shape[1:]), str(batch.dtype).removeprefix("torch."), batch[0].nbytes))

    peak_bytes = peak_growth(first_epoch, torch.device("cpu"))
    yield replace(batches[0], peak_bytes=peak_bytes)
    while True:
        epoch, watch = connection.recv(), Stopwatch()
        num_clips = sum(map(len, pipeline(job, epoch, watch)))
        yield {stage: 1e3 * seconds / num_clips for stage, seconds in watch.seconds.items()}


def _batches(num_videos: int, batch: int) -> Iterator[Sequence[int]]:
    for first in range(0, num_videos, batch):
        yield range(first, min(first + batch, num_videos))
