"""From a video file to the wanted frames: `decode`, with one function per decoder behind it.

T frames, H W pixels, C channels.
"""

import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

Choose = Callable[[int], NDArray[np.int64]]
"""From the number of frames of a video to the indices [T] of the wanted ones."""
Read = Callable[[NDArray[np.int64]], Iterator[NDArray[np.uint8]]]
"""From increasing frame indices to those frames, HWC, one after another."""

MAX_CLIP_BYTES = 2**31
"""A small file can claim frames of gigabytes; 16 frames of 4K video take 0.4 GB."""


class VideoDecodeError(Exception):
    """A video that cannot be read, whatever the decoder raised: its path, the decoder and one line of reason."""

    def __init__(self, path: str, decoder: str, reason: str) -> None:
        super().__init__(path, decoder, reason)  # all three, so that it survives pickling on its way out of a worker
        self.path = path
        self.decoder = decoder
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.decoder}: {self.reason}"


def decode(path: str, choose: Choose, decoder: Literal["decord"] = "decord") -> NDArray[np.uint8]:
    """Reads the frames choose(number of frames) of a video: uint8 clip_THWC, RGB, at the size of the video.

    The file is opened, read with one thread and closed in the calling process.
    Raises: VideoDecodeError when the file is no regular file, no video container, cut off, or when a frame cannot be decoded.
    """
    with _as_decode_error(path, decoder):
        _check_container(path)
        num_video_frames, read = DECODERS[decoder](path)
        if num_video_frames < 1:
            raise ValueError("the video has no frames")
    indices_T = choose(num_video_frames)  # outside: an error in there is no fault of the video
    wanted, place_T = np.unique(indices_T, return_inverse=True)
    assert 0 <= wanted[0] <= wanted[-1] < num_video_frames
    with _as_decode_error(path, decoder):
        frames: list[NDArray[np.uint8]] = []
        for frame in read(wanted):
            if frame.nbytes * len(indices_T) > MAX_CLIP_BYTES:
                raise ValueError(f"{len(indices_T)} frames of {frame.shape[1]} x {frame.shape[0]} pixels are more than 2 GB")
            if frames and frame.shape != frames[0].shape:
                raise ValueError("the size of the picture changes within the clip")
            frames.append(frame)
    return np.stack(frames)[place_T]


def _open_decord(path: str) -> tuple[int, Read]:
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


DECODERS: dict[str, Callable[[str], tuple[int, Read]]] = {"decord": _open_decord}


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
    """Raises ValueError for what a decoder would wait for, follow, or silently decode in part."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
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
