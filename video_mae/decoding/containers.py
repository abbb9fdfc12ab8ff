"""What a video file is before a decoder sees it: is it a container at all, is it whole, and is it
of a kind that decoders read wrongly.
"""

import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import BinaryIO

from video_mae.decoding.media import Member, Place

# Containers that decoders are allowed to see. FFmpeg would also follow playlists and scripts, which
# name other files.
_INDEXED = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV",
)
_ASF = b"\x30\x26\xb2\x75"
_SIGNATURES = (
    *_INDEXED,
    _ASF,
    b"\x47",  # MPEG transport stream
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb0",  # MPEG-4 video
    b"\x00\x00\x01\xb3",  # MPEG-1 and MPEG-2 video
    b"\x00\x00\x01\x67",  # H.264
    b"\x00\x00\x00\x01",  # H.264, H.265
    b"\x06\x0e\x2b\x34\x02\x05\x01\x01",  # MXF
    b"OggS",
    b"GIF8",
    b"YUV4MPEG2 ",
    b"\xff\xd8\xff",  # MJPEG
)
# after the first 16 bytes; what is written to a pipe has no index
_AVI_FLAGS, _AVI_HAS_INDEX = 28, 0x10
# of a transport stream on a camcorder or Blu-ray: a time stamp before each packet
_BLU_RAY_PACKET, _BLU_RAY_STAMP = 192, 4
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp")
_TABLE = (b"mdia", b"minf", b"stbl")
_MP4_NEEDED = (b"moov", b"mdat", b"moof")
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)
# FFmpeg knows packed B-frames by this note of the encoder: several pictures in a packet, so that
# packets and frames do not match.
_PACKED = re.compile(rb"DivX\d{3}(?:b|Build)\d{1,6}p")
_PACKED_WITHIN = 2**18

EDIT_LIST, PACKED_B_FRAMES = "an edit list hides frames", "packed B-frames (DivX)"
NO_INDEX, ASF = "no index of its frames", "ASF (WMV)"
Box = tuple[bytes, int, int]
"""(kind, first byte of its content, end)."""


_KERNEL = frozenset(os.stat(folder).st_dev for folder in ("/proc", "/sys") if os.path.isdir(folder))
"""File systems whose files are regular by their type, and may wait for ever."""


