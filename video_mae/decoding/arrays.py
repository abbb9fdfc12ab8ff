"""Arrays as clips: .npy files, mapped into memory and read slice by slice, and arrays of .npz
files. Never a pickle.

T frames (slices of a volume), H W pixels, C channels.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from video_mae.config.data import FileConfig
from video_mae.decoding.reading import MAX_CLIP_BYTES, Frames, untimed

MAX_HEADER_BYTES = 10_000
DEFAULT_AXES = {2: "HW", 3: "THW", 4: "THWC"}


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
        if member.flag_bits & 1 or member.compress_type not in (
            zipfile.ZIP_STORED,
            zipfile.ZIP_DEFLATED,
        ):
            raise ValueError(
                f"{member.filename} is encrypted or compressed in another way than np.savez_compressed does"
            )
        with archive.open(member) as stream:  # checks the names and the place of the data
            if member.compress_type == zipfile.ZIP_DEFLATED:
                return _frames(_inflate(stream), source.axes_thwc)  # pyright: ignore[reportArgumentType]  (reads bytes, is no BinaryIO)
        file.seek(member.header_offset + 26)
        # lengths of name and extra field
        start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
        file.seek(start)
        return _frames(
            _map(file, min(start + member.file_size, os.fstat(file.fileno()).st_size)),
            source.axes_thwc,
        )


def frames_first(array: NDArray[Any], axes: str) -> NDArray[Any]:
    """A view [T, H, W, C] of an array whose axes are named by letters of THWC; an axis that it does
    not have has length 1.

    Raises: ValueError where the names are not as many as the axes.
    """
    names = axes or DEFAULT_AXES.get(array.ndim, "")
    if array.ndim != len(names):
        raise ValueError(
            f"the array has {array.ndim} axes {array.shape}, data.axes names {axes or '2 to 4'}"
        )
    view = array.transpose([names.index(axis) for axis in "THWC" if axis in names])
    for place, axis in enumerate("THWC"):
        if axis not in names:
            view = np.expand_dims(view, place)
    if 0 in view.shape:
        raise ValueError(f"the array {array.shape} is empty")
    return view


def _frames(array: NDArray[Any], axes: str) -> Frames:
    view_THWC = frames_first(array, axes)

    def read(wanted: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        for index in wanted:
            yield view_THWC[int(index)]

    return Frames(len(view_THWC), read, untimed(len(view_THWC)))


def npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran's order, dtype) of an .npy file; it is then at the data. Raises:
    ValueError for objects and for lies.
    """
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the .npy format is for arrays of structures")
    size = file.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(size, "little")
    if length > MAX_HEADER_BYTES:  # numpy would read it first
        raise ValueError(f"the header claims to have {length} bytes")
    header = io.BytesIO(size + file.read(length))
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read_header(header, MAX_HEADER_BYTES)
    if dtype.hasobject:
        raise ValueError("holds Python objects, which are not read; save an array of numbers")
    if dtype.kind not in "uif":
        raise ValueError(f"holds {dtype}, not integers or floats")
    if any(side < 0 for side in shape):
        raise ValueError(f"the header claims the shape {shape}")
    return shape, fortran_order, dtype


def _map(file: BinaryIO, end: int) -> NDArray[Any]:
    shape, fortran_order, dtype = npy_header(file)
    start, needed = file.tell(), math.prod(shape) * dtype.itemsize
    if needed > end - start:
        raise ValueError(
            f"the file is cut off: it has {end - start} bytes of data, its header says {needed}"
        )
    if needed == 0:
        raise ValueError(f"the array {shape} is empty")
    return np.memmap(file, dtype, "r", start, shape, "F" if fortran_order else "C")


def _inflate(stream: BinaryIO) -> NDArray[Any]:
    shape, fortran_order, dtype = npy_header(stream)
    needed = math.prod(shape) * dtype.itemsize
    if needed > MAX_CLIP_BYTES:
        raise ValueError(
            f"the array {shape} of {dtype} has more than 2 GB; save it with np.save or np.savez, which need not be read whole"
        )
    data = stream.read(needed)
    # the second read reaches the end, where the checksum is compared
    if len(data) < needed or stream.read(1):
        raise ValueError(f"the data are not the {needed} bytes that the header says")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran_order else "C")


def _member(names: list[str], wanted: str) -> str:
    arrays = [name.removesuffix(".npy") for name in names if name.endswith(".npy")]
    if wanted in arrays or (not wanted and len(arrays) == 1):
        return f"{wanted or arrays[0]}.npy"
    listed = ", ".join(arrays[:8]) or "none"
    raise ValueError(
        f"has no array {wanted}, only {listed}"
        if wanted
        else f"holds {len(arrays)} arrays ({listed}), set data.array to one"
    )
