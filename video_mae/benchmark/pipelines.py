"""Ways from video files to batches of clips: ours in all its forms, the official code's,
pytorchvideo's, and decoding alone.

Ours, the official one and decoding alone read the same frames; ours and the official one cut the
same boxes out of them. Theirs are written from the descriptions of their projects.
Letters: B clips, T frames, H W pixels, C channels.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from video_mae.benchmark.clock import Stopwatch, peak_growth, peak_of_children
from video_mae.benchmark.record import dtype_name, reason_of
from video_mae.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from video_mae.data import ClipDataset, clip_indices, collate, read_annotations, sample_rng
from video_mae.data.augment import crop_box
from video_mae.data.dataset import FIRST_ATTEMPT
from video_mae.data.device_crop import UncutClips
from video_mae.data.workers import keep_memory
from video_mae.decoding import Choose, Decoded, resolve_decoder
from video_mae.decoding.choices import Wanted

STAGES = ("decode", "crop", "floats", "collate")
SEED = 0
SourceForm = Literal["plain", "video", "frames"]
Batches = Iterator[tuple[torch.Tensor, int]]
"""Clips, or the bytes of which the device makes them, and how many clips they are."""


@dataclass(frozen=True)
class ClipTask:
    """The same videos as plain files, as packed videos and as packed frames (as data.source names
    them), and the clips to be made.
    """

    sources: Mapping[SourceForm, str]
    num_frames: int
    stride: int
    side: int
    batch: int


@dataclass(frozen=True)
class Pipeline:
    """A row of the benchmark. `make` gives the batches of one epoch, of each video as many clips as
    there are crops; all the time of their making goes to the stopwatch.
    """

    name: str
    make: Callable[["Pipeline", ClipTask, int, Stopwatch], Batches]
    form: SourceForm = "plain"
    decoder: Literal["pyav", "decord", "torchcodec"] = "pyav"
    crops: int = 1
    crop_where: Literal["worker", "device"] = "worker"

    def data(self, task: ClipTask) -> DataConfig:
        """The configuration of the loader; packed frames lie `stride` apart already."""
        return DataConfig(
            source=task.sources[self.form],
            stride=1 if self.form == "frames" else task.stride,
            decoder=self.decoder,
            clips_per_video=self.crops,
            crop_where=self.crop_where,
        )


class _Watched(ClipDataset):
    watch: Stopwatch

    def read(self, index: int, choose: Wanted) -> Decoded:
        decoded = super().read(index, choose)
        self.watch.lap("decode")
        return decoded


def ours(pipeline: Pipeline, task: ClipTask, epoch: int, watch: Stopwatch) -> Batches:
    """Our data set and collation: clip_BTHWC, uint8, or whole frames where the device cuts. It
    makes floats of what the model needs.
    """
    data, side = pipeline.data(task), task.side
    dataset = _Watched(read_annotations(data), data, task.num_frames, side, side, SEED)
    dataset.watch = watch
    for indices in _batches(len(dataset), max(task.batch // pipeline.crops, 1)):
        samples = []
        for index in indices:
            samples.append(dataset[epoch, index])
            watch.lap("crop")
        batch = collate(samples)
        clips: Any = batch.clip_BTHWC
        watch.lap("collate")
        pixels = clips.bytes_N if isinstance(clips, UncutClips) else clips
        yield pixels, len(batch.seeds_B)


def bare(pipeline: Pipeline, task: ClipTask, epoch: int, watch: Stopwatch) -> Batches:
    """Decoding alone, as the library's own documentation does it: the same frames, whole,
    frames_THWC of one video at a time.
    """
    videos = read_annotations(pipeline.data(task))
    for index in range(len(videos)):
        choose = _choice(task, epoch, index)
        frames_THWC = BARE[pipeline.decoder](videos[index][0], choose)
        watch.lap("decode")
        yield torch.from_numpy(frames_THWC), 1


def _choice(task: ClipTask, epoch: int, index: int) -> Choose:
    """The frames that ours reads."""
    rng = sample_rng(SEED, epoch, index, FIRST_ATTEMPT)
    return lambda total: clip_indices(total, task.num_frames, task.stride, rng)


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


def official(pipeline: Pipeline, task: ClipTask, epoch: int, watch: Stopwatch) -> Batches:
    """The official pretraining data set's: the clip's frames by decord, whole, one PIL image a
    frame, multi-scale crop and bilinear resize of each, a stack along the channels, which becomes
    float32, is divided by 255 and normalised channel by channel: video_BCTHW. Source: VideoMAE
    (Tong et al., 2022).
    """
    data, side = pipeline.data(task), task.side
    videos = read_annotations(data)
    for indices in _batches(len(videos), task.batch):
        clips = []
        for index in indices:
            frames_THWC = _bare_decord(videos[index][0], _choice(task, epoch, index))
            watch.lap("decode")
            _, height, width, _ = frames_THWC.shape
            rng = sample_rng(SEED, epoch, index, 0)
            top, left, rows, columns = crop_box(data, height, width, side, side, rng)
            images = [Image.fromarray(frame_HWC).convert("RGB") for frame_HWC in frames_THWC]
            images = [image.crop((left, top, left + columns, top + rows)) for image in images]
            images = [image.resize((side, side), Image.Resampling.BILINEAR) for image in images]
            watch.lap("crop")
            stack_HWS = np.concatenate([np.asarray(image) for image in images], axis=2)
            values_SHW = torch.from_numpy(stack_HWS).permute(2, 0, 1).contiguous().float().div(255)
            means, stds = IMAGENET_MEAN * len(images), IMAGENET_STD * len(images)
            for channel, mean, std in zip(values_SHW, means, stds, strict=True):
                channel.sub_(mean).div_(std)
            clips.append(values_SHW.view(len(images), 3, side, side).transpose(0, 1))
            watch.lap("floats")
        video_BCTHW = torch.stack(clips)
        watch.lap("collate")
        yield video_BCTHW, len(video_BCTHW)


def pytorchvideo(pipeline: Pipeline, task: ClipTask, epoch: int, watch: Stopwatch) -> Batches:
    """LabeledVideoDataset with random clips, without audio, decord, and torchvision's transforms
    (its own cannot be imported any more): 16 frames of each clip, a random resized crop, ImageNet
    normalisation: video_BCTHW, float32.
    """
    import decord
    from pytorchvideo.data import LabeledVideoDataset, RandomClipSampler

    videos = read_annotations(pipeline.data(task))
    random.seed(epoch)
    torch.manual_seed(epoch)
    fps = decord.VideoReader(videos[0][0], num_threads=1).get_avg_fps()
    seconds = task.num_frames * task.stride / fps
    crop = v2.RandomResizedCrop(task.side, antialias=True)
    normalize = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD, inplace=True)

    def transform(sample: dict[str, Any]) -> torch.Tensor:
        watch.lap("decode")
        video_CTHW = sample["video"]
        wanted = torch.linspace(0, video_CTHW.shape[1] - 1, task.num_frames).long()
        video_TCHW = crop(video_CTHW[:, wanted].transpose(0, 1))
        watch.lap("crop")
        video_CTHW = normalize(video_TCHW.div_(255)).transpose(0, 1)
        watch.lap("floats")
        return video_CTHW

    dataset: Any = LabeledVideoDataset(
        videos,  # pyright: ignore[reportArgumentType]
        RandomClipSampler(clip_duration=seconds),  # pyright: ignore[reportArgumentType]
        torch.utils.data.SequentialSampler,
        transform,
        decode_audio=False,
        decoder="decord",
    )
    clips = iter(dataset)
    decord.bridge.set_bridge("torch")  # for the whole process, which is how it wants its frames
    try:
        for indices in _batches(len(videos), task.batch):
            video_BCTHW = torch.stack([next(clips) for _ in indices])
            watch.lap("collate")
            yield video_BCTHW, len(video_BCTHW)
    finally:
        decord.bridge.set_bridge("native")


def _batches(num_videos: int, batch: int) -> list[range]:
    """The indices of the videos of each batch."""
    return [range(num_videos)[first : first + batch] for first in range(0, num_videos, batch)]


PIPELINES = (
    Pipeline("ours", ours),
    Pipeline("ours, 4 crops", ours, crops=4),
    Pipeline("ours, decord", ours, decoder="decord"),
    Pipeline("ours, decord, 4 crops", ours, decoder="decord", crops=4),
    Pipeline("ours, torchcodec", ours, decoder="torchcodec"),
    Pipeline("ours, packed video", ours, "video"),
    Pipeline("ours, packed video, 4 crops", ours, "video", crops=4),
    Pipeline(
        "ours, packed video, 4 crops on the device", ours, "video", crops=4, crop_where="device"
    ),
    Pipeline("ours, packed video, decord", ours, "video", "decord"),
    Pipeline("ours, packed frames", ours, "frames"),
    Pipeline("ours, packed frames, 4 crops", ours, "frames", crops=4),
    Pipeline("ours, packed frames, crop on the device", ours, "frames", crop_where="device"),
    Pipeline("pyav alone", bare),
    Pipeline("decord alone", bare, decoder="decord"),
    Pipeline("torchcodec alone", bare, decoder="torchcodec"),
    Pipeline("official (decord, PIL, floats)", official, decoder="decord"),
    Pipeline("pytorchvideo LabeledVideoDataset", pytorchvideo, decoder="decord"),
)
"""All rows; the first is what training does where nothing is set."""


def begin(core: int) -> None:
    """What a pipeline's process does first: it stays on one core, with one thread."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def run_epoch(pipeline: Pipeline, task: ClipTask, epoch: int) -> dict[str, Any] | str:
    """Milliseconds a clip of each stage; of epoch 0, which is the first of a process, what its
    clips are and the memory that it takes. A text says why there is nothing.
    """
    watch = Stopwatch()

    def passed() -> list[tuple[torch.dtype, int, int]]:
        batches = pipeline.make(pipeline, task, epoch, watch)
        return [(pixels.dtype, pixels.nbytes, num_clips) for pixels, num_clips in batches]

    try:
        if epoch > 0:
            total = sum(num_clips for _, _, num_clips in passed())
            parts = watch.parts()
            return {stage: parts.get(stage, 0.0) / total for stage in STAGES}
        if pipeline.make is ours:
            keep_memory()  # as a worker does
        if pipeline.make is not pytorchvideo:
            resolve_decoder(pipeline.decoder)
        batches, peak_bytes = peak_growth(passed, torch.device("cpu"))
        dtype, num_bytes, num_clips = batches[0]
        facts = {"dtype": dtype_name(dtype), "bytes_a_clip": num_bytes // num_clips}
        if peak_bytes:
            facts["peak_mb"] = (peak_bytes + peak_of_children()) / 1e6
        return facts
    except Exception as error:  # whatever a competitor raises is its row's problem
        return reason_of(error)
