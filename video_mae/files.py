"""Files: text in the encodings it comes in, JSON that anybody reads, whole-or-nothing writes, JSON
lines that a crash may tear.
"""

import codecs
import errno
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

JsonObject = dict[str, Any]
UNFINISHED = ".unfinished-"
"""How the folder begins in which something is made."""
_FULL = errno.ENOSPC, os.strerror(errno.ENOSPC)
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Python reads a byte of a file's name that is not UTF-8 as one of these (PEP 383); no encoding of
# Unicode takes them.
_NO_UNICODE = re.compile("[\ud800-\udfff]")
# What ends a line for some reader, or moves a terminal's cursor, or turns what follows around.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_KERNEL = frozenset(os.stat(folder).st_dev for folder in ("/proc", "/sys") if os.path.isdir(folder))
"""File systems whose files are regular by their type, and may wait for ever."""
MOST_BYTES = 2**26
"""Of a file that describes something: a list of a million names takes less."""


def is_regular(path: str | Path) -> bool:
    """Whether a path leads to a file of a disk: no device, pipe, socket, folder or file of the
    kernel, and no broken link.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return False
    return stat.S_ISREG(status.st_mode) and status.st_dev not in _KERNEL


def read_small(path: Path) -> bytes:
    """A file that describes something, whole. Raises: OSError; ValueError naming one that is no
    regular file, or too large to be what it should.
    """
    num_bytes = path.stat().st_size
    if not is_regular(path) or num_bytes > MOST_BYTES:
        raise ValueError(
            f"{path}: is no regular file of at most {MOST_BYTES} bytes (it has {num_bytes})"
        )
    return path.read_bytes()


def existing(path: Path) -> Path:
    """A path, or the nearest folder above it that is there."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return there


def check_folder(folder: Path) -> None:
    """Raises: ValueError where there can be no folder of results, below a file say."""
    there = existing(folder)
    if not there.is_dir() or there.stat().st_dev in _KERNEL:
        raise ValueError(f"{folder}: cannot be a folder of results: {there} is no folder of a disk")


def say(line: str) -> None:
    """Prints one line, whatever the names in it hold."""
    print(one_line(line), flush=True)


def is_utf16(path: Path) -> bool:
    """Whether a file begins with the mark of UTF-16."""
    with path.open("rb") as file:
        return file.read(2) in _UTF16


def open_text(path: Path) -> TextIO:
    """Opens a text file: UTF-8 with or without its mark, or UTF-16 with it; lines end in any
    system's way, and nowhere else.

    What is not UTF-8 comes through as surrogates, what is not UTF-16 as U+FFFD, so that it costs
    its line and not the file.
    """
    if is_utf16(path):
        return path.open(encoding="utf-16", errors="replace")
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


