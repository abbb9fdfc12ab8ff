"""Ways from video files to batches of clips: ours in all its forms, the official code's,
pytorchvideo's, and decoding alone.

Each is measured in a process of its own, on one core.

Ours, the official one and decoding alone read the same frames; ours and the official one cut the
same boxes out of them. Theirs are written from the descriptions of their projects.
Letters: B clips, T frames, H W pixels, C channels.
"""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from video_mae.benchmark.memory import peak_growth, peak_of_children
from video_mae.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from video_mae.data import ClipDataset, clip_indices, collate, read_annotations, sample_rng
from video_mae.data.augment import crop_box
from video_mae.data.dataset import FIRST_ATTEMPT
from video_mae.data.device_crop import UncutClips
from video_mae.data.workers import keep_memory
from video_mae.decoding import Choose, Decoded, resolve_decoder

STAGES = ("decode", "crop", "floats", "collate")
SEED = 0
Form = Literal["plain", "video", "frames"]


@dataclass(frozen=True)
class Job:
    """The same videos as plain files, as packed videos and as packed frames (as data.source names
    them), and the clips to be made.
    """

    sources: Mapping[Form, str]
    num_frames: int
    stride: int
    side: int
    batch: int


class Stopwatch:
    """Seconds of each stage: a lap goes to a stage and begins where the last one ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


class Made(NamedTuple):
    """A batch: its clips, or the bytes of which the device makes them, and how many clips they are."""

    pixels: torch.Tensor
    num_clips: int


Pipeline = Callable[["Contender", Job, int, Stopwatch], Iterator[Made]]
"""Batches of clips, of each video as many as the contender has crops, in one epoch; all the time of
their making goes to the stopwatch.
"""


@dataclass(frozen=True)
class Contender:
    """A row of the benchmark."""

    name: str
    pipeline: Pipeline
    form: Form = "plain"
    decoder: Literal["pyav", "decord", "torchcodec"] = "pyav"
    crops: int = 1
    crop_where: Literal["worker", "device"] = "worker"

    def data(self, job: Job) -> DataConfig:
        """The configuration of the loader; packed frames lie `stride` apart already."""
        return DataConfig(
            source=job.sources[self.form],
            stride=1 if self.form == "frames" else job.stride,
            decoder=self.decoder,
            clips_per_video=self.crops,
            crop_where=self.crop_where,
        )


class _Watched(ClipDataset):
    def __init__(self, data: DataConfig, job: Job, watch: Stopwatch) -> None:
        super().__init__(read_annotations(data), data, job.num_frames, job.side, job.side, SEED)
        self.watch = watch

    def read(self, index: int, choose: Choose) -> Decoded:
        decoded = super().read(index, choose)
        self.watch.lap("decode")
        return decoded


def ours(contender: Contender, job: Job, epoch: int, watch: Stopwatch) -> Iterator[Made]:
    """Our data set and collation: clip_BTHWC, uint8, or whole frames where the device cuts. It
    makes floats of what the model needs.
    """
    dataset = _Watched(contender.data(job), job, watch)
    for indices in _batches(len(dataset), max(job.batch // contender.crops, 1)):
        samples = []
        for index in indices:
            samples.append(dataset[epoch, index])
            watch.lap("crop")
        batch = collate(samples)
        clips: Any = batch.clip_BTHWC
        watch.lap("collate")
        yield Made(
            clips.bytes_N if isinstance(clips, UncutClips) else clips,
            len(batch.seeds_B),
        )


def bare(contender: Contender, job: Job, epoch: int, watch: Stopwatch) -> Iterator[Made]:
    """Decoding alone, as the library's own documentation does it: the same frames, whole,
    frames_THWC of one video at a time.
    """
    videos = read_annotations(contender.data(job))
    for index in range(len(videos)):
        rng = sample_rng(SEED, epoch, index, FIRST_ATTEMPT)
        frames_THWC = BARE[contender.decoder](
            videos[index][0],
            lambda total, rng=rng: clip_indices(total, job.num_frames, job.stride, rng),
        )
        watch.lap("decode")
        yield Made(torch.from_numpy(frames_THWC), 1)


def _bare_decord(path: str, choose: Choose) -> np.ndarray:
    import decord

    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(choose(len(reader))).asnumpy()


def _bare_pyav(path: str, choose: Choose) -> np.ndarray:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stamps = sorted(
            packet.pts
            for packet in container.demux(stream)
            if packet.size and packet.pts is not None
        )
        wanted = [stamps[index] for index in choose(len(stamps))]
        container.seek(wanted[0], stream=stream)  # to the key frame before it
        frames: dict[Any, np.ndarray] = {}
        for frame in container.decode(stream):
            if frame.pts in wanted:
                frames[frame.pts] = frame.to_ndarray(format="rgb24")
            if frame.pts is not None and frame.pts >= wanted[-1]:
                break
        return np.stack([frames[stamp] for stamp in wanted])


def _bare_torchcodec(path: str, choose: Choose) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder  # pyright: ignore[reportMissingImports]  (optional)

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    return decoder.get_frames_at(choose(len(decoder)).tolist()).data.numpy()


BARE: dict[str, Callable[[str, Choose], np.ndarray]] = {
    "decord": _bare_decord,
    "pyav": _bare_pyav,
    "torchcodec": _bare_torchcodec,
}


def official(contender: Contender, job: Job, epoch: int, watch: Stopwatch) -> Iterator[Made]:
    """The official pretraining data set's: the clip's frames by decord, whole, one PIL image a
    frame, multi-scale crop and bilinear resize of each, a stack along the channels, which becomes
    float32, is divided by 255 and normalised channel by channel: video_BCTHW. Source: VideoMAE
    (Tong et al., 2022).
    """
    data, videos = contender.data(job), read_annotations(contender.data(job))
    for indices in _batches(len(videos), job.batch):
        clips = []
        for index in indices:
            rng = sample_rng(SEED, epoch, index, FIRST_ATTEMPT)
            frames_THWC = _bare_decord(
                videos[index][0],
                lambda total, rng=rng: clip_indices(total, job.num_frames, job.stride, rng),
            )
            watch.lap("decode")
            _, height, width, _ = frames_THWC.shape
            top, left, rows, columns = crop_box(
                data, height, width, job.side, job.side, sample_rng(SEED, epoch, index, 0)
            )
            images = [Image.fromarray(frame_HWC).convert("RGB") for frame_HWC in frames_THWC]
            images = [image.crop((left, top, left + columns, top + rows)) for image in images]
            images = [
                image.resize((job.side, job.side), Image.Resampling.BILINEAR) for image in images
            ]
            watch.lap("crop")
            stack_HWS = np.concatenate([np.asarray(image) for image in images], axis=2)
            values_SHW = torch.from_numpy(stack_HWS).permute(2, 0, 1).contiguous().float().div(255)
            for channel, mean, std in zip(
                values_SHW, IMAGENET_MEAN * len(images), IMAGENET_STD * len(images), strict=True
            ):
                channel.sub_(mean).div_(std)
            clips.append(values_SHW.view(len(images), 3, job.side, job.side).transpose(0, 1))
            watch.lap("floats")
        video_BCTHW = torch.stack(clips)
        watch.lap("collate")
        yield Made(video_BCTHW, len(video_BCTHW))


def pytorchvideo(contender: Contender, job: Job, epoch: int, watch: Stopwatch) -> Iterator[Made]:
    """LabeledVideoDataset with random clips, without audio, decord, and torchvision's transforms
    (its own cannot be imported any more): 16 frames of each clip, a random resized crop, ImageNet
    normalisation: video_BCTHW, float32.
    """
    import decord
    from pytorchvideo.data import LabeledVideoDataset, RandomClipSampler

    videos = read_annotations(contender.data(job))
    random.seed(epoch)
    torch.manual_seed(epoch)
    seconds = (
        job.num_frames * job.stride / decord.VideoReader(videos[0][0], num_threads=1).get_avg_fps()
    )
    crop, normalize = (
        v2.RandomResizedCrop(job.side, antialias=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD, inplace=True),
    )

    def transform(sample: dict[str, Any]) -> torch.Tensor:
        watch.lap("decode")
        video_CTHW = sample["video"]
        wanted = torch.linspace(0, video_CTHW.shape[1] - 1, job.num_frames).long()
        video_TCHW = crop(video_CTHW[:, wanted].transpose(0, 1))
        watch.lap("crop")
        video_CTHW = normalize(video_TCHW.div_(255)).transpose(0, 1)
        watch.lap("floats")
        return video_CTHW

    dataset = iter(
        LabeledVideoDataset(
            videos,  # pyright: ignore[reportArgumentType]
            RandomClipSampler(clip_duration=seconds),  # pyright: ignore[reportArgumentType]
            torch.utils.data.SequentialSampler,
            transform,
            decode_audio=False,
            decoder="decord",
        )
    )
    decord.bridge.set_bridge("torch")  # for the whole process, which is how it wants its frames
    try:
        for indices in _batches(len(videos), job.batch):
            video_BCTHW = torch.stack([next(dataset) for _ in indices])  # pyright: ignore[reportArgumentType]
            watch.lap("collate")
            yield Made(video_BCTHW, len(video_BCTHW))
    finally:
        decord.bridge.set_bridge("native")


CONTENDERS = (
    Contender("ours", ours),
    Contender("ours, 4 crops", ours, crops=4),
    Contender("ours, decord", ours, decoder="decord"),
    Contender("ours, decord, 4 crops", ours, decoder="decord", crops=4),
    Contender("ours, torchcodec", ours, decoder="torchcodec"),
    Contender("ours, packed video", ours, "video"),
    Contender("ours, packed video, 4 crops", ours, "video", crops=4),
    Contender(
        "ours, packed video, 4 crops on the device", ours, "video", crops=4, crop_where="device"
    ),
    Contender("ours, packed video, decord", ours, "video", "decord"),
    Contender("ours, packed frames", ours, "frames"),
    Contender("ours, packed frames, 4 crops", ours, "frames", crops=4),
    Contender("ours, packed frames, crop on the device", ours, "frames", crop_where="device"),
    Contender("pyav alone", bare),
    Contender("decord alone", bare, decoder="decord"),
    Contender("torchcodec alone", bare, decoder="torchcodec"),
    Contender("official (decord, PIL, floats)", official, decoder="decord"),
    Contender("pytorchvideo LabeledVideoDataset", pytorchvideo, decoder="decord"),
)
"""All rows; the first is what training does where nothing is set."""


@dataclass(frozen=True)
class Found:
    """What a pipeline says of itself: its clips, the memory of one epoch, or why it has none."""

    dtype: str = ""
    bytes_a_clip: int = 0
    peak_bytes: int | None = None
    reason: str = ""


def serve(contender: Contender, job: Job, core: int, connection: Connection) -> None:
    """The process of a pipeline, on one core: sends what it has `Found` in a first epoch, then for
    every epoch that it receives the milliseconds a clip of its stages. A `Found` with a reason is
    its last word.
    """
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    if contender.pipeline is ours:
        keep_memory()  # as a worker does
    try:
        for answer in _answers(contender, job, connection):
            connection.send(answer)
    except Exception as error:  # whatever a competitor raises is its row's problem
        connection.send(
            Found(reason=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        )


def _answers(
    contender: Contender, job: Job, connection: Connection
) -> Iterator[Found | dict[str, float]]:
    batches: list[Found] = []

    def first_epoch() -> None:
        for batch in contender.pipeline(contender, job, 0, Stopwatch()):
            batches.append(
                Found(
                    str(batch.pixels.dtype).removeprefix("torch."),
                    batch.pixels.nbytes // batch.num_clips,
                )
            )

    if contender.pipeline is not pytorchvideo:
        resolve_decoder(contender.decoder)
    peak_bytes = peak_growth(first_epoch, torch.device("cpu"))
    yield replace(
        batches[0], peak_bytes=None if peak_bytes is None else peak_bytes + peak_of_children()
    )
    while True:
        epoch, watch = connection.recv(), Stopwatch()
        num_clips = sum(
            batch.num_clips for batch in contender.pipeline(contender, job, epoch, watch)
        )
        yield {stage: 1e3 * seconds / num_clips for stage, seconds in watch.seconds.items()}


def _batches(num_videos: int, batch: int) -> Iterator[Sequence[int]]:
    for first in range(0, num_videos, batch):
        yield range(first, min(first + batch, num_videos))
