"""What the packets of a video say before it is decoded: which frames there are, when each is shown,
and whether that can be believed.

A seek finds a frame by its time stamp, so stamps must tell the order of showing. Some containers
store the order of decoding alone (AVI, ASF, MXF, raw streams), and whoever copies such a stream
into an mp4 copies that as well.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import av
import numpy as np

from video_mae.decoding.containers import (
    ASF,
    EDIT_LIST,
    NO_INDEX,
    PACKED_B_FRAMES,
    check_container,
    has_offsets,
)
from video_mae.decoding.media import Stamps

SEEKABLE = ("mp4", "matroska", "flv", "avi")
"""Containers in which a time stamp leads to a key frame; in MPEG streams, ASF, Ogg, GIF and MXF it
leads to another, or to none.
"""
NO_STAMPS = "time stamps missing or repeated"
DECODING_ORDER = "time stamps in the order of decoding"
LATE_START = "a first frame that is no key frame"
ALL_KEYS = "key frames alone, which may be none"
IN_ORDER = (PACKED_B_FRAMES, ASF, NO_INDEX, NO_STAMPS, DECODING_ORDER, LATE_START, ALL_KEYS)
"""What makes any seek go astray: frames can be numbered only as they come out, from the start of
the file on.
"""
ADJACENT_KEYS, OPEN_GROUPS = "key frames beside each other", "key frames that are no fresh start"
MIRRORED = "a mirrored or slanted picture"

# FFmpeg's marks of a codec that has key frames alone, and that may store frames in another order
# than it shows
INTRA_ONLY, REORDERS = 1, 8
REFUSING = ("ffv1", "h264")
"""Codecs that may have other frames, and are decoded from a key frame on only if it is one."""
VP8_SHOWN = 0x10
# of H.264: of a unit its type, and what comes first in a slice
START_CODE, UNIT_BYTES, UNIT_TYPE = b"\x00\x00\x01", 9, 0x1F
SLICES, IDR, B_SLICE = (1, 2, 5), 5, 1
# In MPEG-1, -2 and -4 two or three bits of what follows the start code of a picture.
B_PICTURE = {"mpeg4": re.compile(rb"\x00\x00\x01\xb6[\x80-\xbf]")}
B_PICTURE |= dict.fromkeys(
    ("mpeg1video", "mpeg2video"),
    re.compile(rb"\x00\x00\x01\x00.[\x18-\x1f\x58-\x5f\x98-\x9f\xd8-\xdf]", re.DOTALL),
)

Turn = tuple[bool, bool, bool]
"""How a stored picture becomes the shown one: rows and columns change places; then left and right
do; top and bottom do.
"""
UPRIGHT: Turn = (False, False, False)


class Packet(NamedTuple):
    """A packet that holds a frame: when it is shown and decoded, in ticks of the stream's clock,
    and whether it is a key frame.
    """

    pts: Any
    dts: Any
    is_key: bool


@dataclass(frozen=True)
class Survey:
    """The packets of a video in the order of decoding.

    traits: what leads decoders astray; reorders: whether some frame is shown before one that is
    stored before it. Of the first frame, where it was looked at: how it is shown, and its (height,
    width) then.
    """

    container: str
    codec: str
    packets: Sequence[Packet]
    traits: tuple[str, ...]
    stamps: Stamps
    reorders: bool = False
    turn: Turn = UPRIGHT
    size: tuple[int, int] = (0, 0)


def open_container(path: str) -> Any:
    """A video container, which may name no other file. Raises: av.FFmpegError."""
    # FFmpeg opens what a file names (playlists, references) by a protocol: none but files are
    # allowed, and check_container comes before.
    return av.open(path, metadata_errors="ignore", options={"protocol_whitelist": "file"})


def video_stream(container: Any, threads: int = 1) -> Any:
    """The stream that is decoded, FFmpeg's choice, by so many threads. Raises: ValueError."""
    stream = container.streams.best("video")
    if stream is None:
        raise ValueError("the file has no video stream")
    if stream.codec_context is None:
        raise ValueError("there is no decoder for its video")
    stream.codec_context.thread_count = threads
    stream.thread_type = "AUTO" if threads > 1 else "NONE"
    return stream


