"""Frames that `video-mae pack` made ready: .npy members of shards, of which only the bytes of the
wanted frames are read.

F frames, H W pixels, C channels.
"""

import io
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_mae.decoding.arrays import npy_header
from video_mae.decoding.decoders import read_member
from video_mae.decoding.reading import Frames, Member, untimed

HEAD_BYTES = 4096
URL_BYTES = 2**24
"""Of neighbouring frames that are asked for at once from a URL, where each request costs; a file is
read frame by frame.
"""


def open_frames(member: Member) -> Frames:
    """An .npy member [F, H, W, C] of a shard. Raises: ValueError where it is another array, or the
    shard is cut off.
    """
    head = io.BytesIO(read_member(member, 0, min(HEAD_BYTES, member.size)))
    shape, fortran_order, dtype = npy_header(head)
    begin, frame_bytes = head.tell(), math.prod(shape[1:]) * dtype.itemsize
    if len(shape) != 4 or fortran_order or 0 in shape:
        raise ValueError(
            f"the member is an array {shape}, not frames as `video-mae pack` writes them"
        )
    if member.size < begin + shape[0] * frame_bytes:
        raise ValueError(
            f"the member has {member.size} bytes, its header says {begin + shape[0] * frame_bytes}"
        )
    is_url = "://" in member.archive
    file = None if is_url else open(member.archive, "rb", buffering=0)  # noqa: SIM115  (closed with the last who holds it)

    def read(wanted: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        # the same for all, so that it stays in the cache until it is copied
        frame = np.empty(shape[1:], dtype)
        for first, num in _runs(wanted, max(URL_BYTES // frame_bytes, 1) if is_url else 1):
            place, size = begin + first * frame_bytes, num * frame_bytes
            if file is None:
                yield from np.frombuffer(read_member(member, place, size), dtype).reshape(
                    num, *shape[1:]
                )
                continue
            # pread, not a map: a disk that fails is an error then, not the end of this process
            if os.preadv(file.fileno(), [frame.view(np.uint8).data], member.offset + place) != size:
                raise ValueError("the shard is cut off")
            yield frame

    return Frames(shape[0], read, untimed(shape[0]), file)


def _runs(wanted: NDArray[np.int64], most: int) -> Iterator[tuple[int, int]]:
    """(first, how many) of neighbours among rising indices, at most so many."""
    first, num = int(wanted[0]), 0
    for index in wanted.tolist():
        if index != first + num or num == most:
            yield first, num
            first, num = index, 0
        num += 1
    yield first, num
