"""The packing stage: the videos of a list as shards, which training reads several times faster than
the files.

Processes pack videos ahead, one writes them in the order of the list: what comes out depends on the
list and the settings alone.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from video_mae.config.data import ListFormat, SourceConfig
from video_mae.config.pack import PackConfig
from video_mae.config.schema import to_dict
from video_mae.data.paths import file_mistake, repetitions
from video_mae.data.shards import FORMAT, MANIFEST, REFUSED, ROWS, SETTINGS
from video_mae.data.videos import read_lines
from video_mae.decoding import Member, Place, VideoDecodeError, decoders, transcode
from video_mae.decoding.isolation import KilledError, decoder_process, in_order
from video_mae.files import is_regular, say, storing, write_json, write_text
from video_mae.processes import hold_folder, on_signals
from video_mae.progress_bar import ProgressBar
from video_mae.results import LIST_DIGEST, check_made_with
from video_mae.tools.shard_writer import ShardWriter

DONE, NOTHING = 0, 3
FREE_KEYS = ("root", "list_format", "num_workers", "decode_seconds", "decode_memory_gb")


class Item(NamedTuple):
    """A line of the list: where its video is, what it is called there, its label, and what is wrong
    with the line.
    """

    place: Place
    name: str
    label: int
    mistake: str = ""


PackedRow = tuple[dict[str, Any], NDArray[Any] | None]
"""What becomes of an item: a row, and the file where there is one."""


def start(source: str, folder: str, config: PackConfig) -> int:
    """Packs what is not packed yet. Returns 0; 3 where no video could be packed; 128 + the signal
    that ended it.

    Raises: ValueError or FileNotFoundError with one line, before anything is packed: for the list,
    for a folder that holds something else, was packed from another list or with other settings, or
    is being packed. StorageError where the disk takes nothing more; what is packed is not lost.
    """
    if "://" in folder:
        raise ValueError(f"{folder}: is a URL; pack into a local folder, then copy it there")
    items, names = read_items(source, config.root, config.list_format)
    settings = {
        "format": FORMAT,
        LIST_DIGEST: _digest(items, names),
        "pyav": decoders.version("pyav"),
        **{key: value for key, value in to_dict(config).items() if key not in FREE_KEYS},
    }
    target = Path(folder)
    check_made_with(target / SETTINGS, settings)
    if (target / MANIFEST).is_file():
        return _tell(target, json.loads((target / MANIFEST).read_bytes()), "is packed already: ")
    with hold_folder(target) as told, storing(target):
        for line in told:
            say(line)
        check_made_with(target / SETTINGS, settings)  # by now it is ours
        write_json(target / SETTINGS, settings)
        with closing(ShardWriter(target, config.form, config.shard_mb * 10**6)) as writer:
            stop = _Stop()
            on_signals(stop.note)
            _pack_all(items, writer, config, stop)
            if stop.number:
                say(
                    f"{folder}: stopped at {writer.num_rows} of {len(items)} videos; the same "
                    "command goes on from there"
                )
                return 128 + stop.number
            return _conclude(target, writer, settings, names)


def read_items(
    source: str, root: str, list_format: ListFormat = "auto"
) -> tuple[list[Item], tuple[str, ...]]:
    """What a list, a folder or a packed folder names, and the names of the classes; prints what is
    to be told about the source.

    Raises: ValueError or FileNotFoundError.
    """
    base = os.path.join(source if os.path.isdir(source) else root or os.path.dirname(source), "")
    try:
        data = SourceConfig(source=source, root=root, list_format=list_format)
        lines, notes, names = read_lines(data)
        # one look, where the list is right
        if not any(isinstance(line.path, Member) or is_regular(line.path) for line in lines):
            mistake = lines[0].mistake or file_mistake(lines[0].path)[1]
            raise ValueError(
                f"{source}: none of its {len(lines)} files is there; the first: {mistake}"
            )
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(
            str(error).replace("data.source", "LIST").replace("data.root", "root")
        ) from None
    for note in (*notes, *repetitions(source, [line.path for line in lines])):
        say(note)
    items = []
    for _, place, label, mistake in lines:
        name = place.name if isinstance(place, Member) else place.removeprefix(base)
        items.append(Item(place, name, label, mistake))
    return items, names


class _Stop:
    """Whether the packing is to end, and the signal that asked for it."""

    asked, number = False, 0

    def note(self, number: int, frame: object) -> None:
        self.asked, self.number = True, number


def _pack_all(items: Sequence[Item], writer: ShardWriter, config: PackConfig, stop: _Stop) -> None:
    """Packs and writes what is left of the items, in their order, until all are there or a signal
    comes.
    """
    left = items[writer.num_rows :]
    num_workers = min(config.num_workers or len(os.sched_getaffinity(0)), max(len(left), 1))
    work = partial(_pack_one, config=config, stop=stop)
    with (
        ProgressBar(len(items), initial=writer.num_rows) as progress,
        closing(in_order(work, left, num_workers, _num_bytes)) as outcomes,
    ):
        try:
            for outcome in outcomes:
                if outcome is None or stop.asked:
                    return
                writer.append(*outcome)
                progress.set_postfix(refused=writer.num_refused, refresh=False)
                progress.update()
        finally:
            stop.asked = True  # those at work leave their videos


def _num_bytes(outcome: PackedRow | None) -> int:
    return outcome[1].nbytes if outcome and outcome[1] is not None else 0


def _pack_one(
    item: Item, config: PackConfig, stop: _Stop, *, again: bool = True
) -> PackedRow | None:
    """What becomes of an item; None where the packing ends before."""
    row: dict[str, Any] = {"path": item.name, "label": item.label}
    reason = item.mistake
    if not reason:
        process = decoder_process()
        process.load(decoders.resolve, "pyav")
        try:
            for packed in process.iterate(
                transcode.pack,
                item.place,
                config,
                seconds=config.decode_seconds,
                memory_gb=config.decode_memory_gb,
            ):
                if packed is not None:
                    return {**row, **packed.about}, packed.media
                if stop.asked:
                    return None
        except VideoDecodeError as error:
            reason = error.reason
        except KilledError as killed:
            if again:
                return _pack_one(item, config, stop, again=False)
            reason = str(killed)
            if "no answer" in reason:  # without figures: they are no fact of the video
                reason = "it makes no progress (decode_seconds)"
    return {**row, "refused": reason}, None


def _conclude(
    folder: Path, writer: ShardWriter, settings: dict[str, Any], names: Sequence[str]
) -> int:
    shards, digest, refused = writer.finish(), hashlib.sha256(), b""
    with open(folder / ROWS, "rb") as rows:
        for line in rows:
            digest.update(line)
            if b'"refused"' in line and "refused" in json.loads(line):
                refused += line
    write_text(folder / REFUSED, refused.decode())
    manifest = {
        **settings,
        "class_names": list(names),
        "videos": writer.num_rows - writer.num_refused,
        "refused": writer.num_refused,
        "bytes": sum(shard["bytes"] for shard in shards),
        "rows_sha256": digest.hexdigest(),
        "shards": shards,
    }
    write_json(folder / MANIFEST, manifest)
    return _tell(folder, manifest, "")


def _tell(folder: Path, manifest: dict[str, Any], before: str) -> int:
    refused = f", {manifest['refused']} refused ({REFUSED} says why)" if manifest["refused"] else ""
    say(
        f"{folder}: {before}{manifest['videos']} videos{refused}, "
        f"{manifest['bytes'] / 1e6:.1f} MB in {len(manifest['shards'])} shards; "
        f"data.source={folder}"
    )
    return DONE if manifest["videos"] else NOTHING


def _digest(items: Sequence[Item], names: Sequence[str]) -> str:
    """Of all that the list says; where it lies does not matter."""
    digest = hashlib.sha256(json.dumps(names).encode())
    for item in items:
        digest.update(json.dumps(item[1:]).encode())
    return digest.hexdigest()
