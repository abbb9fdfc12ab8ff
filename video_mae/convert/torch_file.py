"""Files of torch.save: what they hold, and their tensors one by one, without torch's own reader of
pickles (pickled.py says why).
"""

import io
import math
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from video_mae.convert.pickled import Machine, Storage, Stored

OLD_MAGIC, OLD_VERSION = 0x1950A86A20F9469CFC6C, 1001  # what files begin with that are no archives


class TorchFile:
    """A file of torch.save: its `content`, in which tensors are `Stored`; `tensor` reads one.
    Formats: archive (1.6 on), and before.

    Checksums are compared, except where a file was saved without any, as torch can be told to.
    Raises: CodeError; whatever exception a damaged file leads to.
    """

    def __init__(self, path: Path) -> None:
        self._values: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        # begin and length in a file of the old format
        self._places: dict[str, tuple[int, int]] = {}
        self._root, self._order = "", "little"
        self._file = path.open("rb")
        try:
            self._archive = zipfile.ZipFile(self._file) if self._file.read(2) == b"PK" else None
            self._file.seek(0)
            self.content = (
                self._open_old() if self._archive is None else self._open_archive(self._archive)
            )
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Ends reading."""
        self._file.close()

    def tensor(self, stored: Stored) -> torch.Tensor:
        """The values of a tensor of a known kind. Raises: ValueError where the file has fewer, or
        whatever damage leads to.
        """
        storage, dtype = stored.storage, stored.storage.dtype
        assert dtype is not None
        flat = self._flat(storage, dtype)
        if math.prod(stored.size) > len(flat):
            raise ValueError(
                f"has shape {stored.size}, but only {len(flat) * dtype.itemsize} bytes"
            )
        return flat.as_strided(stored.size, stored.stride, storage.start + stored.offset)

    def _flat(self, storage: Storage, dtype: torch.dtype) -> torch.Tensor:
        """All values of a storage, once for the tensors that share them."""
        if (storage.key, dtype) not in self._values:
            content = self._bytes(storage.key)
            if len(content) < storage.count * dtype.itemsize or len(content) % dtype.itemsize:
                raise ValueError(
                    f"is damaged: {storage.count * dtype.itemsize} bytes should be there, {len(content)} are"
                )
            if self._order != sys.byteorder:
                content = np.frombuffer(content, f"u{dtype.itemsize}").byteswap().tobytes()
            self._values[storage.key, dtype] = (
                torch.frombuffer(bytearray(content), dtype=dtype)
                if content
                else torch.empty(0, dtype=dtype)
            )
        return self._values[storage.key, dtype]

    def _bytes(self, key: str) -> bytes:
        if self._archive is not None:
            return self._archive.read(f"{self._root}/data/{key}")
        begin, length = self._places[key]
        self._file.seek(begin)
        return self._file.read(length)

    def _open_archive(self, archive: zipfile.ZipFile) -> Any:
        names = archive.namelist()
        roots = [
            name.split("/")[0]
            for name in names
            if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise ValueError(f"has {len(roots)} parts named data.pkl, not one")
        self._root = roots[0]
        # torch.serialization.set_crc32_options(False)
        if not any(entry.CRC for entry in archive.infolist()):
            for entry in archive.infolist():
                entry.CRC = None  # pyright: ignore[reportAttributeAccessIssue]
        if f"{self._root}/constants.pkl" in names:
            raise ValueError("is a program of TorchScript")
        if f"{self._root}/byteorder" in names:
            self._order = archive.read(f"{self._root}/byteorder").decode()
        return Machine().run(io.BytesIO(archive.read(f"{self._root}/data.pkl")))

    def _open_old(self) -> Any:
        file = self._file
        magic, version, system = (Machine().run(file) for _ in range(3))
        if (magic, version) != (OLD_MAGIC, OLD_VERSION):
            raise ValueError("is no file of torch.save")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ValueError("is of a machine of another byte order")
        machine = Machine()
        content, keys = machine.run(file), Machine().run(file)
        for key in keys:
            dtype = machine.storages[key].dtype
            if dtype is None:
                raise ValueError(f"holds the values {key} of an unknown kind")
            length = struct.unpack("<q", file.read(8))[0] * dtype.itemsize
            self._places[key] = file.tell(), length
            file.seek(length, 1)
        return content
