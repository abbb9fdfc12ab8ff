"""From a file to the wanted frames: `decode`, for videos, pictures, arrays and TIFF stacks alike.

T frames, H W pixels, C channels.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from video_mae.config.data import SourceConfig
from video_mae.data import stills, tiff
from video_mae.data.arrays import MAX_CLIP_BYTES, Open, Read, open_npy, open_npz

Choose = Callable[[int], NDArray[np.int64]]
"""From the number of frames of a video to the indices [T] of the wanted ones."""
Clip = NDArray[Any]
"""uint8, or uint16 where data.value_range says what is white: the kernels take both."""

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".ts", ".webm")
READERS: dict[str, tuple[str, Open]] = {
    ".npy": ("numpy", open_npy),
    ".npz": ("numpy", open_npz),
    **dict.fromkeys(tiff.EXTENSIONS, ("tifffile", tiff.open_tiff)),
    **dict.fromkeys(stills.EXTENSIONS, ("pillow", stills.open_still)),
}
"""What reads a file that is no video, by the ending of its name; any other ending is a video, for data.decoder."""
WHITE = 65535
AS_STORED = SourceConfig()


class VideoDecodeError(Exception):
    """A video that cannot be read, whatever the decoder raised: its path, the decoder and one line of reason."""

    def __init__(self, path: str, decoder: str, reason: str) -> None:
        super().__init__(path, decoder, reason)  # all three, so that it survives pickling on its way out of a worker
        self.path = path
        self.decoder = decoder
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.decoder}: {self.reason}"


def is_video(path: str) -> bool:
    """Whether a file is left to a video decoder."""
    return Path(path).suffix.lower() not in READERS


def decode(path: str, choose: Choose, decoder: Literal["decord"] = "decord", source: SourceConfig = AS_STORED,
           in_channels: int = 3) -> Clip:
    """Reads the frames choose(number of frames) of a video: clip_THWC at the size of the video, RGB where it is one.

    A picture is a video of one frame, a volume one whose slices are frames. Arrays are read as `source` says; values are uint8, or
    with source.value_range = (black, white) uint16: 65535 * (x - black) / (white - black), clipped, NaN as black.
    One frame wanted T times is there once, with a stride of 0. The file is opened, read with one thread and closed in the calling
    process.
    Raises: VideoDecodeError when the file is not regular, not what its name says, cut off, has other values or not `in_channels`
    channels, or when a frame cannot be decoded.
    """
    name, num_video_frames, read = _open(path, decoder, source, in_channels)
    indices_T = choose(num_video_frames)  # outside: an error in there is no fault of the video
    wanted, place_T = np.unique(indices_T, return_inverse=True)
    assert 0 <= wanted[0] <= wanted[-1] < num_video_frames
    with _as_decode_error(path, name):
        frames: list[Clip] = []
        for frame in read(wanted):
            if frame.nbytes * (len(indices_T) if len(wanted) > 1 else 1) > MAX_CLIP_BYTES:
                raise ValueError(f"{len(indices_T)} frames of {frame.shape[1]} x {frame.shape[0]} pixels are more than 2 GB")
            if frames and frame.shape[:2] != frames[0].shape[:2]:
                raise ValueError("the size of the picture changes within the clip")
            frames.append(_pixels(frame, source, in_channels))
        if len(frames) == 1:  # T times the same memory: of a large picture there may be none for T copies
            frame = np.require(frames[0], requirements=["C", "W"])  # what lies in a file is copied
            return as_strided(frame, (len(indices_T), *frame.shape), (0, *frame.strides))
        return np.ascontiguousarray(np.stack(frames)[place_T])


def stream(path: str, choose: Choose, source: SourceConfig = AS_STORED, in_channels: int = 3) -> Iterator[Clip]:
    """The frames choose(number of frames), of increasing indices, one after another, none kept: for videos of any length.

    Yields: frame_HWC as in the clips of `decode`. Raises: as `decode`, when it comes to a frame that cannot be decoded.
    """
    name, num_video_frames, read = _open(path, "decord", source, in_channels)
    wanted, size = choose(num_video_frames), None
    with _as_decode_error(path, name):
        for frame in read(wanted):
            if frame.shape[:2] != (size or frame.shape[:2]):
                raise ValueError("the size of the picture changes within the video")
            size = frame.shape[:2]
            yield _pixels(frame, source, in_channels)


def _open(path: str, decoder: Literal["decord"], source: SourceConfig, in_channels: int) -> tuple[str, int, Read]:
    """What reads a file, and how many frames it has."""
    name, opener = READERS.get(Path(path).suffix.lower()) or (decoder, DECODERS[decoder])
    with _as_decode_error(path, name):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a regular file")
        num_video_frames, read = opener(path, source, in_channels)
        if num_video_frames < 1:
            raise ValueError("the video has no frames")
    return name, num_video_frames, read


def _pixels(frame_HWC: NDArray[Any], source: SourceConfig, in_channels: int) -> Clip:
    """A frame as the model takes it. Raises: ValueError where it has other channels or values."""
    channels = frame_HWC.shape[2]
    if source.channels:
        if max(source.channels) >= channels:
            raise ValueError(f"has {channels} channels, data.channels asks for {max(source.channels)}, counted from 0")
        frame_HWC = frame_HWC[:, :, list(source.channels)]
        channels = len(source.channels)
    if channels != in_channels:
        raise ValueError(f"gives {channels} channels of {frame_HWC.shape[1]} x {frame_HWC.shape[0]} pixels, model.in_channels is "
                         f"{in_channels}; change it, data.channels, or data.axes")
    if source.value_range is None:
        if frame_HWC.dtype != np.uint8:
            raise ValueError(f"holds {frame_HWC.dtype}; set data.value_range to the values that are black and white")
        return np.asarray(frame_HWC)
    low, high = source.value_range
    values = frame_HWC.astype(np.result_type(frame_HWC.dtype, np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        values = (values - low) * (WHITE / (high - low))
    return np.nan_to_num(values, nan=0.0).clip(0, WHITE).round().astype(np.uint16)


def _open_decord(path: str, source: SourceConfig, in_channels: int) -> tuple[int, Read]:
    _check_container(path)
    # Here and not at the top: the native library must be loaded after torch's, and only by who decodes.
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    # Where decord cannot decode a frame it repeats another: fault_tol=1 makes more than one such frame an error.
    # DECORD_EOF_RETRY_MAX stays 10240: it counts polls of the decoding thread, and 64 failed a third of a set of good files.
    reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, fault_tol=1)

    def read(wanted: NDArray[np.int64]) -> Iterator[NDArray[np.uint8]]:
        for index in wanted:  # one by one costs what get_batch costs, and shows the size before there is memory for all
            yield _without_padding(reader[int(index)].asnumpy())
        reader.seek(0)  # without it decord keeps what it read ahead

    return len(reader), read


def _without_padding(frame_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Where rows are padded to 4/3 of their length (48 pixels wide, for one), decord takes the padding for a fourth channel."""
    height, width, channels = frame_HWC.shape
    return frame_HWC if channels == 3 else frame_HWC.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


