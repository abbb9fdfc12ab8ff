"""Text from outside and to the outside: files in the encodings that lists come in, names that are no Unicode, JSON that anybody reads."""

import codecs
import json
import re
from pathlib import Path
from typing import Any, TextIO

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Python reads a byte of a file's name that is not UTF-8 as one of these (PEP 383); no encoding of Unicode takes them.
_NO_UNICODE = re.compile("[\ud800-\udfff]")
# What ends a line for some reader, or moves a terminal's cursor.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")


def is_utf16(path: Path) -> bool:
    """Whether a file begins with the mark of UTF-16."""
    with path.open("rb") as file:
        return file.read(2) in _UTF16


def open_text(path: Path) -> TextIO:
    """Opens a text file: UTF-8 with or without its mark, or UTF-16 with it; lines end in any system's way, and nowhere else.

    What is not UTF-8 comes through as surrogates, what is not UTF-16 as U+FFFD, so that it costs its line and not the file.
    """
    if is_utf16(path):
        return path.open(encoding="utf-16", errors="replace")
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


def read_text(path: Path) -> str:
    """The text of a file in the encodings of `open_text`. Raises: ValueError naming a file that is in neither."""
    try:
        text = path.read_text(encoding="utf-16" if is_utf16(path) else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is neither UTF-8 nor UTF-16, save it as UTF-8 text") from None
    if "\0" in text:
        raise ValueError(f"{path}: holds control characters (NUL), save it as UTF-8 text")
    return text


def unicode_text(text: str) -> str:
    """The text with what is no Unicode written out: a byte of a name that is not UTF-8 as \\xe4."""
    return _NO_UNICODE.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    """Likewise, and with everything written out that could end the line or move a cursor."""
    return unicode_text(_CONTROL.sub(lambda found: _escape(found[0]), text))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON in UTF-8 that any parser reads, and any reader of lines: texts in it are `unicode_text`.

    Raises: ValueError for a number that is not finite, which JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    text = _NO_UNICODE.sub(lambda found: "\\" + _escape(found[0]), text)  # a backslash inside JSON is written twice
    return re.sub("[\x7f-\x9f\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def json_line(entry: Any) -> bytes:
    """`json_text` as a line of a file. Raises: as it does."""
    return (json_text(entry) + "\n").encode()


def as_read_back(value: Any) -> Any:
    """What JSON makes of a value, to be compared with what a file holds."""
    return json.loads(json_text(value))


def _escape(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
