"""Packed folders, as `video-mae pack` writes them: what lies in them, and their videos as a list.

FOLDER/pack.json       the settings and the list of the packing, from its start on
FOLDER/shard-*.tar     KEY.cls (the label, where there is one), KEY.json (the row) and KEY.mp4 or
KEY.npy of one video after another FOLDER/manifest.jsonl  a row for each line of the list, in its
order: where its video is, or why it was refused FOLDER/shards.jsonl    the bytes and checksum of
each shard FOLDER/manifest.json   at the end: counts, bytes, checksums, names of the classes
FOLDER/refused.jsonl   at the end: what was refused, and why M videos, S shards.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_mae.data.videos import Places, VideoList
from video_mae.decoding import Member

FORMAT = "video-mae pack 1"
SETTINGS, ROWS, SHARDS, MANIFEST, REFUSED = (
    "pack.json",
    "manifest.jsonl",
    "shards.jsonl",
    "manifest.json",
    "refused.jsonl",
)
SHARD = "shard-{:06d}.tar"
ENDINGS = {"video": ".mp4", "frames": ".npy"}
_SHARD_NAME = re.compile(r"shard-[0-9]{6,9}\.tar")


def key_of(number: int) -> str:
    """What the files of a row of the list are called in a shard."""
    return f"{number:09d}"


def number_of(shard: str) -> int:
    """The number of a shard by its name. Raises: ValueError."""
    if not _SHARD_NAME.fullmatch(shard):
        raise ValueError(f"{shard} is no name of a shard")
    return int(shard[6:-4])


class Members(Places):
    """Where packed videos lie, in 28 bytes each: members[index] is made when it is asked for."""

    def __init__(
        self,
        folder: str,
        shards: Sequence[str],
        ending: str,
        shard_M: NDArray[np.int32],
        number_M: NDArray[np.int64],
        offset_M: NDArray[np.int64],
        size_M: NDArray[np.int64],
        rows_digest: bytes = b"",
    ) -> None:
        self.folder, self.shards, self.ending, self.rows_digest = (
            folder,
            shards,
            ending,
            rows_digest,
        )
        self.shard_M, self.number_M, self.offset_M, self.size_M = (
            shard_M,
            number_M,
            offset_M,
            size_M,
        )

    @property
    def digest(self) -> bytes:
        return self.rows_digest

    def __len__(self) -> int:
        return len(self.shard_M)

    def __getitem__(self, index: int) -> Member:  # pyright: ignore[reportIncompatibleMethodOverride]  (no slices)
        archive = _inside(self.folder, self.shards[int(self.shard_M[index])])
        return Member(
            archive,
            key_of(int(self.number_M[index])) + self.ending,
            int(self.offset_M[index]),
            int(self.size_M[index]),
        )


class PackedVideos(VideoList):
    """The videos of a packed folder, shard after shard."""

    places: Members

    def shard_sizes(self) -> NDArray[np.int64]:
        """Videos in each shard [S]; of none there are none."""
        return np.bincount(self.places.shard_M, minlength=len(self.places.shards)).astype(np.int64)


def is_packed(source: str) -> bool:
    """Whether a source is a packed folder, finished or not; a URL can be nothing else."""
    return "://" in source or (source != "" and os.path.isfile(os.path.join(source, SETTINGS)))


def read_packed(source: str, what: str = "data.source") -> PackedVideos:
    """The videos of a packed folder, or of one behind an fsspec URL. Nothing but its shards is ever
    opened, whatever its rows say.

    Raises: ValueError or FileNotFoundError with one line: a packing that is not finished, a file
    that is missing, cut off or not as the manifest says.
    """
    manifest = read_manifest(source, what)
    shards, sizes, ending = _shards_of(manifest, source, what)
    columns, digest = [array("q") for _ in range(5)], hashlib.sha256()
    place_of = {name: place for place, name in enumerate(shards)}
    for number, line in enumerate(_lines(source, ROWS, what)):
        digest.update(line)
        try:
            row = json.loads(line)
            if row["key"] != key_of(number):
                raise ValueError
            if "refused" not in row:
                for column, value in zip(
                    columns,
                    (place_of[row["shard"]], number, row["offset"], row["size"], row["label"]),
                    strict=True,
                ):
                    column.append(value)  # takes nothing but integers of 64 bits
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ValueError(
                f"{what}: {_inside(source, ROWS)}:{number + 1}: is no row of a packed folder; pack it anew"
            ) from None
    shard_M, number_M, offset_M, size_M, label_M = (
        np.frombuffer(column, np.int64) for column in columns
    )
    if not len(shard_M):
        raise ValueError(f"{what}: {source}: holds no videos, all were refused: {REFUSED} says why")
    end_M = sizes[shard_M] - size_M
    if (
        digest.hexdigest() != manifest.get("rows_sha256")
        or (offset_M < 0).any()
        or (size_M <= 0).any()
        or (offset_M > end_M).any()
        or (np.diff(shard_M) < 0).any()
        or (manifest["class_names"] and label_M.max() >= len(manifest["class_names"]))
    ):
        raise ValueError(
            f"{what}: {_inside(source, ROWS)}: is not what {MANIFEST} describes; copy the folder again, or pack it anew"
        )
    _check_files(source, shards, sizes, what)
    return PackedVideos(
        Members(
            source,
            shards,
            ending,
            shard_M.astype(np.int32),
            number_M,
            offset_M,
            size_M,
            digest.digest(),
        ),
        label_M,
    )


def read_manifest(source: str, what: str = "data.source") -> dict[str, Any]:
    """The manifest.json of a packed folder that is finished. Raises: as `read_packed`."""
    try:
        data = b"".join(_lines(source, MANIFEST, what))
    except FileNotFoundError:
        if "://" in source:
            raise FileNotFoundError(
                f"{what}: {source}: there is no {MANIFEST}; name a folder that `video-mae pack` has finished"
            ) from None
        raise ValueError(
            f"{what}: {source}: its packing is not finished, start the same `video-mae pack` again, which goes on"
        ) from None
    try:
        manifest = json.loads(data)
        names = manifest["class_names"]
        if (
            manifest["format"] != FORMAT
            or not isinstance(names, list)
            or not all(isinstance(name, str) for name in names)
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{what}: {_inside(source, MANIFEST)}: is not of `{FORMAT}`; pack the videos anew, with this version"
        ) from None
    return manifest


def _shards_of(
    manifest: dict[str, Any], source: str, what: str
) -> tuple[list[str], NDArray[np.int64], str]:
    """(names, bytes [S], ending of the members)."""
    try:
        names = [shard["name"] for shard in manifest["shards"]]
        sizes = np.array(
            array("q", [shard["bytes"] for shard in manifest["shards"]]), dtype=np.int64
        )
        if not all(_SHARD_NAME.fullmatch(name) for name in names) or len(set(names)) < len(names):
            raise ValueError
        return names, sizes, ENDINGS[manifest["form"]]
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ValueError(
            f"{what}: {_inside(source, MANIFEST)}: does not describe shards; pack the videos anew"
        ) from None


def _check_files(source: str, shards: Sequence[str], sizes: NDArray[np.int64], what: str) -> None:
    if "://" in source:  # a request each; what is missing is found when it is read
        return
    for name, size in zip(shards, sizes.tolist(), strict=True):
        path = _inside(source, name)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{what}: no such shard: {path}, copy the folder again")
        if os.path.getsize(path) != size:
            raise ValueError(
                f"{what}: {path} has {os.path.getsize(path)} bytes, its manifest says {size}; copy the folder again"
            )


def _inside(source: str, name: str) -> str:
    return f"{source.rstrip('/')}/{name}" if "://" in source else os.path.join(source, name)


def _lines(source: str, name: str, what: str) -> Iterator[bytes]:
    """The lines of a file of a folder. Raises: FileNotFoundError, and ValueError for a URL that
    nothing here can open.
    """
    path = _inside(source, name)
    if "://" not in source:
        with open(path, "rb") as file:
            yield from file
        return
    import fsspec

    try:
        with fsspec.open(path, "rb") as file:
            yield from file  # pyright: ignore[reportGeneralTypeIssues]
    except FileNotFoundError:
        raise
    except Exception as error:  # of the library behind the URL
        raise ValueError(
            f"{what}: {source}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from None
