"""Which videos, with which labels and classes: of a list file, a folder of classes, or a packed
folder, checked file by file before anything else starts.

M videos.
"""

import difflib
import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_mae.config import ClassifierConfig, FinetuneConfig
from video_mae.config.data import ListFormat, SourceConfig
from video_mae.data.lists import Line, read_list
from video_mae.data.paths import Paths, file_mistake, first_bad, printable, repetitions
from video_mae.data.shards import Members, is_packed, read_packed
from video_mae.decoding import ANIMATION, READERS, VIDEO_EXTENSIONS
from video_mae.decoding.pictures import STILLS
from video_mae.files import one_line, read_text

EXTENSIONS = (*VIDEO_EXTENSIONS, *READERS)
CLASS_FILE = "classes.txt"
FEATURES = "extract.json"
"""The file of a folder of features, of an earlier prediction as well: such a folder is no class."""
NO_LINES = "the list is empty, write lines `PATH LABEL` into it"
TOLD = 8  # endings and classes that a note names


@dataclass(frozen=True, eq=False)
class VideoList(Sequence[tuple[Any, dict[str, int]]]):
    """Videos and their labels: videos[index] is (place, {"label": label}) as in pytorchvideo's
    LabeledVideoPaths; -1 is no label.

    notes: what is to be told about where they come from, each a line. class_names: of the labels 0,
    1, ..., empty where nobody names them.
    """

    paths: Paths | Members
    label_M: NDArray[np.int64]
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, dict[str, int]]:  # pyright: ignore[reportIncompatibleMethodOverride]  (no slices)
        return self.paths[index], {"label": int(self.label_M[index])}

    @property
    def num_classes(self) -> int:
        """As many as have names, or as the largest label tells."""
        return len(self.class_names) or int(self.label_M.max()) + 1

    def digest(self) -> str:
        """Of all places and labels in their order: another for another list, whatever its name."""
        return hashlib.sha256(self.paths.digest + self.label_M.tobytes()).hexdigest()


def read_annotations(
    data: SourceConfig, what: str = "data.source", *, resumed: bool = False
) -> VideoList:
    """The videos of data.source; one without a label has -1.

    A list file has lines as `read_list` reads them, or as data.list_format says; relative paths
    start at data.root or at the folder of the list. A folder has a folder per class, sorted by
    name, searched to any depth; files beside those have no label; all are videos, or none is. What
    is hidden (.NAME) is passed over, and folders of features. A file that a folder would give is
    itself the only one. The notes of the result tell what a folder holds besides. `what` is what
    the user calls data.source. A packed folder, or the URL of one, gives Members: see
    `read_packed`. Every path must lead to a regular file, through links as well, wherever that is:
    data sets are made of links; through `..` out of the folder of the list only where data.root is
    given. Devices, pipes, sockets, files of the kernel (/proc, /sys), folders, URLs, links in
    circles or to nothing are refused. A video may be named twice. resumed: for a run that has
    read it before, to which a file that is gone since is a bad one, as if it had gone while it ran.
    Raises: FileNotFoundError or ValueError with one line, `LIST:LINE: what, remedy`.
    """
    if is_packed(data.source):
        members, label_M, names = read_packed(data.source, what)
        return VideoList(members, label_M, class_names=names)
    paths, labels, numbers = Paths(), array("q"), array("q")
    lines, notes, names = read_entries(data, what)
    for number, path, label, mistake in lines:
        if mistake:
            raise ValueError(f"{place(data.source, number)}: {mistake}")
        paths.append(path)
        labels.append(label)
        numbers.append(number)
    if not len(paths):
        raise ValueError(f"{data.source}: {NO_LINES}")
    notes = (*notes, *repetitions(data.source, paths))
    bad = first_bad(paths)
    if bad is not None:
        error, mistake = file_mistake(paths[bad], labels[bad])
        mistake = f"{place(data.source, numbers[bad])}: {mistake}"
        if not (resumed and error is FileNotFoundError):
            raise error(mistake)
        notes = (*notes, f"{mistake}; this run has read it before: what is gone counts as bad")
    return VideoList(paths, np.array(labels), notes, names)


def place(source: str, number: int) -> str:
    """Where a list or a folder names a file, for messages."""
    return f"{source}:{number}" if number else source


def read_entries(
    data: SourceConfig, what: str
) -> tuple[Iterator[Line], tuple[str, ...], tuple[str, ...]]:
    """What a list or folder names, in its order; what is to be told about it; and the names of the
    labels 0, 1, ... where it is a folder with a folder per class. No file is touched but the first
    of a list, and a line that is wrong is a Line with a mistake.

    Raises: FileNotFoundError or ValueError where there is no such source, or a folder has no files
    that fit.
    """
    source = Path(data.source)
    if data.source == "":
        raise ValueError(
            f"{what}: (empty), name a list file with lines `PATH LABEL` or a folder with a "
            "folder per class"
        )
    if source.is_dir():
        return _read_folder(source)
    if not source.is_file():
        raise FileNotFoundError(
            f"{what}: no such list file or folder: {source}, check the path (this program "
            f"runs in {Path.cwd()})"
        )
    if _ending(data.source) in EXTENSIONS:
        return iter([Line(0, data.source)]), (), ()
    if data.root and not Path(data.root).is_dir():
        raise FileNotFoundError(
            f"{re.sub('source$', 'root', what)}: no such folder: {data.root}, relative paths of "
            f"{source} start there"
        )
    folder = os.path.join(data.root or source.parent, "")
    # a list by itself names what lies beside it: who makes a list need not be who reads it
    return *read_list(source, data.list_format, folder, may_climb=data.root != ""), ()


