"""The packing stage: the videos of a list as shards, which training reads several times faster than
the files.

Processes pack videos ahead, one writes them in the order of the list: what comes out depends on the
list and the settings alone.
"""

import errno
import hashlib
import json
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from tqdm import tqdm

from video_mae.config.data import ListFormat, SourceConfig
from video_mae.config.pack import PackConfig
from video_mae.config.schema import to_dict
from video_mae.data.paths import file_mistake
from video_mae.data.shards import FORMAT, MANIFEST, REFUSED, ROWS, SETTINGS, is_packed, read_packed
from video_mae.data.videos import class_file, class_names, read_entries
from video_mae.decoding import Place, VideoDecodeError, decoders, transcode
from video_mae.decoding.containers import is_regular
from video_mae.decoding.isolation import Isolated, KilledError
from video_mae.files import json_text
from video_mae.tools.shard_writer import ShardWriter

DONE, FAILED, NOTHING = 0, 1, 3
FREE_KEYS = ("root", "list_format", "num_workers", "decode_seconds", "decode_memory_gb")
START_SECONDS = 120.0
AHEAD = 4
"""Videos that are packed or wait to be written, for each process."""
HELD_BYTES = 2**30
"""What waits to be written; beyond it no more videos are begun."""
POLL_SECONDS = 0.5


class Item(NamedTuple):
    """A line of the list: where its video is, what it is called there, its label, and what is wrong
    with the line.
    """

    place: Place
    name: str
    label: int
    mistake: str = ""


@dataclass(frozen=True)
class Outcome:
    """What becomes of an item: a row, and the file where there is one."""

    row: dict[str, Any]
    media: NDArray[Any] | None = None


def start(source: str, folder: str, config: PackConfig) -> int:
    """Packs what is not packed yet. Returns 0; 3 where no video could be packed; 1 where the disk
    is full; 128 + the signal that ended it.

    Raises: ValueError or FileNotFoundError with one line, before anything is packed: for the list,
    for a folder that holds something else, was packed from another list or with other settings, or
    is being packed.
    """
    if "://" in folder:
        raise ValueError(f"{folder}: is a URL; pack into a local folder, then copy it there")
    items, names = read_items(source, config.root, config.list_format)
    settings = {
        "format": FORMAT,
        "list_sha256": _digest(items, names),
        "pyav": decoders.version("pyav"),
        **{key: value for key, value in to_dict(config).items() if key not in FREE_KEYS},
    }
    target = Path(folder)
    _check_folder(target, settings)
    if (target / MANIFEST).is_file():
        return _tell(target, json.loads((target / MANIFEST).read_bytes()), "is packed already: ")
    target.mkdir(parents=True, exist_ok=True)
    try:
        if not (target / SETTINGS).is_file():
            _write(target / SETTINGS, _indented(settings))
        writer = ShardWriter(target, config.form, config.shard_mb * 10**6)
    except OSError as error:
        return _failed(error, target)
    try:
        _check_folder(target, settings)  # by now it is ours
        with _stopping() as stop:
            _pack_all(items, writer, config, stop)
            if stop.number:
                print(
                    f"{folder}: stopped at {writer.num_rows} of {len(items)} videos; the same command goes on from there",
                    flush=True,
                )
                return 128 + stop.number
        return _conclude(target, writer, settings, names)
    except OSError as error:
        return _failed(error, target)
    finally:
        writer.close()


def read_items(
    source: str, root: str, list_format: ListFormat = "auto"
) -> tuple[list[Item], tuple[str, ...]]:
    """What a list, a folder or a packed folder names, and the names of the classes; prints what is
    to be told about the source.

    Raises: ValueError or FileNotFoundError.
    """
    try:
        data = SourceConfig(source=source, root=root, list_format=list_format)
        if is_packed(source):
            members, label_M, names = read_packed(source)
            return [
                Item(place, place.name, label)
                for place, label in zip(members, label_M.tolist(), strict=True)
            ], names
        base = os.path.join(
            source if os.path.isdir(source) else root or os.path.dirname(source), ""
        )
        lines, notes = read_entries(data)
        entries = list(lines)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(
            str(error).replace("data.source", "LIST").replace("data.root", "root")
        ) from None
    if not entries:
        raise ValueError(f"{source}: the list is empty, write lines `PATH LABEL` into it")
    if not any(is_regular(entry.path) for entry in entries):  # one look, where the list is right
        mistake = (entries[0].mistake or file_mistake(entries[0].path)[1]).replace(
            "data.root", "root"
        )
        raise ValueError(
            f"{source}: none of its {len(entries)} files is there; the first: {mistake}"
        )
    for note in notes:
        print(note, flush=True)
    items = [
        Item(entry.path, entry.path.removeprefix(base), entry.label, entry.mistake)
        for entry in entries
    ]
    return items, class_names(data) or class_file(Path(source))


class _Stop:
    """Whether the packing is to end, and the signal that asked for it."""

    asked, number = False, 0


