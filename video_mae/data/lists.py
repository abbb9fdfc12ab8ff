"""List files: what a line says in each format, in which encodings, and how one is written."""

import csv
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from video_mae.config.data import ListFormat
from video_mae.files import is_regular, is_utf16, one_line, open_text, unicode_text

MAX_LINE = 2**16
"""Characters; the longest path that Linux takes has 4,096 bytes."""
NO_INTEGER = "the label `{}` is not an integer, number the classes from 0"
NO_FRAMES = "folders of frames are not read, make a video of each"
CLIMBS = (
    "leads out of the folder of the list; write the whole path, or set the folder where relative "
    "paths start (data.root)"
)
WRITTEN = {"start_frames": "PATH 0 -1", "frames_label": "PATH FRAMES LABEL"}
"""Lines with two numbers behind the path: VideoMAE V2's for pretraining, and mmaction2's."""
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
    """A file that a list or a folder names: its line from 1 on (0: no list), its place and label
    (-1: none), and what is wrong with it ("": nothing).
    """

    number: int
    path: Any
    label: int = -1
    mistake: str = ""


def read_list(
    source: Path, list_format: ListFormat = "label", folder: str = "", *, may_climb: bool = False
) -> tuple[Iterator[Line], tuple[str, ...]]:
    """The lines of a list file that are not blank, their paths joined to `folder`, out of which
    they lead where they `may_climb`; and what is to be told about its format. A line that cannot be
    read is a mistake, not an error.

    By default a line is `PATH LABEL`, `PATH,LABEL` or `PATH`: the last word is the label where it
    is an integer; blanks, tabs and a comma separate it. A path may contain all of them; one that
    itself ends like a label, or begins with a quote, stands in double quotes (a quote inside is
    written twice), and so may its label. There are no comments: names of files begin with # as
    well. Text is UTF-8, or UTF-16 with its mark; lines end in any system's way. With `auto` the
    format is what the first line shows for certain.
    Raises: ValueError where the first line should name columns, and names none of paths.
    """
    texts = _texts(source)
    first = next(texts, None)
    if first is None:
        return iter(()), ()
    number, text, mistake = first
    notes = ()
    if list_format == "auto":
        list_format = "label" if mistake else _format_of(text, folder)
        if list_format == "start_frames":
            notes = (
                f"{source}: lines are `PATH 0 -1`, as VideoMAE V2 has them: whole videos without "
                "labels (data.list_format=start_frames)",
            )
    if list_format == "header":
        split, note = _header(source, number, text)
        notes = (note,)
    else:
        split = partial(split_line, list_format=list_format)
        texts = chain([first], texts)

    def lines() -> Iterator[Line]:
        for number, text, mistake in texts:
            path, label = "", -1
            if not mistake:
                try:
                    path, label = split(text)
                except ValueError as error:
                    mistake = str(error)
            if not may_climb and ".." in path and os.path.normpath(path).startswith("../"):
                mistake = mistake or f"{one_line(path[:100])} {CLIMBS}"
            yield Line(number, path if path.startswith(os.sep) else folder + path, label, mistake)

    return lines(), notes


def _texts(source: Path) -> Iterator[tuple[int, str, str]]:
    """(number, text without its end, mistake) of each line that is not blank."""
    utf16 = is_utf16(source)
    with open_text(source) as file:
        for number, text in enumerate(iter(partial(file.readline, MAX_LINE), ""), start=1):
            # of a line that is too long its beginning: a file of gigabytes may have no other
            rest = text
            while len(rest) == MAX_LINE and not rest.endswith("\n"):
                rest = file.readline(MAX_LINE)
            if not text.isspace():
                yield number, text.rstrip("\r\n"), _mistake(text, utf16)


def _mistake(text: str, utf16: bool) -> str:
    if len(text) == MAX_LINE:
        return (
            f"the line is longer than {MAX_LINE} characters, is this a list with lines "
            "`PATH LABEL`?"
        )
    if "\0" in text:
        return "the line holds a NUL byte, is this a list? Save it as UTF-8 text"
    if text.isascii():
        return ""
    if "\ufffd" in text if utf16 else unicode_text(text) != text:
        return (
            f"the line `{one_line(text.strip()[:100])}` is not {'UTF-16' if utf16 else 'UTF-8'}, "
            "save the list as UTF-8 text; where a file itself is named so, rename it"
        )
    return ""


