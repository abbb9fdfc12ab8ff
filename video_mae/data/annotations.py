"""Which videos there are: list files and folders of classes, checked file by file before anything
else starts.
"""

import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from video_mae.config.data import SourceConfig
from video_mae.data.lists import NO_FRAMES, NO_INTEGER, find_layout, read_lines
from video_mae.data.shards import is_packed, read_manifest, read_packed
from video_mae.data.videos import Paths, VideoList
from video_mae.decoding import ANIMATION, READERS, VIDEO_EXTENSIONS
from video_mae.decoding.containers import is_regular
from video_mae.decoding.pictures import STILLS
from video_mae.files import one_line

EXTENSIONS = (*VIDEO_EXTENSIONS, *READERS)
STAT_THREADS, STAT_CHUNK = 16, 2000
LISTED = 16
"""Paths of one folder from which on it is listed, at most LISTED_MORE times as many names as paths,
before files are asked for singly.
"""
LISTED_MORE = 4
SHOWN = 300  # characters of a path in a message
TOLD = 8  # endings and classes that a note names
_URL = re.compile(
    r"(?:^|/)((?:[a-z][a-z0-9+.-]*://|(?:async|cache|concat|crypto|data|file|pipe|subfile)[:,]).*)",
    re.IGNORECASE,
)
"""What FFmpeg would take for something else than a local file."""
_COLUMN = re.compile(r"[ \t,;|]+[^ \t,;|/]+$")
_NUMBER, _WORD = re.compile(r"[ \t,]*[+-]?[0-9]{1,18}"), re.compile(r"[ \t,]*([^ \t,;|]+)")
_QUOTED = re.compile(r'"((?:[^"]|"")+)"[ \t]*[ \t,;|][ \t]*(.+)$')


class Entry(NamedTuple):
    """A file that a list or folder names: its line (0: no list), its path and label (-1: none), and
    what is wrong with it ("": nothing).
    """

    number: int
    path: str
    label: int
    mistake: str = ""


class Named(NamedTuple):
    """What a source names, in its order, and lines to be told about it."""

    entries: Iterator[Entry]
    notes: tuple[str, ...] = ()


def read_annotations(data: SourceConfig, key: str = "data") -> VideoList:
    """The videos of data.source; one without a label has -1.

    A list file has lines as `read_lines` reads them, or as data.list_format says; relative paths
    start at data.root or at the folder of the list. A folder has a folder per class (`class_names`
    gives their order), searched to any depth, or files without labels; all are videos, or none is.
    A file that a folder would give is itself the only one. The notes of the result tell what a
    folder holds besides. `key` is what the user calls `data`. A packed folder, or the URL of one,
    gives Members: see `read_packed`. Every path must lead to a regular file, through links and `..`
    as well, wherever that is: data sets are made of links. Devices, pipes, sockets, files of the
    kernel (/proc, /sys), folders, URLs, links in circles or to nothing are refused. A video may be
    named twice.
    Raises: FileNotFoundError or ValueError with one line, `LIST:LINE: what, remedy`.
    """
    if is_packed(data.source):
        return read_packed(data.source, f"{key}.source")
    paths, labels, numbers = Paths(), array("q"), array("q")
    entries, notes = read_entries(data, key)
    for entry in entries:
        if entry.mistake:
            raise ValueError(f"{place(data.source, entry.number)}: {entry.mistake}")
        paths.append(entry.path)
        labels.append(entry.label)
        numbers.append(entry.number)
    if not len(paths):
        raise ValueError(f"{data.source}: the list is empty, write lines `PATH LABEL` into it")
    bad = _first_bad(paths)
    if bad is not None:
        error, mistake = file_mistake(paths[bad], labels[bad])
        raise error(f"{place(data.source, numbers[bad])}: {mistake}")
    return VideoList(paths, np.array(labels), notes)


def place(source: str, number: int) -> str:
    """Where a list or a folder names a file, for messages."""
    return f"{source}:{number}" if number else source


