"""From a file to what a shard holds of it, in the process that decodes: `begin`, then `go_on` until
it is done.

F frames, H W pixels, C channels.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from typing import Any

import av
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from video_mae.config.data import SourceConfig
from video_mae.config.pack import PackConfig
from video_mae.decoding.containers import check_container, check_regular
from video_mae.decoding.decoders import local_file
from video_mae.decoding.opened import READERS, as_decode_error, suffix
from video_mae.decoding.packets import Turn, orientation
from video_mae.decoding.pyav_video import CONVERTER, frame_rate, pixels, sequential, upright
from video_mae.decoding.reading import MAX_CLIP_BYTES, Place, shown_times

STEP_FRAMES, STEP_BYTES = 32, 2**26
"""Between frames, and between bytes of a file, after which `go_on` returns: what takes longer makes
no progress.
"""
CLOCK = 90_000
"""Ticks a second of the time stamps in packed videos: whole ticks a frame at 24, 25, 30,
30000/1001, 50 or 60 frames a second.
"""
JITTER = 0.1
"""Of the time between two frames that are kept: a frame may come so much too early, as stamps in
milliseconds do.
"""
NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class Packed:
    """The file for a shard, and what is known of it and of its source; fps is None where there is
    no time.
    """

    media: NDArray[np.uint8]
    num_frames: int
    fps: float | None
    height: int
    width: int
    source_bytes: int
    source_sha256: str


_jobs: dict[int, Generator[None, None, Packed]] = {}
_handles = count(os.getpid() << 32)  # those of a process that was replaced mean nothing to the next


def ready() -> None:
    """Does nothing: the libraries are loaded, which takes a moment, when it can be called."""


def begin(place: Place, config: PackConfig) -> int:
    """Begins with a file; the number that it returns is for `go_on`. One that was begun before is
    given up.
    """
    _jobs.clear()
    handle = next(_handles)
    _jobs[handle] = _pack(place, config)
    return handle


def go_on(handle: int) -> Packed | None:
    """Goes on with a file for a while: None, or what came of it at last. Raises: VideoDecodeError
    where it cannot be packed.
    """
    try:
        next(_jobs[handle])
    except StopIteration as end:
        del _jobs[handle]
        return end.value
    return None


def _pack(place: Place, config: PackConfig) -> Generator[None, None, Packed]:
    reader, open_still = READERS.get(suffix(place), ("pyav", None))
    with as_decode_error(place, reader):
        if open_still and config.form == "video":
            raise ValueError("pictures and arrays are packed with form=frames only")
        check_regular(place)
        path, kept = local_file(place)
        size, digest = yield from _identity(path)
        if open_still:
            frames, rate = _images(open_still, path), None
        else:
            with open(path, "rb") as file:
                check_container(file, size)
            frames, rate = sequential(path), frame_rate(path)
        keeps = yield from _choice(path, rate, config)
        sink = (_Video if config.form == "video" else _Array)(config, rate)
        stamps, places = list[float | None](), list[int]()
        for number, frame in enumerate(frames):
            if number % STEP_FRAMES == 0:
                yield
            stamps.append(frame.time)
            if keeps(number):
                sink.add(frame)
                places.append(number)
        if not places:
            raise ValueError("the video has no frames")
        seconds = _seconds(stamps, rate)[places] if rate else None
        media = sink.close(seconds)
        del kept
        return Packed(
            np.frombuffer(media, np.uint8),
            len(places),
            _fps(seconds, rate),
            *sink.size,
            size,
            digest,
        )


def _identity(path: str) -> Generator[None, None, tuple[int, str]]:
    """(bytes, sha256) of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(STEP_BYTES):
            digest.update(data)
            yield
        return file.tell(), digest.hexdigest()


def _images(open_still: Callable[..., Any], path: str) -> Iterator[av.VideoFrame]:
    """The frames of a picture or an array. Raises: ValueError where they are not RGB."""
    opened = open_still(path, SourceConfig(), 3)
    for frame_HWC in opened.read(np.arange(opened.num_frames)):
        if frame_HWC.dtype != np.uint8 or frame_HWC.shape[2] != 3:
            raise ValueError(
                f"holds {frame_HWC.dtype} of {frame_HWC.shape[2]} channels, only uint8 of 3 is packed; list it as it is"
            )
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")


def _choice(
    path: str, rate: Fraction | None, config: PackConfig
) -> Generator[None, None, Callable[[int], bool]]:
    """Which frames are kept, by their numbers; for fps the time stamps of all are read first."""
    if config.fps is None or rate is None:
        return lambda number: number % config.frame_step == 0
    stamps = list[float | None]()
    for frame in sequential(path):
        stamps.append(frame.time)
        if len(stamps) % STEP_FRAMES == 0:
            yield
    slots = np.floor(_seconds(stamps, rate) * config.fps + JITTER)
    kept = np.flatnonzero(np.diff(slots, prepend=-1.0) > 0)
    return set(kept.tolist()).__contains__


def _seconds(stamps: Sequence[float | None], rate: Fraction) -> NDArray[np.float64]:
    """When each frame is shown, from the first one on; where the stamps do not rise, as the frame
    rate says.
    """
    return shown_times(np.array(stamps, dtype=np.float64), float(rate))[:, 0]  # None is NaN


def _fps(seconds: NDArray[np.float64] | None, rate: Fraction | None) -> float | None:
    if seconds is None or rate is None:
        return None
    return round(
        float((len(seconds) - 1) / (seconds[-1] - seconds[0]) if len(seconds) > 1 else rate), 4
    )


