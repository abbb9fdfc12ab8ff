"""The video decoders behind one function, `open_video`: which there are, which a run takes, and what each is known to read wrongly."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any, get_args

from video_mae.config.data import Decoder
from video_mae.decoding.containers import ASF, EDIT_LIST, HEVC, NO_INDEX, PACKED_B_FRAMES, check_container
from video_mae.decoding.reading import Frames, Member, Place, Reading

NAMES: tuple[str, ...] = tuple(name for name in get_args(Decoder) if name != "auto")
"""In the order in which they are tried."""
MISREADS = {"decord": (EDIT_LIST, PACKED_B_FRAMES, HEVC, NO_INDEX, ASF), "torchcodec": (PACKED_B_FRAMES, NO_INDEX), "pyav": ()}
"""What seeking returns other frames than reading in order does; pyav decodes such files from their start.

Measured with decord 0.6.0 and torchcodec 0.13.0 and 0.17.0: tests/test_decoders.py.
"""
IN_ORDER = (PACKED_B_FRAMES, NO_INDEX)
"""Where a seek goes astray, for PyAV as well."""


@cache
def problem(name: str) -> str:
    """Why a decoder cannot be used on this machine, in one line; empty where it can. Loads its library."""
    try:
        _module(name).load()
    except (ImportError, OSError, RuntimeError) as error:  # a library that does not fit the torch that is here gives the last two
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
        raise ValueError(f"data.decoder: {decoder} cannot be loaded here ({reason}); install it, or take one of: {working}")
    return decoder


def version(name: str) -> str:
    """The version of a decoder that works here."""
    return _module(name).load()


def open_video(place: Place, reading: Reading) -> tuple[str, Frames, str]:
    """(decoder, frames, why it is not the first one): `reading.decoder` opens a video, or where it cannot, the next that works here.

    Raises: what the first decoder raises, where neither can; ValueError for what is no whole video container.
    """
    path, kept = local_file(place)
    with open(path, "rb") as file:
        trouble = check_container(file, os.fstat(file.fileno()).st_size)
    first = resolve(reading.decoder)
    try:
        return first, replace(_open(first, path, reading, trouble), kept=kept), ""
    except Exception as error:  # each library has types of its own
        second = next((name for name in NAMES if name != first and not problem(name)), None)
        try:
            if second is not None:
                return second, replace(_open(second, path, reading, trouble), kept=kept), f"{first}: {error}"
        except Exception:
            pass
        raise error


def _open(name: str, path: str, reading: Reading, trouble: str) -> Frames:
    if trouble in MISREADS[name]:
        raise ValueError(f"{trouble}; it would be read wrongly, `video-mae pack` cures it")
    if name == "pyav":
        from video_mae.decoding import pyav_video

        return pyav_video.open_video(path, reading, in_order=trouble in IN_ORDER)
    frames = _module(name).open_video(path, reading)
    if frames.num_frames < 1:
        raise ValueError("the video has no frames")
    return frames


def _module(name: str) -> "_Module":
    return import_module(f"video_mae.decoding.{name}_video")  # pyright: ignore[reportReturnType]


class _Module:
    """What the file of a decoder has."""

    load: Callable[[], str]
    open_video: Callable[[str, Reading], Frames]


def local_file(place: Place) -> tuple[str, Any]:
    """A path under which a decoder finds a video, and what keeps it there: of a member of a shard it is a copy in memory."""
    if not isinstance(place, Member):
        return os.path.join(os.curdir, place), None  # FFmpeg takes a bare `concat:a|b` for an order, not for a name
    memory = open(os.memfd_create("video"), "wb", buffering=0)  # noqa: SIM115  (closed with the last who holds it)
    memory.write(read_member(place))
    return f"/proc/self/fd/{memory.fileno()}", memory


def read_member(member: Member, offset: int = 0, size: int | None = None) -> bytes:
    """Bytes of a member of a shard, all or `size` from `offset` on. Raises: ValueError where the shard is cut off."""
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