def read_entries(data: SourceConfig, key: str = "data") -> Named:
    """What a list or folder names; no file is touched but the first of a list, and a line that is
    wrong is an entry with a mistake.

    Raises: FileNotFoundError or ValueError where there is no such source, or a folder has no files
    that fit.
    """
    source = Path(data.source)
    if data.source == "":
        raise ValueError(
            f"{key}.source: (empty), name a list file with lines `PATH LABEL` or a folder with a folder per class"
        )
    if source.is_dir():
        return _read_folder(source, _class_folders(source))
    if not source.is_file():
        raise FileNotFoundError(
            f"{key}.source: no such list file or folder: {source}, check the path (this program runs in {Path.cwd()})"
        )
    if _ending(data.source) in EXTENSIONS:
        return Named(iter([Entry(0, data.source, -1)]))
    return _read_list(source, data, key)


def file_mistake(path: str, label: int = -1) -> tuple[type[ValueError | FileNotFoundError], str]:
    """The error that a path which leads to no regular file deserves, and its one line; an empty one
    for others.
    """
    if is_regular(path):
        return ValueError, ""
    shown = printable(path)
    if os.path.isdir(path):
        return ValueError, f"{shown} is a folder, name a video file"
    if os.path.exists(path):
        return ValueError, f"{shown} is not a regular file, name a video file"
    if url := _URL.search(path):
        return (
            ValueError,
            f"{printable(url[1])} is no local file, and only those are opened: download it",
        )
    if mistake := _columns_mistake(path, label):
        return ValueError, mistake
    if os.path.islink(path):
        return FileNotFoundError, f"{shown} is a link that leads to no file, correct it"
    return FileNotFoundError, f"no such file: {shown}, correct the path or data.root"


def _columns_mistake(path: str, label: int) -> str:
    """What is wrong with a line whose path leads to a file, or to a folder, once columns behind it
    are taken away.
    """
    if quoted := _QUOTED.search(path):
        shorter, columns = path[: quoted.start()] + quoted[1].replace('""', '"'), quoted[2]
        if os.path.isabs(quoted[1]):
            shorter = quoted[1].replace('""', '"')
    else:
        shorter, columns = path, ""
        while not os.path.exists(shorter) and (column := _COLUMN.search(shorter)):
            shorter, columns = shorter[: column.start()], f"{column[0]}{columns}"
    if not columns or not os.path.exists(shorter):
        return ""
    # a number in its place was the end of a longer line
    if label != -1 or _NUMBER.fullmatch(columns):
        columns = f"{columns} {label}"
    columns, word = printable(columns.strip()), _WORD.fullmatch(columns)
    if os.path.isdir(shorter):
        is_frames = re.fullmatch(r"[-+0-9 \t,]+", columns)
        return (
            f"`{columns}` stands behind the folder {printable(shorter)}; {NO_FRAMES}"
            if is_frames
            else ""
        )
    if label == -1 and word:
        return NO_INTEGER.format(printable(word[1]))
    return (
        f"`{columns}` stands behind {printable(shorter)}, where one label is expected; set data.list_format to what the columns are "
        "(frames_label, start_frames, header), or write lines `PATH LABEL`"
    )


