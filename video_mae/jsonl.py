"""Files of JSON lines that a run adds to and a crash may tear: metrics, and videos that something is to be said of, each once."""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from video_mae.text import json_line, unicode_text


class Failure(Protocol):
    """A video, the decoder, and what is to be said of them."""

    @property
    def path(self) -> str: ...
    @property
    def decoder(self) -> str: ...
    @property
    def reason(self) -> str: ...


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, oldest first: none for a missing file, and without a line that a crash tore."""
    if not path.exists():
        return []
    return list(_objects(path.read_bytes()))


class Register:
    """A file of videos, each once, with the decoder and the reason: RUN/quarantine.jsonl, RUN/fallbacks.jsonl.

    All ranks of a run may hold one: the file is the truth, read on under a lock before each write.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._paths: set[str] = set()
        self._bytes_read = 0

    def add(self, failures: Iterable[Failure]) -> None:
        """Writes {path, decoder, reason, time} for each path that no rank and no earlier start of the run has written."""
        named = {unicode_text(failure.path): failure for failure in failures}
        if named.keys() <= self._paths:
            return
        with self.file.open("ab+") as stream:
            with suppress(OSError):  # a file system without locks: two ranks may then both write a path, which is no reason to stop
                fcntl.flock(stream, fcntl.LOCK_EX)
            self._read_on(stream.fileno())
            if stream.seek(0, os.SEEK_END) > self._bytes_read:  # a crash tore the last line: end it, so that it spoils no other
                stream.write(b"\n")
                stream.flush()
                self._read_on(stream.fileno())
            stream.writelines(json_line({"path": path, "decoder": failure.decoder, "reason": failure.reason, "time": time.time()})
                              for path, failure in named.items() if path not in self._paths)

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
        new = os.pread(descriptor, max(0, os.fstat(descriptor).st_size - self._bytes_read), self._bytes_read)
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
    """Keeps the lines up to a step of metrics; the file is replaced in one move, so a crash here loses nothing."""
    if not path.exists():
        return
    new = path.with_name(path.name + ".new")
    with new.open("wb") as stream:
        stream.writelines(json_line(entry) for entry in read_jsonl(path) if entry["step"] <= last_step)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)
