"""Files that are open for reading, in the process that decodes: `open_file`, `next_frames`,
`frame_times`, `close_file`.

T frames of a clip, F frames of a file, H W pixels, C channels.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from video_mae.config.data import FileConfig
from video_mae.decoding import stills, tiff
from video_mae.decoding.arrays import open_npy, open_npz
from video_mae.decoding.containers import check_regular
from video_mae.decoding.decoders import local_file, open_video, resolve
from video_mae.decoding.packed_frames import open_frames
from video_mae.decoding.reading import (
    MAX_CLIP_BYTES,
    Clip,
    Frames,
    Member,
    Place,
    Reading,
    VideoDecodeError,
)

VIDEO_EXTENSIONS = (
    ".3g2",
    ".3gp",
    ".3gpp",
    ".f4v",
    ".ismv",
    ".m4v",
    ".mov",
    ".mp4",
    ".mp4v",
    ".qt",
    ".mk3d",
    ".mkv",
    ".webm",
    ".avi",
    ".divx",
    ".xvid",
    ".asf",
    ".wmv",
    ".m2p",
    ".m2v",
    ".mp2v",
    ".mpe",
    ".mpeg",
    ".mpg",
    ".mpv",
    ".m1v",
    ".vob",
    ".m2t",
    ".m2ts",
    ".mts",
    ".ts",
    ".flv",
    ".ogm",
    ".ogv",
    ".mxf",
    ".gif",
    ".264",
    ".265",
    ".avc",
    ".h264",
    ".h265",
    ".hevc",
    ".mjpeg",
    ".mjpg",
    ".y4m",
)
"""Of files that a folder gives as videos, a container a line; a list may name any other."""
ANIMATION = ".gif"
"""A video beside videos; beside pictures a picture that nothing here reads."""
READERS: dict[str, tuple[str, Callable[[str, FileConfig, int], Frames]]] = {
    ".npy": ("numpy", open_npy),
    ".npz": ("numpy", open_npz),
    **dict.fromkeys(tiff.EXTENSIONS, ("tifffile", tiff.open_tiff)),
    **dict.fromkeys(stills.EXTENSIONS, ("pillow", stills.open_still)),
}
"""What reads a file that is no video, by the ending of its name; any other ending is a video, for
data.decoder.
"""
WHITE = 65535

Allocate = Callable[[tuple[int, ...], Any], NDArray[Any]]
"""From a shape and a type to memory for a clip."""


class Facts(NamedTuple):
    """What is known of a file that is open: a number to call it by, its frames, what reads it, and
    why it is not the first decoder.
    """

    handle: int
    num_frames: int
    decoder: str
    fallback: str


class Cost(NamedTuple):
    """Seconds that frames took, with the opening of their file: waiting for the disk, and
    computing.

    Waiting for a core, which is neither, is left out as far as the thread that reads did it itself.
    """

    waiting: float
    computing: float

    @classmethod
    def since(cls, begin: "Moment") -> "Cost":
        """What has gone by; several threads compute more than time goes by."""
        elapsed, computing, queued = (
            now - then for now, then in zip(Moment.now(), begin, strict=True)
        )
        return cls(max(elapsed - computing - queued, 0.0), computing)


class Moment(NamedTuple):
    """Seconds on the clock, that all threads of the process have computed, and that this one has
    waited for a core.
    """

    clock: float
    computed: float
    queued: float

    @classmethod
    def now(cls) -> "Moment":
        """The present."""
        try:
            with open("/proc/thread-self/schedstat", "rb") as file:
                queued = int(file.read().split()[1]) / 1e9
        except (OSError, IndexError):  # a kernel that does not count
            queued = 0.0
        return cls(time.perf_counter(), time.process_time(), queued)


@dataclass
class _Opened:
    place: Place
    reading: Reading
    decoder: str
    frames: Frames
    opening: Cost
    pass_over: Iterator[NDArray[Any]] = iter(())


_opened: dict[int, _Opened] = {}
_FIRST_HANDLE = os.getpid() << 32  # handles of a process that was replaced mean nothing to the next
_last_handle = _FIRST_HANDLE


def is_video(place: Place) -> bool:
    """Whether a file is left to a video decoder."""
    return suffix(place) not in READERS


def suffix(place: Place) -> str:
    """The ending of a file's name, in lower case."""
    return Path(place.name if isinstance(place, Member) else place).suffix.lower()


def open_file(place: Place, reading: Reading) -> Facts:
    """Opens a file until it is closed. Raises: VideoDecodeError."""
    begin = Moment.now()
    known = READERS.get(suffix(place))
    first = known[0] if known else resolve(reading.decoder)
    with as_decode_error(place, first):
        check_regular(place)
        fallback = ""
        if known is None:
            name, frames, fallback = open_video(place, reading)
            fallback = _one_line(ValueError(fallback), place) if fallback else ""
        elif isinstance(place, Member) and suffix(place) == ".npy":
            name, frames = known[0], open_frames(place)
        else:
            path, kept = local_file(place)
            name, frames = known[0], known[1](path, reading.source, reading.in_channels)
            frames = Frames(frames.num_frames, frames.read, frames.times, kept)
        if frames.num_frames < 1:
            raise ValueError("the video has no frames")
    global _last_handle
    handle = _last_handle = _last_handle + 1
    _opened[handle] = _Opened(place, reading, name, frames, Cost.since(begin))
    return Facts(handle, frames.num_frames, name, fallback)


