"""From a file to the wanted frames: `read_clip`, for videos, pictures, arrays, TIFF stacks alike.

A file is opened, read and closed by a function that is called in a process of its own. F different
frames of a file, T frames of a clip, H W pixels, C channels.
"""

import operator
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from video_mae.config.data import FileConfig
from video_mae.decoding import decoders, pictures
from video_mae.decoding.arrays import open_npy, open_npz, open_packed
from video_mae.decoding.choices import Wanted, chosen, is_sent
from video_mae.decoding.containers import check_regular
from video_mae.decoding.isolation import KilledError, decoder_process
from video_mae.decoding.media import (
    MAX_CLIP_BYTES,
    Array,
    Clip,
    Frames,
    Indices,
    Member,
    Place,
    Reading,
    VideoDecodeError,
    as_decode_error,
    local_file,
    suffix,
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
    **dict.fromkeys(pictures.STACKS, ("tifffile", pictures.open_tiff)),
    **dict.fromkeys(pictures.STILLS, ("pillow", pictures.open_still)),
}
"""What reads a file that is no video, by the ending of its name; any other ending is a video, for
data.decoder.
"""
STREAMED = 8  # frames of a stream that are handed over at once
WHITE = 65535


@dataclass(frozen=True)
class Decoded:
    """The wanted frames of a video, each once, and which of them stands where in the choice.

    num_frames: of the whole video. decoder: what read it; fallback: why that was not the run's
    decoder (empty: it was). waiting_seconds: what went by without computing, from the opening of
    the file on, mostly for the disk; waiting for a core is left out as far as the thread that reads
    did it itself.
    """

    frames_FHWC: Clip
    places: Indices
    num_frames: int
    decoder: str
    fallback: str
    waiting_seconds: float

    @property
    def clip_THWC(self) -> Clip:  # noqa: N802  (shape letters)
        """The frames in the order of the choice; one that is wanted T times is there once, with a
        stride of 0.
        """
        frames_FHWC, places_T = self.frames_FHWC, self.places.ravel()
        # T times the same memory: of a large picture there may be none for T copies
        if len(frames_FHWC) == 1:
            shape, strides = frames_FHWC.shape[1:], frames_FHWC.strides[1:]
            return as_strided(frames_FHWC, (len(places_T), *shape), (0, *strides))
        if np.array_equal(places_T, np.arange(len(frames_FHWC))):
            return frames_FHWC
        return frames_FHWC[places_T]


def decode(place: Place, wanted: Wanted, reading: Reading = Reading()) -> Clip:  # noqa: B008  (frozen)
    """Reads the wanted frames of a video: clip_THWC, RGB where it is a video. See `read_clip`."""
    return read_clip(place, wanted, reading).clip_THWC


def read_clip(place: Place, wanted: Wanted, reading: Reading) -> Decoded:
    """Reads the wanted frames of a video, of the size that `reading.short_side` says.

    A picture is a video of one frame, a volume one whose slices are frames. Arrays are read as
    `reading.source` says; values are uint8, or with source.value_range = (black, white) uint16:
    65535 * (x - black) / (white - black), clipped, NaN as black. The file is opened, read and
    closed in a process of its own, which is ended when it takes longer than `reading.seconds` or
    more memory than `reading.memory_gb`; arrays of .npy files are read in this one.
    Raises: VideoDecodeError when the file is not regular, not what its name says, cut off, has
    other values or not `in_channels` channels, when a frame cannot be decoded, or when the process
    had to be ended.
    """
    return _call(_read, place, reading, _sendable(wanted, place, reading))


def stream(
    place: Place,
    wanted: Wanted,
    reading: Reading = Reading(),  # noqa: B008
) -> Iterator[tuple[int, int, Clip]]:
    """The wanted frames of a video, rising, one after another, none kept: for videos of any length.

    Yields: (frames of the video, index, frame_HWC as in the clips of `decode`). Raises: as
    `decode`, when it comes to a frame that cannot be decoded.
    """
    wanted, done = _sendable(wanted, place, reading), 0
    for is_last in (False, True):
        with _attempt(place, reading, is_last):
            _, iterate, reading = _caller(place, reading)
            # what the process before has handed over is passed over
            left = islice(iterate(_read_on, place, reading, wanted), done, None)
            for num_frames, indices, clip_FHWC in left:
                done += 1
                for index, frame_HWC in zip(indices, clip_FHWC, strict=True):
                    yield num_frames, index, frame_HWC
            return


