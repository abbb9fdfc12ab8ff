"""Clips along a video of any length, with their times, read once from start to end in bounded
memory.

C clips of a video, T frames of a clip, B clips of a piece, H W pixels, C channels (last axis).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from video_mae.data.augment import central_box, crop_clip
from video_mae.data.dataset import Failure
from video_mae.data.loader import worker_options
from video_mae.decoding import (
    Choose,
    Place,
    Reading,
    VideoDecodeError,
    stream,
    times_and_start,
)
from video_mae.decoding.choices import view_indices, window_indices


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Where clips lie along a video: one every `hop` frames, each spanning num_frames * stride of
    them, resized to height x width.

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

    @property
    def span(self) -> int:
        """Frames from the first frame of a clip to where one that follows it without a gap would
        start.
        """
        return self.num_frames * self.stride

    def ends(self, num_video_frames: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first and the last frame [C] that each clip spans: every hop-th one begins a clip,
        until one reaches the end of the video; no frame is left out where hop <= span.
        """
        if self.sampling == "uniform":
            return np.array([0]), np.array([num_video_frames - 1])
        first_C = self.frames(num_video_frames)[:, 0]
        return first_C, np.minimum(first_C + self.span, num_video_frames) - 1

    @property
    def frames(self) -> Choose:
        """Frame indices [C, T] of a video from the number of its frames."""
        choice = partial(view_indices, num_clips=1, sampling="uniform")
        if self.sampling == "dense":
            choice = partial(window_indices, hop=self.hop)
        return partial(choice, num_frames=self.num_frames, stride=self.stride)

    def clips(self, path: Place) -> Iterator[tuple[int, torch.Tensor]]:
        """(frames of the video, clip_THWC), clip after clip; only frames that a later clip needs
        are kept. Raises: VideoDecodeError.
        """
        indices_CT: NDArray[np.int64] | None = None
        kept: dict[int, torch.Tensor] = {}
        done = 0
        for total, place, frame in stream(path, self.frames, self.reading):
            if indices_CT is None:
                indices_CT = self.frames(total)
            kept[place] = self._fit(torch.from_numpy(frame))
            while done < len(indices_CT) and indices_CT[done, -1] <= place:
                yield total, torch.stack([kept[index] for index in indices_CT[done].tolist()])
                done += 1
                first = indices_CT[done, 0] if done < len(indices_CT) else total
                kept = {index: kept_frame for index, kept_frame in kept.items() if index >= first}

    def _fit(self, frame_HWC: torch.Tensor) -> torch.Tensor:
        height, width = frame_HWC.shape[:2]
        box = (0, 0, height, width)
        if self.crop == "center":
            box = central_box(height, width, self.width / self.height)
        return crop_clip(frame_HWC[None], box, (self.height, self.width), flip=False)[0]


class Times(NamedTuple):
    """When the clips of a video are: first frames, begin of the first and end of the last frame
    that each spans, in seconds from the first frame of the video on; which by the file's own clock
    is shown at video_start_seconds.
    """

    start_frame_C: NDArray[np.int64]
    start_seconds_C: NDArray[np.float64]
    end_seconds_C: NDArray[np.float64]
    video_start_seconds: float


def clip_times(path: Place, num_video_frames: int, windows: Windows) -> Times:
    """The times of the clips of a video as its time stamps say; NaN for files without time, such as
    arrays.
    """
    seconds_F2, start = times_and_start(path, windows.reading)
    first_C, last_C = windows.ends(num_video_frames)
    return Times(first_C, seconds_F2[first_C, 0], seconds_F2[last_C, 1], start)


@dataclass(frozen=True)
class Piece:
    """The next clips of a video, by its place in the list; the first piece has the times of all its
    clips. Or why there are no more.
    """

    video: int
    clip_BTHWC: torch.Tensor | None = None
    times: Times | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class PieceStream(IterableDataset[Piece]):
    """Videos from start to end as pieces of at most batch_size clips; with workers each video is
    read by one of them.
    """

    paths: Sequence[Place]
    videos: Sequence[int]
    windows: Windows
    batch_size: int

    def __iter__(self) -> Iterator[Piece]:
        worker = get_worker_info()
        mine = self.videos if worker is None else self.videos[worker.id :: worker.num_workers]
        for video in mine:
            try:
                yield from self._pieces(video)
            except VideoDecodeError as error:
                yield Piece(video, failure=Failure(*error.args))

    def _pieces(self, video: int) -> Iterator[Piece]:
        path, is_first = self.paths[video], True
        clips = self.windows.clips(path)
        while batch := list(islice(clips, self.batch_size)):
            times = clip_times(path, batch[0][0], self.windows) if is_first else None
            is_first = False
            yield Piece(video, torch.stack([clip_THWC for _, clip_THWC in batch]), times)


def make_piece_loader(pieces: PieceStream, num_workers: int) -> "DataLoader[Piece]":
    """The pieces; those of a video come in their order, those of several videos may take turns."""
    workers = min(num_workers, len(pieces.videos))
    return DataLoader(pieces, batch_size=None, **worker_options(workers))
