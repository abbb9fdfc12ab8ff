"""Videos by decord."""

from collections.abc import Iterable, Iterator
from typing import Any

from video_mae.decoding.media import Array, Indices, Read, Reading, scaled_size
from video_mae.extras import require_package

BATCH = 16  # frames that are asked for at once: cheaper than one by one


def load() -> str:
    """Loads the library; returns its version."""
    require_package("decord")
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord.__version__


def open_video(path: str, reading: Reading, size: tuple[int, int]) -> tuple[int, Read]:
    """Opens a file whose frames are shown in this (height, width): how many there are, and what
    reads them.

    Raises: what decord does, which is of many types.
    """
    import decord

    height, width = scaled_size(*size, reading.short_side) if reading.short_side else (-1, -1)
    # Where decord cannot decode a frame it repeats another: fault_tol=1 makes more than one such
    # frame an error. DECORD_EOF_RETRY_MAX stays 10240: it counts polls of the decoding thread, and
    # 64 failed a third of a set of good files.
    reader = decord.VideoReader(
        path,
        ctx=decord.cpu(0),
        width=width,
        height=height,
        num_threads=reading.threads,
        fault_tol=1,
    )

    def read(wanted: Indices) -> Iterator[Array]:
        for first in range(0, len(wanted), BATCH):
            frames_FHWC = _batch(reader, wanted[first : first + BATCH])
            if first + BATCH >= len(wanted):
                # at once: decord's thread goes on decoding what follows, and keeps it
                reader.seek(0)
            yield from map(_without_padding, frames_FHWC)

    return len(reader), read


def _batch(reader: Any, wanted: Indices) -> Iterable[Array]:
    """Frames asked for at once; one by one where their rows are padded, or their size changes,
    which decord finds to be no batch.
    """
    import decord

    try:
        return reader.get_batch(wanted).asnumpy()
    except decord.DECORDError as error:
        if "size must exactly match" not in str(error):
            raise
    return [reader[int(index)].asnumpy() for index in wanted]


def _without_padding(frame_HWC: Array) -> Array:
    """Where rows are padded to 4/3 of their length (48 pixels wide, for one), decord takes the
    padding for a fourth channel.
    """
    height, width, channels = frame_HWC.shape
    return (
        frame_HWC
        if channels == 3
        else frame_HWC.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
    )