@contextmanager
def _stopping() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: Any) -> None:
        stop.asked, stop.number = True, number
        # a second one ends it at once; it goes on all the same
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _pack_all(items: Sequence[Item], writer: ShardWriter, config: PackConfig, stop: _Stop) -> None:
    """Packs and writes what is left of the items, in their order, until all are there or a signal
    comes.
    """
    num_workers = min(
        config.num_workers or len(os.sched_getaffinity(0)), max(len(items) - writer.num_rows, 1)
    )
    processes: queue.SimpleQueue[Isolated] = queue.SimpleQueue()
    isolated = [Isolated() for _ in range(num_workers)]
    for process in isolated:
        processes.put(process)

    def work(item: Item) -> Outcome | None:
        process = processes.get()
        try:
            return _pack_one(item, process, config, stop)
        finally:
            processes.put(process)

    ahead: deque[Future[Outcome | None]] = deque()
    left = iter(items[writer.num_rows :])
    pool = ThreadPoolExecutor(num_workers)
    try:
        with tqdm(
            total=len(items), initial=writer.num_rows, unit="video", disable=None
        ) as progress:
            while not stop.asked and writer.num_rows < len(items):
                while len(ahead) < AHEAD * num_workers and (not ahead or _held(ahead) < HELD_BYTES):
                    item = next(left, None)
                    if item is None:
                        break
                    ahead.append(pool.submit(work, item))
                if not wait([ahead[0]], POLL_SECONDS).done:
                    continue
                outcome = ahead.popleft().result()
                if outcome is None:  # stopped in the middle of it
                    break
                writer.append(outcome.row, outcome.media)
                progress.set_postfix(refused=writer.num_refused, refresh=False)
                progress.update()
    finally:
        stop.asked = True  # those at work leave their videos
        pool.shutdown(cancel_futures=True)
        for process in isolated:
            process.close()


def _held(ahead: Sequence[Future[Outcome | None]]) -> int:
    outcomes = [future.result() for future in ahead if future.done()]
    return sum(
        outcome.media.nbytes
        for outcome in outcomes
        if outcome is not None and outcome.media is not None
    )


def _pack_one(item: Item, process: Isolated, config: PackConfig, stop: _Stop) -> Outcome | None:
    row: dict[str, Any] = {"path": item.name, "label": item.label}
    if item.mistake:
        return Outcome({**row, "refused": item.mistake})
    if not process.is_alive:  # a new one loads its libraries first, which is no fault of the video
        process.call(transcode.ready, seconds=START_SECONDS)
    try:
        handle, packed = (
            process.call(transcode.begin, item.place, config, seconds=config.decode_seconds),
            None,
        )
        while packed is None:
            if stop.asked:
                return None
            packed = process.call(
                transcode.go_on,
                handle,
                seconds=config.decode_seconds,
                memory_gb=config.decode_memory_gb,
            )
    except VideoDecodeError as error:
        return Outcome({**row, "refused": error.reason})
    except KilledError as killed:
        late = "no answer" in str(killed)  # without figures: they are no fact of the video
        return Outcome(
            {**row, "refused": "it makes no progress (decode_seconds)" if late else str(killed)}
        )
    known = {
        field.name: getattr(packed, field.name) for field in fields(packed) if field.name != "media"
    }
    return Outcome({**row, **known}, packed.media)


def _conclude(
    folder: Path, writer: ShardWriter, settings: dict[str, Any], names: Sequence[str]
) -> int:
    shards, digest, refused = writer.finish(), hashlib.sha256(), list[bytes]()
    with open(folder / ROWS, "rb") as rows:
        for line in rows:
            digest.update(line)
            if b'"refused"' in line and "refused" in json.loads(line):
                refused.append(line)
    _write(folder / REFUSED, b"".join(refused))
    manifest = {
        **settings,
        "class_names": list(names),
        "videos": writer.num_rows - writer.num_refused,
        "refused": writer.num_refused,
        "bytes": sum(shard["bytes"] for shard in shards),
        "rows_sha256": digest.hexdigest(),
        "shards": shards,
    }
    _write(folder / MANIFEST, _indented(manifest))
    return _tell(folder, manifest, "")


def _tell(folder: Path, manifest: dict[str, Any], before: str) -> int:
    refused = f", {manifest['refused']} refused ({REFUSED} says why)" if manifest["refused"] else ""
    print(
        f"{folder}: {before}{manifest['videos']} videos{refused}, {manifest['bytes'] / 1e6:.1f} MB in {len(manifest['shards'])} shards; "
        f"data.source={folder}",
        flush=True,
    )
    return DONE if manifest["videos"] else NOTHING


def _failed(error: OSError, folder: Path) -> int:
    remedy = (
        "free some space"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        else "see to the disk"
    )
    print(
        f"video-mae pack: {folder}: {error.strerror or error}: {remedy} and start the same command again, what is packed is not lost",
        file=sys.stderr,
        flush=True,
    )
    return FAILED


def _digest(items: Sequence[Item], names: Sequence[str]) -> str:
    """Of all that the list says; where it lies does not matter."""
    digest = hashlib.sha256(json.dumps(names).encode())
    for item in items:
        digest.update(json.dumps([item.name, item.label, item.mistake]).encode())
    return digest.hexdigest()


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """A folder is new, or its packing was begun with this list and these settings."""
    file = folder / SETTINGS
    if not file.is_file():
        if folder.exists() and (
            not folder.is_dir() or any(path.name != f"{SETTINGS}.new" for path in folder.iterdir())
        ):
            raise ValueError(
                f"{folder}: is not empty and holds no packed videos (no {SETTINGS}); choose another folder"
            )
        return
    try:
        before = json.loads(file.read_bytes())
        changes = [
            f"{key} = {before.get(key)}, now {value}"
            for key, value in settings.items()
            if before.get(key) != value
        ]
    except (ValueError, AttributeError):
        raise ValueError(f"{file}: is not readable; choose another folder") from None
    if changes:
        what = "from another list" if changes[0].startswith("list_sha256") else f"with {changes[0]}"
        raise ValueError(
            f"{folder}: its packing was begun {what}; choose another folder, or remove this one"
        )


def _indented(values: dict[str, Any]) -> bytes:
    return json_text(values, indent=1).encode() + b"\n"


def _write(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all; what a kill leaves beside it is replaced the next
    time.
    """
    new = path.with_name(f"{path.name}.new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
