"""What is known of a video without a decoder for it, for `video-mae doctor`; all of it runs in a
process that decodes.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from video_mae.decoding.decoders import NAMES, distrust
from video_mae.decoding.media import Member, Place, local_file, read_member
from video_mae.decoding.packets import (
    UPRIGHT,
    is_mirrored,
    open_container,
    survey,
    video_stream,
)
from video_mae.decoding.pyav_video import sequential

UNEVEN = 0.3
"""A frame that is shown this share longer or shorter than the median one makes a frame rate
variable; time stamps are rounded.
"""
ROTATIONS = {
    UPRIGHT: 0,
    (True, False, True): 90,
    (False, True, True): 180,
    (True, True, False): -90,
}
"""Degrees against the clock."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a container and its packets say. rotation, mirrored: how the first frame is shown, as if
    it were mirrored after it is turned by so many degrees against the clock; 0 where it cannot be
    decoded.

    traits: what leads decoders astray, as `Survey` has them. trusted_with: the decoders that read
    each frame rightly. header_frames: as the header says, 0 where it does not. start_seconds: when
    the first frame is shown by the file's own clock. key_frame_distance: most frames from one key
    frame to the next, or to the end. bits: of a colour.
    """

    container: str
    codec: str
    traits: tuple[str, ...]
    trusted_with: tuple[str, ...]
    header_frames: int
    num_packets: int
    start_seconds: float
    seconds: float
    fps: float
    constant_rate: bool
    key_frame_distance: int
    rotation: int
    mirrored: bool
    bits: int
    has_sound: bool


def sha256(place: Place) -> str:
    """Of the bytes of a file. Raises: OSError; ValueError where a shard is cut off."""
    if isinstance(place, Member):
        return hashlib.sha256(read_member(place)).hexdigest()
    with open(place, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(place: Place) -> Description:
    """Describes a video container. Raises: ValueError where it is none or has no video;
    av.FFmpegError and others for damaged ones.
    """
    with local_file(place) as path:
        found = survey(path)
        with open_container(path) as container:
            stream = video_stream(container)
            colour = stream.format.components if stream.format else ()
            ticks = found.stamps.ticks
            steps = [later - earlier for earlier, later in pairwise(ticks)]
            usual = median(steps) if steps else 0
            length = ticks[-1] - ticks[0] + usual if ticks else 0
            keys = [number for number, packet in enumerate(found.packets) if packet.is_key]
            groups = pairwise([0, *keys, len(found.packets)])
            transposed, mirrored, upside_down = found.turn
            has_mirror = is_mirrored(found.turn)
            # of a mirrored picture before it is mirrored
            rotation = ROTATIONS[transposed, mirrored != has_mirror, upside_down]
            return Description(
                container=found.container,
                codec=found.codec,
                traits=found.traits,
                trusted_with=tuple(name for name in NAMES if not distrust(name, found)),
                header_frames=stream.frames,
                num_packets=len(found.packets),
                start_seconds=found.stamps.start,
                seconds=float(length * stream.time_base),
                fps=float(stream.average_rate or stream.guessed_rate or 0),
                constant_rate=all(abs(step - usual) <= UNEVEN * usual for step in steps),
                key_frame_distance=max(after - key for key, after in groups),
                rotation=rotation,
                mirrored=has_mirror,
                bits=max((component.bits for component in colour), default=0),
                has_sound=bool(container.streams.audio),
            )


def count_frames(place: Place) -> int:
    """How many frames come out when a video is decoded in order, from its start on. Raises: as
    `describe`.
    """
    with local_file(place) as path:
        return sum(1 for _ in sequential(path))
