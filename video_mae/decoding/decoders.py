"""The video decoders behind one function, `open_video`: which there are, which a run takes, and
what each is known to read wrongly.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, get_args

from video_mae.config.data import Decoder
from video_mae.decoding.containers import ASF, EDIT_LIST, NO_INDEX, PACKED_B_FRAMES, check_container
from video_mae.decoding.packets import (
    ADJACENT_KEYS,
    IN_ORDER,
    MIRRORED,
    OPEN_GROUPS,
    Survey,
    survey,
)
from video_mae.decoding.reading import Frames, Member, Place, Read, Reading

NAMES: tuple[str, ...] = tuple(name for name in get_args(Decoder) if name != "auto")
"""In the order in which they are tried."""
TRUSTED: dict[str, dict[str, tuple[str, ...]]] = {
    "decord": {
        "mp4": ("ffv1", "h264", "mjpeg", "mpeg4", "prores", "vp9"),
        "matroska": ("ffv1", "h264", "mjpeg", "mpeg4", "prores", "vp9"),
        "avi": ("mjpeg", "mpeg4"),
    },
    "torchcodec": {
        "mp4": ("av1", "ffv1", "h264", "hevc", "mjpeg", "mpeg2video", "mpeg4", "prores", "vp9"),
        "matroska": (
            "av1",
            "ffv1",
            "h264",
            "hevc",
            "mjpeg",
            "mpeg2video",
            "mpeg4",
            "prores",
            "vp9",
        ),
        "avi": ("mjpeg", "mpeg4"),
    },
}
"""Containers and their codecs of which each frame asked for alone is what reading in order gives;
anything else is left to pyav.

Measured with decord 0.6.0 and torchcodec 0.13.0 and 0.17.0: tests/test_matrix.py. `mp4` is mov and
3gp too, `matroska` webm.
"""
REORDERED = {"decord": ("h264",), "torchcodec": ("h264", "hevc", "mpeg2video", "mpeg4")}
"""Codecs that are trusted with B-frames."""
MISREADS = {
    "decord": (EDIT_LIST, MIRRORED, OPEN_GROUPS, ADJACENT_KEYS, PACKED_B_FRAMES, ASF, *IN_ORDER),
    "torchcodec": (
        EDIT_LIST,
        MIRRORED,
        OPEN_GROUPS,
        ADJACENT_KEYS,
        PACKED_B_FRAMES,
        ASF,
        *IN_ORDER,
    ),
}
"""What is left to pyav whatever the codec."""
FROM_START = (PACKED_B_FRAMES, NO_INDEX, ASF)
"""Containers in which a seek goes astray, for PyAV as well."""


@cache
def problem(name: str) -> str:
    """Why a decoder cannot be used on this machine, in one line; empty where it can. Loads its
    library.
    """
    try:
        _module(name).load()
    except (ImportError, OSError, RuntimeError) as error:
        # a library that does not fit the torch that is here gives the last two
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ""


def resolve(decoder: str) -> str:
    """The decoder that a run takes: the one asked for, or the first that works here.

    Raises: ValueError naming data.decoder and the remedy.
    """
    if decoder == "auto":
        return next(name for name in NAMES if not problem(name))  # pyav is always installed
    if reason := problem(decoder):
        working = ", ".join(name for name in NAMES if not problem(name))
        raise ValueError(
            f"data.decoder: {decoder} cannot be loaded here ({reason}); install it, or take one of: {working}"
        )
    return decoder


def version(name: str) -> str:
    """The version of a decoder that works here."""
    return _module(name).load()


def open_video(place: Place, reading: Reading) -> tuple[str, Frames, str]:
    """(decoder, frames, why it is not the first one): `reading.decoder` opens a video, or where it
    cannot, the next that works here.

    Raises: what the first decoder raises, where neither can; ValueError for what is no whole video
    container.
    """
    path, kept = local_file(place)
    with open(path, "rb") as file:
        trait = check_container(file, os.fstat(file.fileno()).st_size)
    first = resolve(reading.decoder)
    try:
        return first, replace(_open(first, path, reading, trait), kept=kept), ""
    except Exception as error:  # each library has types of its own
        second = next((name for name in NAMES if name != first and not problem(name)), None)
        try:
            if second is not None:
                return (
                    second,
                    replace(_open(second, path, reading, trait), kept=kept),
                    f"{first}: {error}",
                )
        except Exception:
            pass
        raise error


def distrust(name: str, traits: Sequence[str], found: Survey | None) -> str:
    """Why a decoder is passed over for a file with these traits, or of this container and codec;
    empty where it reads it rightly.
    """
    if name == "pyav":
        return ""
    known = next((trait for trait in MISREADS[name] if trait in traits), "")
    if known or found is None:
        return known
    if found.codec not in TRUSTED[name].get(found.container, ()):
        return f"{found.codec} in {found.container}"
    return (
        f"{found.codec} with B-frames"
        if found.reorders and found.codec not in REORDERED[name]
        else ""
    )


def _open(name: str, path: str, reading: Reading, trait: str) -> Frames:
    if name == "pyav":
        from video_mae.decoding import pyav_video

        return pyav_video.open_video(path, reading, in_order=trait in FROM_START)
    reason = distrust(name, (trait,), None)
    found = None if reason else survey(path)
    if found is not None:
        reason = distrust(name, (trait, *found.traits), found)
    if found is None or reason:
        raise ValueError(f"{reason}; it would be read wrongly, `video-mae pack` cures it")
    num_frames, read = _module(name).open_video(path, reading, found.size)
    if num_frames != len(found.stamps):
        raise ValueError(
            f"it counts {num_frames} frames, the packets are {len(found.stamps)}; it would be read wrongly"
        )
    return Frames(num_frames, read, found.times, start=found.start())


def _module(name: str) -> "_Module":
    return import_module(f"video_mae.decoding.{name}_video")  # pyright: ignore[reportReturnType]


class _Module:
    """What the file of a decoder has; `open_video`, which pyav has in another form, gives the
    number of frames and what reads them.
    """

    load: Callable[[], str]
    open_video: Callable[[str, Reading, tuple[int, int]], tuple[int, Read]]


def local_file(place: Place) -> tuple[str, Any]:
    """A path under which a decoder finds a video, and what keeps it there: of a member of a shard
    it is a copy in memory.
    """
    if not isinstance(place, Member):
        # FFmpeg takes a bare `concat:a|b` for an order, not for a name
        return os.path.join(os.curdir, place), None
    memory = open(os.memfd_create("video"), "wb", buffering=0)  # noqa: SIM115  (closed with the last who holds it)
    memory.write(read_member(place))
    return f"/proc/self/fd/{memory.fileno()}", memory


def read_member(member: Member, offset: int = 0, size: int | None = None) -> bytes:
    """Bytes of a member of a shard, all or `size` from `offset` on. Raises: ValueError where the
    shard is cut off.
    """
    size = member.size - offset if size is None else size
    start = member.offset + offset
    if "://" in member.archive:
        import fsspec

        files, path = fsspec.url_to_fs(member.archive)
        data = files.cat_file(path, start=start, end=start + size)
    else:
        descriptor = os.open(member.archive, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, size, start)
        finally:
            os.close(descriptor)
    if len(data) != size:
        raise ValueError(f"the shard is cut off: it has {len(data)} of the {size} bytes at {start}")
    return data
