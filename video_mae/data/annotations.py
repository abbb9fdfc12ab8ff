"""Which videos there are: list files and folders of classes, checked line by line before anything else starts."""

import os
import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths

from video_mae.config.data import SourceConfig
from video_mae.decoding import READERS, VIDEO_EXTENSIONS, stills

EXTENSIONS = (*VIDEO_EXTENSIONS, *READERS)
STAT_THREADS = 16


def read_annotations(data: SourceConfig, key: str = "data") -> LabeledVideoPaths:
    """Reads data.source into pytorchvideo's list of (path, label); a video without a label has -1.

    A list file has lines `PATH LABEL`: the path may contain spaces, blank lines do not count, relative paths start at data.root or at
    the folder of the list. A folder has a folder per class (`class_names` gives their order), searched to any depth, or files without
    labels; all are videos, or none is. `key` is what the user calls `data`.
    Raises: FileNotFoundError or ValueError with one line, `LIST:LINE: what, remedy`.
    """
    source = Path(data.source)
    if data.source == "":
        raise ValueError(f"{key}.source: (empty), name a list file with lines `PATH LABEL` or a folder with a folder per class")
    if source.is_dir():
        return LabeledVideoPaths(_read_folder(source, class_names(data)))
    if source.is_file():
        return LabeledVideoPaths(_read_list(source, data.root, key))
    raise FileNotFoundError(f"{key}.source: no such list file or folder: {source}, check the path (this program runs in {Path.cwd()})")


def class_names(data: SourceConfig) -> tuple[str, ...]:
    """The names of the labels 0, 1, ... where data.source is a folder with a folder per class; of a list file there are none."""
    source = Path(data.source)
    if not source.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in source.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _read_list(source: Path, root: str, key: str) -> list[tuple[str, int | None]]:
    if root and not Path(root).is_dir():
        raise FileNotFoundError(f"{key}.root: no such folder: {root}, relative paths of {source} start there")
    folder = root or str(source.parent)
    lines = source.read_bytes().split(b"\n")
    videos: list[tuple[str, int | None]] = []
    places: list[str] = []
    for number, raw in enumerate(lines, start=1):
        place = f"{source}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{place}: the line is not UTF-8, save the list as UTF-8 text") from None
        if line:
            path, label = _split(line)
            videos.append((os.path.join(folder, path), label))
            places.append(place)
    if not videos:
        raise ValueError(f"{source}: the list is empty, write lines `PATH LABEL` into it")
    _check_files(videos, places)
    return videos


def _split(line: str) -> tuple[str, int]:
    path, _, label = line.replace("\t", " ").rpartition(" ")
    if path and re.fullmatch(r"[+-]?[0-9]{1,18}", label):
        return line[: len(path)].rstrip(), int(label)
    return line, -1


def _read_folder(source: Path, classes: Sequence[str]) -> list[tuple[str, int | None]]:
    labelled = [(path, label) for label, name in enumerate(classes) for path in _readable(source / name)]
    stray = [(path, -1) for path in _readable(source, deep=False)]
    videos: list[tuple[str, int | None]] = [*labelled, *stray]
    endings = {_ending(path) for path, _ in videos}
    if endings & set(VIDEO_EXTENSIONS):  # what else lies there are thumbnails and features
        videos = [(path, label) for path, label in videos if _ending(path) in VIDEO_EXTENSIONS]
    elif endings & set(stills.EXTENSIONS) and endings - set(stills.EXTENSIONS):
        raise ValueError(f"{source}: holds pictures and arrays ({' '.join(sorted(endings))}), name those to use in a list file")
    if not videos:
        raise ValueError(f"{source}: no videos in its folders, put files ({' '.join(EXTENSIONS)}) into a folder per class, or into it")
    if classes and videos[-1][1] == -1:
        raise ValueError(f"{videos[-1][0]}: is in no class folder, move it into one of {source}, or write a list file")
    _check_files(videos, [str(source)] * len(videos))
    return videos


def _readable(folder: Path, *, deep: bool = True) -> list[str]:
    """The files of a folder that some reader takes by their name, sorted; not one of them is touched: there may be millions."""
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        found += [os.path.join(parent, name) for name in names if _ending(name) in EXTENSIONS]
        if not deep:
            folders.clear()
    return sorted(found, key=lambda path: path.split(os.sep))


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _check_files(videos: Sequence[tuple[str, int | None]], places: Sequence[str]) -> None:
    """Raises for the first path that is not a regular file; threads hide the latency of a network disk."""

    def first_bad(offset: int) -> int:
        return next((i for i in range(offset, len(videos), STAT_THREADS) if not _is_regular(videos[i][0])), len(videos))

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        bad = min(pool.map(first_bad, range(STAT_THREADS)))
    if bad == len(videos):
        return
    path, label = videos[bad]
    if Path(path).is_dir():
        raise ValueError(f"{places[bad]}: {path} is a folder, name a video file")
    if os.path.exists(path):
        raise ValueError(f"{places[bad]}: {path} is not a regular file, name a video file")
    shorter, _, word = path.replace("\t", " ").rpartition(" ")
    if label == -1 and _is_regular(path[: len(shorter)].rstrip()):
        raise ValueError(f"{places[bad]}: the label `{word}` is not an integer, number the classes from 0")
    raise FileNotFoundError(f"{places[bad]}: no such file: {path}, correct the path or data.root")


def _is_regular(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return False
