"""List files: what a line says in each format, in which encodings, and how one is written."""

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TextIO

from video_mae.config.data import ListFormat
from video_mae.files import is_utf16, one_line, open_text

MAX_LINE = 2**16
"""Characters; the longest path that Linux takes has 4,096 bytes."""
NO_INTEGER = "the label `{}` is not an integer, number the classes from 0"
NO_FRAMES = "folders of frames are not read, make a video of each"
PATH_COLUMNS = (
    "path",
    "video_path",
    "videopath",
    "file_path",
    "filepath",
    "clip_path",
    "video",
    "file",
    "filename",
    "file_name",
    "video_name",
    "clip_name",
    "name",
)
"""What a first line calls the column of paths, and that of labels; where there are several, the
first of these counts.
"""
LABEL_COLUMNS = (
    "label",
    "label_id",
    "class_id",
    "class_index",
    "class_idx",
    "target",
    "category_id",
    "class",
    "category",
)
_QUOTED = re.compile(r'"((?:[^"]|"")+)"')
_NUMBER = re.compile(r'[ \t,](")?([+-]?[0-9]{1,18})(?(1)")$')
_NUMBER_LENGTH = 22
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_VALUE = re.compile(r"[-+.\d]+|.*/.*")  # no name of a column


class Line(NamedTuple):
    """A line that is not blank: its number from 1 on, its path as written, its label (-1: none),
    what is wrong with it ("": nothing).
    """

    number: int
    path: str
    label: int
    mistake: str = ""


@dataclass(frozen=True)
class Layout:
    """How a list is read: what makes a path and a label of a line, or raises ValueError; whether
    the first line is none; what is told.
    """

    split: Callable[[str], tuple[str, int]]
    has_header: bool = False
    note: str = ""


def read_lines(source: Path, layout: Layout | None = None) -> Iterator[Line]:
    """The lines of a list file, by default `PATH LABEL`, `PATH,LABEL` or `PATH`; one that cannot be
    read is a mistake, not an error.

    The last word is the label where it is an integer; blanks, tabs and a comma separate it. A path
    may contain all of them; one that itself ends like a label, or begins with a quote, stands in
    double quotes (a quote inside is written twice), and so may its label. There are no comments:
    names of files begin with # as well. Text is UTF-8, or UTF-16 with its mark; lines end in any
    system's way.
    """
    layout = layout or Layout(split_line)
    texts = _text_lines(source)
    if layout.has_header:
        next(texts)
    for number, text, mistake in texts:
        if mistake:
            yield Line(number, "", -1, mistake)
            continue
        try:
            path, label = layout.split(text)
        except ValueError as error:
            yield Line(number, "", -1, str(error))
        else:
            yield Line(number, path, label)


def find_layout(source: Path, list_format: ListFormat, is_file: Callable[[str], bool]) -> Layout:
    """The layout that a list is said to have, or, for auto, the one that its first line shows for
    certain. is_file: of a path as written.

    Raises: ValueError where the first line should name columns, and names none of paths.
    """
    if list_format in _SPLITS:
        return Layout(_SPLITS[list_format])
    number, first, mistake = next(_text_lines(source), (1, "", ""))
    if list_format == "auto" and (not first or mistake or is_file(split_line(first)[0])):
        return Layout(split_line)
    if list_format == "auto" and _numbers_behind(first)[1] == [0, -1]:
        return Layout(
            _split_start_frames,
            note=f"{source}: lines are `PATH 0 -1`, as VideoMAE V2 has them: whole videos without labels "
            "(data.list_format=start_frames)",
        )
    separator = next((letter for letter in ",\t;|" if letter in first), " ")
    columns = [name.lower() for name in _columns(first, separator)]
    if list_format == "auto" and not _are_names(columns, separator):
        return Layout(split_line)
    path = next((name for name in PATH_COLUMNS if name in columns), None)
    if path is None:
        raise ValueError(
            f"{source}:{number}: names no column of paths; call it `path`, or set another data.list_format"
        )
    return _table(source, columns, separator, path)


def _text_lines(source: Path) -> Iterator[tuple[int, str, str]]:
    """(number, text without its end, mistake) of each line that is not blank."""
    utf16 = is_utf16(source)
    with open_text(source) as file:
        for number, text in enumerate(_pieces(file), start=1):
            if not text.isspace():
                yield number, text.rstrip("\r\n"), _mistake(text, utf16)


def _pieces(file: TextIO) -> Iterator[str]:
    """Lines; of one that is too long its beginning: a file of gigabytes may have none at all."""
    while text := file.readline(MAX_LINE):
        rest = text
        while len(rest) == MAX_LINE and not rest.endswith("\n"):
            rest = file.readline(MAX_LINE)
        yield text


