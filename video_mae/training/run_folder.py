"""A run folder is new, or holds an earlier start of this very run: what may differ, which decoder
they share, and which lists.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from video_mae.config import RunConfig, load_config
from video_mae.config.schema import flatten
from video_mae.decoding import resolve_decoder

Config = TypeVar("Config", bound=RunConfig)

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
    "probe.",  # it changes no weight, and no sample
)

LISTS_FILE = "lists.json"


def check_lists(folder: Path, lists: Mapping[str, Mapping[str, Any]], *, allow: bool) -> list[str]:
    """Compares lists, {"digest", "videos"} by their keys, with those of the run in the folder;
    returns a line about each that is another, where `allow` lets it in.

    What is not recorded (earlier versions did not), and the lists of a run without a checkpoint, is
    not compared.
    Raises: ValueError naming the key and the remedy where a list is another than before, under the
    same name.
    """
    file = folder / LISTS_FILE
    if not file.is_file() or not any((folder / "checkpoints").glob("step_*")):
        return []
    try:
        before = json.loads(file.read_bytes())
        changed = [
            f"{key} is another list than that of this run (it had {before[key]['videos']} videos, "
            f"and has {facts['videos']}, of other paths, labels or order)"
            for key, facts in lists.items()
            if key in before and before[key]["digest"] != facts["digest"]
        ]
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{file}: is not readable; remove it, and see that the lists are those of the run"
        ) from None
    if changed and not allow:
        raise ValueError(
            f"{folder}: {changed[0]}; put the list back, set data.allow_changed_list=true to go on "
            "with this one, or choose another output"
        )
    return changed


def settled(config: Config) -> Config:
    """The configuration with the decoder that auto means: that of the run in the folder, or the
    first that works here.

    Raises: ValueError where the folder holds anything but this very run, or its decoder is not
    there any more.
    """
    folder, recorded, wanted = Path(config.output), "auto", config.data.decoder
    before = _run_in(folder, type(config))
    if before is not None:
        recorded = before.data.decoder  # earlier versions wrote auto
        if wanted == "auto":
            wanted = recorded
        was, now = flatten(before), flatten(config)
        now["data.decoder"] = wanted
        if recorded == "auto":
            was["data.decoder"] = wanted
        for key, value in now.items():
            if value != was[key] and not key.startswith(FREE_KEYS):
                raise ValueError(
                    f"{folder}: this run was started with {key} = {was[key]}, now it is {value}; "
                    "set it back, or choose another output"
                )
    try:
        decoder = resolve_decoder(wanted)
    except ValueError as error:
        if recorded == "auto":
            raise
        reason = str(error).removeprefix("data.decoder: ").split(";")[0]
        raise ValueError(
            f"{folder}: this run reads videos with {recorded}: {reason}; install it, or choose "
            "another output"
        ) from None
    return replace(config, data=replace(config.data, decoder=decoder))


def _run_in(folder: Path, schema: type[Config]) -> Config | None:
    """The configuration of the run that a folder holds; None for a new folder. Raises: ValueError
    for any other folder.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(
            f"{folder}: is not empty and not a run folder (no config.yaml); choose another output"
        )
    try:
        return load_config(file, schema=schema)
    except ValueError as error:
        raise ValueError(
            f"{error}: the folder holds a run of another kind; choose another output"
        ) from None
