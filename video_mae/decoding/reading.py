"""What is read and how: the words that everything around decoding shares.

T frames of a clip, F frames of a file, H W pixels, C channels.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from video_mae.config.data import Decoder, FileConfig, ReadConfig

Choose = Callable[[int], NDArray[np.int64]]
"""From the number of frames of a video to the indices [T] of the wanted ones."""
Clip = NDArray[Any]
"""uint8, or uint16 where data.value_range says what is white: the kernels take both."""

MAX_CLIP_BYTES = 2**31
"""A small file can claim frames of gigabytes; 16 frames of 4K video take 0.4 GB."""


class Member(NamedTuple):
    """A file inside a file: `size` bytes from `offset` on of an archive, which is a path or an
    fsspec URL.
    """

    archive: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"


Place = str | Member
"""Where a video is: a path, or a member of a shard."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files are read.

    decoder: of videos. source: how arrays and pictures become clips of `in_channels` channels.
    short_side: videos whose shorter side is longer are scaled down to it, in pixels; 0 keeps all as
    stored. threads: of the decoder. device: where torchcodec decodes. seconds, memory_gb: what one
    clip may take, before its process is ended.
    """

    decoder: Decoder = "auto"
    source: FileConfig = FileConfig()
    in_channels: int = 3
    short_side: int = 0
    threads: int = 1
    device: str = "cpu"
    seconds: float = 60.0
    memory_gb: float = 4.0

    @classmethod
    def of(
        cls,
        data: ReadConfig,
        in_channels: int = 3,
        source: FileConfig | None = None,
        threads: int = 1,
    ) -> "Reading":
        """As a configuration says, for files of one of its sources (its only one, where none is
        given).
        """
        return cls(
            decoder=data.decoder,
            source=source or data,
            in_channels=in_channels,
            short_side=data.short_side,
            threads=threads,
            device=data.decoder_device,
            seconds=data.decode_seconds,
            memory_gb=data.decode_memory_gb,
        )


Read = Callable[[NDArray[np.int64]], Iterator[NDArray[Any]]]


@dataclass(frozen=True)
class Frames:
    """An opened file: how many frames it has, and what reads some of them.

    read: from increasing indices to those frames_HWC, one after another, each to be copied before
    the next one is asked for. times: when each frame is shown, seconds from the first one on [F,
    (begin, end)]; NaN for files without time. kept: what must live as long as it is read. start:
    when the first frame is shown by the file's own clock, seconds.
    """

    num_frames: int
    read: Read
    times: Callable[[], NDArray[np.float64]]
    kept: Any = None
    start: float = 0.0


def untimed(num_frames: int) -> Callable[[], NDArray[np.float64]]:
    """The times of a file that has none."""
    return lambda: np.full((num_frames, 2), np.nan)


def shown_times(stamps_F: NDArray[np.float64], fps: float) -> NDArray[np.float64]:
    """When frames are shown, seconds from the first one on [F, (begin, end)], the last one for as
    long as they are on average.

    By their time stamps where all are there (not NaN) and rise, else, and where there is only one,
    by the frame rate.
    """
    num = len(stamps_F)
    if num < 2 or not np.isfinite(stamps_F).all() or np.any(np.diff(stamps_F) <= 0):
        return np.stack([np.arange(num), np.arange(1, num + 1)], axis=1) / fps
    begin_F = stamps_F - stamps_F[0]
    return np.stack([begin_F, np.append(begin_F[1:], begin_F[-1] * num / (num - 1))], axis=1)


class VideoDecodeError(Exception):
    """A video that cannot be read, whatever the decoder raised: its path, the decoder and one line
    of reason.
    """

    def __init__(self, path: str, decoder: str, reason: str) -> None:
        # all three, so that it survives pickling on its way out of a process
        super().__init__(path, decoder, reason)
        self.path = path
        self.decoder = decoder
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.decoder}: {self.reason}"


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter one brought down to short_side, the ratio kept; as it is
    where 0 or shorter already.
    """
    if short_side == 0 or min(height, width) <= short_side:
        return height, width
    if height <= width:
        return short_side, max(round(width * short_side / height), 1)
    return max(round(height * short_side / width), 1), short_side
