"""Shards that are written one after another, each byte of them the same however often the writing
was broken off.

A row of the list is written when its files are in their shard, and a shard's checksum before the
next one is begun: what is there after a kill is told by the rows, and what goes beyond them is cut
off. Formats: `data/shards.py`.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from numpy.typing import NDArray

from video_mae.data.shards import ENDINGS, ROWS, SHARD, SHARDS, key_of
from video_mae.files import json_line

BLOCK = tarfile.BLOCKSIZE
END_OF_ARCHIVE = bytes(2 * BLOCK)
REFUSED = -1
"""In no shard."""


class _Row(NamedTuple):
    """Where the row ends in its file, and where its video lies."""

    end: int
    shard: int = REFUSED
    offset: int = 0
    size: int = 0
    sha256: str = ""


class ShardWriter:
    """Rows and their videos, from the one on where the writing stopped before; `num_rows` and
    `num_refused` count those that are there. Its process holds the folder.
    """

    def __init__(self, folder: Path, form: str, shard_bytes: int) -> None:
        self.folder, self.ending, self.shard_bytes = folder, ENDINGS[form], shard_bytes
        self._rows = open(folder / ROWS, "ab+")  # noqa: SIM115
        self._shards = open(folder / SHARDS, "ab+")  # noqa: SIM115
        self._number = 0
        self._file: BinaryIO | None = None  # a shard has none before it has a video
        self._resume()

    def append(self, row: dict[str, Any], media: NDArray[Any] | None) -> None:
        """Writes the next row and, unless it was refused, its video. Raises: OSError, such as that
        of a full disk: nothing is lost then.
        """
        key = key_of(self.num_rows)
        if media is not None:
            row = {**row, **self._append_files(key, row, media.data)}
        self._rows.write(json_line({"key": key, **row}))
        self._rows.flush()
        self.num_rows += 1
        self.num_refused += media is None

    def finish(self) -> list[dict[str, Any]]:
        """Ends the last shard; returns name, bytes and sha256 of each."""
        if self._file is not None:
            self._end_shard(self._file)
        for file in (self._rows, self._shards):
            os.fsync(file.fileno())
        self._shards.seek(0)
        return [json.loads(line) for line in self._shards]

    def close(self) -> None:
        """Raises: OSError where what is left cannot be written."""
        for file in (self._rows, self._shards, self._file):
            if file is not None:
                file.close()

    def _append_files(self, key: str, row: dict[str, Any], media: memoryview) -> dict[str, Any]:
        files = [(".json", json_line(row)), (self.ending, media)]
        if row["label"] != -1:
            files.insert(0, (".cls", str(row["label"]).encode()))
        size = sum(BLOCK + _padded(len(data)) for _, data in files)
        if self._file is not None and self._file.tell() + size > self.shard_bytes:
            self._end_shard(self._file)
        if self._file is None:
            self._file = open(self._path(self._number), "ab")  # noqa: SIM115
        archive = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        for ending, data in files:
            header = tarfile.TarInfo(key + ending)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
        self._file.flush()
        return {
            "shard": SHARD.format(self._number),
            "offset": archive.offset - _padded(len(media)),
            "size": len(media),
            "sha256": hashlib.sha256(media).hexdigest(),
        }

    def _path(self, number: int) -> Path:
        return self.folder / SHARD.format(number)

    def _end_shard(self, file: BinaryIO) -> None:
        file.write(END_OF_ARCHIVE)
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._write_shard_row(self._number)
        self._number, self._file = self._number + 1, None

    def _write_shard_row(self, number: int) -> None:
        path = self._path(number)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        row = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256}
        self._shards.write(json_line(row))
        self._shards.flush()

    def _resume(self) -> None:
        """Goes back to the last row whose video is whole, and removes what lies beyond it."""
        rows = _read_rows(self.folder / ROWS)
        # the machine itself went down: rows may be there before their videos
        while (broken := self._first_broken(rows)) is not None:
            del rows[broken:]
        self._rows.truncate(rows[-1].end if rows else 0)
        self.num_rows = len(rows)
        written = [row for row in rows if row.shard != REFUSED]
        self.num_refused = len(rows) - len(written)
        if written:
            last = written[-1]
            self._number = last.shard
            self._file = open(self._path(last.shard), "rb+")  # noqa: SIM115
            self._file.truncate(last.offset + _padded(last.size))
            self._file.seek(0, os.SEEK_END)
        kept = {self._path(number) for number in range(self._number + bool(written))}
        for file in set(self.folder.glob("shard-*.tar")) - kept:
            file.unlink()
        # rows of the shards before the open one: those that a power cut took away are made anew
        self._shards.seek(0)
        whole = [line for line in self._shards if line.endswith(b"\n")][: self._number]
        self._shards.truncate(sum(map(len, whole)))
        for number in range(len(whole), self._number):
            self._write_shard_row(number)

    def _first_broken(self, rows: Sequence[_Row]) -> int | None:
        """The first row of the last shard whose video is not there as it was."""
        last = max((row.shard for row in rows), default=REFUSED)
        for number, row in enumerate(rows):
            if row.shard == last != REFUSED and not self._is_whole(row):
                return number
        return None

    def _is_whole(self, row: _Row) -> bool:
        try:
            with self._path(row.shard).open("rb") as file:
                file.seek(row.offset)
                return hashlib.sha256(file.read(row.size)).hexdigest() == row.sha256
        except FileNotFoundError:
            return False


def _read_rows(path: Path) -> list[_Row]:
    """The rows up to the first that is torn."""
    rows, end = list[_Row](), 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            try:
                row = json.loads(line)
                if row["key"] != key_of(len(rows)) or not line.endswith(b"\n"):
                    break
                if "refused" in row:
                    rows.append(_Row(end))
                    continue
                shard = int(row["shard"][6:-4])  # as SHARD writes it
                rows.append(_Row(end, shard, row["offset"], row["size"], row["sha256"]))
            except (ValueError, KeyError, TypeError):
                break
    return rows


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
