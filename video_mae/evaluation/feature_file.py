"""A file of features that is written piece by piece, for any length, and is there whole or not at
all: .npz or .safetensors.

C clips of a video; what follows in a shape belongs to one clip.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64"}
FEATURES = "features"


class FeatureFile:
    """One file with the array `features` [C, ...] and small arrays beside it. `append` clips, then
    `close`; or `discard` it.

    What is unfinished has a name of its own, .NAME.part, the same in the next attempt, which
    overwrites it. Equal features are equal bytes.
    """

    def __init__(
        self,
        path: Path,
        kind: Literal["npz", "safetensors"],
        shape: tuple[int, ...],
        dtype: Literal["float32", "float16"],
        beside: Mapping[str, NDArray[np.generic]],
    ) -> None:
        self.path, self.unfinished, self.dtype, self.missing = (
            path,
            path.with_name(f".{path.name}.part"),
            dtype,
            shape[0],
        )
        self._open = ExitStack()
        file = self._open.enter_context(self.unfinished.open("wb"))
        self._stream = (
            self._begin_npz(file, shape, beside)
            if kind == "npz"
            else self._begin_safetensors(file, shape, beside)
        )

    def append(self, features: NDArray[np.floating]) -> None:
        """Adds the features of the next clips."""
        self.missing -= len(features)
        self._stream.write(np.ascontiguousarray(features, dtype=self.dtype).tobytes())

    def close(self) -> None:
        """Puts the finished file in its place."""
        assert self.missing == 0, f"{self.path}: {self.missing} clips are missing"
        self._open.close()
        with self.unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self.unfinished, self.path)

    def discard(self) -> None:
        """Removes what was written."""
        self.unfinished.unlink()
        self._open.close()

    def _begin_npz(
        self, file: IO[bytes], shape: tuple[int, ...], beside: Mapping[str, NDArray[np.generic]]
    ) -> IO[bytes]:
        archive = self._open.enter_context(zipfile.ZipFile(file, "w"))
        for name, array in beside.items():
            member = io.BytesIO()
            npy.write_array(member, np.asarray(array), allow_pickle=False)
            # a ZipInfo is of 1980: the file's bytes tell no time
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
        stream = self._open.enter_context(
            archive.open(zipfile.ZipInfo(f"{FEATURES}.npy"), "w", force_zip64=True)
        )
        npy.write_array_header_1_0(
            stream, {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": shape}
        )
        return stream

    def _begin_safetensors(
        self, file: IO[bytes], shape: tuple[int, ...], beside: Mapping[str, NDArray[np.generic]]
    ) -> IO[bytes]:
        header, offset = {}, 0
        sizes = {name: (str(array.dtype), array.shape) for name, array in beside.items()} | {
            FEATURES: (self.dtype, shape)
        }
        for name, (dtype, size) in sizes.items():
            end = offset + math.prod(size) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": SAFETENSORS_TYPES[dtype],
                "shape": list(size),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for array in beside.values():
            file.write(np.ascontiguousarray(array).tobytes())
        return file
