"""A list of videos that all have a label, with classes that agree with those of a model."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from video_mae.config.data import ListFormat, SourceConfig
from video_mae.data.annotations import class_names, read_annotations
from video_mae.data.videos import Places, VideoList
from video_mae.files import read_text

CLASS_FILE = "classes.txt"


@dataclass(frozen=True)
class LabeledVideos:
    """Videos that all have a label, in the order of the list; names of the classes 0, 1, ..., empty
    where nobody names them.
    """

    videos: VideoList
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def paths(self) -> Places:
        return self.videos.places

    @cached_property
    def labels(self) -> tuple[int, ...]:
        return tuple(self.videos.label_M.tolist())

    @property
    def num_classes(self) -> int:
        """As many as have names, or as the largest label tells."""
        return len(self.class_names) or int(self.videos.label_M.max()) + 1


def read_labeled(
    what: str,
    source: str,
    root: str = "",
    num_classes: int | None = None,
    names: Sequence[str] = (),
    list_format: ListFormat = "auto",
) -> LabeledVideos:
    """Reads a list or a folder of classes (as `read_annotations`) whose every video has a label
    below num_classes.

    what: how error messages call the source. names: those of the model's classes. A folder of
    classes is matched to them by name, and may lack some; a list is numbered like the classes.txt
    beside it, where there is one, which must be the same.
    Raises: FileNotFoundError or ValueError with one line: a list that is empty, a video without a
    label, a label out of range, classes that do not match.
    """
    data = SourceConfig(source=source, root=root, list_format=list_format)
    try:
        videos = read_annotations(data)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(
            str(error).replace("data.source", what).replace("data.root", "root")
        ) from None
    from_folder, found = class_names(data), class_file(Path(source))
    if from_folder and names:
        there = np.unique(videos.label_M)
        number_of = np.array(
            [
                _number(from_folder[label], names, source) if label >= 0 else label
                for label in there.tolist()
            ]
        )
        videos = videos.labelled(number_of[np.searchsorted(there, videos.label_M)])
    elif from_folder or found:
        found = from_folder or found
        _check_names(
            found,
            names,
            num_classes,
            source if from_folder else str(Path(source).parent / CLASS_FILE),
        )
    names = tuple(names) or found
    limit = len(names) or num_classes
    wrong_M = (videos.label_M < 0) | (videos.label_M >= (2**63 - 1 if limit is None else limit))
    if wrong_M.any():
        path, info = videos[int(wrong_M.argmax())]
        label = info["label"]
        if label >= 0:
            raise ValueError(
                f"{what}: {path} has the label {label}, there are {limit} classes (0 to {(limit or 0) - 1}); correct {source}"
            )
        raise ValueError(
            f"{what}: {path} has "
            + (
                f"the label {label}, number the classes from 0"
                if label < -1
                else f"no label in {source}, write lines `PATH LABEL`"
            )
        )
    return LabeledVideos(videos, names)


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
    raise ValueError(
        f"{source}: the folder {name} is none of the model's {len(names)} classes"
        + (f" (did you mean {near[0]}?)" if near else f" ({', '.join(names[:3])}, ...)")
        + ", rename or remove it"
    )


def _check_names(
    found: Sequence[str], names: Sequence[str], num_classes: int | None, where: str
) -> None:
    expected = len(names) or num_classes
    if expected is not None and len(found) != expected:
        raise ValueError(
            f"{where}: names {len(found)} classes, the model has {expected}; give it the classes that it was trained with"
        )
    for label, (ours, theirs) in enumerate(zip(found, names or found, strict=True)):
        if ours != theirs:
            raise ValueError(
                f"{where}: class {label} is {ours}, the model calls it {theirs}; give it the classes that it was trained with"
            )