def is_regular(path: str) -> bool:
    """Whether a path leads to a file of a disk: no device, pipe, socket, folder or file of the
    kernel, and no broken link.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return False
    return stat.S_ISREG(status.st_mode) and status.st_dev not in _KERNEL


def check_regular(place: Place) -> None:
    """Raises: OSError where there is no file, ValueError where it is no regular one; members of
    shards have their own checks.
    """
    if not isinstance(place, Member) and not is_regular(place):
        os.stat(place)  # says it better, where there is none
        raise ValueError("not a regular file")


def check_container(path: str) -> str:
    """What decoders that seek read wrongly in a video: EDIT_LIST, PACKED_B_FRAMES, NO_INDEX, ASF or
    nothing ("").

    Raises: ValueError for what a decoder would follow, or silently decode in part.
    """
    num_bytes = os.path.getsize(path)
    if num_bytes == 0:
        raise ValueError("the file is empty")
    with open(path, "rb") as file:
        head = file.read(16)
        if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
            return _check_avi(file, head, num_bytes)
        if head[4:8] in _MP4_BOXES:
            return _check_mp4(file, num_bytes)
        if not head.startswith(_SIGNATURES) and not _is_blu_ray(file):
            raise ValueError(
                "not a video container (mp4, mov, mkv, webm, avi, ts, mpg, flv, ogg, wmv, gif, mxf, y4m, h264, mjpeg)"
            )
    if head.startswith(_ASF):
        return ASF
    return "" if head.startswith(_INDEXED) else NO_INDEX


def _check_avi(file: BinaryIO, head: bytes, num_bytes: int) -> str:
    claimed = int.from_bytes(head[4:8], "little")
    # writers disagree about the last padding byte
    if claimed not in _UNKNOWN_SIZES and claimed + 8 > num_bytes + 1:
        raise ValueError(
            f"the file is cut off: it has {num_bytes} bytes, its header says {claimed + 8}"
        )
    beginning = file.read(_PACKED_WITHIN)
    if _PACKED.search(beginning):
        return PACKED_B_FRAMES
    flags = int.from_bytes(beginning[_AVI_FLAGS : _AVI_FLAGS + 1], "little")
    return "" if flags & _AVI_HAS_INDEX else NO_INDEX


def _is_blu_ray(file: BinaryIO) -> bool:
    file.seek(_BLU_RAY_STAMP)
    return file.read(_BLU_RAY_PACKET + 1)[::_BLU_RAY_PACKET] == b"\x47\x47"


def has_offsets(path: str) -> bool:
    """Whether an mp4 file shows frames at other times than it decodes them."""
    with open(path, "rb") as file:
        tracks = _video_tracks(file, os.path.getsize(path))
        offsets = (_inside(file, track, *_TABLE, b"ctts") for track, _ in tracks)
        return any(True for _ in chain.from_iterable(offsets))


def _check_mp4(file: BinaryIO, num_bytes: int) -> str:
    for kind, _, end in _boxes(file, 0, num_bytes):
        if end > num_bytes and kind in _MP4_NEEDED:  # a cut in anything else does no harm
            raise ValueError(
                f"the file is cut off: it has {num_bytes} bytes, its {kind.decode()} box ends at {end}"
            )
    for track, movie_scale in _video_tracks(file, num_bytes):
        if _hides_frames(file, track, movie_scale):
            return EDIT_LIST
    return ""


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[Box]:
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        size, kind, content = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if size == 1:  # the size follows as 64 bits
            size, content = int.from_bytes(head[8:16], "big"), start + 16
        if size < content - start:  # 0: up to the end of the file; others: no box, such as padding
            return
        yield kind, content, start + size
        start += size


def _inside(file: BinaryIO, box: Box, *kinds: bytes) -> Iterator[Box]:
    """The boxes of a box along a path of kinds."""
    for inner in _boxes(file, box[1], box[2]):
        if inner[0] == kinds[0]:
            if len(kinds) == 1:
                yield inner
            else:
                yield from _inside(file, inner, *kinds[1:])


def _numbers(file: BinaryIO, box: Box, at: int, form: str) -> tuple[int, ...]:
    file.seek(box[1] + at)
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _video_tracks(file: BinaryIO, num_bytes: int) -> Iterator[tuple[Box, int]]:
    """Tracks of pictures, with the time scale of the movie; a header that ends too soon has none."""
    whole = (b"", 0, num_bytes)
    with suppress(struct.error):
        for movie in list(_inside(file, whole, b"moov")):
            for header in _inside(file, movie, b"mvhd"):
                time_scale = _scale_and_duration(file, header)[0]
                for track in _inside(file, movie, b"trak"):
                    for handler in _inside(file, track, b"mdia", b"hdlr"):
                        if _numbers(file, handler, 8, "4s") == (b"vide",):
                            yield track, time_scale


def _scale_and_duration(file: BinaryIO, header: Box) -> tuple[int, int]:
    long = _numbers(file, header, 0, "B")[0] == 1
    scale, duration = _numbers(file, header, 20 if long else 12, ">IQ" if long else ">II")
    return scale, duration


def _hides_frames(file: BinaryIO, track: Box, movie_scale: int) -> bool:
    """Whether the edits of a track show less than all of its frames, or show them out of order."""
    edits = [edit for box in _inside(file, track, b"edts", b"elst") for edit in _edits(file, box)]
    # -1 is time in which nothing is shown
    shown = [(duration, start) for duration, start in edits if start >= 0]
    if len(shown) != 1:  # no edits: all is shown
        return len(shown) > 1
    ((duration, start),) = shown
    for header in _inside(file, track, b"mdia", b"mdhd"):
        scale, length = _scale_and_duration(file, header)
        frame = _first_entry(file, track, b"stts", ">I")
        start -= _first_entry(file, track, b"ctts", ">i")  # shown so long after decoding
        if not (scale and movie_scale and length and duration and frame):
            return shown[0][1] > 0 and start >= max(frame, 1)
        visible = duration * scale / movie_scale
        # durations are rounded to the scale of the movie
        tolerance = frame + 2 * scale / movie_scale
        return start >= frame or length - visible >= tolerance
    return False


def _first_entry(file: BinaryIO, track: Box, table: bytes, form: str) -> int:
    for box in _inside(file, track, *_TABLE, table):
        return _numbers(file, box, 12, form)[0]
    return 0


def _edits(file: BinaryIO, box: Box) -> Iterator[tuple[int, int]]:
    """(duration, first time) of each edit."""
    long = _numbers(file, box, 0, "B")[0] == 1
    count, size = _numbers(file, box, 4, ">I")[0], 20 if long else 12
    for i in range(min(count, (box[2] - box[1]) // size)):
        duration, start = _numbers(file, box, 8 + i * size, ">Qq" if long else ">Ii")
        yield duration, start
