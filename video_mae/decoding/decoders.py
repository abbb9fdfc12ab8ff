"""The video decoders behind one function, `open_video`: which there are, which a run takes, and
what each is known to read wrongly.
"""

from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, get_args

from video_mae.config.data import DecoderName
from video_mae.decoding.media import Frames, Place, Reading, one_line
from video_mae.decoding.packets import Survey, survey

NAMES: tuple[str, ...] = tuple(name for name in get_args(DecoderName) if name != "auto")
"""In the order in which they are tried."""
OF_AVI = ("mjpeg", "mpeg4")
OF_DECORD = ("ffv1", "h264", "mjpeg", "mpeg4", "prores", "vp9")
OF_TORCHCODEC = (*OF_DECORD, "av1", "hevc", "mpeg2video")
TRUSTED: dict[str, dict[str, tuple[str, ...]]] = {
    "decord": {"mp4": OF_DECORD, "matroska": OF_DECORD, "avi": OF_AVI},
    "torchcodec": {"mp4": OF_TORCHCODEC, "matroska": OF_TORCHCODEC, "avi": OF_AVI},
}
"""Containers and their codecs of which each frame asked for alone is what reading in order gives;
anything else is left to pyav.

Measured with decord 0.6.0 and torchcodec 0.13.0 and 0.17.0: tests/decoding/test_matrix.py. `mp4` is
mov and 3gp too, `matroska` webm.
"""
REORDERED = {"decord": ("h264",), "torchcodec": ("h264", "hevc", "mpeg2video", "mpeg4")}
"""Codecs that are trusted with B-frames."""


@cache
def problem(name: str) -> str:
    """Why a decoder cannot be used on this machine, in one line; empty where it can. Loads its
    library.
    """
    try:
        version(name)
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
            f"data.decoder: {decoder} cannot be loaded here ({reason}); install it, or take "
            f"one of: {working}"
        )
    return decoder


def version(name: str) -> str:
    """The version of a decoder that works here."""
    return _module(name).load()


def open_video(path: str, place: Place, reading: Reading) -> tuple[Frames, str, str]:
    """(frames, decoder, why it is not the first one): `reading.decoder` opens a video, which lies
    at `path`, or where it cannot, the next that works here.

    Raises: what the first decoder raises, where neither can; ValueError for what is no whole video
    container.
    """
    first = resolve(reading.decoder)
    try:
        return _open(first, path, reading), first, ""
    except Exception as error:  # each library has types of its own
        # Only as far as needed: to ask whether torchcodec works loads torch.
        others = (name for name in NAMES if name != first and not problem(name))
        second = next(others, None)
        if second:
            with suppress(Exception):
                return _open(second, path, reading), second, f"{first}: {one_line(error, place)}"
        raise


def distrust(name: str, found: Survey) -> str:
    """Why a decoder is passed over for a file; empty where it reads it rightly."""
    if name == "pyav":
        return ""
    if found.traits:  # each of them leads these decoders astray
        return found.traits[0]
    if found.codec not in TRUSTED[name].get(found.container, ()):
        return f"{found.codec} in {found.container}"
    if found.reorders and found.codec not in REORDERED[name]:
        return f"{found.codec} with B-frames"
    return ""


def _open(name: str, path: str, reading: Reading) -> Frames:
    module = _module(name)
    if name == "pyav":
        return module.open_video(path, reading)
    found = survey(path)
    if reason := distrust(name, found):
        raise ValueError(f"{reason}; it would be read wrongly, `video-mae pack` cures it")
    num_frames, read = module.open_video(path, reading, found.size)
    if num_frames != len(found.stamps.ticks):
        raise ValueError(
            f"it counts {num_frames} frames, the packets are {len(found.stamps.ticks)}; it "
            "would be read wrongly"
        )
    return Frames(num_frames, read, found.stamps)


def _module(name: str) -> Any:
    """The file of a decoder; its `load` returns a version, and `open_video`, which pyav has in
    another form, the number of frames and what reads them.
    """
    return import_module(f"video_mae.decoding.{name}_video")
