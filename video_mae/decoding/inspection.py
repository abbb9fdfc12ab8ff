"""What is known of a video without a decoder for it, for `video-mae doctor`; all of it runs in a process that decodes."""

import hashlib
import os
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import av

from video_mae.decoding.containers import check_container
from video_mae.decoding.decoders import local_file, read_member
from video_mae.decoding.pyav_video import open_container, sequential, video_stream
from video_mae.decoding.reading import Member, Place

UNEVEN = 0.3
"""A frame that is shown this share longer or shorter than the median one makes a frame rate variable; time stamps are rounded."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a container and its packets say. rotation: of the first frame, degrees; 0 where that cannot be decoded.

    kind: as `check_container` says. header_frames: as the header says, 0 where it does not. key_frame_distance: most frames from one key
    frame to the next, or to the end. bits: of a colour.
    """

    container: str
    codec: str
    kind: str
    header_frames: int
    num_packets: int
    seconds: float
    fps: float
    constant_rate: bool
    key_frame_distance: int
    rotation: int
    bits: int
    has_sound: bool


def sha256(place: Place) -> str:
    """Of the bytes of a file. Raises: OSError; ValueError where a shard is cut off."""
    if isinstance(place, Member):
        return hashlib.sha256(read_member(place)).hexdigest()
    with open(place, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(place: Place) -> Description:
    """Describes a video container. Raises: ValueError where it is none or has no video; av.FFmpegError and others for damaged ones."""
    path, kept = local_file(place)
    with open(path, "rb") as file:
        kind = check_container(file, os.fstat(file.fileno()).st_size)
    with open_container(path) as container:
        stream = video_stream(container)
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
        stamps = sorted({pts for pts, _ in packets if pts is not None})
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        steps = [later - earlier for earlier, later in pairwise(stamps)]
        usual = median(steps) if steps else 0
        keys = [0, *(place for place, (_, is_key) in enumerate(packets) if is_key), len(packets)]
        names = container.format.name.split(",")
        colour = stream.format.components if stream.format else ()
        found = Description(
            container="mp4" if "mp4" in names else names[0],
            codec=stream.codec_context.name,
            kind=kind,
            header_frames=stream.frames,
            num_packets=len(packets),
            seconds=float((stamps[-1] - stamps[0] + usual) * stream.time_base) if stamps else 0.0,
            fps=fps,
            constant_rate=all(abs(step - usual) <= UNEVEN * usual for step in steps),
            key_frame_distance=max(b - a for a, b in pairwise(keys)),
            rotation=_rotation(path),
            bits=max((component.bits for component in colour), default=0),
            has_sound=bool(container.streams.audio),
        )
    del kept
    return found


def count_frames(place: Place) -> int:
    """How many frames come out when a video is decoded in order, from its start on. Raises: as `describe`."""
    path, kept = local_file(place)
    num_frames = sum(1 for _ in sequential(path))
    del kept
    return num_frames


def _rotation(path: str) -> int:
    try:
        return next((frame.rotation for frame in sequential(path)), 0)
    except (av.FFmpegError, ValueError, MemoryError):  # whether it can be decoded is found out elsewhere
        return 0
