"""A run folder is new, or holds an earlier start of this very run: what may differ, which decoder
they share, and which lists.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from video_mae.config import RunConfig, load_config
from video_mae.config.schema import flatten
from video_mae.decoding import resolve_decoder
from video_mae.files import write_whole

# What may change when a run folder is started again; anything else would silently make it another
# run.
FREE_KEYS = (
    "output",
    "journal.",
    "data.num_workers",
    "data.decoder_threads",
    "data.prefetch_batches",
    "data.decode_seconds",
    "data.decode_memory_gb",
    "data.max_bad_share",
    "data.allow_changed_list",
    "engine.compile",
    "engine.kernels",
    "engine.activation_checkpointing",
    "engine.max_skipped_in_a_row",
    "validation.batch",
)

LISTS_FILE = "lists.json"


class ListFacts(NamedTuple):
    """What is known of a list, or of a packed folder: a digest of all its paths and labels in their
    order, and how many there are.
    """

    digest: str
    videos: int


def check_lists(folder: Path, lists: Mapping[str, ListFacts], *, allow_changed: bool) -> str:
    """Compares the lists, by their keys, with those of the run in the folder; returns a line about
    the others, where they are allowed.

    What is not recorded (earlier versions did not), and the lists of a run without a checkpoint, is
    not compared.
    Raises: ValueError naming the key and the remedy where a list is another than before, under the
    same name.
    """
    file = folder / LISTS_FILE
    if not file.is_file() or not any((folder / "checkpoints").glob("step_*")):
        return ""
    try:
        before = {key: ListFacts(**facts) for key, facts in json.loads(file.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{file}: is not readable; remove it, and see that the lists are those of the run"
        ) from None
    changed = [
        f"{key} is another list than that of this run (it had {before[key].videos} videos, and has {facts.videos}, of other paths, "
        "labels or order)"
        for key, facts in lists.items()
        if key in before and before[key].digest != facts.digest
    ]
    if changed and not allow_changed:
        raise ValueError(
            f"{folder}: {changed[0]}; put the list back, set data.allow_changed_list=true to go on with this one, or choose "
            "another output"
        )
    return "; ".join(changed)


def write_lists(folder: Path, lists: Mapping[str, ListFacts]) -> None:
    """Records which lists a run reads."""
    text = json.dumps({key: facts._asdict() for key, facts in lists.items()}, indent=2) + "\n"

    def write(unfinished: Path) -> None:
        unfinished.write_text(text)

    write_whole(folder / LISTS_FILE, write)


def settled(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with the decoder that auto means: that of the run in the folder, or the
    first that works here.

    Raises: ValueError where the folder holds anything but this very run, or its decoder is not
    there any more.
    """
    before = _run_in(folder, type(config))
    recorded = before.data.decoder if before is not None else "auto"  # earlier versions wrote auto
    wanted = recorded if config.data.decoder == "auto" else config.data.decoder
    if before is not None:
        before = replace(
            before, data=replace(before.data, decoder=wanted if recorded == "auto" else recorded)
        )
        _check_same(before, replace(config, data=replace(config.data, decoder=wanted)), folder)
    try:
        found = resolve_decoder(wanted)
    except ValueError as error:
        if recorded == "auto":
            raise
        raise ValueError(
            f"{folder}: this run reads videos with {recorded}: {str(error).removeprefix('data.decoder: ').split(';')[0]}; "
            "install it, or choose another output"
        ) from None
    return replace(config, data=replace(config.data, decoder=found))


def _run_in(folder: Path, schema: type[RunConfig]) -> RunConfig | None:
    """The configuration of the run that a folder holds; None for a new folder. Raises: ValueError
    for any other folder.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder}: is not empty and not a run folder (no config.yaml); choose another output"
        )
    try:
        return load_config(folder / "config.yaml", schema=schema)
    except ValueError as error:
        raise ValueError(
            f"{error}: the folder holds a run of another kind; choose another output"
        ) from None


def _check_same(before: RunConfig, config: RunConfig, folder: Path) -> None:
    flat = flatten(before)
    for key, value in flatten(config).items():
        if value != flat[key] and not key.startswith(FREE_KEYS):
            raise ValueError(
                f"{folder}: this run was started with {key} = {flat[key]}, now it is {value}; set it back, or choose "
                "another output"
            )