def read_lines(data: SourceConfig) -> tuple[list[Line], tuple[str, ...], tuple[str, ...]]:
    """All that a list, a folder or a packed folder names, as `read_entries` reads it, good or bad;
    what is to be told about it; and the names of the classes, those of a classes.txt beside a list
    as well.

    Raises: as `read_entries`, and ValueError where nothing is named.
    """
    if is_packed(data.source):
        members, label_M, names = read_packed(data.source, "data.source")
        pairs = zip(members, label_M.tolist(), strict=True)
        return [Line(number, *pair) for number, pair in enumerate(pairs, start=1)], (), names
    entries, notes, names = read_entries(data, "data.source")
    lines = list(entries)
    if not lines:
        raise ValueError(f"{data.source}: {NO_LINES}")
    return lines, notes, names or class_file(Path(data.source))


def _read_folder(source: Path) -> tuple[Iterator[Line], tuple[str, ...], tuple[str, ...]]:
    entries = sorted(os.scandir(source), key=lambda entry: entry.name)
    classes = [
        entry.name
        for entry in entries
        if entry.is_dir() and entry.name[0] != "." and not (source / entry.name / FEATURES).exists()
    ]
    found = [
        Line(0, path, label) for label, name in enumerate(classes) for path in _files(source / name)
    ]
    found += [Line(0, entry.path) for entry in entries if not entry.is_dir()]
    found = [line for line in found if "/." not in line.path.removeprefix(str(source))]
    endings = Counter(_ending(line.path) for line in found)
    wanted = _wanted(source, set(endings))
    videos = [line for line in found if _ending(line.path) in wanted]
    left = _few(
        f"{number} {ending or 'without an ending'}"
        for ending, number in endings.most_common()
        if ending not in wanted
    )
    if not videos:
        raise ValueError(
            f"{source}: no videos in its folders, put files ({' '.join(EXTENSIONS)}) into a folder "
            "per class, or into it" + (f"; there are {left}" if left else "")
        )
    notes = [f"{source}: files that are left out by their endings: {left}"] if left else []
    if classes and videos[-1].label == -1:
        notes.append(f"{source}: what is in no class folder has no label: {videos[-1].path}")
    filled = {line.label for line in videos}
    empty = [name for label, name in enumerate(classes) if label not in filled]
    if empty:
        notes.append(
            f"{source}: {len(empty)} of {len(classes)} classes have no videos, and keep their "
            f"labels: {_few(empty)}"
        )
    return iter(videos), tuple(notes), tuple(map(one_line, classes))


def _wanted(source: Path, endings: set[str]) -> set[str]:
    """The endings of the files that are read of a folder which holds these: all are videos, or none
    is.
    """
    here = endings.intersection(EXTENSIONS)
    videos, pictures = here.intersection(VIDEO_EXTENSIONS), here.intersection(STILLS)
    # what else lies there are thumbnails and features
    if videos and not (videos == {ANIMATION} and pictures):
        return videos
    here.discard(ANIMATION)
    if pictures and here != pictures:
        raise ValueError(
            f"{source}: holds pictures and arrays ({' '.join(sorted(here))}), name those to use in "
            "a list file"
        )
    return here


def _few(words: Iterable[str]) -> str:
    """Words for a line: the first of them, and how many more there are."""
    shown = [printable(word) for word in words]
    if len(shown) > TOLD:
        shown[TOLD:] = [f"and {len(shown) - TOLD} more"]
    return ", ".join(shown)


