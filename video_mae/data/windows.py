"""Clips along a video of any length, with their times, read once from start to end in bounded
memory.

C clips of a video, T frames of a clip, B clips of a piece, H W pixels, C channels (last axis).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from video_mae.data.augment import central_box, crop_clip
from video_mae.decoding import Place, Reading, stream, times_and_start
from video_mae.decoding.choices import view_indices, window_indices


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

    @property
    def span(self) -> int:
        """Frames from the first frame of a clip to where one that follows it without a gap would
        start.
        """
        return self.num_frames * self.stride

    def read(self, path: Place) -> tuple[Times, Iterator[torch.Tensor]]:
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

    def pieces(self, path: Place, batch_size: int) -> Iterator[tuple[torch.Tensor, Times | None]]:
        """A video from start to end as clip_BTHWC of at most batch_size clips; with the first one
        come the times of all. Raises: VideoDecodeError.
        """
        times, clips = self.read(path)
        while batch := list(islice(clips, batch_size)):
            yield torch.stack(batch), times
            times = None

    def _clips(self, path: Place, indices_CT: NDArray[np.int64]) -> Iterator[torch.Tensor]:
        """Only frames that a later clip needs are kept."""
        frames = stream(path, indices_CT, self.reading)
        kept: dict[int, torch.Tensor] = {}
        for indices in indices_CT.tolist():
            kept = {place: frame for place, frame in kept.items() if place >= indices[0]}
            while indices[-1] not in kept:
                _, place, frame = next(frames)
                kept[place] = self._fit(torch.from_numpy(frame))
            yield torch.stack([kept[index] for index in indices])

    def _fit(self, frame_HWC: torch.Tensor) -> torch.Tensor:
        height, width = frame_HWC.shape[:2]
        box = (0, 0, height, width)
        if self.crop == "center":
            box = central_box(height, width, self.width / self.height)
        return crop_clip(frame_HWC[None], box, (self.height, self.width), flip=False)[0]