def orientation(frame: av.VideoFrame) -> tuple[Turn, bool]:
    """How a frame is shown, as its display matrix says, to the nearest quarter turn; and whether
    that is a quarter turn and no more.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return UPRIGHT, True
    # The pixel (x, y) is shown at (a x + c y, b x + d y): FFmpeg's av_display_rotation_get, and
    # what `ffmpeg` does with it.
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    transposed = abs(b) + abs(c) > abs(a) + abs(d)
    turn = (transposed, (c if transposed else a) < 0, (b if transposed else d) < 0)
    straight = (a == d == 0 if transposed else b == c == 0) and not is_mirrored(turn)
    return turn, straight


def is_mirrored(turn: Turn) -> bool:
    """Whether no rotation alone would do."""
    return sum(turn) % 2 == 1


def survey(path: str) -> Survey:
    """What is known of a video before its second frame is decoded. Raises: av.FFmpegError;
    ValueError where there is no video, or no whole one.
    """
    trait = check_container(path)
    with open_container(path) as container:
        stream = video_stream(container)
        return _read(container, stream, container.demux(stream), trait, thorough=True)


def read_packets(path: str, container: Any, stream: Any) -> Survey:
    """What PyAV needs to know of a video that it has open; what the index of the file says is not
    read from its packets.
    """
    rest = container.demux(stream)
    head = list(islice(rest, 1))
    packets = _indexed(path, container, stream, head[0].pts) if head else []
    if packets:
        traits = _stamp_traits("mp4", packets, reorders=False, is_cut=False)
        return _survey(container, stream, packets, traits)
    return _read(container, stream, chain(head, rest), "", thorough=False)


def stamps_of(stream: Any, ticks: list[Any]) -> Stamps:
    """Ticks of a stream's clock."""
    fps = float(stream.average_rate or stream.guessed_rate or 1)
    return Stamps(ticks, float(stream.time_base), fps)


def _survey(
    container: Any,
    stream: Any,
    packets: Sequence[Packet],
    traits: Iterable[str],
    *more: Any,
) -> Survey:
    ticks = sorted(packet.pts for packet in packets if packet.pts is not None)
    return Survey(
        _name(container),
        stream.codec_context.codec.canonical_name,
        packets,
        tuple(dict.fromkeys(filter(None, traits))),
        stamps_of(stream, ticks),
        *more,
    )


def _name(container: Any) -> str:
    """One name for a container and its kin: mp4 for mov and 3gp, matroska for webm."""
    names = container.format.name.split(",")
    return "mp4" if "mp4" in names else names[0]


def _indexed(path: str, container: Any, stream: Any, first_pts: Any) -> list[Packet]:
    """The packets as an mp4's index has them, where frames are shown when they are decoded: packed
    videos need not be read for it.
    """
    context, entries = stream.codec_context, stream.index_entries
    if (
        _name(container) != "mp4"
        or context.name != "h264"
        or context.has_b_frames
        or not len(entries) == stream.frames > 0
        or entries[0].timestamp != first_pts
        or has_offsets(path)
    ):
        return []
    return [
        Packet(entry.timestamp, entry.timestamp, entry.is_keyframe)
        for entry in entries
        if not entry.is_discard
    ]


def _read(
    container: Any, stream: Any, rest: Iterator[Any], trait: str, *, thorough: bool
) -> Survey:
    """trait: of the container. thorough: the first frame is decoded, and key frames are looked
    into.
    """
    context, entries, name = stream.codec_context, stream.index_entries, _name(container)
    codec, properties = context.codec.canonical_name, context.codec.properties
    extradata = context.extradata
    may_reorder = context.has_b_frames or (name == "avi" and properties & REORDERS)
    packets, frame, num_stored = list[Packet](), None, 0
    is_cut = is_late = has_open_groups = reorders = False
    for packet in rest:
        if thorough and frame is None:
            with suppress(av.FFmpegError):  # whether it can be decoded is found out elsewhere
                frame = next(iter(packet.decode()), None)
        num_stored += packet.size > 0
        if packet.size and not packets and not is_cut:
            is_late = not packet.is_keyframe
        if packet.is_discard:
            is_cut = True
            continue
        # of VP8 also packets that only others refer to
        if not packet.size or (codec == "vp8" and not memoryview(packet)[0] & VP8_SHOWN):
            continue
        packets.append(Packet(packet.pts, packet.dts, packet.is_keyframe))
        if may_reorder and not reorders:
            reorders = _is_b_frame(packet, codec, extradata)
        if thorough and codec == "h264" and packet.is_keyframe:
            types = {unit[0] & UNIT_TYPE for unit in _units(packet, extradata)}
            has_open_groups |= IDR not in types
    # FFmpeg discards what an edit list hides, leaves it out, or shows it again
    is_edited = is_cut or (name == "mp4" and stream.frames not in (0, num_stored))
    traits = [trait, EDIT_LIST if is_edited else ""]
    traits += _stamp_traits(name, packets, reorders=reorders, is_cut=is_cut)
    may_have_others = not properties & INTRA_ONLY
    without_index = name not in SEEKABLE or (name == "avi" and len(entries) < len(packets))
    turn, size, is_straight = UPRIGHT, (0, 0), True
    if frame is not None:
        turn, is_straight = orientation(frame)
        size = (frame.width, frame.height) if turn[0] else (frame.height, frame.width)
    for trait, is_there in (
        (LATE_START, is_late),  # one that an edit list hides
        (ALL_KEYS, may_have_others and _calls_all_keys(name, codec, packets, entries)),
        (NO_INDEX, without_index),
        (OPEN_GROUPS, has_open_groups),
        (MIRRORED, not is_straight),
    ):
        traits.append(trait if is_there else "")
    return _survey(container, stream, packets, traits, reorders, turn, size)


