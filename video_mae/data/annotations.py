"""Which videos there are: list files and folders of classes, checked file by file before anything else starts."""

import os
import re
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths

from video_mae.config.data import SourceConfig
from video_mae.data.lists import read_lines
from video_mae.data.shards import is_packed, read_manifest, read_packed
from video_mae.decoding import READERS, VIDEO_EXTENSIONS, stills
from video_mae.decoding.containers import is_regular
from video_mae.text import one_line

EXTENSIONS = (*VIDEO_EXTENSIONS, *READERS)
STAT_THREADS, STAT_CHUNK = 16, 2000
SHOWN = 300  # characters of a path in a message
_URL = re.compile(r"(?:^|/)((?:[a-z][a-z0-9+.-]*://|(?:async|cache|concat|crypto|data|file|pipe|subfile)[:,]).*)", re.IGNORECASE)
"""What FFmpeg would take for something else than a local file."""


class Entry(NamedTuple):
    """A file that a list or folder names: its line (0: no list), its path and label (-1: none), and what is wrong with it ("": nothing)."""

    number: int
    path: str
    label: int
    mistake: str = ""


class VideoPaths(LabeledVideoPaths):
    """Paths and labels in the bytes that they take.

    pytorchvideo keeps a tuple for each, 250 bytes; and where workers fork, each copies all it touches, as Python counts references.
    """

    def __init__(self) -> None:
        super().__init__([])
        self._text, self._ends, self._labels = bytearray(), array("q"), array("q")

    def append(self, path: str, label: int) -> None:
        """Adds a video."""
        self._text += os.fsencode(path)
        self._ends.append(len(self._text))
        self._labels.append(label)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[str, dict[str, int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(path, {"label": label}): pytorchvideo annotates another type than it returns."""
        index = range(len(self._labels))[index]
        return os.path.join(self._path_prefix, self._path(index)), {"label": self._labels[index]}

    def _path(self, index: int) -> str:
        return os.fsdecode(bytes(self._text[self._ends[index - 1] if index else 0: self._ends[index]]))


def read_annotations(data: SourceConfig, key: str = "data") -> LabeledVideoPaths:
    """Reads data.source into a list of (path, label) like pytorchvideo's; a video without a label has -1.

    A list file has lines as `read_lines` reads them; relative paths start at data.root or at the folder of the list. A folder has a
    folder per class (`class_names` gives their order), searched to any depth, or files without labels; all are videos, or none is.
    `key` is what the user calls `data`. A packed folder, or the URL of one, gives (Member, label): see `read_packed`.
    Every path must lead to a regular file, through links and `..` as well, wherever that is: data sets are made of links. Devices, pipes,
    sockets, files of the kernel (/proc, /sys), folders, URLs, links in circles or to nothing are refused. A video may be named twice.
    Raises: FileNotFoundError or ValueError with one line, `LIST:LINE: what, remedy`.
    """
    if is_packed(data.source):
        return read_packed(data.source, f"{key}.source")
    videos, numbers = VideoPaths(), array("q")
    for entry in read_entries(data, key):
        if entry.mistake:
            raise ValueError(f"{place(data.source, entry.number)}: {entry.mistake}")
        videos.append(entry.path, entry.label)
        numbers.append(entry.number)
    if not len(videos):
        raise ValueError(f"{data.source}: the list is empty, write lines `PATH LABEL` into it")
    bad = _first_bad(videos)
    if bad < len(videos):
        path, info = videos[bad]
        error, mistake = file_mistake(path, info["label"])
        raise error(f"{place(data.source, numbers[bad])}: {mistake}")
    return videos


def place(source: str, number: int) -> str:
    """Where a list or a folder names a file, for messages."""
    return f"{source}:{number}" if number else source


def read_entries(data: SourceConfig, key: str = "data") -> Iterator[Entry]:
    """What a list or folder names, in its order; no file is touched, and a line that is wrong is an entry with a mistake.

    Raises: FileNotFoundError or ValueError where there is no such source, or a folder has no files that fit.
    """
    source = Path(data.source)
    if data.source == "":
        raise ValueError(f"{key}.source: (empty), name a list file with lines `PATH LABEL` or a folder with a folder per class")
    if source.is_dir():
        return _read_folder(source, _class_folders(source))
    if source.is_file():
        return _read_list(source, data.root, key)
    raise FileNotFoundError(f"{key}.source: no such list file or folder: {source}, check the path (this program runs in {Path.cwd()})")


def file_mistake(path: str, label: int = -1) -> tuple[type[ValueError | FileNotFoundError], str]:
    """The error that a path which leads to no regular file deserves, and its one line; an empty one for others."""
    if is_regular(path):
        return ValueError, ""
    shown = printable(path)
    if os.path.isdir(path):
        return ValueError, f"{shown} is a folder, name a video file"
    if os.path.exists(path):
        return ValueError, f"{shown} is not a regular file, name a video file"
    if url := _URL.search(path):
        return ValueError, f"{printable(url[1])} is no local file, and only those are opened: download it"
    shorter, _, word = path.replace("\t", " ").rpartition(" ")
    if label == -1 and is_regular(path[: len(shorter)].rstrip()):
        return ValueError, f"the label `{printable(word)}` is not an integer, number the classes from 0"
    if os.path.islink(path):
        return FileNotFoundError, f"{shown} is a link that leads to no file, correct it"
    return FileNotFoundError, f"no such file: {shown}, correct the path or data.root"


def printable(text: str) -> str:
    """A path for a message: one line, not too long, nothing that moves a terminal's cursor."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text[:SHOWN + 1])
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def class_names(data: SourceConfig) -> tuple[str, ...]:
    """The names of the labels 0, 1, ... where data.source is a folder with a folder per class, or was packed from one; else none."""
    if is_packed(data.source):
        return tuple(read_manifest(data.source)["class_names"])
    source = Path(data.source)
    if not source.is_dir():
        return ()
    return tuple(one_line(name) for name in _class_folders(source))


def _class_folders(source: Path) -> list[str]:
    return sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_list(source: Path, root: str, key: str) -> Iterator[Entry]:
    if root and not Path(root).is_dir():
        raise FileNotFoundError(f"{key}.root: no such folder: {root}, relative paths of {source} start there")
    folder = root or str(source.parent)
    return (Entry(number, os.path.join(folder, path), label, mistake) for number, path, label, mistake in read_lines(source))


def _read_folder(source: Path, classes: Sequence[str]) -> Iterator[Entry]:
    labelled = [(path, label) for label, name in enumerate(classes) for path in _readable(source / name)]
    stray = [(path, -1) for path in _readable(source, deep=False)]
    videos = [*labelled, *stray]
    endings = {_ending(path) for path, _ in videos}
    if endings & set(VIDEO_EXTENSIONS):  # what else lies there are thumbnails and features
        videos = [(path, label) for path, label in videos if _ending(path) in VIDEO_EXTENSIONS]
    elif endings & set(stills.EXTENSIONS) and endings - set(stills.EXTENSIONS):
        raise ValueError(f"{source}: holds pictures and arrays ({' '.join(sorted(endings))}), name those to use in a list file")
    if not videos:
        raise ValueError(f"{source}: no videos in its folders, put files ({' '.join(EXTENSIONS)}) into a folder per class, or into it")
    if classes and videos[-1][1] == -1:
        raise ValueError(f"{videos[-1][0]}: is in no class folder, move it into one of {source}, or write a list file")
    return (Entry(0, path, label) for path, label in videos)


def _readable(folder: Path, *, deep: bool = True) -> list[str]:
    """The files of a folder that some reader takes by their name, sorted; not one of them is touched: there may be millions.

    Links to files are followed, and a class may itself be a link; links to folders further down are not, they may lead in circles.
    """
    found: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=_refuse):
        found += [os.path.join(parent, name) for name in names if _ending(name) in EXTENSIONS]
        if not deep:
            folders.clear()
    return sorted(found, key=lambda path: path.split(os.sep))


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: the folder cannot be read ({error.strerror}), its videos would be missing")


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _first_bad(videos: VideoPaths) -> int:
    """The first path that does not lead to a regular file, or as many as there are.

    Threads hide the latency of a network disk; where there is none to hide they only take the interpreter from each other.
    """
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        waits = False
        for first in range(0, len(videos), STAT_CHUNK):
            chunk = range(first, min(first + STAT_CHUNK, len(videos)))
            shares = [chunk[offset::STAT_THREADS] for offset in range(STAT_THREADS)] if waits else [chunk]
            begin, begin_cpu = time.perf_counter(), time.process_time()
            bad = min((pool.map if waits else map)(partial(_first_bad_of, videos), shares))
            if bad < len(videos):
                return bad
            waits = time.perf_counter() - begin > 2 * (time.process_time() - begin_cpu)
    return len(videos)


def _first_bad_of(videos: VideoPaths, indices: Sequence[int]) -> int:
    return next((i for i in indices if not is_regular(videos[i][0])), len(videos))
