"""List files: what a line says, in which encodings, and how one is written."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from video_mae.text import is_utf16, one_line, open_text

MAX_LINE = 2**16
"""Characters; the longest path that Linux takes has 4,096 bytes."""
_QUOTED = re.compile(r'"((?:[^"]|"")+)"(?:[ \t,][ \t]*([+-]?[0-9]{1,18}))?')
_LABEL = re.compile(r"[ \t,]([+-]?[0-9]{1,18})$")
_LABEL_LENGTH = 20


class Line(NamedTuple):
    """A line that is not blank: its number from 1 on, its path as written, its label (-1: none), what is wrong with it ("": nothing)."""

    number: int
    path: str
    label: int
    mistake: str = ""


def read_lines(source: Path) -> Iterator[Line]:
    """The lines `PATH LABEL`, `PATH,LABEL` or `PATH` of a list file; one that cannot be read is a mistake, not an error.

    The last word is the label where it is an integer; blanks, tabs and a comma separate it. A path may contain all of them; one that
    itself ends like a label, or begins with a quote, stands in double quotes (a quote inside is written twice). There are no comments:
    names of files begin with # as well. Text is UTF-8, or UTF-16 with its mark; lines end in any system's way.
    """
    utf16 = is_utf16(source)
    with open_text(source) as file:
        for number, text in enumerate(_pieces(file), start=1):
            line = text.strip()
            if not line:
                continue
            if mistake := _mistake(text, utf16):
                yield Line(number, "", -1, mistake)
            else:
                path, label = split_line(line)
                yield Line(number, path, label)


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
    if not text.isascii() and ("\ufffd" in text if utf16 else any("\ud800" <= letter <= "\udfff" for letter in text)):
        return (f"the line `{one_line(text.strip()[:100])}` is not {'UTF-16' if utf16 else 'UTF-8'}, save the list as UTF-8 text; where a "
                "file itself is named so, rename it")
    return ""


def split_line(line: str) -> tuple[str, int]:
    """(path, label) of a line without blanks around it; -1 is no label."""
    if line.startswith('"') and (quoted := _QUOTED.fullmatch(line)):
        return quoted[1].replace('""', '"'), int(quoted[2] or -1)
    label = _LABEL.search(line[-_LABEL_LENGTH:])
    if label is None:
        return line, -1
    path = line[: -len(label[0])].rstrip()
    if label[0][0] != "," and path.endswith(","):  # `PATH, LABEL`
        path = path[:-1].rstrip()
    return (path, int(label[1])) if path else (line, -1)


def format_line(path: str, label: int) -> str:
    """The line that says so; quotes only where they are needed."""
    plain = path if label == -1 else f"{path} {label}"
    if plain == plain.strip("\ufeff").strip() and split_line(plain) == (path, label):  # the first line may not begin with a mark
        return plain
    return '"' + path.replace('"', '""') + '"' + ("" if label == -1 else f" {label}")
