"""The crops of a batch, cut on the device: whole frames go there once, all boxes are cut and
resized in a few launches.

V videos, R crops of each, F frames that are there (1 of a still, else T), T frames of a clip, H W
pixels of the frames, h w of the crops, C channels, B = V x R.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from video_mae.data.augment import Box

CHUNK_BYTES = 2**28
"""What the steps of cutting some videos may take at once on the device, beside the frames and the
crops themselves.
"""
# bytes between the begins of videos are a multiple of it, so that their bytes can be read as any
# type
ALIGNMENT = 16


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


class _Group(NamedTuple):
    """Neighbours of one size and type: V videos from byte `begin` on, `stride` bytes from one to
    the next.
    """

    begin: int
    stride: int
    shape_VFHWC: tuple[int, ...]
    dtype: torch.dtype


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
    batch.
    """

    bytes_N: torch.Tensor
    crop_VR5: torch.Tensor
    order_V: torch.Tensor
    groups: tuple[_Group, ...]
    size: CropSize

    @classmethod
    def gather(
        cls, frames: Sequence[torch.Tensor], crops: Sequence[Sequence[Crop]], size: CropSize
    ) -> "UncutClips":
        """Of each video its frames_FHWC, uint8 or uint16, and its R crops; a still, shown T times
        from the same memory, is taken once.
        """
        frames = [
            video[:1] if len(video) > 1 and video.stride(0) == 0 else video for video in frames
        ]

        def kind(place: int) -> tuple[Any, ...]:
            return str(frames[place].dtype), *frames[place].shape

        order = sorted(range(len(frames)), key=kind)
        groups: list[_Group] = []
        begin = 0
        for _, members in groupby(order, kind):
            places = list(members)
            first = frames[places[0]]
            stride = -(-first.nbytes // ALIGNMENT) * ALIGNMENT
            groups.append(_Group(begin, stride, (len(places), *first.shape), first.dtype))
            begin += stride * len(places)
        clips = cls(
            for_trainer((begin,), torch.uint8),
            torch.tensor([[(*crop.box, crop.flip) for crop in crops[place]] for place in order]),
            torch.tensor(order),
            tuple(groups),
            size,
        )
        rest = iter(order)
        for group in groups:
            for there_FHWC in clips._frames(group):
                there_FHWC.copy_(frames[next(rest)])
        return clips

    def pin_memory(self) -> "UncutClips":
        """The same in page-locked memory."""
        return self._each("pin_memory")

    def to(self, device: torch.device | str) -> "UncutClips":
        """The same on a device, copied without waiting."""
        return self._each("to", device, non_blocking=True)

    def _each(self, method: str, *arguments: Any, **options: Any) -> "UncutClips":
        return replace(
            self,
            **{
                name: getattr(getattr(self, name), method)(*arguments, **options)
                for name in ("bytes_N", "crop_VR5", "order_V")
            },
        )

    def cut(self) -> torch.Tensor:
        """The clips clip_BTHWC, where the frames are: of each frame the box, resized bilinearly
        with a triangle filter as wide as a pixel of the result (torchvision's antialias; without it
        as a pixel of the frame), mirrored where asked.

        Resizing is two products of matrices: with the weights of rows, then with those of columns.
        Within 1 level of `crop_clip`, which rounds uint8 between the two.
        """
        size, channels, num = self.size, self.groups[0].shape_VFHWC[-1], self.crop_VR5.shape[1]
        clip_VRTHWC = torch.empty(
            len(self.order_V),
            num,
            size.num_frames,
            size.height,
            size.width,
            channels,
            device=self.bytes_N.device,
            dtype=torch.uint16 if size.sixteen_bit else torch.uint8,
        )
        # few operations know uint16
        bits = clip_VRTHWC.view(torch.int16) if size.sixteen_bit else clip_VRTHWC
        first = 0
        for group in self.groups:
            frames_VFHWC = self._frames(group)
            is_still = group.shape_VFHWC[1] == 1
            for videos, times in _chunks(group, num, size, self.bytes_N.device):
                here = slice(first + videos.start, first + videos.stop)
                part = _resized(frames_VFHWC[videos, times], self.crop_VR5[here], size)
                if is_still:
                    part = part.expand(-1, -1, size.num_frames, -1, -1, -1)
                shown = slice(None) if is_still else times
                bits[:, :, shown].index_copy_(0, self.order_V[here], part.view(bits.dtype))
            first += group.shape_VFHWC[0]
        return clip_VRTHWC.flatten(0, 1)

    def _frames(self, group: _Group) -> torch.Tensor:
        """The frames of a group, frames_VFHWC: a view."""
        num, *shape = group.shape_VFHWC
        bytes_VN = self.bytes_N[group.begin : group.begin + num * group.stride].view(
            num, group.stride
        )
        num_bytes = torch.Size(shape).numel() * group.dtype.itemsize
        return bytes_VN[:, :num_bytes].view(group.dtype).unflatten(1, shape)


def _number(dtype: torch.dtype, size: CropSize, device: torch.device) -> torch.dtype:
    """Of the products: float16 holds every uint8, and rounding weights and lines to it costs a
    fifth of a level; a CPU is slow with it.
    """
    return (
        torch.float16
        if device.type == "cuda" and dtype == torch.uint8 and not size.sixteen_bit
        else torch.float32
    )


def _chunks(
    group: _Group, num_crops: int, size: CropSize, device: torch.device
) -> Iterator[tuple[slice, slice]]:
    """Which videos and which of their frames are cut at once."""
    num, num_frames, height, width, channels = group.shape_VFHWC
    pixels = height * width + num_crops * size.height * (width + 2 * size.width)
    frame_bytes = pixels * channels * _number(group.dtype, size, device).itemsize
    weight_bytes = 3 * 4 * num_crops * (size.height * height + size.width * width)
    videos = max(CHUNK_BYTES // (num_frames * frame_bytes + weight_bytes), 1)
    frames = (
        num_frames
        if videos > 1
        else min(max((CHUNK_BYTES - weight_bytes) // frame_bytes, 1), num_frames)
    )
    for video in range(0, num, videos):
        for frame in range(0, num_frames, frames):
            yield (
                slice(video, min(video + videos, num)),
                slice(frame, min(frame + frames, num_frames)),
            )


def _resized(frames_VFHWC: torch.Tensor, crop_VR5: torch.Tensor, size: CropSize) -> torch.Tensor:
    """All crops of some videos of one size: clip_VRFhwC, of the type that the batch has."""
    (num, frames, height, width, channels), num_crops = frames_VFHWC.shape, crop_VR5.shape[1]
    number = _number(frames_VFHWC.dtype, size, frames_VFHWC.device)
    top_B, left_B, rows_B, columns_B, flip_B = crop_VR5.flatten(0, 1).unbind(1)
    row_BhH = _weights(top_B, rows_B, size.height, height, antialias=size.antialias)
    column_BwW = _weights(left_B, columns_B, size.width, width, antialias=size.antialias)
    column_BwW = torch.where(flip_B[:, None, None] > 0, column_BwW.flip(1), column_BwW)
    frame_VHN = (
        frames_VFHWC.permute(0, 2, 1, 4, 3)
        .to(number, memory_format=torch.contiguous_format)
        .view(num, height, -1)
    )
    lines_BNW = (row_BhH.to(number).view(num, -1, height) @ frame_VHN).view(
        num * num_crops, -1, width
    )
    pixel_BNw = lines_BNW @ column_BwW.to(number).mT
    if size.sixteen_bit and frames_VFHWC.dtype == torch.uint8:
        pixel_BNw = pixel_BNw.round_().clamp_(0, 255).mul_(257)  # 65535 / 255
    white = torch.iinfo(torch.uint16 if size.sixteen_bit else torch.uint8).max
    pixel_VRhFCw = (
        pixel_BNw.round_()
        .clamp_(0, white)
        .view(num, num_crops, size.height, frames, channels, size.width)
    )
    return pixel_VRhFCw.permute(0, 1, 3, 2, 5, 4).to(
        torch.uint16 if size.sixteen_bit else torch.uint8
    )


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
