"""The crops of a batch, cut on the device: whole frames go there once, each box is cut and resized
there.

R crops of a video, F frames that are there (1 of a still, else T), T frames of a clip, H W pixels
of the frames, C channels, B clips.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from video_mae.data.augment import Box, crop_clip

SHARED, NO_ROOM = "/dev/shm", "has no room for a batch of"
"""Where processes share memory, and what is said where it is too small."""
CHUNK_BYTES = 2**28
"""What the steps of cutting a clip may take at once on the device, beside the frames and the clips
themselves.
"""


class Crop(NamedTuple):
    """A box of a video's frames, mirrored or not."""

    box: Box
    flip: bool


class CropSize(NamedTuple):
    """Of the finished clips, which are uint16 or uint8."""

    num_frames: int
    height: int
    width: int
    sixteen_bit: bool
    antialias: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of the clips."""
        return torch.uint16 if self.sixteen_bit else torch.uint8


def for_trainer(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for what a worker hands over, which the trainer sees too: anything else would be
    copied once more on its way. Raises: RuntimeError that says NO_ROOM.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    # PyTorch shares small tensors besides in a thread, whose error nobody would hear of
    free = shutil.disk_usage(SHARED).free
    if free < num_bytes + 2**20:
        raise RuntimeError(f"{SHARED}: {NO_ROOM} {num_bytes} bytes more, {free} are free")
    storage = torch.UntypedStorage._new_shared(num_bytes)
    return torch.empty(0, dtype=dtype).set_(storage, 0, torch.Size(shape))  # pyright: ignore[reportCallIssue]  (its stub wants strides)


def cut(frames_FHWC: Tensor, crop: Crop, size: CropSize) -> Tensor:
    """The clip clip_FHWC of a crop: what workers and devices do."""
    clip_FHWC = crop_clip(frames_FHWC, crop.box, size[1:3], crop.flip, antialias=size.antialias)
    # The clips of a run have one type; 257 = 65535 / 255. Few operations know uint16.
    if size.sixteen_bit and clip_FHWC.dtype == torch.uint8:
        clip_FHWC = (clip_FHWC.int() * 257).to(torch.uint16)
    return clip_FHWC


@dataclass(frozen=True)
class UncutClips:
    """Frames of videos, as bytes one after another, and of each video the type and shape
    (F, H, W, C) of its frames, and the crops to be cut out of them.
    """

    bytes_N: Tensor
    videos: Sequence[tuple[torch.dtype, torch.Size, Sequence[Crop]]]
    size: CropSize

    @classmethod
    def gather(
        cls, frames: Sequence[Tensor], crops: Sequence[Sequence[Crop]], size: CropSize
    ) -> "UncutClips":
        """Of each video its frames_FHWC, uint8 or uint16, and its R crops; a still, shown T times
        from the same memory, is taken once.
        """
        frames = [video[:1] if video.stride(0) == 0 else video for video in frames]
        videos = [(v.dtype, v.shape, c) for v, c in zip(frames, crops, strict=True)]
        num_bytes = sum(_even(video.nbytes) for video in frames)
        clips = cls(for_trainer((num_bytes,), torch.uint8), videos, size)
        for there_FHWC, video in zip(clips._frames(clips.bytes_N), frames, strict=True):
            there_FHWC.copy_(video)
        return clips

    def _frames(self, bytes_N: Tensor) -> Iterator[Tensor]:
        """The frames_FHWC of each video: views of the bytes."""
        begin = 0
        for dtype, shape, _ in self.videos:
            num_bytes = dtype.itemsize * shape.numel()
            yield bytes_N[begin : begin + num_bytes].view(dtype).view(shape)
            begin += _even(num_bytes)

    def pin_memory(self) -> "UncutClips":
        """The same in page-locked memory."""
        return replace(self, bytes_N=self.bytes_N.pin_memory())

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Tensor:
        """The clips clip_BTHWC, cut on a device as `cut` does it: on a CPU the pixels are those of
        workers, on a GPU they are within 1 level, as torch rounds uint8 on a CPU once more.
        """
        size, (_, (*_, channels), _) = self.size, self.videos[0]
        num_clips = sum(len(crops) for _, _, crops in self.videos)
        shape = num_clips, *size[:3], channels
        clip_BTHWC = torch.empty(shape, dtype=size.dtype, device=device)
        left = iter(clip_BTHWC)
        frames = self._frames(self.bytes_N.to(device, non_blocking=non_blocking))
        for frames_FHWC, (_, _, crops) in zip(frames, self.videos, strict=True):
            for crop in crops:
                num_frames = _at_once(frames_FHWC, crop, size)
                parts = frames_FHWC.split(num_frames)
                # a still becomes all frames of its clip
                for there_THWC, part in zip(next(left).split(num_frames), parts, strict=True):
                    there_THWC.copy_(cut(part, crop, size))
        return clip_BTHWC


def _even(num_bytes: int) -> int:
    """Room for frames, so that uint16 lies at even bytes."""
    return num_bytes + num_bytes % 2


def _at_once(frames_FHWC: Tensor, crop: Crop, size: CropSize) -> int:
    """How many frames are cut at once; torch resizes them as float32, and copies them for it."""
    num_frames, _, _, channels = frames_FHWC.shape
    if num_frames == 1:
        return size.num_frames
    _, _, rows, columns = crop.box
    frame_bytes = 2 * 4 * channels * (rows * columns + size.height * size.width)
    return max(CHUNK_BYTES // frame_bytes, 1)
