"""The crops of a batch, cut on the device: whole frames go there once, all boxes are cut and
resized in a few launches.

V videos, R crops of each, F frames that are there (1 of a still, else T), T frames of a clip, H W
pixels of the frames, h w of the crops, C channels, B = V x R.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from video_mae.data.augment import Box

CHUNK_BYTES = 2**28
"""What the steps of cutting some videos may take at once on the device, beside the frames and the
crops themselves.
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


def for_trainer(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory for what a worker hands over, which the trainer sees too: anything else would be
    copied once more on its way.
    """
    empty = torch.empty(0, dtype=dtype)
    if get_worker_info() is None:
        return empty.new_empty(shape)
    num = math.prod(shape)
    storage = empty.untyped_storage()._new_shared(num * dtype.itemsize)
    return empty.set_(storage, 0, torch.Size(shape))  # pyright: ignore[reportCallIssue]  (its stub wants strides)


@dataclass(frozen=True)
class UncutClips:
    """Frames of videos, as bytes one after another, videos of one size neighbours, and what is to
    be cut out of them.

    crop_VR5: (top, left, height, width, flip). order_V: where each video's clips stand in the
    batch. groups: the type of neighbours, and their frames' shape (V, F, H, W, C).
    """

    bytes_N: torch.Tensor
    crop_VR5: torch.Tensor
    order_V: torch.Tensor
    groups: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    size: CropSize

    @classmethod
    def gather(
        cls, frames: Sequence[torch.Tensor], crops: Sequence[Sequence[Crop]], size: CropSize
    ) -> "UncutClips":
        """Of each video its frames_FHWC, uint8 or uint16, and its R crops; a still, shown T times
        from the same memory, is taken once.
        """
        frames = [video[:1] if video.stride(0) == 0 else video for video in frames]

        def kind(place: int) -> tuple[Any, ...]:
            # uint16 comes first, so that it lies at even bytes
            return str(frames[place].dtype), *frames[place].shape

        order = sorted(range(len(frames)), key=kind)
        groups: list[tuple[torch.dtype, tuple[int, ...]]] = []
        for _, members in groupby(order, kind):
            first, *others = (frames[place] for place in members)
            groups.append((first.dtype, (1 + len(others), *first.shape)))
        clips = cls(
            for_trainer((sum(video.nbytes for video in frames),), torch.uint8),
            torch.tensor([[(*crop.box, crop.flip) for crop in crops[place]] for place in order]),
            torch.tensor(order),
            tuple(groups),
            size,
        )
        there = chain.from_iterable(clips._frames(clips.bytes_N))
        for place, there_FHWC in zip(order, there, strict=True):
            there_FHWC.copy_(frames[place])
        return clips

    def _frames(self, bytes_N: torch.Tensor) -> list[torch.Tensor]:
        """The frames of each group, frames_VFHWC: views of the bytes."""
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in self.groups]
        return [
            part_N.view(dtype).view(shape)
            for part_N, (dtype, shape) in zip(bytes_N.split(sizes), self.groups, strict=True)
        ]

    def pin_memory(self) -> "UncutClips":
        """The same in page-locked memory."""
        return replace(
            self,
            bytes_N=self.bytes_N.pin_memory(),
            crop_VR5=self.crop_VR5.pin_memory(),
            order_V=self.order_V.pin_memory(),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> torch.Tensor:
        """The clips clip_BTHWC, cut on a device: of each frame the box, resized bilinearly with a
        triangle filter as wide as a pixel of the result (torchvision's antialias; without it as a
        pixel of the frame), mirrored where asked.

        Resizing is two products of matrices: with the weights of rows, then with those of columns.
        Within 1 level of `crop_clip`, which rounds uint8 between the two.
        """
        bytes_N, crop_VR5, order_V = (
            tensor.to(device, non_blocking=non_blocking)
            for tensor in (self.bytes_N, self.crop_VR5, self.order_V)
        )
        size, num_crops = self.size, crop_VR5.shape[1]
        shape = len(order_V), num_crops, *size[:3], self.groups[0][1][-1]
        clip_VRTHWC = torch.empty(shape, dtype=size.dtype, device=device)
        # few operations know uint16
        bits = clip_VRTHWC.view(torch.int16) if size.sixteen_bit else clip_VRTHWC
        nums = [of_group[0] for _, of_group in self.groups]
        for frames_VFHWC, some_crops, some_order in zip(
            self._frames(bytes_N), crop_VR5.split(nums), order_V.split(nums), strict=True
        ):
            num_videos, num_frames = _at_once(frames_VFHWC, num_crops, size)
            for videos in range(0, len(frames_VFHWC), num_videos):
                here = slice(videos, videos + num_videos)
                for first in range(0, frames_VFHWC.shape[1], num_frames):
                    times = slice(first, first + num_frames)
                    part = _resized(frames_VFHWC[here, times], some_crops[here], size)
                    if frames_VFHWC.shape[1] == 1:  # a still
                        times, part = slice(None), part.expand(-1, -1, size.num_frames, -1, -1, -1)
                    bits[:, :, times].index_copy_(0, some_order[here], part.view(bits.dtype))
        return clip_VRTHWC.flatten(0, 1)


def _number(frames_VFHWC: torch.Tensor, size: CropSize) -> torch.dtype:
    """Of the products: float16 holds every uint8, and rounding weights and lines to it costs a
    fifth of a level; a CPU is slow with it.
    """
    is_small = frames_VFHWC.dtype == torch.uint8 and not size.sixteen_bit
    return torch.float16 if frames_VFHWC.is_cuda and is_small else torch.float32


def _at_once(frames_VFHWC: torch.Tensor, num_crops: int, size: CropSize) -> tuple[int, int]:
    """How many videos, and how many of their frames, are cut at once."""
    _, num_frames, height, width, channels = frames_VFHWC.shape
    pixels = height * width + num_crops * size.height * (width + 2 * size.width)
    frame_bytes = pixels * channels * _number(frames_VFHWC, size).itemsize
    weight_bytes = 3 * 4 * num_crops * (size.height * height + size.width * width)
    videos = CHUNK_BYTES // (num_frames * frame_bytes + weight_bytes)
    frames = (CHUNK_BYTES - weight_bytes) // frame_bytes
    return max(videos, 1), max(frames, 1)


def _resized(frames_VFHWC: torch.Tensor, crop_VR5: torch.Tensor, size: CropSize) -> torch.Tensor:
    """All crops of some videos of one size: clip_VRFhwC, of the type that the batch has."""
    (num, frames, height, width, channels), num_crops = frames_VFHWC.shape, crop_VR5.shape[1]
    number = _number(frames_VFHWC, size)
    top_B, left_B, rows_B, columns_B, flip_B = crop_VR5.flatten(0, 1).unbind(1)
    row_BhH = _weights(top_B, rows_B, size.height, height, antialias=size.antialias)
    column_BwW = _weights(left_B, columns_B, size.width, width, antialias=size.antialias)
    column_BwW = torch.where(flip_B[:, None, None] > 0, column_BwW.flip(1), column_BwW)
    frame_VHFCW = frames_VFHWC.permute(0, 2, 1, 4, 3)
    frame_VHN = frame_VHFCW.to(number, memory_format=torch.contiguous_format).flatten(2)
    line_VNN = row_BhH.to(number).view(num, -1, height) @ frame_VHN
    pixel_BNw = line_VNN.view(num * num_crops, -1, width) @ column_BwW.to(number).mT
    if size.sixteen_bit and frames_VFHWC.dtype == torch.uint8:
        pixel_BNw = pixel_BNw.round_().clamp_(0, 255).mul_(257)  # 65535 / 255
    pixel_BNw = pixel_BNw.round_().clamp_(0, torch.iinfo(size.dtype).max)
    pixel_VRhFCw = pixel_BNw.view(num, num_crops, size.height, frames, channels, size.width)
    return pixel_VRhFCw.permute(0, 1, 3, 2, 5, 4).to(size.dtype)


def _weights(
    begin_B: torch.Tensor, length_B: torch.Tensor, num_out: int, num_in: int, *, antialias: bool
) -> torch.Tensor:
    """What each of num_in pixels gives to each of num_out: weight_Boi of the boxes [begin, begin +
    length), rows of sum 1.

    In float32, in the order in which torch computes them: a weight of the border of a large box is
    the same.
    """
    scale_B = length_B.float() / num_out
    center_Bo = scale_B[:, None] * (torch.arange(num_out, device=begin_B.device) + 0.5)
    place_Bi = torch.arange(num_in, device=begin_B.device) - begin_B[:, None]
    reach_B = scale_B.clamp(min=1) if antialias else torch.ones_like(scale_B)
    distance_Boi = (place_Bi[:, None] - center_Bo[:, :, None] + 0.5) * (1 / reach_B)[:, None, None]
    weight_Boi = (1 - distance_Boi.abs()).clamp(min=0)
    weight_Boi = weight_Boi * ((place_Bi >= 0) & (place_Bi < length_B[:, None]))[:, None]
    return weight_Boi / weight_Boi.sum(dim=2, keepdim=True)