class _Array:
    """Frames one after another, as an .npy file of uint8 [F, H, W, 3]."""

    def __init__(self, config: PackConfig, rate: Fraction | None) -> None:
        self.short_side, self.size, self.num_frames = config.short_side, (0, 0), 0
        self.data = bytearray(NPY_HEADER_BYTES)

    def add(self, frame: av.VideoFrame) -> None:
        frame_HWC = pixels(frame, self.short_side)
        self.size = _same(self.size, frame_HWC.shape[:2])
        self.data += np.ascontiguousarray(frame_HWC).data
        self.num_frames += 1
        _check_bytes(len(self.data), "frame_step, fps or short_side")

    def close(self, seconds: NDArray[np.float64] | None) -> bytearray:
        header = io.BytesIO()
        npy.write_array_header_1_0(
            header,
            {"descr": "|u1", "fortran_order": False, "shape": (self.num_frames, *self.size, 3)},
        )
        assert header.tell() == NPY_HEADER_BYTES
        self.data[:NPY_HEADER_BYTES] = header.getvalue()
        return self.data


class _Video:
    """H.264 that costs little to decode: short groups, no B-frames, one reference, no filter in the
    loop; 8-bit 4:2:0, even sides.

    x264 alone in one thread, and without mbtree, gives the same bytes each time.
    """

    def __init__(self, config: PackConfig, rate: Fraction | None) -> None:
        self.short_side, self.size = config.short_side, (0, 0)
        self.file = io.BytesIO()
        # Without edit lists, which decoders read wrongly, and without the versions of libraries in
        # the file.
        self.container = av.open(
            self.file, "w", format="mp4", options={"fflags": "+bitexact", "use_editlist": "0"}
        )
        rate = rate or Fraction(25)
        options = {
            "crf": str(config.crf),
            "preset": config.preset,
            "tune": "fastdecode",
            "x264-params": f"keyint={config.gop}:min-keyint=1:bframes=0:ref=1:mbtree=0:threads=1:lookahead-threads=1",
        }
        self.stream = self.container.add_stream("libx264", rate=rate, options=options)
        self.stream.codec_context.thread_count, self.stream.codec_context.time_base = 1, 1 / rate
        self.stream.pix_fmt, self.stream.time_base = "yuv420p", Fraction(1, CLOCK)
        self.packets: list[av.Packet] = []
        self.num_frames = self.num_bytes = 0

    def add(self, frame: av.VideoFrame) -> None:
        height, width = _even_size(frame.height, frame.width, self.short_side)
        small = _upright(CONVERTER.reformat(frame, width, height, "yuv420p"), orientation(frame)[0])
        if self.num_frames == 0:
            context = self.stream.codec_context
            self.stream.width, self.stream.height = small.width, small.height
            context.color_range, context.colorspace = frame.color_range, frame.colorspace
            context.color_primaries, context.color_trc = frame.color_primaries, frame.color_trc
        self.size = _same(self.size, (small.height, small.width))
        small.pts, small.time_base = self.num_frames, self.stream.codec_context.time_base
        self.num_frames += 1
        self._take(self.stream.encode(small))

    def close(self, seconds: NDArray[np.float64] | None) -> memoryview:
        assert seconds is not None
        self._take(self.stream.encode())
        assert len(self.packets) == self.num_frames
        ticks = np.round(seconds * CLOCK).astype(np.int64)
        # two frames within a tick
        ticks = np.maximum.accumulate(ticks - np.arange(len(ticks))) + np.arange(len(ticks))
        last = (
            int(ticks[-1] - ticks[-2])
            if len(ticks) > 1
            else round(CLOCK / self.stream.codec_context.framerate)
        )
        for packet, tick, duration in zip(
            self.packets, ticks.tolist(), [*np.diff(ticks).tolist(), last], strict=True
        ):
            packet.time_base, packet.pts, packet.dts, packet.duration = (
                Fraction(1, CLOCK),
                tick,
                tick,
                duration,
            )
            self.container.mux(packet)
        self.container.close()
        return self.file.getbuffer()

    def _take(self, packets: Sequence[av.Packet]) -> None:
        self.packets += packets
        self.num_bytes += sum(packet.size for packet in packets)
        _check_bytes(self.num_bytes, "crf, fps or short_side")


def _even_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) with the shorter one brought down to short_side, each the nearest even
    number, the smaller one of two.
    """
    factor = min(short_side / min(height, width), 1.0) if short_side else 1.0
    return max(2 * math.ceil(height * factor / 2 - 0.5), 2), max(
        2 * math.ceil(width * factor / 2 - 0.5), 2
    )


def _upright(frame: av.VideoFrame, turn: Turn) -> av.VideoFrame:
    """A frame of 4:2:0 with even sides, as it is shown."""
    if not any(turn):
        return frame
    planes_YUV, half = (
        frame.to_ndarray().astype(np.uint8, copy=False),
        (frame.height // 2, frame.width // 2),
    )
    luma_HW = planes_YUV[: frame.height]
    chroma = planes_YUV[frame.height :].reshape(2, *half)
    turned = [upright(plane, turn) for plane in (luma_HW, *chroma)]
    height, width = turned[0].shape
    flat = np.concatenate([plane.ravel() for plane in turned])
    return av.VideoFrame.from_ndarray(flat.reshape(height * 3 // 2, width), format="yuv420p")


def _same(size: tuple[int, int], new: tuple[int, ...]) -> tuple[int, int]:
    if size not in ((0, 0), new):
        raise ValueError("the size of the picture changes within the video")
    return new[0], new[1]


def _check_bytes(num_bytes: int, remedy: str) -> None:
    if num_bytes > MAX_CLIP_BYTES:
        raise ValueError(f"packed it would have more than 2 GB; cut it, or change {remedy}")