def times_and_start(place: Place, reading: Reading) -> tuple[NDArray[np.float64], float]:
    """When each frame of a video is shown, seconds from the first one on [F, (begin, end)], NaN for
    files without time; and what its own clock says when the first frame is shown, seconds: often 0,
    in a recording anything.

    The same for every decoder. Raises: as `decode`.
    """
    return _call(_times, place, reading)


@cache
def resolve_decoder(decoder: str) -> str:
    """The decoder of a run on this machine, tried in a process of its own. Raises: ValueError
    naming data.decoder and the remedy.
    """
    return decoder_process().ask(decoders.resolve, decoder)


@cache
def decoder_version(decoder: str) -> str:
    """The version of a decoder that works here, asked in a process of its own."""
    return decoder_process().ask(decoders.version, decoder)


def is_video(place: Place) -> bool:
    """Whether a file is left to a video decoder."""
    return suffix(place) not in READERS


def _call(function: Callable[..., Any], place: Place, reading: Reading, *arguments: Any) -> Any:
    """function(place, reading, ...) where the file is read."""
    for is_last in (False, True):
        with _attempt(place, reading, is_last):
            call, _, reading = _caller(place, reading)
            return call(function, place, reading, *arguments)


@contextmanager
def _attempt(place: Place, reading: Reading, is_last: bool) -> Iterator[None]:
    """To read a file. Where the process has ended, or had to be, and this is not the last attempt,
    it ends in silence: who is out of memory, or cleans up, kills or stops whatever decodes just
    then. Twice in a row is no chance, but the file.
    """
    try:
        yield
    except KilledError as killed:
        if is_last:
            raise VideoDecodeError(str(place), reading.decoder, str(killed)) from None


def _caller(
    place: Place, reading: Reading
) -> tuple[Callable[..., Any], Callable[..., Any], Reading]:
    """What calls a function where a file is read, what runs a generator there, and how it is read:
    with a decoder that works.
    """
    if is_video(place):
        reading = replace(reading, decoder=resolve_decoder(reading.decoder))
    if _is_for_this_process(place):
        return operator.call, operator.call, reading
    process = decoder_process()
    process.load(decoders.resolve, reading.decoder)
    # CUDA reserves addresses without end
    memory_gb = reading.memory_gb if reading.device == "cpu" else 0.0
    limits = {"seconds": reading.seconds, "memory_gb": memory_gb}
    return partial(process.call, **limits), partial(process.iterate, **limits), reading


def _is_for_this_process(place: Place) -> bool:
    """Arrays of local files, which are only copied; and what lies in the memory of this process."""
    archive = place.archive if isinstance(place, Member) else ""
    return archive.startswith("memory://") or (suffix(place) == ".npy" and "://" not in archive)


def _sendable(wanted: Wanted, place: Place, reading: Reading) -> Wanted:
    """The choice as the process that reads can be given it: a lambda as its indices."""
    if is_sent(wanted):
        return wanted
    times_F2, _ = times_and_start(place, reading)
    return chosen(wanted, len(times_F2))


# From here on: what runs where the file is read.


@contextmanager
def open_file(place: Place, reading: Reading) -> Iterator[tuple[Frames, str, str]]:
    """Opens a file within: its frames, what reads them, and why that is not the first decoder.
    Raises: VideoDecodeError where it cannot be opened.
    """
    decoder, open_other = READERS.get(suffix(place), (reading.decoder, None))
    fallback = ""
    with ExitStack() as kept:
        with as_decode_error(place, decoder):
            check_regular(place)
            if isinstance(place, Member) and suffix(place) == ".npy":
                frames = open_packed(place)
            else:
                path = kept.enter_context(local_file(place))
                if open_other is None:
                    frames, decoder, fallback = decoders.open_video(path, place, reading)
                else:
                    frames = open_other(path, reading.source, reading.in_channels)
            if frames.num_frames < 1:
                raise ValueError("the video has no frames")
        yield frames, decoder, fallback