def _mistake(text: str, utf16: bool) -> str:
    if len(text) == MAX_LINE:
        return f"the line is longer than {MAX_LINE} characters, is this a list with lines `PATH LABEL`?"
    if "\0" in text:
        return "the line holds a NUL byte, is this a list? Save it as UTF-8 text"
    if not text.isascii() and (
        "\ufffd" in text if utf16 else any("\ud800" <= letter <= "\udfff" for letter in text)
    ):
        return (
            f"the line `{one_line(text.strip()[:100])}` is not {'UTF-16' if utf16 else 'UTF-8'}, save the list as UTF-8 text; where a "
            "file itself is named so, rename it"
        )
    return ""


def split_line(line: str) -> tuple[str, int]:
    """(path, label) of a line `PATH LABEL` or `PATH`; -1 is no label."""
    path, label = _split_number(line.strip())
    return _unquoted(path), -1 if label is None else label


def _split_start_frames(line: str) -> tuple[str, int]:
    """A line of VideoMAE V2's pretraining: `PATH 0 -1` is a whole video; other numbers are frames
    of a folder.
    """
    path, numbers = _numbers_behind(line)
    if len(numbers) < 2:
        raise ValueError(
            "has no two numbers behind its path; data.list_format=start_frames reads lines `PATH 0 -1`"
        )
    if numbers != [0, -1]:
        raise ValueError(
            f"names frames `{numbers[0]} {numbers[1]}` of {path}, and not all of a video, `0 -1`; {NO_FRAMES}"
        )
    return path, -1


def _split_frames_label(line: str) -> tuple[str, int]:
    """A line `PATH FRAMES LABEL` of mmaction2 or VideoMAE V2; the number of frames is not needed."""
    path, numbers = _numbers_behind(line)
    if len(numbers) < 2:
        raise ValueError(
            "has no two numbers behind its path; data.list_format=frames_label reads lines `PATH FRAMES LABEL`"
        )
    return path, numbers[1]


_SPLITS = {
    "label": split_line,
    "start_frames": _split_start_frames,
    "frames_label": _split_frames_label,
}


def _numbers_behind(line: str) -> tuple[str, list[int]]:
    """The path of a line and its last two numbers, or those that there are."""
    before, last = _split_number(line.strip())
    path, first = _split_number(before)
    return _unquoted(path), [number for number in (first, last) if number is not None]


def _split_number(line: str) -> tuple[str, int | None]:
    """What stands before the last word, and that word, where it is an integer; it may be quoted
    where the path is.
    """
    found = _NUMBER.search(line[-_NUMBER_LENGTH:])
    if found is None or (found[1] and not line.startswith('"')):
        return line, None
    before = line[: -len(found[0])].rstrip()
    if found[0][0] != "," and before.endswith(","):  # `PATH, LABEL`
        before = before[:-1].rstrip()
    return (before, int(found[2])) if before else (line, None)


def _unquoted(path: str) -> str:
    quoted = _QUOTED.fullmatch(path) if path.startswith('"') else None
    return quoted[1].replace('""', '"') if quoted else path


def _are_names(columns: list[str], separator: str) -> bool:
    """Whether a first line can be nothing but names of columns."""
    known = {*PATH_COLUMNS, *LABEL_COLUMNS}
    if separator == " ":  # which paths hold as well
        return known.issuperset(columns)
    return not known.isdisjoint(columns) and not any(_VALUE.fullmatch(name) for name in columns)


def _table(source: Path, columns: list[str], separator: str, path: str) -> Layout:
    """The layout of a list whose first line names these columns, that of its paths `path`."""
    label = next((name for name in LABEL_COLUMNS if name in columns), None)
    note = f"{source}: its first line names columns: paths are those of `{path}`, " + (
        f"labels those of `{label}`" if label else "there are no labels"
    )
    # then paths may hold what separates columns
    if separator in ", \t" and columns in ([path], [path, label]):
        return Layout(split_line, has_header=True, note=note)

    def split(line: str) -> tuple[str, int]:
        values = _columns(line, separator)
        if len(values) != len(columns):
            raise ValueError(
                f"has {len(values)} columns, the first line names {len(columns)}; what holds a `{separator}` stands in double "
                "quotes"
            )
        row = dict(zip(columns, values, strict=True))
        text = row[label] if label else ""
        if not row[path]:
            raise ValueError(f"has no `{path}`, remove the line")
        if text and not _INTEGER.fullmatch(text):
            raise ValueError(NO_INTEGER.format(text))
        return row[path], int(text or -1)

    return Layout(split, has_header=True, note=note)


def _columns(line: str, separator: str) -> list[str]:
    return [
        value.strip()
        for value in next(csv.reader([line], delimiter=separator, skipinitialspace=True))
    ]


def format_line(path: str, label: int) -> str:
    """The line that says so; quotes only where they are needed."""
    plain = path if label == -1 else f"{path} {label}"
    # the first line may not begin with a mark
    if plain == plain.strip("\ufeff").strip() and split_line(plain) == (path, label):
        return plain
    return '"' + path.replace('"', '""') + '"' + ("" if label == -1 else f" {label}")
