"""What of a video is looked at: the views of a test, from one decode, or clips along a video of any
length, read once in bounded memory; and the videos of a list, one after another.

S C clips of a video, V views = S clips x crops, T frames of a clip, F different frames that views
need, B clips of a piece, H W pixels, C channels (last axis).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from video_mae.config.model import Sampling
from video_mae.data.augment import central_box, crop_clip
from video_mae.data.dataset import Failure
from video_mae.data.loader import Loader, worker_options
from video_mae.decoding import (
    Choose,
    Place,
    Reading,
    VideoDecodeError,
    read_clip,
    stream,
    times_and_start,
)
from video_mae.decoding.choices import spread, view_indices, window_indices


@dataclass(frozen=True, kw_only=True)
class Views:
    """How a video is looked at: num_clips x num_crops clips of num_frames x height x width;
    `reading` says how its file is read.
    """

    num_frames: int
    height: int
    width: int
    sampling: Sampling
    stride: int
    num_clips: int
    num_crops: int
    antialias: bool = True
    reading: Reading = Reading()

    @property
    def frames(self) -> Choose:
        """Frame indices [S, T] of a video from the number of its frames: `view_indices`."""
        return partial(
            view_indices,
            num_frames=self.num_frames,
            stride=self.stride,
            num_clips=self.num_clips,
            sampling=self.sampling,
        )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """The size (height, width) that a frame is brought to: the smallest that covers the
        model's, the aspect ratio kept.
        """
        if width * self.height >= height * self.width:
            return self.height, max(width * self.height // height, self.width)
        return max(height * self.width // width, self.height), self.width

    def corners(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """Where the crops of a resized frame start, (top, left): int(crop * free / (crops - 1))
        along the longer side, the middle where it is one.
        """
        tops = spread(height - self.height, self.num_crops).tolist()
        lefts = spread(width - self.width, self.num_crops).tolist()
        return tuple(zip(tops, lefts, strict=True))

    def read(self, path: Place) -> "VideoViews":
        """Opens a video once and keeps the frames that some view needs, resized. Raises:
        VideoDecodeError.
        """
        found = read_clip(path, self.frames, self.reading)
        frames_FHWC = torch.from_numpy(found.frames_FHWC)
        height, width = frames_FHWC.shape[1:3]
        size = self.resized(height, width)
        resized_FHWC = crop_clip(
            frames_FHWC, (0, 0, height, width), size, flip=False, antialias=self.antialias
        )
        return VideoViews(resized_FHWC, torch.from_numpy(found.places), self)


@dataclass(frozen=True)
class VideoViews:
    """The frames of a video that its views share, and where each view lies in them: less to move
    than the views themselves.
    """

    frames_FHWC: Tensor
    places_ST: Tensor
    views: Views

    def clips(self, device: torch.device | str = "cpu") -> Tensor:
        """All views, uint8 clip_VTHWC, cut on a device: the crops of a clip follow one another."""
        height, width = self.views.height, self.views.width
        frames_FHWC = self.frames_FHWC.to(device, non_blocking=True)
        places_ST = self.places_ST.to(device)
        crops = [
            frames_FHWC[:, top : top + height, left : left + width][places_ST]
            for top, left in self.views.corners(*frames_FHWC.shape[1:3])
        ]
        return torch.stack(crops, dim=1).flatten(0, 1)


class Times(NamedTuple):
    """When the clips of a video are: first frames, begin of the first and end of the last frame
    that each spans, in seconds from the first frame of the video on; which by the file's own clock
    is shown at video_start_seconds. NaN for files without time, such as arrays.
    """

    start_frame_C: NDArray[np.int64]
    start_seconds_C: NDArray[np.float64]
    end_seconds_C: NDArray[np.float64]
    video_start_seconds: float


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Where clips lie along a video: one every `hop` frames, each spanning num_frames * stride of
    them, resized to height x width; no frame is left out where hop <= span.

    With sampling = uniform there is one, of the middle frame of each of num_frames equal parts of
    the video.
    """

    num_frames: int
    height: int
    width: int
    stride: int
    hop: int
    crop: Literal["center", "whole"]
    reading: Reading
    sampling: Literal["dense", "uniform"] = "dense"
    antialias: bool = True

    @property
    def span(self) -> int:
        """Frames from the first frame of a clip to where one that follows it without a gap would
        start.
        """
        return self.num_frames * self.stride

    def read(self, path: Place) -> tuple[Times, Iterator[Tensor]]:
        """The times of the clips of a video as its time stamps say, and clip_THWC after clip_THWC.
        Raises: VideoDecodeError, as the iterator does.
        """
        seconds_F2, start = times_and_start(path, self.reading)
        num_video_frames = len(seconds_F2)
        if self.sampling == "dense":
            indices_CT = window_indices(num_video_frames, self.num_frames, self.stride, self.hop)
            first_C = indices_CT[:, 0]
            end_C = np.minimum(first_C + self.span, num_video_frames)
        else:
            indices_CT = view_indices(num_video_frames, self.num_frames, self.stride, 1, "uniform")
            first_C, end_C = np.array([0]), np.array([num_video_frames])
        times = Times(first_C, seconds_F2[first_C, 0], seconds_F2[end_C - 1, 1], start)
        return times, self._clips(path, indices_CT)

    def pieces(self, path: Place, batch_size: int) -> Iterator[tuple[Tensor, Times | None]]:
        """A video from start to end as clip_BTHWC of at most batch_size clips; with the first one
        come the times of all. Raises: VideoDecodeError.
        """
        times, clips = self.read(path)
        while batch := list(islice(clips, batch_size)):
            yield torch.stack(batch), times
            times = None

    def _clips(self, path: Place, indices_CT: NDArray[np.int64]) -> Iterator[Tensor]:
        """Only frames that a later clip needs are kept."""
        frames = stream(path, indices_CT, self.reading)
        kept: dict[int, Tensor] = {}
        for indices in indices_CT.tolist():
            kept = {place: frame for place, frame in kept.items() if place >= indices[0]}
            while indices[-1] not in kept:
                _, place, frame = next(frames)
                kept[place] = self._fit(torch.from_numpy(frame))
            yield torch.stack([kept[index] for index in indices])

    def _fit(self, frame_HWC: Tensor) -> Tensor:
        height, width = frame_HWC.shape[:2]
        box = (0, 0, height, width)
        if self.crop == "center":
            box = central_box(height, width, self.width / self.height)
        size = self.height, self.width
        return crop_clip(frame_HWC[None], box, size, flip=False, antialias=self.antialias)[0]


