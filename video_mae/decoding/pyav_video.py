"""Videos by PyAV: frames are numbered by the packets' time stamps, a seek goes to the key frame
before, decoding goes on from there.

Where stamps cannot be believed (`packets`), the file is decoded from its start, twice: to count,
and to read.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from video_mae.decoding.containers import check_container
from video_mae.decoding.media import Array, Frames, Indices, Reading, scaled_size
from video_mae.decoding.packets import (
    IN_ORDER,
    Packet,
    Turn,
    open_container,
    orientation,
    read_packets,
    stamps_of,
    video_stream,
)

CONVERTER = VideoReformatter()
"""Keeps its tables, which take longer to make than a small frame to convert."""
SKIPPING = ("h264", "hevc", "mpeg4")
"""Decoders that decide packet by packet what they leave out, and name what no other frame refers
to.
"""


def load() -> str:
    """Loads the library; returns its version."""
    av.logging.set_level(None)
    return av.__version__


def open_video(path: str, reading: Reading) -> Frames:
    """Opens a file that is a video container.

    Raises: av.FFmpegError, and ValueError for what is no whole container, and where a frame that
    the packets promise does not come out.
    """
    video = _Video(path, reading)
    return Frames(len(video.stamps.ticks), video.read, video.stamps)


def sequential(path: str, threads: int = 1) -> Iterator[av.VideoFrame]:
    """All frames of a video in the order they are shown, from its start on: the truth that random
    access is measured by.
    """
    with open_container(path) as container:
        stream = video_stream(container, threads)
        yield from container.decode(stream)


def pixels(frame: av.VideoFrame, short_side: int) -> Array:
    """A decoded frame as RGB, upright, scaled down to short_side: frame_HWC."""
    height, width = scaled_size(frame.height, frame.width, short_side)
    scaled = CONVERTER.reformat(frame, width, height, "rgb24")
    return upright(np.asarray(scaled.to_ndarray(), np.uint8), orientation(frame)[0])


def upright(picture: Array, turn: Turn) -> Array:
    """A stored picture [H, W, ...] as it is shown: a view."""
    transposed, mirrored, upside_down = turn
    if transposed:
        picture = picture.swapaxes(0, 1)
    return picture[:: -1 if upside_down else 1, :: -1 if mirrored else 1]


def _at(frames: Iterator[av.VideoFrame], stamp: int) -> av.VideoFrame | None:
    """The frame of a time stamp among those that come out; None where it is not among them."""
    for frame in frames:
        if frame.pts is not None and frame.pts >= stamp:
            return frame if frame.pts == stamp else None
    return None


class _Video:
    """An opened file, which is closed with it: PyAV's objects refer to each other, and Python would
    collect them late.
    """

    container: Any = None

    def __init__(self, path: str, reading: Reading) -> None:
        self.path, self.reading = path, reading
        trait = check_container(path)
        self._open()  # costs milliseconds
        found = None if trait in IN_ORDER else read_packets(path, self.container, self.stream)
        self.in_order = found is None or not set(IN_ORDER).isdisjoint(found.traits)
        if found is None or self.in_order:
            # counted by decoding: packets mislead
            ticks = [frame.pts for frame in sequential(path, reading.threads)]
            self.stamps = stamps_of(self.stream, ticks)
            return
        self.stamps = found.stamps
        self.places = {packet.pts: place for place, packet in enumerate(found.packets)}
        keys = {packet for packet in found.packets if packet.is_key}
        # where an edit list hides the first key frame, the first stamp that is shown leads there
        if self.stamps.ticks:
            keys.add(found.packets[0]._replace(pts=self.stamps.ticks[0]))
        self.keys = sorted(keys, key=lambda key: key.pts)
        self.key_stamps = [key.pts for key in self.keys]

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if self.container is not None:
            self.container.close()

    def _open(self) -> None:
        self._close()
        self.container = open_container(self.path)
        self.stream = video_stream(self.container, self.reading.threads)

    def read(self, wanted: Indices) -> Iterator[Array]:
        """The frames of these rising indices."""
        frames = self._in_order if self.in_order else self._by_seeking
        for frame in frames(wanted.tolist()):
            yield pixels(frame, self.reading.short_side)

    def _in_order(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        frames = enumerate(sequential(self.path, self.reading.threads))
        for index in wanted:
            for place, frame in frames:
                if place == index:
                    yield frame
                    break
            else:
                raise self._missing(index)

    def _by_seeking(self, wanted: list[int]) -> Iterator[av.VideoFrame]:
        frames: Iterator[av.VideoFrame] = iter(())
        ticks = self.stamps.ticks
        needed = {ticks[index] for index in wanted}
        position: Any = None
        for index in wanted:
            stamp, found = ticks[index], None
            key = bisect_right(self.key_stamps, stamp) - 1
            # no key frame lies between
            if position is not None and self.key_stamps[key] <= position:
                found = _at(frames, stamp)
            if found is None:
                found, frames = self._sought(stamp, key, needed)
            if found is None:
                raise self._missing(index)
            position = stamp
            yield found

    def _missing(self, index: int) -> ValueError:
        return ValueError(f"frame {index} of {len(self.stamps.ticks)} cannot be decoded")

    def _sought(
        self, stamp: int, key: int, needed: set[Any]
    ) -> tuple[av.VideoFrame | None, Iterator[av.VideoFrame]]:
        """The frame of a time stamp, and those after it; `key` is the last key frame that is not
        shown later.

        What is shown after a key frame that is no fresh start may need the one before it. Where
        that does not help either, all is decoded from the start of the file: a frame that comes out
        there is never refused.
        """
        for begin in self.keys[max(key - 1, 0) : key + 1][::-1]:
            with suppress(av.FFmpegError):
                frames = self._decoded(self._packets_from(begin), needed)
                first = next(frames, None)
                if first is None or (
                    begin is self.keys[key] and first.pts is not None and first.pts > begin.pts
                ):
                    # refreshed bit by bit: what comes out at the end may lack what the key frame
                    # did not bring
                    continue
                found = _at(chain((first,), frames), stamp)
                if found is not None:
                    return found, frames
        self._open()
        frames = self.container.decode(self.stream)
        return _at(frames, stamp), frames

    def _packets_from(self, key: Packet) -> Iterator[Any]:
        """The packets from a key frame on, or from one before it; which stamp leads there depends
        on what the container's index has.
        """
        for target in (key.pts, key.dts):
            if target is None:
                continue
            self.container.seek(target, stream=self.stream)
            packets, head = self.container.demux(self.stream), []
            for packet in packets:
                head.append(packet)
                if packet.pts in self.places:  # what is not shown has none
                    break
            if head and self.places.get(head[-1].pts, len(self.places)) <= self.places[key.pts]:
                return chain(head, packets)
        self._open()
        return self.container.demux(self.stream)

    def _decoded(self, packets: Iterator[Any], needed: set[Any]) -> Iterator[av.VideoFrame]:
        """The frames of packets; those that are not needed, nor needed by others, are not decoded
        at all.
        """
        context = self.stream.codec_context
        for packet in packets:
            if context.name in SKIPPING:
                is_needed = packet.pts is None or packet.pts in needed
                context.skip_frame = "DEFAULT" if is_needed else "NONREF"
            yield from packet.decode()
