"""Files: text in the encodings it comes in, JSON that anybody reads, whole-or-nothing writes, JSON
lines that a crash may tear.
"""

import codecs
import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Python reads a byte of a file's name that is not UTF-8 as one of these (PEP 383); no encoding of
# Unicode takes them.
_NO_UNICODE = re.compile("[\ud800-\udfff]")
# What ends a line for some reader, or moves a terminal's cursor.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")


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


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file or folder aside, then puts it in its place, instead of an earlier
    one.

    Where `write` raises, what was there before is left as it is, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # short: a name has 255 bytes
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as work:
        building = Path(work) / "new"
        write(building)
        if building.is_file():
            _to_disk(building)
        if path.is_dir():  # a file is replaced by the rename itself
            os.replace(path, Path(work) / "old")
        os.replace(building, path)


def _to_disk(file: Path) -> None:
    """A rename may outlive a power cut that the bytes of the file do not."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def draw_or_tell(
    path: Path, draw: Callable[[Path], None], say: Callable[[str], None] = print
) -> None:
    """Lets `draw` write a picture, whole or not at all; where it cannot, one line says so: no
    figure and no run depends on a picture.
    """
    try:
        write_whole(path, draw)
    except Exception as error:  # of a library that draws, or the disk
        say(
            f"{path}: could not be drawn, all else is there ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        )


class Failure(Protocol):
    """A video, the decoder, and what is to be said of them."""

    @property
    def path(self) -> str: ...
    @property
    def decoder(self) -> str: ...
    @property
    def reason(self) -> str: ...


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, oldest first: none for a missing file, and without a line
    that a crash tore.
    """
    if not path.exists():
        return []
    return list(_objects(path.read_bytes()))


class Register:
    """A file of videos, each once, with the decoder and the reason: RUN/quarantine.jsonl,
    RUN/fallbacks.jsonl.

    All ranks of a run may hold one: the file is the truth, read on under a lock before each write.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._paths: set[str] = set()
        self._bytes_read = 0

    def add(self, failures: Iterable[Failure]) -> None:
        """Writes {path, decoder, reason, time} for each path that no rank and no earlier start of
        the run has written.
        """
        named = {unicode_text(failure.path): failure for failure in failures}
        if named.keys() <= self._paths:
            return
        with self.file.open("ab+") as stream:
            # a file system without locks: two ranks may then both write a path, which is no reason
            # to stop
            with suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_EX)
            self._read_on(stream.fileno())
            # a crash tore the last line: end it, so that it spoils no other
            if stream.seek(0, os.SEEK_END) > self._bytes_read:
                stream.write(b"\n")
                stream.flush()
                self._read_on(stream.fileno())
            stream.writelines(
                json_line(
                    {
                        "path": path,
                        "decoder": failure.decoder,
                        "reason": failure.reason,
                        "time": time.time(),
                    }
                )
                for path, failure in named.items()
                if path not in self._paths
            )

    @property
    def paths(self) -> frozenset[str]:
        """All paths in the file, whoever wrote them."""
        if self.file.exists():
            with self.file.open("rb") as stream:
                self._read_on(stream.fileno())
        return frozenset(self._paths)

    def __len__(self) -> int:
        return len(self.paths)

    def _read_on(self, descriptor: int) -> None:
        new = os.pread(
            descriptor, max(0, os.fstat(descriptor).st_size - self._bytes_read), self._bytes_read
        )
        new = new[: new.rfind(b"\n") + 1]
        self._paths.update(entry["path"] for entry in _objects(new))
        self._bytes_read += len(new)


def _objects(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        if isinstance(entry, dict):
            yield entry


def cut_after(path: Path, last_step: int) -> None:
    """Keeps the lines up to a step of metrics; the file is replaced in one move, so a crash here
    loses nothing.
    """
    if not path.exists():
        return
    new = path.with_name(path.name + ".new")
    with new.open("wb") as stream:
        stream.writelines(
            json_line(entry) for entry in read_jsonl(path) if entry["step"] <= last_step
        )
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)


METRICS_FILE = "metrics.json"
LIST_DIGEST = "list_sha256"
"""The setting that tells one list from another under the same name; earlier versions did not write
it.
"""
AS_EARLIER = {"antialias": True}
"""What earlier versions did, and had no setting for."""


def choose_folder(output: str, model: str, name: str = "") -> Path:
    """The folder of the results: `output`, else the run folder that `model` is or lies in (and
    `name` there).

    Raises: ValueError where there is none.
    """
    if output:
        return Path(output)
    for folder in (Path(model), Path(model).absolute().parent):
        if (folder / "config.yaml").is_file():
            return folder / name
    raise ValueError(
        f"output: (empty), name a folder for the results, {model} is not part of a run folder"
    )


def check_settings(file: Path, before: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compares the settings that a folder's `file` holds with those of now, as JSON keeps them.

    Raises: ValueError naming the first setting that is another, and the remedy.
    """
    for key, value in as_read_back(settings).items():
        if before.get(key) == value:
            continue
        change = f"{key} = {before.get(key)}, now {value}"
        if key == LIST_DIGEST:
            change = "another list of this name"
        raise ValueError(
            f"{file}: was made with {change}; choose another folder, or remove this one"
        )


def check_made_with(
    file: Path, settings: dict[str, Any], earlier: dict[str, Any] | None = None
) -> None:
    """A folder that a stage writes is new, or `file` in it holds these very settings.

    earlier: what earlier versions did, and had no setting for.
    Raises: ValueError naming what is there, and the remedy.
    """
    folder = file.parent
    if not file.is_file():
        # What a stopped writer leaves is hidden.
        if folder.exists() and (
            not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())
        ):
            raise ValueError(
                f"{folder}: is not empty and has no {file.name}; choose another folder"
            )
        return
    try:
        before = {**(earlier or {}), **json.loads(file.read_bytes())}
    except (ValueError, TypeError):
        raise ValueError(f"{file}: is not readable; choose another folder") from None
    check_settings(file, before, settings)


def check_results(folder: Path, settings: dict[str, Any]) -> None:
    """Raises: ValueError where the folder has a metrics.json that was made with other settings."""
    file = folder / METRICS_FILE
    if not file.exists():
        return
    try:
        written = json.loads(file.read_bytes())["settings"]
        before = {**AS_EARLIER, LIST_DIGEST: settings.get(LIST_DIGEST), **written}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: is no result of this program; choose another output") from None
    check_settings(file, before, settings)


def write_metrics(folder: Path, settings: dict[str, Any], metrics: dict[str, Any]) -> None:
    """Writes metrics.json: the settings, then the metrics. The same results give the same bytes."""
    write_json(folder / METRICS_FILE, {"settings": settings, **metrics})


def write_json(path: Path, value: Any) -> None:
    """Writes `json_text` that a person can read, whole or not at all."""
    write_text(path, json_text(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    data = unicode_text(text).encode()
    write_whole(path, lambda unfinished: unfinished.write_bytes(data))
