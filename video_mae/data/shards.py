"""Packed folders, as `video-mae pack` writes them: what lies in them, and their videos as a list.

pack.json        the settings and the list of the packing, from its start on
shard-*.tar      KEY.cls (the label, where there is one), KEY.json (the row) and KEY.mp4 or KEY.npy
                 of one video after another
manifest.jsonl   a row for each line of the list, in its order: where its video is, or why it was
                 refused
shards.jsonl     the bytes and checksum of each shard
manifest.json    at the end: counts, bytes, checksums, names of the classes
refused.jsonl    at the end: what was refused, and why

M videos, S shards.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_mae.decoding import Member
from video_mae.extras import require_package
from video_mae.files import is_regular

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


ROW = np.dtype([("shard", "i4"), ("number", "i8"), ("offset", "i8"), ("size", "i8")])
"""Where a packed video lies: its shard, its row in the list, and its bytes in the shard."""


@dataclass(frozen=True, eq=False)
class Members(Sequence[Member]):
    """Where packed videos lie, in 28 bytes each: members[index] is made when it is asked for.

    rows_M: of ROW. digest: of the rows of the folder.
    """

    folder: str
    shards: Sequence[str]
    ending: str
    rows_M: NDArray[np.void]
    digest: bytes = b""

    def __len__(self) -> int:
        return len(self.rows_M)

    def __getitem__(self, index: int) -> Member:  # pyright: ignore[reportIncompatibleMethodOverride]  (no slices)
        shard, number, offset, size = self.rows_M[index].item()
        archive = _inside(self.folder, self.shards[int(shard)])
        return Member(archive, key_of(number) + self.ending, offset, size)

    def shard_sizes(self) -> list[int]:
        """Videos in each shard; of none there are none."""
        return np.bincount(self.rows_M["shard"], minlength=len(self.shards)).tolist()


def is_packed(source: str) -> bool:
    """Whether a source is a packed folder, finished or not; a URL can be nothing else."""
    return "://" in source or (source != "" and os.path.isfile(os.path.join(source, SETTINGS)))


def read_packed(source: str, what: str) -> tuple[Members, NDArray[np.int64], tuple[str, ...]]:
    """The videos of a packed folder, or of one behind an fsspec URL, their labels [M], and the
    names of the classes. Nothing but its shards is ever opened, whatever its rows say.

    Raises: ValueError or FileNotFoundError with one line: a packing that is not finished, a file
    that is missing, cut off or not as the manifest says.
    """
    manifest = read_manifest(source, what)
    names = [shard["name"] for shard in manifest["shards"]]
    bytes_S = np.array([shard["bytes"] for shard in manifest["shards"]], dtype=np.int64)
    place_of = {name: place for place, name in enumerate(names)}
    values, digest = array("q"), hashlib.sha256()
    for number, line in enumerate(_lines(source, ROWS, what)):
        digest.update(line)
        try:
            row = json.loads(line)
            if row["key"] != key_of(number):
                raise ValueError
            if "refused" not in row:
                place = place_of[row["shard"]], number, row["offset"], row["size"]
                values.extend((*place, row["label"]))  # takes nothing but integers of 64 bits
        except (ValueError, KeyError, TypeError, OverflowError):
            raise ValueError(
                f"{what}: {_inside(source, ROWS)}:{number + 1}: is no row of a packed folder; pack "
                "it anew"
            ) from None
    *places, label_M = np.frombuffer(values, np.int64).reshape(-1, 5).T
    shard_M, _, offset_M, size_M = places
    if not len(label_M):
        raise ValueError(f"{what}: {source}: holds no videos, all were refused: {REFUSED} says why")
    if (
        digest.hexdigest() != manifest.get("rows_sha256")
        or (offset_M < 0).any()
        or (size_M <= 0).any()
        or (offset_M > bytes_S[shard_M] - size_M).any()
        or (np.diff(shard_M) < 0).any()
        or (manifest["class_names"] and label_M.max() >= len(manifest["class_names"]))
    ):
        raise ValueError(
            f"{what}: {_inside(source, ROWS)}: is not what {MANIFEST} describes; copy the folder "
            "again, or pack it anew"
        )
    if "://" not in source:  # a request each; what is missing is found when it is read
        for name, num_bytes in zip(names, bytes_S.tolist(), strict=True):
            path = _inside(source, name)
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{what}: no such shard: {path}, copy the folder again")
            if os.path.getsize(path) != num_bytes:
                raise ValueError(
                    f"{what}: {path} has {os.path.getsize(path)} bytes, its manifest says "
                    f"{num_bytes}; copy the folder again"
                )
    rows_M = np.rec.fromarrays(places, dtype=ROW)
    members = Members(source, names, ENDINGS[manifest["form"]], rows_M, digest.digest())
    return members, label_M.copy(), tuple(manifest["class_names"])


def read_manifest(source: str, what: str = "data.source") -> dict[str, Any]:
    """The manifest.json of a packed folder that is finished. Raises: as `read_packed`."""
    try:
        data = b"".join(_lines(source, MANIFEST, what))
    except FileNotFoundError:
        if "://" in source:
            raise FileNotFoundError(
                f"{what}: {source}: there is no {MANIFEST}; name a folder that `video-mae pack` "
                "has finished"
            ) from None
        raise ValueError(
            f"{what}: {source}: its packing is not finished, start the same `video-mae pack` "
            "again, which goes on"
        ) from None
    try:
        manifest = json.loads(data)
        classes, shards = manifest["class_names"], manifest["shards"]
        names = [shard["name"] for shard in shards]
        array("q", [shard["bytes"] for shard in shards])  # integers of 64 bits
        if (
            manifest["format"] != FORMAT
            or manifest["form"] not in ENDINGS
            or not isinstance(classes, list)
            or not all(isinstance(name, str) for name in classes)
            or not all(map(_SHARD_NAME.fullmatch, names))
            or len(set(names)) < len(names)
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ValueError(
            f"{what}: {_inside(source, MANIFEST)}: is not of `{FORMAT}`, or does not describe its "
            "shards; pack the videos anew, with this version"
        ) from None
    return manifest


def _inside(source: str, name: str) -> str:
    return f"{source.rstrip('/')}/{name}" if "://" in source else os.path.join(source, name)


def _lines(source: str, name: str, what: str) -> Iterator[bytes]:
    """The lines of a file of a folder. Raises: FileNotFoundError, and ValueError for a URL that
    nothing here can open.
    """
    path = _inside(source, name)
    if "://" not in source:
        if not is_regular(path):
            raise FileNotFoundError(f"{what}: no such file: {path}, copy the folder again")
        with open(path, "rb") as file:
            yield from file
        return
    require_package("fsspec", what)
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