Found = tuple[int, Any, Failure | None]
"""The place of a video in its list, and what is read of it, or the reason why there is no more."""


@dataclass(frozen=True)
class VideoStream(IterableDataset[Found]):
    """Of the videos `order` in turn all that `read` gives; what cannot be decoded is told, not
    replaced.
    """

    paths: Sequence[Place]
    order: Sequence[int]
    read: Callable[[Place], Iterable[Any]]

    def __iter__(self) -> Iterator[Found]:
        worker = get_worker_info()
        mine = self.order if worker is None else self.order[worker.id :: worker.num_workers]
        for video in mine:
            try:
                for found in self.read(self.paths[video]):
                    yield video, found, None
            except VideoDecodeError as error:
                yield video, None, Failure(*error.args)

    def load(self, num_workers: int, ahead: int = 2) -> "DataLoader[Found]":
        """The stream, of which each worker keeps `ahead` parts ready: those of a video come in
        their order, and where each video has one part, they come in the order of the videos.
        """
        workers = min(num_workers, len(self.order))
        options = worker_options(workers, ahead)
        # as it is: DataLoader would make tensors of arrays
        return DataLoader(self, batch_size=None, collate_fn=lambda found: found, **options)


def load_views(
    paths: Sequence[Place], order: Sequence[int], views: Views, num_workers: int, ahead: int = 2
) -> Loader[Found]:
    """The VideoViews of the videos `order`, in that order, each once, also where workers die."""

    def make(delivered: int) -> "DataLoader[Found]":
        stream = VideoStream(paths, order[delivered:], lambda path: [views.read(path)])
        return stream.load(num_workers, ahead)

    return Loader(make)
