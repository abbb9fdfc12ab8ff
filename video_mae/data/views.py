"""The views of a test: which frames and which crops, and one decode of a video for all of them.

S clips of a video, V views = S clips x crops, T frames of a clip, F different frames that they
need, H W pixels, C channels.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from video_mae.config.model import Sampling
from video_mae.data.augment import crop_clip
from video_mae.decoding import Choose, Place, Reading, read_clip
from video_mae.decoding.choices import spread, view_indices


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

    frames_FHWC: torch.Tensor
    places_ST: torch.Tensor
    views: Views

    def to(self, device: torch.device) -> "VideoViews":
        """The frames on a device; the views are cut there."""
        return replace(
            self,
            frames_FHWC=self.frames_FHWC.to(device, non_blocking=True),
            places_ST=self.places_ST.to(device),
        )

    def clips(self) -> torch.Tensor:
        """All views, uint8 clip_VTHWC: the crops of a clip follow one another."""
        height, width = self.views.height, self.views.width
        crops = [
            self.frames_FHWC[:, top : top + height, left : left + width][self.places_ST]
            for top, left in self.views.corners(*self.frames_FHWC.shape[1:3])
        ]
        return torch.stack(crops, dim=1).flatten(0, 1)