def _format_of(first: str, folder: str) -> ListFormat:
    """The format that a first line shows for certain."""
    if is_regular(folder + split_line(first)[0]):
        return "label"
    if _numbers_behind(first)[1:] == (0, -1):
        return "start_frames"
    separator, columns = _columns_of(first)
    known = {*PATH_COLUMNS, *LABEL_COLUMNS}
    if separator == " ":  # which paths hold as well
        is_header = known.issuperset(columns)
    else:
        is_header = not known.isdisjoint(columns) and not any(map(_VALUE.fullmatch, columns))
    return "header" if is_header else "label"


def split_line(line: str, list_format: ListFormat = "label") -> tuple[str, int]:
    """(path, label) of a line; -1 is no label. Of the number of frames there is no need.

    Raises: ValueError for a line that does not have the two numbers of its format.
    """
    if list_format == "label":
        path, label = _split_number(line.strip())
        return _unquoted(path), -1 if label is None else label
    path, first, last = _numbers_behind(line)
    if first is None or last is None:
        raise ValueError(
            f"has no two numbers behind its path; data.list_format={list_format} reads lines "
            f"`{WRITTEN[list_format]}`"
        )
    if list_format == "frames_label":
        return path, last
    if (first, last) != (0, -1):
        raise ValueError(
            f"names frames `{first} {last}` of {path}, and not all of a video, `0 -1`; {NO_FRAMES}"
        )
    return path, -1


def _numbers_behind(line: str) -> tuple[str, int | None, int | None]:
    """The path of a line, and the last two numbers behind it."""
    before, last = _split_number(line.strip())
    path, first = _split_number(before)
    return _unquoted(path), first, last


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


def _header(source: Path, number: int, first: str) -> tuple[Callable[[str], tuple[str, int]], str]:
    """What reads the lines below a first one that names columns, and what is told about them."""
    separator, columns = _columns_of(first)
    path, label = (
        next((name for name in names if name in columns), None)
        for names in (PATH_COLUMNS, LABEL_COLUMNS)
    )
    if path is None:
        raise ValueError(
            f"{source}:{number}: names no column of paths; call it `path`, or set another "
            "data.list_format"
        )
    labels = f"labels those of `{label}`" if label else "there are no labels"
    note = f"{source}: its first line names columns: paths are those of `{path}`, {labels}"
    # then paths may hold what separates columns
    if separator in ", \t" and columns in ([path], [path, label]):
        return split_line, note

    def split(line: str) -> tuple[str, int]:
        values = _columns(line, separator)
        if len(values) != len(columns):
            raise ValueError(
                f"has {len(values)} columns, the first line names {len(columns)}; what holds a "
                f"`{separator}` stands in double quotes"
            )
        row = dict(zip(columns, values, strict=True))
        text = row[label] if label else ""
        if not row[path]:
            raise ValueError(f"has no `{path}`, remove the line")
        if text and not _INTEGER.fullmatch(text):
            raise ValueError(NO_INTEGER.format(text))
        return row[path], int(text or -1)

    return split, note


def _columns_of(first: str) -> tuple[str, list[str]]:
    """What separates the columns of a first line, and their names."""
    separator = next((letter for letter in ",\t;|" if letter in first), " ")
    return separator, [name.lower() for name in _columns(first, separator)]


def _columns(line: str, separator: str) -> list[str]:
    (values,) = csv.reader([line], delimiter=separator, skipinitialspace=True)
    return [value.strip() for value in values]


def format_line(path: str, label: int) -> str:
    """The line that says so; quotes only where they are needed."""
    plain = path if label == -1 else f"{path} {label}"
    # the first line may not begin with a mark
    if plain == plain.strip("\ufeff").strip() and split_line(plain) == (path, label):
        return plain
    return '"' + path.replace('"', '""') + '"' + ("" if label == -1 else f" {label}")
