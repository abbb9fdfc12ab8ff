"""From a file to what a shard holds of it, in the process that decodes: `pack`.

F frames, H W pixels, C channels.
"""

import hashlib
import io
import math
import sys
from collections.abc import Callable, Container, Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from video_mae.config.data import FileConfig
from video_mae.config.pack import PackConfig
from video_mae.decoding.containers import check_container, check_regular
from video_mae.decoding.frames import READERS
from video_mae.decoding.media import (
    MAX_CLIP_BYTES,
    Array,
    Place,
    as_decode_error,
    local_file,
    shown_times,
    suffix,
)
from video_mae.decoding.packets import Turn, open_container, orientation, video_stream
from video_mae.decoding.pyav_video import CONVERTER, pixels, sequential, upright

STEP_FRAMES, STEP_BYTES = 32, 2**26
"""Between frames, and between bytes of a file, after which `pack` yields: what takes longer makes
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


def write_video(path: Path, clip_THWC: Array, fps: int) -> None:
    """Writes an MP4 of H.264, the same bytes each time; sides must be even."""
    # mbtree (a look-ahead) or several threads make x264's output differ from run to run; a key
    # frame only every 12 frames, as random starts have to seek in real videos too
    options = {
        "crf": "18",
        "preset": "veryfast",
        "g": "12",
        "threads": "1",
        "x264-params": "mbtree=0",
    }
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = clip_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame_HWC in clip_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


class Packed(NamedTuple):
    """The file for a shard, and what its row says of it and of its source: num_frames, fps (None
    where there is no time), height, width, source_bytes, source_sha256.
    """

    media: Array
    about: dict[str, Any]


def pack(place: Place, config: PackConfig) -> Iterator[Packed | None]:
    """Yields None after every while, and at last what came of a file. Raises: VideoDecodeError
    where it cannot be packed.
    """
    reader, open_still = READERS.get(suffix(place), ("pyav", None))
    with as_decode_error(place, reader):
        if open_still and config.form == "video":
            raise ValueError("pictures and arrays are packed with form=frames only")
        check_regular(place)
        with local_file(place) as path:
            size, digest = yield from _identity(path)
            if open_still:
                frames, rate = _images(open_still, path), None
            else:
                check_container(path)
                frames, rate = sequential(path), _frame_rate(path)
            kept = yield from _kept(path, rate, config)
            sink = (_Video if config.form == "video" else _Array)(config, rate)
            stamps, numbers = list[float | None](), list[int]()
            for number, frame in enumerate(frames):
                if number % STEP_FRAMES == 0:
                    yield
                stamps.append(frame.time)
                if number in kept:
                    sink.add(frame)
                    numbers.append(number)
        if not numbers:
            raise ValueError("the video has no frames")
        seconds = fps = None
        if rate:
            seconds, fps = _seconds(stamps, rate)[numbers], float(rate)
            if len(seconds) > 1:
                fps = (len(seconds) - 1) / (seconds[-1] - seconds[0])
            fps = round(float(fps), 4)
        height, width = sink.size
        about = {
            "num_frames": len(numbers),
            "fps": fps,
            "height": height,
            "width": width,
            "source_bytes": size,
            "source_sha256": digest,
        }
        yield Packed(np.frombuffer(sink.close(seconds), np.uint8), about)


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
    opened = open_still(path, FileConfig(), 3)
    for frame_HWC in opened.read(np.arange(opened.num_frames)):
        if frame_HWC.dtype != np.uint8 or frame_HWC.shape[2] != 3:
            raise ValueError(
                f"holds {frame_HWC.dtype} of {frame_HWC.shape[2]} channels, only uint8 of 3 "
                "is packed; list it as it is"
            )
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")


def _frame_rate(path: str) -> Fraction:
    """Frames a second of a video, as its file says; 25 where it does not."""
    with open_container(path) as container:
        stream = video_stream(container)
        return stream.average_rate or stream.guessed_rate or Fraction(25)


def _kept(
    path: str, rate: Fraction | None, config: PackConfig
) -> Generator[None, None, Container[int]]:
    """The numbers of the frames that are kept; for fps the time stamps of all are read first."""
    if config.fps is None or rate is None:
        return range(0, sys.maxsize, config.frame_step)
    stamps = list[float | None]()
    for frame in sequential(path):
        stamps.append(frame.time)
        if len(stamps) % STEP_FRAMES == 0:
            yield
    slots = np.floor(_seconds(stamps, rate) * config.fps + JITTER)
    return set(np.flatnonzero(np.diff(slots, prepend=-1.0) > 0).tolist())


def _seconds(stamps: Sequence[float | None], rate: Fraction) -> NDArray[np.float64]:
    """When each frame is shown, from the first one on; where the stamps do not rise, as the frame
    rate says.
    """
    return shown_times(np.array(stamps, dtype=np.float64), float(rate))[:, 0]  # None is NaN


class _Sink:
    """A file in memory that frames are written to."""

    def __init__(self, config: PackConfig) -> None:
        self.short_side, self.file = config.short_side, io.BytesIO()
        self.size = (0, 0)
        self.num_frames = self.num_bytes = 0

    def begin_frame(self, height: int, width: int) -> None:
        """Raises: ValueError where a frame is of another size than those before."""
        if self.size not in ((0, 0), (height, width)):
            raise ValueError("the size of the picture changes within the video")
        self.size = (height, width)
        self.num_frames += 1

    def count(self, num_bytes: int) -> None:
        """Raises: ValueError where it becomes too much."""
        self.num_bytes += num_bytes
        if self.num_bytes > MAX_CLIP_BYTES:
            raise ValueError(
                "packed it would have more than 2 GB; cut it, or change frame_step, fps, "
                "short_side or crf"
            )


class _Array(_Sink):
    """Frames one after another, as an .npy file of uint8 [F, H, W, 3]."""

    def __init__(self, config: PackConfig, rate: Fraction | None) -> None:
        super().__init__(config)
        self.file.seek(NPY_HEADER_BYTES)

    def add(self, frame: av.VideoFrame) -> None:
        frame_HWC = np.ascontiguousarray(pixels(frame, self.short_side))
        self.begin_frame(*frame_HWC.shape[:2])
        self.count(self.file.write(frame_HWC.data))

    def close(self, seconds: NDArray[np.float64] | None) -> memoryview:
        shape = (self.num_frames, *self.size, 3)
        self.file.seek(0)
        npy.write_array_header_1_0(
            self.file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        assert self.file.tell() == NPY_HEADER_BYTES
        return self.file.getbuffer()


class _Video(_Sink):
    """H.264 that costs little to decode: short groups, no B-frames, one reference, no filter in the
    loop; 8-bit 4:2:0, even sides.

    x264 alone in one thread, and without mbtree, gives the same bytes each time.
    """

    def __init__(self, config: PackConfig, rate: Fraction | None) -> None:
        super().__init__(config)
        # Without edit lists, which decoders read wrongly, and without the versions of libraries in
        # the file.
        self.container = av.open(
            self.file, "w", format="mp4", options={"fflags": "+bitexact", "use_editlist": "0"}
        )
        assert rate is not None
        options = {
            "crf": str(config.crf),
            "preset": config.preset,
            "tune": "fastdecode",
            "x264-params": f"keyint={config.gop}:min-keyint=1:bframes=0:ref=1:mbtree=0:"
            "threads=1:lookahead-threads=1",
        }
        self.stream = self.container.add_stream("libx264", rate=rate, options=options)
        self.context = self.stream.codec_context
        self.context.thread_count, self.context.time_base = 1, 1 / rate
        self.stream.pix_fmt, self.stream.time_base = "yuv420p", Fraction(1, CLOCK)
        self.packets: list[av.Packet] = []

    def add(self, frame: av.VideoFrame) -> None:
        height, width = _even_size(frame.height, frame.width, self.short_side)
        small = _upright(CONVERTER.reformat(frame, width, height, "yuv420p"), orientation(frame)[0])
        if self.num_frames == 0:
            self.stream.width, self.stream.height = small.width, small.height
            for name in ("color_range", "colorspace", "color_primaries", "color_trc"):
                setattr(self.context, name, getattr(frame, name))
        small.pts, small.time_base = self.num_frames, self.context.time_base
        self.begin_frame(small.height, small.width)
        self._encode(small)

    def close(self, seconds: NDArray[np.float64] | None) -> memoryview:
        assert seconds is not None
        self._encode(None)
        assert len(self.packets) == self.num_frames
        numbers = np.arange(self.num_frames)
        ticks = np.round(seconds * CLOCK).astype(np.int64)
        # two frames within a tick
        ticks = np.maximum.accumulate(ticks - numbers) + numbers
        last = round(CLOCK / self.context.framerate) if len(ticks) == 1 else ticks[-1] - ticks[-2]
        durations = np.diff(ticks, append=ticks[-1] + last)
        for packet, tick, duration in zip(
            self.packets, ticks.tolist(), durations.tolist(), strict=True
        ):
            packet.time_base, packet.duration = Fraction(1, CLOCK), duration
            packet.pts = packet.dts = tick
            self.container.mux(packet)
        self.container.close()
        return self.file.getbuffer()

    def _encode(self, frame: av.VideoFrame | None) -> None:
        packets = self.stream.encode(frame)
        self.packets += packets
        self.count(sum(packet.size for packet in packets))


def _even_size(height: int, width: int, short_side: int) -> list[int]:
    """(height, width) with the shorter one brought down to short_side, each the nearest even
    number, the smaller one of two.
    """
    factor = min(short_side / min(height, width), 1.0) if short_side else 1.0
    return [max(2 * math.ceil(side * factor / 2 - 0.5), 2) for side in (height, width)]


def _upright(frame: av.VideoFrame, turn: Turn) -> av.VideoFrame:
    """A frame of 4:2:0 with even sides, as it is shown."""
    if not any(turn):
        return frame
    planes_YUV = frame.to_ndarray().astype(np.uint8, copy=False)
    chroma = planes_YUV[frame.height :].reshape(2, frame.height // 2, frame.width // 2)
    turned = [upright(plane, turn) for plane in (planes_YUV[: frame.height], *chroma)]
    height, width = turned[0].shape
    flat = np.concatenate([plane.ravel() for plane in turned])
    return av.VideoFrame.from_ndarray(flat.reshape(height * 3 // 2, width), format="yuv420p")