def _calls_all_keys(
    name: str, codec: str, packets: Sequence[Packet], entries: Sequence[Any]
) -> bool:
    """Whether the packets, or the index of an mp4 against its packets, call each frame a key frame;
    decoders then begin anywhere.
    """
    if len(packets) < 2:
        return False
    if all(packet.is_key for packet in packets):
        return codec not in REFUSING
    is_indexed = name == "mp4" and len(entries) >= len(packets)
    return is_indexed and all(entry.is_keyframe for entry in entries)


def _stamp_traits(
    name: str, packets: Sequence[Packet], *, reorders: bool, is_cut: bool
) -> Iterator[str]:
    """What is wrong with the stamps of a container's packets, some of which an edit list may hide
    (is_cut).
    """
    stamps = [packet.pts for packet in packets]
    if None in stamps or len(set(stamps)) < len(stamps):
        yield NO_STAMPS
        return
    # AVI has no other stamps than those of decoding
    if reorders and (name == "avi" or stamps == sorted(stamps)):
        yield DECODING_ORDER
    # decoders leave out what they lack a key frame for
    if stamps and not is_cut and (not packets[0].is_key or min(stamps) < stamps[0]):
        yield LATE_START
    if name == "matroska":
        return
    for one, two in pairwise(packet for packet in packets if packet.is_key):
        # in an index by the time of decoding the second one stands before the first one is shown
        if two.dts is not None and two.dts <= one.pts:
            yield ADJACENT_KEYS
            return


def _is_b_frame(packet: Any, codec: str, extradata: bytes | None) -> bool:
    """Whether a packet holds a frame that is shown before one that is stored before it; true where
    nothing is known of the codec.
    """
    if codec == "h264":
        slices = (unit for unit in _units(packet, extradata) if unit[0] & UNIT_TYPE in SLICES)
        return any(_slice_type(unit) == B_SLICE for unit in slices)
    return codec not in B_PICTURE or B_PICTURE[codec].search(packet) is not None


def _units(packet: Any, extradata: bytes | None) -> Iterator[bytes]:
    """The beginnings of the units of a packet of H.264."""
    data = bytes(packet)
    # start codes between the units, not their lengths before them
    if not extradata or extradata[0] != 1:
        for unit in data.split(START_CODE)[1:]:
            if unit:
                yield unit[:UNIT_BYTES]
        return
    length_bytes = (extradata[4] & 3) + 1
    begin = length_bytes
    while begin < len(data):
        yield data[begin : begin + UNIT_BYTES]
        begin += int.from_bytes(data[begin - length_bytes : begin], "big") + length_bytes


def _slice_type(unit: bytes) -> int:
    """The second of the numbers that a slice begins with, each as many bits after as zeros before
    its first one; 5 says what 0 says.
    """
    bits, value = "".join(f"{byte:08b}" for byte in unit[1:]) + "1", 0
    for _ in range(2):
        zeros = bits.index("1")
        value = int(bits[zeros : 2 * zeros + 1], 2) - 1
        bits = bits[2 * zeros + 1 :] or "1"
    return value % 5