DECODERS: dict[str, Open] = {"decord": _open_decord}


@contextmanager
def _as_decode_error(path: str, decoder: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # decoders raise RuntimeError, ValueError, IndexError, MemoryError and types of their own
        raise VideoDecodeError(path, decoder, _one_line(error, path)) from error


# Containers that decoders are allowed to see. FFmpeg would also follow playlists and scripts, which name other files.
_SIGNATURES = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"\x47",  # MPEG transport stream
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"FLV",
    b"OggS",
    b"\x30\x26\xb2\x75",  # ASF, WMV
)
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp")
_MP4_NEEDED = (b"moov", b"mdat", b"moof")
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)


def _check_container(path: str) -> None:
    """Raises ValueError for what a decoder would follow, or silently decode in part."""
    with open(path, "rb") as file:
        num_bytes = os.fstat(file.fileno()).st_size
        head = file.read(16)
        if num_bytes == 0:
            raise ValueError("the file is empty")
        if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
            claimed = int.from_bytes(head[4:8], "little")
            if claimed not in _UNKNOWN_SIZES and claimed + 8 > num_bytes + 1:  # writers disagree about the last padding byte
                raise ValueError(f"the file is cut off: it has {num_bytes} bytes, its header says {claimed + 8}")
        elif head[4:8] in _MP4_BOXES:
            _check_mp4(file, num_bytes)
        elif not head.startswith(_SIGNATURES):
            raise ValueError("not a video container (mp4, mov, mkv, webm, avi, ts, mpg, flv, ogg, wmv)")


def _check_mp4(file: BinaryIO, num_bytes: int) -> None:
    offset = 0
    while offset + 8 <= num_bytes:
        file.seek(offset)
        head = file.read(16)
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if size == 1:  # the size follows as 64 bits
            size = int.from_bytes(head[8:16], "big")
        if size < 8:  # 0: up to the end of the file; others: no box, such as padding
            return
        offset += size
        if offset > num_bytes and kind in _MP4_NEEDED:  # a cut in anything else does no harm
            raise ValueError(f"the file is cut off: it has {num_bytes} bytes, its {kind.decode()} box ends at {offset}")


def _one_line(error: Exception, path: str) -> str:
    """The reason without decord's C++ file names, time stamps, conditions, advice and stack trace."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).split("Stack trace")[0].replace(f"[{path}]", "").replace(path, "the file")
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+?:\d+: ", "", text)
    text = re.sub(r"Check failed: .*? \(\S+ vs\. \S+\) (ERROR )?", "", text)
    text = re.split(r"\. (?=[A-Z])|\.\.\.|\n", text.strip())[0].strip(" .")
    return text[:200] or type(error).__name__
