"""What a video file is before a decoder sees it: is it a container at all, is it whole, and is it
of a kind that decoders read wrongly.
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from video_mae.decoding.media import Member, Place
from video_mae.files import is_regular

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
_MP4_NEEDED = (b"moov", b"mdat", b"moof")
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)
# FFmpeg knows packed B-frames by this note of the encoder: several pictures in a packet, so that
# packets and frames do not match.
_PACKED = re.compile(rb"DivX\d{3}(?:b|Build)\d{1,6}p")
_PACKED_WITHIN = 2**18

EDIT_LIST, PACKED_B_FRAMES = "an edit list hides frames", "packed B-frames (DivX)"
NO_INDEX, ASF = "no index of its frames", "ASF (WMV)"


def check_regular(place: Place) -> None:
    """Raises: OSError where there is no file, ValueError where it is no regular one; members of
    shards have their own checks.
    """
    if not isinstance(place, Member) and not is_regular(place):
        os.stat(place)  # says it better, where there is none
        raise ValueError("not a regular file")


def check_container(path: str) -> str:
    """What decoders that seek read wrongly in a video: PACKED_B_FRAMES, NO_INDEX, ASF or nothing
    ("").

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
            for kind, end in _boxes(file, 0, num_bytes):
                if end > num_bytes and kind in _MP4_NEEDED:  # a cut in anything else does no harm
                    raise ValueError(
                        f"the file is cut off: it has {num_bytes} bytes, its {kind.decode()} box "
                        f"ends at {end}"
                    )
            return ""
        file.seek(_BLU_RAY_STAMP)
        is_blu_ray = file.read(_BLU_RAY_PACKET + 1)[::_BLU_RAY_PACKET] == b"\x47\x47"
        if not head.startswith(_SIGNATURES) and not is_blu_ray:
            raise ValueError(
                "not a video container (mp4, mov, mkv, webm, avi, ts, mpg, flv, ogg, wmv, "
                "gif, mxf, y4m, h264, mjpeg)"
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


def has_offsets(path: str) -> bool:
    """Whether an mp4 file may show frames at other times than it decodes them."""
    table = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"ctts")
    with open(path, "rb") as file:
        return any(True for _ in _boxes(file, 0, os.path.getsize(path), *table))


def _boxes(file: BinaryIO, start: int, end: int, *path: bytes) -> Iterator[tuple[bytes, int]]:
    """(kind, end) of the boxes of an mp4 file between two places, or of those that lie within them
    along a path of kinds.
    """
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        size, kind, content = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if size == 1:  # the size follows as 64 bits
            size, content = int.from_bytes(head[8:16], "big"), start + 16
        if size < content - start:  # 0: up to the end of the file; others: no box, such as padding
            return
        if not path or path == (kind,):
            yield kind, start + size
        elif kind == path[0]:
            yield from _boxes(file, content, start + size, *path[1:])
        start += size
