"""Videos by PyAV: frames are numbered by the packets' time stamps, a seek goes to the key frame before, decoding goes on from there.

Where packets and frames do not match (packed B-frames, missing stamps), the file is decoded from its start, twice: to count, and to read.
"""

from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from video_mae.decoding.reading import Frames, Reading, scaled_size, shown_times

CONVERTER = VideoReformatter()
"""Keeps its tables, which take longer to make than a small frame to convert."""
SKIPPING = ("h264", "hevc", "mpeg4")
"""Decoders that decide packet by packet what they leave out, and name what no other frame refers to."""


def load() -> str:
    """Loads the library; returns its version."""
    av.logging.set_level(None)
    return av.__version__


def open_video(path: str, reading: Reading, *, in_order: bool = False) -> Frames:
    """Opens a file that is a video container; in_order: frames are counted by decoding, for files whose packets mislead.

    Raises: av.FFmpegError, and ValueError where a frame that the packets promise does not come out.
    """
    video = _Video(path, reading, in_order)
    return Frames(len(video.stamps), video.read, video.times)


def shown_size(path: str) -> tuple[int, int]:
    """(height, width) of the frames of a video as they are shown, its rotation included."""
    with open_container(path) as container:
        stream = video_stream(container)
        frame = next(container.decode(stream))
        height, width = stream.codec_context.height, stream.codec_context.width
        return (width, height) if frame.rotation % 180 else (height, width)


def frame_rate(path: str) -> Fraction:
    """Frames a second of a video, as its file says; 25 where it does not."""
    with open_container(path) as container:
        stream = video_stream(container)
        return stream.average_rate or stream.guessed_rate or Fraction(25)


def sequential(path: str, threads: int = 1) -> Iterator[av.VideoFrame]:
    """All frames of a video in the order they are shown, from its start on: the truth that random access is measured by."""
    with open_container(path) as container:
        stream = video_stream(container)
        _set_threads(stream, threads)
        yield from container.decode(stream)


def pixels(frame: av.VideoFrame, short_side: int) -> NDArray[np.uint8]:
    """A decoded frame as RGB, upright, scaled down to short_side: frame_HWC."""
    height, width = scaled_size(frame.height, frame.width, short_side)
    scaled = CONVERTER.reformat(frame, width, height, "rgb24")
    return np.rot90(np.asarray(scaled.to_ndarray(), np.uint8), frame.rotation // 90)


def open_container(path: str) -> Any:
    """A video container, which may name no other file. Raises: av.FFmpegError."""
    # FFmpeg opens what a file names (playlists, references) by a protocol: none but files are allowed, and check_container comes before.
    return av.open(path, metadata_errors="ignore", options={"protocol_whitelist": "file"})


def video_stream(container: Any) -> Any:
    """The stream that is decoded, FFmpeg's choice. Raises: ValueError."""
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("the file has no video stream")
    return stream


def _set_threads(stream: Any, threads: int) -> None:
    stream.codec_context.thread_count = threads
    stream.thread_type = "AUTO" if threads > 1 else "NONE"


def _table(container: Any, stream: Any) -> list[tuple[Any, bool]]:
    """(time stamp, whether it is a key frame) of each packet that is shown."""
    first = next(container.demux(stream), None)
    if first is None:
        return []
    if stream.codec_context.name == "h264" and not stream.codec_context.has_b_frames and "mp4" in container.format.name:
        # The index of the file has the order of decoding, which here is that of showing: packed videos need not be read for it.
        index = [(entry.timestamp, entry.is_keyframe) for entry in stream.index_entries if not entry.is_discard]
        if len(index) == stream.frames > 0 and first.pts == index[0][0]:
            return index
    return [(p.pts, p.is_keyframe) for p in chain([first], container.demux(stream)) if p.size and not p.is_discard]


def _decoded(container: Any, stream: Any, needed: set[Any]) -> Iterator[av.VideoFrame]:
    """The frames from where the file is; those that are not needed, nor needed by others, are not decoded at all."""
    skips = stream.codec_context.name in SKIPPING
    for packet in container.demux(stream):
        if skips:
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in needed else "NONREF"
        yield from packet.decode()


class _Video:
    """An opened file, which is closed with it: PyAV's objects refer to each other, and Python would collect them late."""

    container: Any = None

    def __init__(self, path: str, reading: Reading, in_order: bool) -> None:
        self.path, self.reading = path, reading
        self.container = open_container(path)  # opening one costs milliseconds
        self.stream = video_stream(self.container)
        _set_threads(self.stream, reading.threads)
        self.time_base = float(self.stream.time_base)
        self.fps = float(self.stream.average_rate or self.stream.guessed_rate or 1)
        packets = _table(self.container, self.stream)
        self.ordered = in_order or any(pts is None for pts, _ in packets) or len({pts for pts, _ in packets}) < len(packets)
        if self.ordered:
            stamps = [frame.pts for frame in sequential(path, reading.threads)]
            self.stamps: list[Any] = stamps
            self.keys: list[Any] = []
        else:
            self.stamps = sorted(pts for pts, _ in packets)
            self.keys = sorted(pts for pts, is_key in packets if is_key)

    def __del__(self) -> None:
        if self.container is not None:
            self.container.close()

    def read(self, wanted: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        for frame in self._in_order(wanted) if self.ordered else self._by_seeking(wanted):
            yield pixels(frame, self.reading.short_side)

    def times(self) -> NDArray[np.float64]:
        return shown_times(np.array(self.stamps, dtype=np.float64) * self.time_base, self.fps)  # None is NaN

    def _in_order(self, wanted: NDArray[np.int64]) -> Iterator[av.VideoFrame]:
        rest = iter(wanted.tolist())
        next_wanted = next(rest, None)
        for place, frame in enumerate(sequential(self.path, self.reading.threads)):
            if next_wanted is None:
                return
            if place == next_wanted:
                yield frame
                next_wanted = next(rest, None)
        if next_wanted is not None:
            raise ValueError(f"frame {next_wanted} of {len(self.stamps)} cannot be decoded")

    def _by_seeking(self, wanted: NDArray[np.int64]) -> Iterator[av.VideoFrame]:
        frames: Iterator[av.VideoFrame] = iter(())
        needed = {self.stamps[index] for index in wanted.tolist()}
        position: Any = None
        for index in wanted.tolist():
            stamp = self.stamps[index]
            key = bisect_right(self.keys, stamp)
            if position is None or (key and self.keys[key - 1] > position):  # a key frame lies between: jump to it
                self.container.seek(self.keys[key - 1] if key else self.stamps[0], stream=self.stream)
                frames = _decoded(self.container, self.stream, needed)
            for frame in frames:
                position = frame.pts
                if position is not None and position >= stamp:
                    break
            if position != stamp:
                raise ValueError(f"frame {index} of {len(self.stamps)} cannot be decoded")
            yield frame  # pyright: ignore[reportPossiblyUnboundVariable]  (position is the last one's)
