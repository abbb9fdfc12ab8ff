"""A media file: where it is, how it is read, what it is once it is open, and why it cannot be.

T frames of a clip, F frames of a file, H W pixels, C channels.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from video_mae.config.data import DecoderName, FileConfig, ReadConfig
from video_mae.extras import require_package

Array = NDArray[Any]
Indices = NDArray[np.int64]
Clip = Array
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


def suffix(place: Place) -> str:
    """The ending of a file's name, in lower case."""
    return Path(place.name if isinstance(place, Member) else place).suffix.lower()


@contextmanager
def local_file(place: Place) -> Iterator[str]:
    """A path under which a decoder finds a video; of a member of a shard it is a copy in memory."""
    if not isinstance(place, Member):
        # FFmpeg takes a bare `concat:a|b` for an order, not for a name
        yield os.path.join(os.curdir, place)
        return
    with open(os.memfd_create("video"), "wb", buffering=0) as memory:
        memory.write(read_member(place))
        yield f"/proc/self/fd/{memory.fileno()}"


def read_member(member: Member, offset: int = 0, size: int | None = None) -> bytes:
    """Bytes of a member of a shard, all or `size` from `offset` on. Raises: ValueError where the
    shard is cut off.
    """
    size = member.size - offset if size is None else size
    start = member.offset + offset
    if "://" in member.archive:
        require_package("fsspec")
        import fsspec

        files, path = fsspec.url_to_fs(member.archive)
        data = files.cat_file(path, start=start, end=start + size)
    else:
        with open(member.archive, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, start)
    if len(data) != size:
        raise ValueError(f"the shard is cut off: it has {len(data)} of the {size} bytes at {start}")
    return data


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How files are read.

    decoder: of videos. source: how arrays and pictures become clips of `in_channels` channels.
    short_side: videos whose shorter side is longer are scaled down to it, in pixels; 0 keeps all as
    stored. threads: of the decoder. device: where torchcodec decodes. seconds, memory_gb: what one
    clip may take, before its process is ended.
    """

    decoder: DecoderName = "auto"
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


class Stamps(NamedTuple):
    """When frames are shown by the file's own clock: rising ticks, None where there is no stamp."""

    ticks: list[Any]
    tick_seconds: float
    fps: float

    @property
    def start(self) -> float:
        """When the first frame is shown, seconds; 0 where no stamp says it."""
        return (self.ticks[0] or 0) * self.tick_seconds if self.ticks else 0.0

    def shown(self) -> NDArray[np.float64]:
        """The `shown_times` of the frames."""
        # None is NaN
        return shown_times(np.array(self.ticks, np.float64) * self.tick_seconds, self.fps)


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


Read = Callable[[Indices], Iterator[Array]]
"""From rising indices to those frames_HWC, one after another, each to be copied before the next one
is asked for.
"""


@dataclass(frozen=True)
class Frames:
    """An open file: how many frames it has, what reads some of them, and when they are shown, None
    for files without time.
    """

    num_frames: int
    read: Read
    stamps: Stamps | None = None


def scaled_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter one brought down to short_side, the ratio kept; as it is
    where 0 or shorter already.
    """
    short = min(height, width)
    if short_side == 0 or short <= short_side:
        return height, width
    return max(round(height * short_side / short), 1), max(round(width * short_side / short), 1)


class VideoDecodeError(ValueError):
    """A video that cannot be read, whatever the decoder raised: its path, the decoder and one line
    of reason.
    """

    def __init__(self, path: str, decoder: str, reason: str) -> None:
        # all three, so that it survives pickling on its way out of a process
        super().__init__(path, decoder, reason)
        self.path, self.decoder, self.reason = path, decoder, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.decoder}: {self.reason}"


@contextmanager
def as_decode_error(place: Place, decoder: str) -> Iterator[None]:
    """Whatever goes wrong with a file within is raised as a VideoDecodeError."""
    try:
        yield
    except Exception as error:
        # decoders raise RuntimeError, ValueError, IndexError, MemoryError and types of their own
        raise VideoDecodeError(str(place), decoder, one_line(error, place)) from None


NOISE = (
    (r"/proc/self/fd/\d+", "the file"),  # a member of a shard
    (r"^\w+, \S+\.cpp:\d+, ", ""),  # torchcodec's functions and files
    (r"\[\d\d:\d\d:\d\d\] \S+?:\d+: ", ""),  # decord's clock and files, its conditions
    (r"Check failed: .*? \(\S+ vs\. \S+\) (ERROR )?", ""),
    (r"\[Errno -?\d+\] |: '\w+\(\)'$", ""),  # FFmpeg's numbers and functions, from PyAV
)
"""What libraries say around a reason."""


def one_line(error: Exception, place: Place) -> str:
    """The reason without C++ file names, time stamps, conditions, advice and stack traces."""
    if isinstance(error, MemoryError):
        return "needs more memory than a decoder may take"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).split("Stack trace")[0]
    for name in (os.path.join(os.curdir, str(place)), str(place)):
        text = text.replace(f"[{name}]", "").replace(name, "the file")
    for pattern, replacement in NOISE:
        text = re.sub(pattern, replacement, text)
    text = re.split(r"\. (?=[A-Z])|\.\.\.|\n", text.strip())[0].strip(" .")
    return text[:200] or type(error).__name__
