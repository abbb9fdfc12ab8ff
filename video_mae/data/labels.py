"""A list of videos that all have a label, with classes that agree with those of a model."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pytorchvideo.data.labeled_video_paths import LabeledVideoPaths

from video_mae.config import DataConfig
from video_mae.data.annotations import class_names, read_annotations
from video_mae.data.shards import Members, PackedVideos
from video_mae.decoding import Place
from video_mae.text import read_text

CLASS_FILE = "classes.txt"


@dataclass(frozen=True)
class LabeledVideos:
    """Paths and labels in the order of the list; names of the classes 0, 1, ..., empty where nobody names them."""

    paths: Sequence[Place]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """As many as have names, or as the largest label tells."""
        return len(self.class_names) or max(self.labels) + 1

    def as_paths(self) -> LabeledVideoPaths:
        """The list as pytorchvideo's, which datasets take."""
        if isinstance(self.paths, Members):
            return PackedVideos(self.paths, np.array(self.labels))
        return LabeledVideoPaths(list(zip(self.paths, self.labels, strict=True)))  # pyright: ignore[reportArgumentType]


def read_labeled(what: str, source: str, root: str = "", num_classes: int | None = None, names: Sequence[str] = ()) -> LabeledVideos:
    """Reads a list or a folder of classes (as `read_annotations`) whose every video has a label below num_classes.

    what: how error messages call the source. names: those of the model's classes. A folder of classes is matched to them by name, and
    may lack some; a list is numbered like the classes.txt beside it, where there is one, which must be the same.
    Raises: FileNotFoundError or ValueError with one line: a list that is empty, a video without a label, a label out of range, classes
    that do not match.
    """
    data = DataConfig(source=source, root=root)
    try:
        videos = read_annotations(data)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("data.source", what).replace("data.root", "root")) from None
    if isinstance(videos, PackedVideos):
        paths, labels = videos.members, tuple(videos.label_M.tolist())
    else:
        paths, labels = zip(*((path, info["label"]) for path, info in videos), strict=True)  # pyright: ignore[reportIndexIssue]
    from_folder, found = class_names(data), class_file(Path(source))
    if from_folder and names:
        number_of = {label: _number(from_folder[label], names, source) for label in set(labels) if label >= 0}
        labels = tuple(number_of[label] if label >= 0 else label for label in labels)
    elif from_folder or found:
        found = from_folder or found
        _check_names(found, names, num_classes, source if from_folder else str(Path(source).parent / CLASS_FILE))
    names = tuple(names) or found
    limit = len(names) or num_classes
    for path, label in zip(paths, labels, strict=True):
        if label < 0:
            raise ValueError(f"{what}: {path} has " + (f"the label {label}, number the classes from 0" if label < -1 else
                             f"no label in {source}, write lines `PATH LABEL`"))
        if limit is not None and label >= limit:
            raise ValueError(f"{what}: {path} has the label {label}, there are {limit} classes (0 to {limit - 1}); correct {source}")
    return LabeledVideos(paths, labels, names)


def class_file(source: Path) -> tuple[str, ...]:
    """The names in the classes.txt beside a list, where there is one."""
    file = source.parent / CLASS_FILE
    if source.is_dir() or not file.is_file():
        return ()
    return tuple(line.strip() for line in read_text(file).split("\n") if line.strip())


def _number(name: str, names: Sequence[str], source: str) -> int:
    if name in names:
        return list(names).index(name)
    near = difflib.get_close_matches(name, names, n=1)
    raise ValueError(f"{source}: the folder {name} is none of the model's {len(names)} classes" + (f" (did you mean {near[0]}?)" if near
                     else f" ({', '.join(names[:3])}, ...)") + ", rename or remove it")


def _check_names(found: Sequence[str], names: Sequence[str], num_classes: int | None, where: str) -> None:
    expected = len(names) or num_classes
    if expected is not None and len(found) != expected:
        raise ValueError(f"{where}: names {len(found)} classes, the model has {expected}; give it the classes that it was trained with")
    for label, (ours, theirs) in enumerate(zip(found, names or found, strict=True)):
        if ours != theirs:
            raise ValueError(f"{where}: class {label} is {ours}, the model calls it {theirs}; give it the classes that it was trained with")