def printable(text: str) -> str:
    """A path for a message: one line, not too long, nothing that moves a terminal's cursor."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: SHOWN + 1])
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def class_names(data: SourceConfig) -> tuple[str, ...]:
    """The names of the labels 0, 1, ... where data.source is a folder with a folder per class, or
    was packed from one; else none.
    """
    if is_packed(data.source):
        return tuple(read_manifest(data.source)["class_names"])
    source = Path(data.source)
    if not source.is_dir():
        return ()
    return tuple(one_line(name) for name in _class_folders(source))


def _class_folders(source: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in source.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )


def _read_list(source: Path, data: SourceConfig, key: str) -> Named:
    if data.root and not Path(data.root).is_dir():
        raise FileNotFoundError(
            f"{key}.root: no such folder: {data.root}, relative paths of {source} start there"
        )
    folder = os.path.join(data.root or source.parent, "")
    layout = find_layout(
        source, data.list_format, lambda path: is_regular(os.path.join(folder, path))
    )
    entries = (
        Entry(number, path if path.startswith(os.sep) else folder + path, label, mistake)
        for number, path, label, mistake in read_lines(source, layout)
    )
    return Named(entries, (layout.note,) if layout.note else ())


def _read_folder(source: Path, classes: Sequence[str]) -> Named:
    found = [(path, label) for label, name in enumerate(classes) for path in _files(source / name)]
    found += [(path, -1) for path in _files(source, deep=False)]
    endings = Counter(_ending(path) for path, _ in found)
    wanted = _kind(source, endings)
    videos = [(path, label) for path, label in found if _ending(path) in wanted]
    left = _counted(
        Counter({ending: number for ending, number in endings.items() if ending not in wanted})
    )
    if not videos:
        raise ValueError(
            f"{source}: no videos in its folders, put files ({' '.join(EXTENSIONS)}) into a folder per class, or into it"
            + (f"; there are {left}" if left else "")
        )
    if classes and videos[-1][1] == -1:
        raise ValueError(
            f"{videos[-1][0]}: is in no class folder, move it into one of {source}, or write a list file"
        )
    notes = [f"{source}: files that are left out by their endings: {left}"] if left else []
    filled = {label for _, label in videos}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        notes.append(
            f"{source}: {len(empty)} of {len(classes)} classes have no videos, and keep their labels: {_few(empty)}"
        )
    return Named((Entry(0, path, label) for path, label in videos), tuple(notes))


def _kind(source: Path, endings: Iterable[str]) -> set[str]:
    """The endings of the files that are read of a folder which holds these: all are videos, or none
    is.
    """
    here = set(endings) & set(EXTENSIONS)
    videos, pictures = here & set(VIDEO_EXTENSIONS), here & set(STILLS)
    # what else lies there are thumbnails and features
    if videos and not (videos == {ANIMATION} and pictures):
        return videos
    here.discard(ANIMATION)
    if pictures and here != pictures:
        raise ValueError(
            f"{source}: holds pictures and arrays ({' '.join(sorted(here))}), name those to use in a list file"
        )
    return here


def _counted(endings: Counter[str]) -> str:
    return _few(
        [f"{number} {ending or 'without an ending'}" for ending, number in endings.most_common()]
    )


def _few(words: Sequence[str]) -> str:
    """Words for a line: the first of them, and how many more there are."""
    return ", ".join(
        [printable(word) for word in words[:TOLD]]
        + ([f"and {len(words) - TOLD} more"] if len(words) > TOLD else [])
    )


def _files(folder: Path, *, deep: bool = True) -> list[str]:
    """The files of a folder, sorted; not one of them is touched: there may be millions.

    Links to files are followed, and a class may itself be a link; links to folders further down are
    not, they may lead in circles.
    """
    found: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        found += [os.path.join(parent, name) for name in names]
        if not deep:
            folders.clear()
    return sorted(found, key=lambda path: path.split(os.sep))


def _refuse(error: OSError) -> None:
    raise ValueError(
        f"{error.filename}: the folder cannot be read ({error.strerror}), its videos would be missing"
    )


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _first_bad(paths: Paths) -> int | None:
    """The first path that does not lead to a regular file, None where there is none.

    Threads hide the latency of a network disk; where there is none to hide they only take the
    interpreter from each other.
    """
    left = np.flatnonzero(~_listed_as_regular(paths)).tolist()
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        waits = False
        for first in range(0, len(left), STAT_CHUNK):
            chunk = left[first : first + STAT_CHUNK]
            shares = (
                [chunk[offset::STAT_THREADS] for offset in range(STAT_THREADS)]
                if waits
                else [chunk]
            )
            begin, begin_cpu = time.perf_counter(), time.process_time()
            bad = [
                index
                for index in (pool.map if waits else map)(partial(_first_bad_of, paths), shares)
                if index is not None
            ]
            if bad:
                return min(bad)
            waits = time.perf_counter() - begin > 2 * (time.process_time() - begin_cpu)
    return None


def _first_bad_of(paths: Paths, indices: Sequence[int]) -> int | None:
    return next((i for i in indices if not is_regular(paths[i])), None)


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
        if number >= LISTED:
            regular.extend(
                hash(folder + name)
                for name in _regular_names(folder or os.curdir, number * LISTED_MORE)
            )
    return np.isin(np.array(hashes), np.array(regular))


def _regular_names(folder: str, most: int) -> Iterator[str]:
    """Regular files among the first names of a folder; none of one that cannot be listed, or whose
    files are the kernel's.
    """
    try:
        with os.scandir(folder) as entries:
            names = [
                entry.name
                for entry in islice(entries, most)
                if entry.is_file(follow_symlinks=False)
            ]
    except (OSError, ValueError):
        return iter(())
    return iter(names if names and is_regular(os.path.join(folder, names[0])) else ())