def _files(folder: Path) -> list[str]:
    """The files below a folder, sorted; not one of them is touched: there may be millions.

    Links to files are followed, and a class may itself be a link; links to folders further down are
    not, they may lead in circles.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(
            f"{error.filename}: the folder cannot be read ({error.strerror}), its videos would be "
            "missing"
        )

    found: list[str] = []
    for parent, _, names in os.walk(folder, onerror=refuse):
        found += [os.path.join(parent, name) for name in names]
    return sorted(found, key=lambda path: path.split(os.sep))


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def class_file(source: Path) -> tuple[str, ...]:
    """The names in the classes.txt beside a list, where there is one."""
    file = source.parent / CLASS_FILE
    if source.is_dir() or not file.is_file():
        return ()
    return tuple(line.strip() for line in read_text(file).split("\n") if line.strip())


def read_labeled(
    what: str,
    source: str,
    root: str = "",
    num_classes: int | None = None,
    names: Sequence[str] = (),
    list_format: ListFormat = "auto",
    *,
    resumed: bool = False,
) -> VideoList:
    """Reads a list or a folder of classes (as `read_annotations`) whose every video has a label
    below num_classes.

    what: how error messages call the source. names: those of the model's classes. A folder of
    classes is matched to them by name, and may lack some; a list is numbered like the classes.txt
    beside it, where there is one, which must be the same.
    Raises: FileNotFoundError or ValueError with one line: a list that is empty, a video without a
    label, a label out of range, classes that do not match.
    """
    data = SourceConfig(source=source, root=root, list_format=list_format)
    videos = read_annotations(data, what, resumed=resumed)
    found, where = videos.class_names, source
    if found and names:
        there, place_M = np.unique(videos.label_M, return_inverse=True)
        numbers = [
            _number(found[label], names, source) if label >= 0 else label
            for label in there.tolist()
        ]
        videos = replace(videos, label_M=np.array(numbers)[place_M])
    else:
        if not found:
            found, where = class_file(Path(source)), str(Path(source).parent / CLASS_FILE)
        remedy = "give it the classes that it was trained with"
        num, expected = len(found), len(names) or num_classes or len(found)
        if found and num != expected:
            raise ValueError(f"{where}: names {num} classes, the model has {expected}; {remedy}")
        for label, (ours, theirs) in enumerate(zip(found, names or found, strict=False)):
            if ours != theirs:
                raise ValueError(
                    f"{where}: class {label} is {ours}, the model calls it {theirs}; {remedy}"
                )
    names = tuple(names) or found
    limit = len(names) or num_classes or 2**63 - 1
    wrong_M = (videos.label_M < 0) | (videos.label_M >= limit)
    if wrong_M.any():
        path, info = videos[int(wrong_M.argmax())]
        label = info["label"]
        reason = f"no label in {source}, write lines `PATH LABEL`, or put it into a class folder"
        if label < -1:
            reason = f"the label {label}, number the classes from 0"
        elif label >= 0:
            reason = (
                f"the label {label}, there are {limit} classes (0 to {limit - 1}); correct {source}"
            )
        raise ValueError(f"{what}: {path} has {reason}")
    return replace(videos, class_names=names)


def _number(name: str, names: Sequence[str], source: str) -> int:
    if name in names:
        return names.index(name)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"{', '.join(names[:3])}, ..."
    raise ValueError(
        f"{source}: the folder {name} is none of the model's {len(names)} classes ({hint}), rename "
        "or remove it"
    )


def read_training_videos(config: FinetuneConfig) -> tuple[VideoList, ClassifierConfig]:
    """The training list with every label checked, and the head with the number and the names of its
    classes, where anybody names them: a folder of classes, a classes.txt, or the folders that the
    videos of a list lie in, where those of each class share one.

    Raises: ValueError or FileNotFoundError with one line that names the list or key, and the
    remedy.
    """
    data, classifier = config.data, config.classifier
    videos = read_labeled(
        "data.source",
        data.source,
        data.root,
        names=classifier.class_names,
        list_format=data.list_format,
        resumed=config.has_begun,
    )
    known, num = len(videos.class_names), classifier.num_classes or videos.num_classes
    if known and known != num:
        raise ValueError(
            f"classifier.num_classes: {num} is not the number of classes that {data.source} has "
            f"names for; set classifier.num_classes={known}"
        )
    if videos.num_classes > num:
        path, info = videos[int(videos.label_M.argmax())]
        raise ValueError(
            f"data.source: {path} has the label {info['label']}, classifier.num_classes = {num} "
            f"allows 0 to {num - 1}; correct {data.source}, or set "
            f"classifier.num_classes={videos.num_classes}"
        )
    names, notes = videos.class_names, videos.notes
    if videos.num_classes < num:
        notes += (
            f"{data.source}: has the labels 0 to {videos.num_classes - 1} alone, and "
            f"classifier.num_classes = {num} outputs are trained; null has as many as there are",
        )
    elif not names:
        names = _folders_of_classes(videos)
    return replace(videos, notes=notes), replace(classifier, num_classes=num, class_names=names)


def _folders_of_classes(videos: VideoList) -> tuple[str, ...]:
    """The names of the folders in which the videos of each class lie; none where two lie in one, or
    one in two.
    """
    folders = {
        (label, Path(str(path)).parent.name)
        for label, path in zip(videos.label_M.tolist(), videos.paths, strict=True)
    }
    names = [name for _, name in sorted(folders)]
    is_named = len(names) == videos.num_classes == len(set(names)) > 1
    return tuple(map(one_line, names)) if is_named else ()


def read_validation_videos(config: FinetuneConfig) -> VideoList:
    """The validation list, every label checked against the classes of config.classifier. Raises: as
    `read_training_videos`.
    """
    classifier, validation = config.classifier, config.validation
    return read_labeled(
        "validation.source",
        validation.source,
        validation.root,
        classifier.num_classes,
        classifier.class_names,
        validation.list_format,
        resumed=config.has_begun,
    )
