"""Paths of a list: millions of them in memory, whether they lead to regular files, and what is said
about one that does not.
"""

import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from video_mae.data.lists import NO_FRAMES, NO_INTEGER
from video_mae.files import is_regular

STAT_THREADS, STAT_CHUNK = 16, 100
LISTED = 16
"""Paths of one folder from which on it is listed, at most LISTED_MORE times as many names as paths,
before files are asked for singly.
"""
LISTED_MORE = 4
SHOWN = 300  # characters of a path in a message
_URL = re.compile(
    r"(?:^|/)((?:[a-z][a-z0-9+.-]*://|(?:async|cache|concat|crypto|data|file|pipe|subfile)[:,]).*)",
    re.IGNORECASE,
)
"""What FFmpeg would take for something else than a local file."""
_COLUMN = re.compile(r"[ \t,;|]+[^ \t,;|/]+$")
_NUMBER, _WORD = re.compile(r"[ \t,]*[+-]?[0-9]{1,18}"), re.compile(r"[ \t,]*([^ \t,;|]+)")
_QUOTED = re.compile(r'"((?:[^"]|"")+)"[ \t]*[ \t,;|][ \t]*(.+)$')


class Paths(Sequence[str]):
    """Paths in the bytes that they take, and 8 more: a million `str` take three times as much.

    Where workers fork, each copies all the objects that it touches, as Python counts references.
    """

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("q")

    def append(self, path: str) -> None:
        """Adds a path."""
        self._text += os.fsencode(path)
        self._ends.append(len(self._text))

    @property
    def digest(self) -> bytes:
        """Of all of them in their order."""
        digest = hashlib.sha256(self._text)
        digest.update(self._ends)
        return digest.digest()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]  (no slices)
        index = range(len(self))[index]
        begin = self._ends[index - 1] if index else 0
        return os.fsdecode(bytes(self._text[begin : self._ends[index]]))


def printable(text: str) -> str:
    """A path for a message: one line, not too long, nothing that moves a terminal's cursor."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: SHOWN + 1])
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def file_mistake(path: str, label: int = -1) -> tuple[type[ValueError | FileNotFoundError], str]:
    """The error that a path which leads to no regular file deserves, and its one line; an empty one
    for others.
    """
    shown = printable(path)
    if is_regular(path):
        return ValueError, ""
    if os.path.isdir(path):
        return ValueError, f"{shown} is a folder, name a video file"
    if os.path.exists(path):
        return ValueError, f"{shown} is not a regular file, name a video file"
    if url := _URL.search(path):
        shown = printable(url[1])
        return ValueError, f"{shown} is no local file, and only those are opened: download it"
    if mistake := _columns_mistake(path, label):
        return ValueError, mistake
    if os.path.islink(path):
        return FileNotFoundError, f"{shown} is a link that leads to no file, correct it"
    names = "; where the line names columns, data.list_format=header" if "," in shown else ""
    return FileNotFoundError, f"no such file: {shown}, correct the path or root{names}"


def _columns_mistake(path: str, label: int) -> str:
    """What is wrong with a line whose path leads to a file, or to a folder, once columns behind it
    are taken away.
    """
    shorter, columns = path, ""
    if quoted := _QUOTED.search(path):
        # it was taken for a relative path
        name, columns = quoted[1].replace('""', '"'), quoted[2]
        shorter = os.path.join(path[: quoted.start()], name)
    else:
        while not os.path.exists(shorter) and (column := _COLUMN.search(shorter)):
            shorter, columns = shorter[: column.start()], column[0] + columns
    if not columns or not os.path.exists(shorter):
        return ""
    # a number in its place was the end of a longer line
    if label != -1 or _NUMBER.fullmatch(columns):
        columns = f"{columns} {label}"
    columns, word, shown = printable(columns.strip()), _WORD.fullmatch(columns), printable(shorter)
    if os.path.isdir(shorter):
        is_frames = re.fullmatch(r"[-+0-9 \t,]+", columns)
        return f"`{columns}` stands behind the folder {shown}; {NO_FRAMES}" if is_frames else ""
    if label == -1 and word:
        return NO_INTEGER.format(printable(word[1]))
    return (
        f"`{columns}` stands behind {shown}, where one label is expected; set data.list_format to "
        "what the columns are (frames_label, start_frames, header), or write lines `PATH LABEL`"
    )


def repetitions(source: str, paths: Iterable[object]) -> tuple[str, ...]:
    """A line where files are named more than once; hashes of 64 bits are compared."""
    hashes = array("q", map(hash, paths))
    num = len(hashes) - len(np.unique(hashes))
    line = (
        f"{source}: {num} of its {len(hashes)} lines name files of earlier ones, and count as "
        "well; `video-mae doctor` writes a list without them"
    )
    return (line,) if num else ()


def first_bad(paths: Paths) -> int | None:
    """The first path that does not lead to a regular file, None where there is none. Threads hide
    the latency of a network disk.
    """

    def first_of(indices: Sequence[int]) -> int | None:
        return next((index for index in indices if not is_regular(paths[index])), None)

    left = np.flatnonzero(~_listed_as_regular(paths)).tolist()
    shares = [left[first : first + STAT_CHUNK] for first in range(0, len(left), STAT_CHUNK)]
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        # what is left of the shares is not begun once one is found
        return next((index for index in pool.map(first_of, shares) if index is not None), None)


def _listed_as_regular(paths: Paths) -> NDArray[np.bool_]:
    """Which paths [M] are regular files by what their folders say when they are listed; of the
    others that is not known.

    One call tells of many files what would take a call each. Names are compared by hashes of 64
    bits, which differ in every process.
    """
    hashes, folders = array("q"), Counter[str]()
    for path in paths:
        hashes.append(hash(path))
        folders[path[: path.rfind(os.sep) + 1]] += 1
    regular = array("q")
    for folder, number in folders.items():
        if number < LISTED:
            continue
        with suppress(OSError, ValueError), os.scandir(folder or os.curdir) as entries:
            files = islice(entries, number * LISTED_MORE)
            names = [file.name for file in files if file.is_file(follow_symlinks=False)]
            if names and is_regular(folder + names[0]):  # and none of the kernel's
                regular.extend(hash(folder + name) for name in names)
    return np.isin(np.array(hashes), np.array(regular))
