"""Shards that are written one after another, each byte of them the same however often the writing
was broken off.

A row of the list is written when its files are in their shard, and a shard's checksum before the
next one is begun: what is there after a kill is told by the rows, and what goes beyond them is cut
off. Formats: `data/shards.py`.
"""

import fcntl
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from video_mae.data.shards import ENDINGS, ROWS, SHARD, SHARDS, key_of, number_of
from video_mae.files import json_line

BLOCK = tarfile.BLOCKSIZE
END_OF_ARCHIVE = bytes(2 * BLOCK)


class ShardWriter:
    """Rows and their videos, from the one on where the writing stopped before; `num_rows` and
    `num_refused` count those that are there.
    """

    def __init__(self, folder: Path, form: str, shard_bytes: int) -> None:
        """Raises: ValueError while another writer works in the folder."""
        self.folder, self.ending, self.shard_bytes = folder, ENDINGS[form], shard_bytes
        self._rows = open(folder / ROWS, "ab+", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(self._rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._rows.close()
            raise ValueError(
                f"{folder}: another `video-mae pack` is at work in it; wait for it, or choose another folder"
            ) from None
        self._shards = open(folder / SHARDS, "ab+", buffering=0)  # noqa: SIM115
        self._file: io.FileIO | None = None
        self.num_rows = self.num_refused = self._number = self._end = 0
        self._digest = hashlib.sha256()
        self._resume()

    def append(self, row: dict[str, Any], media: NDArray[Any] | None) -> None:
        """Writes the next row and, unless it was refused, its video. Raises: OSError, such as that
        of a full disk: nothing is lost then.
        """
        key = key_of(self.num_rows)
        if media is not None:
            row = {**row, **self._append_files(key, row, media.data)}
        _write(self._rows, json_line({"key": key, **row}))
        self.num_rows += 1
        self.num_refused += media is None

    def finish(self) -> list[dict[str, Any]]:
        """Ends the last shard; returns name, bytes and sha256 of each."""
        if self._file is not None:
            self._end_shard()
        for file in (self._rows, self._shards):
            os.fsync(file.fileno())
        self._shards.seek(0)
        return [json.loads(line) for line in self._shards.read().splitlines()]

    def close(self) -> None:
        """Leaves the folder to others."""
        for file in (self._rows, self._shards, self._file):
            if file is not None:
                file.close()

    def _append_files(self, key: str, row: dict[str, Any], media: memoryview) -> dict[str, Any]:
        files = [(".cls", str(row["label"]).encode())] if row["label"] != -1 else []
        files += [(".json", json_line(row)), (self.ending, media)]
        size = sum(BLOCK + _padded(len(data)) for _, data in files)
        if self._end and self._end + size > self.shard_bytes:
            self._end_shard()
        if self._file is None:
            self._file = open(self.folder / SHARD.format(self._number), "ab", buffering=0)  # noqa: SIM115
        offset = 0
        for ending, data in files:
            header = tarfile.TarInfo(key + ending)
            header.size, header.mode = len(data), 0o644
            self._add(header.tobuf(tarfile.USTAR_FORMAT))
            offset = self._end
            self._add(data)
            self._add(bytes(_padded(len(data)) - len(data)))
        return {
            "shard": SHARD.format(self._number),
            "offset": offset,
            "size": len(media),
            "sha256": hashlib.sha256(media).hexdigest(),
        }

    def _add(self, data: bytes | memoryview) -> None:
        assert self._file is not None
        _write(self._file, data)
        self._digest.update(data)
        self._end += len(data)

    def _end_shard(self) -> None:
        assert self._file is not None
        self._add(END_OF_ARCHIVE)
        os.fsync(self._file.fileno())
        self._file.close()
        row = {
            "name": SHARD.format(self._number),
            "bytes": self._end,
            "sha256": self._digest.hexdigest(),
        }
        _write(self._shards, json_line(row))
        self._file, self._number, self._end, self._digest = (
            None,
            self._number + 1,
            0,
            hashlib.sha256(),
        )

    def _resume(self) -> None:
        """Goes back to the last row whose video is whole, and removes what lies beyond it."""
        places, ends, refused = _read_rows(self.folder / ROWS)
        while (last := max(places, default=NOWHERE)) != NOWHERE:
            broken = next(
                (
                    row
                    for row, place in enumerate(places)
                    if place.number == last.number and not self._is_whole(place)
                ),
                None,
            )
            if broken is None:
                break
            # the machine itself went down: rows may be there before their videos
            del places[broken:], ends[broken:], refused[broken:]
        self._rows.truncate(ends[-1] if ends else 0)
        self.num_rows, self.num_refused = len(places), sum(refused)
        if last != NOWHERE:
            self._number, self._end = last.number, last.offset + _padded(last.size)
            self._file = open(self.folder / SHARD.format(last.number), "rb+", buffering=0)  # noqa: SIM115
            self._file.truncate(self._end)
            self._digest = hashlib.file_digest(self._file, "sha256")
            self._file.seek(0, os.SEEK_END)
        for file in self.folder.glob("shard-*.tar"):
            if file.name not in {
                SHARD.format(number) for number in range(self._number + (last != NOWHERE))
            }:
                file.unlink()
        self._keep_shard_rows()

    def _is_whole(self, place: "_Place") -> bool:
        try:
            with open(self.folder / SHARD.format(place.number), "rb", buffering=0) as file:
                file.seek(place.offset)
                return hashlib.sha256(file.read(place.size)).hexdigest() == place.sha256
        except FileNotFoundError:
            return False

    def _keep_shard_rows(self) -> None:
        """Rows of the shards before the open one, those that a power cut took away made anew."""
        self._shards.seek(0)
        lines = [
            line for line in self._shards.read().splitlines(keepends=True) if line.endswith(b"\n")
        ][: self._number]
        self._shards.truncate(sum(map(len, lines)))
        for number in range(len(lines), self._number):
            path = self.folder / SHARD.format(number)
            with open(path, "rb") as file:
                _write(
                    self._shards,
                    json_line(
                        {
                            "name": path.name,
                            "bytes": path.stat().st_size,
                            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                        }
                    ),
                )


class _Place(NamedTuple):
    """Where the video of a row lies; in no shard where it was refused."""

    number: int
    offset: int = 0
    size: int = 0
    sha256: str = ""


NOWHERE = _Place(-1)


def _read_rows(path: Path) -> tuple[list[_Place], list[int], list[bool]]:
    """The place of each row's video, where the row ends in its file, and whether it was refused; up
    to the first that is torn.
    """
    places, ends, refused = list[_Place](), list[int](), list[bool]()
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else {}
                if row["key"] != key_of(len(places)):
                    break
                places.append(
                    NOWHERE
                    if "refused" in row
                    else _Place(number_of(row["shard"]), row["offset"], row["size"], row["sha256"])
                )
            except (ValueError, KeyError, TypeError):
                break
            ends.append((ends[-1] if ends else 0) + len(line))
            refused.append("refused" in row)
    return places, ends, refused


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _write(file: io.FileIO, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while len(view):
        view = view[file.write(view) :]