def read_text(path: Path) -> str:
    """The text of a file in the encodings of `open_text`. Raises: ValueError naming a file that is
    in neither.
    """
    data = read_small(path)
    try:
        text = data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is neither UTF-8 nor UTF-16, save it as UTF-8 text") from None
    if "\0" in text:
        raise ValueError(f"{path}: holds control characters (NUL), save it as UTF-8 text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


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
    # a backslash inside JSON is written twice
    text = _NO_UNICODE.sub(lambda found: "\\" + _escape(found[0]), text)
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


class StorageError(OSError):
    """What the disk refuses to take, in one line: the file, the bytes it needs and those that are
    free, and the remedy.
    """


class FolderError(ValueError):
    """A folder that a command cannot go on with, for what it holds or who holds it, in one line."""


@contextmanager
def storing(path: Path, num_bytes: int = 0) -> Iterator[None]:
    """Wraps the writing of a file or folder that takes num_bytes (0: unknown): it is not begun
    where the disk has less. Raises: StorageError for what the disk refuses inside.
    """
    free = shutil.disk_usage(existing(path)).free
    try:
        if num_bytes > free > 0:  # some network disks do not know
            raise OSError(*_FULL)
        yield
    except StorageError:
        raise
    except Exception as error:
        # Of safetensors, shutil.copytree and torch.save, two of which this module is to do without.
        # Another OSError without a number is of our own.
        is_refused = getattr(error, "errno", None) or re.match(
            r"SafetensorError|Error\(|RuntimeError.*inline_container", repr(error)
        )
        source = getattr(error, "filename", None) or path  # what is read for it may be missing
        if not is_refused or not str(source).startswith(str(path.parent)):
            raise
        raise StorageError(
            f"{path}: cannot be written ({error}): needed are {num_bytes or 'some'} bytes, {free} "
            "are free; make room, or let it be written to, and start the same command again"
        ) from None


def fsync(path: Path) -> None:
    """Waits until a file's, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Callable[[Path], object], num_bytes: int = 0) -> None:
    """Lets `write` make a file or folder of num_bytes (0: unknown) aside, then puts it in its
    place, instead of an earlier file; a folder also takes the place of a folder.

    Where `write` raises, what was there before is left as it is, and nothing else.
    Raises: StorageError.
    """
    with storing(path, num_bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        # short: a name has 255 bytes
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=path.parent) as work:
            building = Path(work) / "new"
            write(building)
            if building.is_file():
                # a rename may outlive a power cut that the bytes of the file do not
                fsync(building)
            is_other = path.exists() and not path.is_file()
            if is_other and not (path.is_dir() and building.is_dir()):
                raise StorageError(f"{path}: is no file, and stays as it is; name another")
            if building.is_dir() and path.exists():  # a rename replaces files by files alone
                os.replace(path, Path(work) / "old")
            os.replace(building, path)


def write_json(path: Path, value: Any) -> None:
    """Writes `json_text` that a person can read, whole or not at all."""
    write_text(path, json_text(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    data = unicode_text(text).encode()
    write_whole(path, lambda unfinished: unfinished.write_bytes(data), len(data))


def append(path: Path, data: bytes) -> None:
    """Adds whole lines to the end of a file, all of them or nothing. Raises: StorageError."""
    with storing(path, len(data)), path.open("ab", buffering=0) as stream:
        size = stream.tell()
        if stream.write(data) < len(data):
            stream.truncate(size)
            raise OSError(*_FULL)


def log(file: Path, text: str) -> None:
    """Adds to a log, with the time; what the disk refuses has been said."""
    with suppress(StorageError):
        append(file, unicode_text(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n").encode())


def draw_or_tell(
    path: Path, draw: Callable[[Path], None], say: Callable[[str], None] = say
) -> None:
    """Lets `draw` write a picture, whole or not at all; where it cannot, one line says so: no
    figure and no run depends on a picture.
    """
    try:
        write_whole(path, draw)
    except Exception as error:  # of a library that draws, or the disk
        say(
            f"{path}: could not be drawn, all else is there ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})"
        )


def read_jsonl(path: Path) -> list[JsonObject]:
    """The objects of a JSON-lines file, oldest first: none for a missing file, and without a line
    that a crash tore.
    """
    entries = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):  # torn by a crash, or NaN, which is no JSON
            entries.append(json.loads(line, parse_constant=int))
    return [entry for entry in entries if isinstance(entry, dict)]


def mend_jsonl(path: Path, last_step: int, keys: set[str], say: Callable[[str], None]) -> None:
    """Takes the lines after a step, which are lost work, out of a JSON-lines file, and those that
    are no objects with these keys, which is told: FILE.damaged has all as it was.

    What a crash tore is lost work. The file is replaced in one move, so a crash here loses nothing.
    Raises: StorageError.
    """
    if not path.exists():
        return
    data = path.read_bytes()
    whole = [
        entry
        for entry in read_jsonl(path)
        if keys <= entry.keys() and isinstance(entry.get("step", 0), int)
    ]
    num_damaged = data.count(b"\n") - len(whole)
    if num_damaged > 0:
        append(path.with_name(f"{path.name}.damaged"), data)
        say(f"{path}: {num_damaged} damaged lines are left out, {path.name}.damaged has them")
    kept = b"".join(json_line(entry) for entry in whole if entry.get("step", 0) <= last_step)
    write_whole(path, lambda new: new.write_bytes(kept), len(kept))


class Register:
    """A file of videos, each once, with the decoder and the reason: RUN/quarantine.jsonl,
    RUN/fallbacks.jsonl.

    All ranks of a run may hold one: the file is the truth, read before each write. Two that meet a
    video in the same instant may both write it; it counts once. What the disk refuses is written
    when it comes again; the journal tells of such a disk.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known = frozenset[str]()

    def add(self, failures: Iterable[Any], step: int) -> None:
        """Writes {path, decoder, reason, step, time} for each path that no rank and no earlier
        start of the run has written. A failure has the first three; step: whose batch it was in.
        """
        named = {unicode_text(failure.path): failure for failure in failures}
        if named.keys() <= self._known:
            return
        self._known, lines = self.paths, b""
        for path, failure in named.items():
            if path not in self._known:
                lines += json_line(
                    {
                        "path": path,
                        "decoder": failure.decoder,
                        "reason": failure.reason,
                        "step": step,
                        "time": time.time(),
                    }
                )
        with suppress(StorageError):
            append(self.file, lines)
            self._known |= named.keys()

    @property
    def paths(self) -> frozenset[str]:
        """All paths in the file, whoever wrote them."""
        return frozenset(entry["path"] for entry in read_jsonl(self.file))

    def __len__(self) -> int:
        return len(self.paths)
