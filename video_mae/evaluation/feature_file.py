"""A file of features that is written piece by piece, for any length, and is there whole or not at
all: .npz or .safetensors.

C clips of a video; what follows in a shape belongs to one clip.
"""

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

FEATURES = "features"
Arrays = Mapping[str, NDArray[np.generic]]


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
        beside: Arrays,
    ) -> None:
        self.path, self.unfinished = path, path.with_name(f".{path.name}.part")
        self.dtype, self.missing = np.dtype(dtype), shape[0]
        self._open = ExitStack()
        self._file = self._open.enter_context(self.unfinished.open("wb"))
        begin = self._begin_npz if kind == "npz" else self._begin_safetensors
        self._stream = begin(shape, beside)

    def append(self, features: NDArray[np.floating]) -> None:
        """Adds the features of the next clips."""
        self.missing -= len(features)
        self._stream.write(features.astype(self.dtype).tobytes())

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

    def _begin_npz(self, shape: tuple[int, ...], beside: Arrays) -> IO[bytes]:
        # A member that is opened by its name is of 1980: the file's bytes tell no time.
        archive = self._open.enter_context(zipfile.ZipFile(self._file, "w"))
        for name, array in beside.items():
            with archive.open(f"{name}.npy", "w") as member:
                npy.write_array(member, array, allow_pickle=False)
        stream = archive.open(f"{FEATURES}.npy", "w", force_zip64=True)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(stream, header)
        return self._open.enter_context(stream)

    def _begin_safetensors(self, shape: tuple[int, ...], beside: Arrays) -> IO[bytes]:
        kinds = {name: (array.dtype, array.shape) for name, array in beside.items()}
        kinds[FEATURES] = (self.dtype, shape)
        header, end = {}, 0
        for name, (dtype, size) in kinds.items():
            begin, end = end, end + math.prod(size) * dtype.itemsize
            header[name] = {
                "dtype": f"{dtype.kind}{8 * dtype.itemsize}".upper(),  # F16, I64
                "shape": size,
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file.write(len(text).to_bytes(8, "little") + text)
        for array in beside.values():
            self._file.write(array.tobytes())
        return self._file