def _read(place: Place, reading: Reading, wanted: Wanted) -> Decoded:
    begin = _idle_seconds()
    with open_file(place, reading) as (frames, decoder, fallback):
        # an error in the choice is no fault of the video
        indices = chosen(wanted, frames.num_frames)
        different, places = np.unique(indices, return_inverse=True)
        assert 0 <= different[0] <= different[-1] < frames.num_frames
        with as_decode_error(place, decoder):
            frames_FHWC = _gathered(frames.read(different), len(different), reading)
    return Decoded(
        frames_FHWC,
        places.reshape(indices.shape),
        frames.num_frames,
        decoder,
        fallback,
        # several threads compute more than time goes by
        max(_idle_seconds() - begin, 0.0),
    )


def _read_on(
    place: Place, reading: Reading, wanted: Wanted
) -> Iterator[tuple[int, list[int], Clip]]:
    with open_file(place, reading) as (frames, decoder, _):
        indices = np.unique(chosen(wanted, frames.num_frames))
        rest, shape = frames.read(indices), None
        for first in range(0, len(indices), STREAMED):
            part = indices[first : first + STREAMED].tolist()
            with as_decode_error(place, decoder):
                clip_FHWC = _gathered(rest, len(part), reading, shape)
            shape = clip_FHWC.shape[1:]
            yield frames.num_frames, part, clip_FHWC


def _times(place: Place, reading: Reading) -> tuple[NDArray[np.float64], float]:
    with open_file(place, reading) as (frames, decoder, _), as_decode_error(place, decoder):
        if frames.stamps is None:
            return np.full((frames.num_frames, 2), np.nan), 0.0
        return frames.stamps.shown(), frames.stamps.start


def _idle_seconds() -> float:
    """The clock, less what all threads of the process have computed, and what this one has waited
    for a core.
    """
    try:
        with open("/proc/thread-self/schedstat", "rb") as file:
            queued = int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):  # a kernel that does not count
        queued = 0.0
    return time.perf_counter() - time.process_time() - queued


def _gathered(
    frames: Iterator[Array], num: int, reading: Reading, shape: tuple[int, ...] | None = None
) -> Clip:
    """The next frames, as the model takes them: clip_FHWC. shape: of those before, if any. Raises:
    ValueError, and what reads them does.
    """
    clip_FHWC: Clip | None = None
    done = 0
    for done, frame in enumerate(islice(frames, num), 1):
        if frame.nbytes * num > MAX_CLIP_BYTES:
            raise ValueError(
                f"{num} frames of {frame.shape[1]} x {frame.shape[0]} pixels are more than 2 GB"
            )
        frame_HWC = _pixels(frame, reading)
        shape = shape or frame_HWC.shape
        if frame_HWC.shape != shape:
            raise ValueError("the size of the picture changes within the video")
        if clip_FHWC is None:
            clip_FHWC = np.empty((num, *shape), frame_HWC.dtype)
        clip_FHWC[done - 1] = frame_HWC
    if clip_FHWC is None or done < num:
        raise ValueError(f"only {done} of {num} frames can be decoded")
    return clip_FHWC


def _pixels(frame_HWC: Array, reading: Reading) -> Clip:
    """A frame as the model takes it. Raises: ValueError where it has other channels or values."""
    source, channels = reading.source, frame_HWC.shape[2]
    if source.channels:
        if max(source.channels) >= channels:
            raise ValueError(
                f"has {channels} channels, data.channels asks for {max(source.channels)}, "
                "counted from 0"
            )
        frame_HWC = frame_HWC[:, :, list(source.channels)]
        channels = len(source.channels)
    if channels != reading.in_channels:
        raise ValueError(
            f"gives {channels} channels of {frame_HWC.shape[1]} x {frame_HWC.shape[0]} "
            "pixels, model.in_channels is "
            f"{reading.in_channels}; change it, data.channels, or data.axes"
        )
    if source.value_range is None:
        if frame_HWC.dtype != np.uint8:
            raise ValueError(
                f"holds {frame_HWC.dtype}; set data.value_range to the values that are black "
                "and white"
            )
        return np.asarray(frame_HWC)
    low, high = source.value_range
    values = frame_HWC.astype(np.result_type(frame_HWC.dtype, np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        values = (values - low) * (WHITE / (high - low))
    return np.nan_to_num(values, nan=0.0).clip(0, WHITE).round().astype(np.uint16)
