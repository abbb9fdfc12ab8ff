"""From a file to the wanted frames: `decode`, for videos, pictures, arrays and TIFF stacks alike.

T frames, F different ones, H W pixels, C channels.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from video_mae.decoding import decoders
from video_mae.decoding.isolation import Isolated, KilledError, decoder_process
from video_mae.decoding.opened import (
    Cost,
    Facts,
    close_file,
    frame_times,
    is_video,
    next_frames,
    open_file,
    suffix,
)
from video_mae.decoding.reading import Choose, Clip, Member, Place, Reading, VideoDecodeError

STREAMED = 8  # frames of a stream that are handed over at once
MOST_FILES = 5000
"""That a process opens before another takes its place: decoders leave some KB behind with each."""
# a process that decodes is there by then, its libraries loaded, also on a busy machine
START_SECONDS = 120.0


@dataclass(frozen=True)
class Decoded:
    """A clip, what read it, why that was not the run's decoder (empty: it was), and what it cost."""

    clip_THWC: Clip
    decoder: str
    fallback: str
    cost: Cost


def decode(place: Place, choose: Choose, reading: Reading = Reading()) -> Clip:  # noqa: B008  (frozen)
    """Reads the frames choose(number of frames) of a video: clip_THWC, RGB where it is a video. See
    `read_clip`.
    """
    return read_clip(place, choose, reading).clip_THWC


def read_clip(place: Place, choose: Choose, reading: Reading) -> Decoded:
    """Reads the frames choose(number of frames) of a video, of the size that `reading.short_side`
    says.

    A picture is a video of one frame, a volume one whose slices are frames. Arrays are read as
    `reading.source` says; values are uint8, or with source.value_range = (black, white) uint16:
    65535 * (x - black) / (white - black), clipped, NaN as black. One frame wanted T times is there
    once, with a stride of 0. The file is opened, read and closed in a process of its own, which is
    ended when it takes longer than `reading.seconds` or more memory than `reading.memory_gb`;
    arrays of .npy files are read in this one.
    Raises: VideoDecodeError when the file is not regular, not what its name says, cut off, has
    other values or not `in_channels` channels, when a frame cannot be decoded, or when the process
    had to be ended.
    """
    with _opened(place, reading) as (facts, run):
        indices_T = choose(facts.num_frames)  # outside: an error in there is no fault of the video
        wanted, place_T = np.unique(indices_T, return_inverse=True)
        assert 0 <= wanted[0] <= wanted[-1] < facts.num_frames
        clip_FHWC, cost = run(next_frames, facts.handle, len(wanted), wanted, shares=True)
    # T times the same memory: of a large picture there may be none for T copies
    if len(wanted) == 1:
        clip_THWC = as_strided(
            clip_FHWC[0], (len(indices_T), *clip_FHWC.shape[1:]), (0, *clip_FHWC.strides[1:])
        )
    else:
        clip_THWC = (
            clip_FHWC
            if len(wanted) == len(indices_T) and np.array_equal(wanted, indices_T)
            else clip_FHWC[place_T]
        )
    return Decoded(clip_THWC, facts.decoder, facts.fallback, cost)


def stream(place: Place, choose: Choose, reading: Reading = Reading()) -> Iterator[Clip]:  # noqa: B008
    """The frames choose(number of frames), of increasing indices, one after another, none kept: for
    videos of any length.

    Yields: frame_HWC as in the clips of `decode`. Raises: as `decode`, when it comes to a frame
    that cannot be decoded.
    """
    with _opened(place, reading) as (facts, run):
        wanted = choose(facts.num_frames)
        size = None
        for first in range(0, len(wanted), STREAMED):
            clip_FHWC, _ = run(
                next_frames,
                facts.handle,
                min(STREAMED, len(wanted) - first),
                None if first else wanted,
                shares=True,
            )
            if clip_FHWC.shape[1:] != (size or clip_FHWC.shape[1:]):
                raise VideoDecodeError(
                    str(place), facts.decoder, "the size of the picture changes within the video"
                )
            size = clip_FHWC.shape[1:]
            yield from clip_FHWC


def times(place: Place, reading: Reading) -> NDArray[np.float64]:
    """When each frame of a video is shown, seconds from the first one on [F, (begin, end)]; NaN for
    files without time.

    The same for every decoder. Raises: as `decode`.
    """
    return times_and_start(place, reading)[0]


def times_and_start(place: Place, reading: Reading) -> tuple[NDArray[np.float64], float]:
    """The `times` of a video, and what its own clock says when the first frame is shown, seconds:
    often 0, in a recording anything.
    """
    with _opened(place, reading) as (facts, run):
        return run(frame_times, facts.handle)


@cache
def resolve_decoder(decoder: str) -> str:
    """The decoder of a run on this machine, tried in a process of its own. Raises: ValueError
    naming data.decoder and the remedy.
    """
    return decoder_process().call(decoders.resolve, decoder, seconds=START_SECONDS)


@cache
def decoder_version(decoder: str) -> str:
    """The version of a decoder that works here, asked in a process of its own."""
    return decoder_process().call(decoders.version, decoder, seconds=START_SECONDS)


Run = Callable[..., Any]


@contextmanager
def _opened(place: Place, reading: Reading) -> Iterator[tuple[Facts, Run]]:
    """An open file, and what calls functions where it is open."""
    if is_video(place) and reading.decoder == "auto":
        reading = replace(reading, decoder=resolve_decoder("auto"))
    if _is_for_this_process(place):
        facts = open_file(place, reading)
        try:
            yield facts, _here
        finally:
            close_file(facts.handle)
        return
    process = decoder_process()
    run = partial(_there, process, place, reading)
    facts = run(open_file, place, reading)
    try:
        yield facts, run
    finally:
        if (
            process.is_alive
            and process.call(close_file, facts.handle, seconds=START_SECONDS) >= MOST_FILES
        ):
            process.close()


def _is_for_this_process(place: Place) -> bool:
    """Arrays of local files, which are only copied; and what lies in the memory of this process."""
    archive = place.archive if isinstance(place, Member) else ""
    return archive.startswith("memory://") or (suffix(place) == ".npy" and "://" not in archive)


def _here(function: Callable[..., Any], *arguments: Any, shares: bool = False) -> Any:
    return function(*arguments)


def _there(
    process: Isolated,
    place: Place,
    reading: Reading,
    function: Callable[..., Any],
    *arguments: Any,
    shares: bool = False,
) -> Any:
    if not process.is_alive:  # a new one loads its libraries first, which is no fault of the file
        process.call(decoders.resolve, reading.decoder, seconds=START_SECONDS)
    # CUDA reserves addresses without end
    memory_gb = reading.memory_gb if reading.device == "cpu" else 0.0
    try:
        return process.call(
            function, *arguments, seconds=reading.seconds, memory_gb=memory_gb, shares=shares
        )
    except KilledError as killed:
        raise VideoDecodeError(str(place), reading.decoder, str(killed)) from None
    except KeyError:  # what a file did to the process was to another one's loss
        raise VideoDecodeError(
            str(place), reading.decoder, "the process that read it was ended meanwhile"
        ) from None
