"""Arrays as clips: .npy files, arrays of .npz files, and the frames that `video-mae pack` made
ready. Never a pickle.

T frames (slices of a volume), H W pixels, C channels.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.lib import format as npy

from video_mae.config.data import FileConfig
from video_mae.decoding.media import MAX_CLIP_BYTES, Array, Frames, Indices, Member, read_member

MAX_HEADER_BYTES = 10_000
PACKED_HEAD_BYTES = 4096
URL_BYTES = 2**24
"""Of neighbouring frames that are asked for at once from a URL, where each request costs; a file is
read frame by frame.
"""
DEFAULT_AXES = {2: "HW", 3: "THW", 4: "THWC"}
HEADERS = {(1, 0): (2, npy.read_array_header_1_0), (2, 0): (4, npy.read_array_header_2_0)}
"""Versions of the .npy format for arrays of numbers: bytes of a header's length, what reads it."""


def open_npy(path: str, source: FileConfig, in_channels: int) -> Frames:
    """An .npy file: only the slices that are wanted are read. Raises: ValueError for objects and
    for a header that lies.
    """
    with open(path, "rb") as file:
        return _frames(_map(file, os.fstat(file.fileno()).st_size), source.axes_thwc)


def open_npz(path: str, source: FileConfig, in_channels: int) -> Frames:
    """One array of an .npz file: mapped where it is stored as it is (np.savez), read whole where it
    is compressed, up to 2 GB.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        member = archive.getinfo(_member(archive.namelist(), source.array))
        method = member.compress_type
        if member.flag_bits & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{member.filename} is encrypted or compressed in another way than "
                "np.savez_compressed does"
            )
        with archive.open(member) as stream:  # checks the names and the place of the data
            if method == zipfile.ZIP_DEFLATED:
                return _frames(_inflate(stream), source.axes_thwc)  # pyright: ignore[reportArgumentType]  (reads bytes, is no BinaryIO)
        file.seek(member.header_offset + 26)
        # lengths of name and extra field
        start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        file.seek(start)
        end = min(start + member.file_size, os.fstat(file.fileno()).st_size)
        return _frames(_map(file, end), source.axes_thwc)


def open_packed(member: Member) -> Frames:
    """An .npy member [F, H, W, C] of a shard, of which only the bytes of the wanted frames are
    read. Raises: ValueError where it is another array, or the shard is cut off.
    """
    head = io.BytesIO(read_member(member, 0, min(PACKED_HEAD_BYTES, member.size)))
    shape, order, dtype, num_bytes = _header(head)
    begin = head.tell()
    if len(shape) != 4 or order == "F" or num_bytes == 0:
        raise ValueError(
            f"the member is an array {shape}, not frames as `video-mae pack` writes them"
        )
    if member.size < begin + num_bytes:
        raise ValueError(f"the member has {member.size} bytes, its header says {begin + num_bytes}")
    frame_bytes = num_bytes // shape[0]

    def read_url(wanted: Indices) -> Iterator[Array]:
        most = max(URL_BYTES // frame_bytes, 1)
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
            for first in range(0, len(run), most):
                part = run[first : first + most]
                data = read_member(
                    member, begin + int(part[0]) * frame_bytes, len(part) * frame_bytes
                )
                yield from np.frombuffer(data, dtype).reshape(-1, *shape[1:])

    def read_file(wanted: Indices) -> Iterator[Array]:
        # the same for all, so that it stays in the cache until it is copied
        frame = np.empty(shape[1:], dtype)
        with open(member.archive, "rb", buffering=0) as file:
            for index in wanted.tolist():
                place = member.offset + begin + index * frame_bytes
                # pread, not a map: a disk that fails is an error then, not the end of this process
                if os.preadv(file.fileno(), [frame.view(np.uint8).data], place) != frame_bytes:
                    raise ValueError("the shard is cut off")
                yield frame

    return Frames(shape[0], read_url if "://" in member.archive else read_file)


def frames_first(array: Array, axes: str) -> Array:
    """A view [T, H, W, C] of an array whose axes are named by letters of THWC; an axis that it does
    not have has length 1.

    Raises: ValueError where the names are not as many as the axes.
    """
    names = axes or DEFAULT_AXES.get(array.ndim, "")
    if array.ndim != len(names):
        raise ValueError(
            f"the array has {array.ndim} axes {array.shape}, data.axes names {axes or '2 to 4'}"
        )
    if array.size == 0:
        raise ValueError(f"the array {array.shape} is empty")
    view = array.transpose([names.index(axis) for axis in "THWC" if axis in names])
    return np.expand_dims(view, ["THWC".index(axis) for axis in set("THWC") - set(names)])


def _frames(array: Array, axes: str) -> Frames:
    view_THWC = frames_first(array, axes)

    def read(wanted: Indices) -> Iterator[Array]:
        for index in wanted:
            yield view_THWC[int(index)]

    return Frames(len(view_THWC), read)


def _header(
    file: BinaryIO,
) -> tuple[tuple[int, ...], Literal["F", "C"], np.dtype[Any], int]:
    """(shape, order, dtype, bytes of the data) of an .npy file; it is then at the data. Raises:
    ValueError for objects and for lies.
    """
    version = npy.read_magic(file)
    if version not in HEADERS:
        raise ValueError(f"version {version} of the .npy format is for arrays of structures")
    num_bytes, read_header = HEADERS[version]
    size = file.read(num_bytes)
    length = int.from_bytes(size, "little")
    if length > MAX_HEADER_BYTES:  # numpy would read it first
        raise ValueError(f"the header claims to have {length} bytes")
    header = io.BytesIO(size + file.read(length))
    shape, is_fortran, dtype = read_header(header, MAX_HEADER_BYTES)
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are not read; save an array of numbers")
    if dtype.kind not in "uif":
        raise ValueError(f"holds {dtype}, not integers or floats")
    if min(shape, default=0) < 0:
        raise ValueError(f"the header claims the shape {shape}")
    return shape, "F" if is_fortran else "C", dtype, math.prod(shape) * dtype.itemsize


def _map(file: BinaryIO, end: int) -> Array:
    shape, order, dtype, needed = _header(file)
    start = file.tell()
    if needed > end - start:
        raise ValueError(
            f"the file is cut off: it has {end - start} bytes of data, its header says {needed}"
        )
    return np.memmap(file, dtype, "r", start, shape, order)


def _inflate(stream: BinaryIO) -> Array:
    shape, order, dtype, needed = _header(stream)
    if needed > MAX_CLIP_BYTES:
        raise ValueError(
            f"the array {shape} of {dtype} has more than 2 GB; save it with np.save or "
            "np.savez, which need not be read whole"
        )
    data = stream.read(needed)
    # the second read reaches the end, where the checksum is compared
    if len(data) < needed or stream.read(1):
        raise ValueError(f"the data are not the {needed} bytes that the header says")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _member(names: list[str], wanted: str) -> str:
    arrays = [name.removesuffix(".npy") for name in names if name.endswith(".npy")]
    listed = ", ".join(arrays[:8]) or "none"
    if not wanted and len(arrays) != 1:
        raise ValueError(f"holds {len(arrays)} arrays ({listed}), set data.array to one")
    if wanted and wanted not in arrays:
        raise ValueError(f"has no array {wanted}, only {listed}")
    return f"{wanted or arrays[0]}.npy"