def next_frames(
    handle: int, num_frames: int, wanted: NDArray[np.int64] | None, allocate: Allocate = np.empty
) -> tuple[Clip, Cost]:
    """The first frames of a new pass over an open file, which will give the frames `wanted`, rising
    indices; or its next ones where None.

    Returns: clip_FHWC and what it cost, of the first frames with the opening. Raises:
    VideoDecodeError.
    """
    begin = Moment.now()
    opened = _opened[handle]
    before, opened.opening = opened.opening, Cost(0.0, 0.0)
    if wanted is not None:
        opened.pass_over = opened.frames.read(wanted)
    clip_FHWC: NDArray[Any] | None = None
    with as_decode_error(opened.place, opened.decoder):
        num = 0
        for num, frame in enumerate(islice(opened.pass_over, num_frames), 1):
            if clip_FHWC is None and frame.nbytes * num_frames > MAX_CLIP_BYTES:
                raise ValueError(
                    f"{num_frames} frames of {frame.shape[1]} x {frame.shape[0]} pixels are more than 2 GB"
                )
            frame_HWC = _pixels(frame, opened.reading)
            if clip_FHWC is None:
                clip_FHWC = allocate((num_frames, *frame_HWC.shape), frame_HWC.dtype)
            elif frame_HWC.shape != clip_FHWC.shape[1:]:
                raise ValueError("the size of the picture changes within the clip")
            clip_FHWC[num - 1] = frame_HWC
        if clip_FHWC is None or num < num_frames:
            raise ValueError(f"only {num} of {num_frames} frames can be decoded")
    cost = Cost.since(begin)
    return clip_FHWC, Cost(before.waiting + cost.waiting, before.computing + cost.computing)


def frame_times(handle: int) -> tuple[NDArray[np.float64], float]:
    """When each frame of an open file is shown, and by the file's own clock the first one: see
    `frames.times`. Raises: VideoDecodeError.
    """
    opened = _opened[handle]
    with as_decode_error(opened.place, opened.decoder):
        return opened.frames.times(), opened.frames.start


def close_file(handle: int) -> int:
    """Closes an open file. Returns how many this process has opened by then; 0 while others are
    open.
    """
    _opened.pop(handle, None)
    return 0 if _opened else _last_handle - _FIRST_HANDLE


def _pixels(frame_HWC: NDArray[Any], reading: Reading) -> Clip:
    """A frame as the model takes it. Raises: ValueError where it has other channels or values."""
    source, channels = reading.source, frame_HWC.shape[2]
    if source.channels:
        if max(source.channels) >= channels:
            raise ValueError(
                f"has {channels} channels, data.channels asks for {max(source.channels)}, counted from 0"
            )
        frame_HWC = frame_HWC[:, :, list(source.channels)]
        channels = len(source.channels)
    if channels != reading.in_channels:
        raise ValueError(
            f"gives {channels} channels of {frame_HWC.shape[1]} x {frame_HWC.shape[0]} pixels, model.in_channels is "
            f"{reading.in_channels}; change it, data.channels, or data.axes"
        )
    if source.value_range is None:
        if frame_HWC.dtype != np.uint8:
            raise ValueError(
                f"holds {frame_HWC.dtype}; set data.value_range to the values that are black and white"
            )
        return np.asarray(frame_HWC)
    low, high = source.value_range
    values = frame_HWC.astype(np.result_type(frame_HWC.dtype, np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        values = (values - low) * (WHITE / (high - low))
    return np.nan_to_num(values, nan=0.0).clip(0, WHITE).round().astype(np.uint16)


@contextmanager
def as_decode_error(place: Place, decoder: str) -> Iterator[None]:
    """Whatever goes wrong with a file within is raised as a VideoDecodeError, its reason one line."""
    try:
        yield
    except Exception as error:
        # decoders raise RuntimeError, ValueError, IndexError, MemoryError and types of their own
        raise VideoDecodeError(str(place), decoder, _one_line(error, place)) from None


def _one_line(error: Exception, place: Place) -> str:
    """The reason without decord's C++ file names, time stamps, conditions, advice and stack trace."""
    if isinstance(error, MemoryError):
        return "needs more memory than a decoder may take"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).split("Stack trace")[0]
    for name in (os.path.join(os.curdir, str(place)), str(place)):
        text = text.replace(f"[{name}]", "").replace(name, "the file")
    text = re.sub(r"/proc/self/fd/\d+", "the file", text)
    text = re.sub(r"^\w+, \S+\.cpp:\d+, ", "", text)  # torchcodec's functions and files
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+?:\d+: ", "", text)
    text = re.sub(r"Check failed: .*? \(\S+ vs\. \S+\) (ERROR )?", "", text)
    # FFmpeg's numbers and functions, from PyAV
    text = re.sub(r"\[Errno -?\d+\] |: '\w+\(\)'$", "", text)
    text = re.split(r"\. (?=[A-Z])|\.\.\.|\n", text.strip())[0].strip(" .")
    return text[:200] or type(error).__name__
