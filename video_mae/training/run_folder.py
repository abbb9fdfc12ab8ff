"""A run folder is new, or holds an earlier start of this very run: what may differ, which decoder
they share, and which lists.
"""

import json
import math
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from video_mae.config import OptimConfig, RunConfig, load_config
from video_mae.config.schema import flatten
from video_mae.config.world import World
from video_mae.decoding import resolve_decoder
from video_mae.files import StorageError, check_folder, read_text
from video_mae.processes import require_free
from video_mae.training.checkpoint import facts, newest, steps_done

if TYPE_CHECKING:
    from video_mae.training.optim import Schedule

Config = TypeVar("Config", bound=RunConfig)

# What may change when a run folder is started again; anything else would silently make it another
# run.
FREE_KEYS = (
    "output",
    "dry_run",
    "data.root",  # the digest of the list tells whether its paths are others
    "validation.root",
    "journal.",
    "data.num_workers",
    "data.decoder_threads",
    "data.prefetch_batches",
    "data.decode_seconds",
    "data.decode_memory_gb",
    "data.max_bad_share",
    "data.allow_changed_list",
    "engine.",
    "optim.accumulation",
    "optim.global_batch",  # what it makes of these two and the ranks is compared
    "validation.batch",
    "validation.patience",
    "classifier.class_names",  # the digest tells whether labels are others
    "probe.",  # it changes no weight, and no sample
)

# With optim.schedule = constant_cooldown these may change too: `check_rates` sees to it that the
# steps that are done keep their rates. Stages that have not begun are as free.
LENGTHS = ("optim.steps", "optim.epochs", "optim.warmup_", "optim.cooldown_")

# What a stage finds out for itself, from the model that it starts from and from its lists.
FOUND_KEYS = ("model.target_width", "model.position_grid", "classifier.num_classes")

# May come apart in another way, but stays.
GLOBAL_BATCH = "ranks x optim.micro_batch x optim.accumulation"

LISTS_FILE = "lists.json"


def check_lists(config: RunConfig, lists: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Compares lists, {"digest", "videos"} by their keys, with those of the run in the folder;
    returns a line about each that is another, where data.allow_changed_list lets it in.

    What is not recorded (earlier versions did not), and the lists of a run without a checkpoint, is
    not compared.
    Raises: ValueError naming the key and the remedy where a list is another than before, under the
    same name.
    """
    file = Path(config.output) / LISTS_FILE
    if not file.is_file() or not config.has_begun:
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
    if changed and not config.data.allow_changed_list:
        raise ValueError(
            f"{config.output}: {changed[0]}; put the list back, set data.allow_changed_list=true "
            "to go on with this one, or choose another output"
        )
    return changed


def settled(config: Config) -> tuple[Config, OptimConfig, list[str]]:
    """The configuration with the decoder that auto means, that of the run in the folder or the
    first that works here; the optimization that the run had before (for a new one the same), with
    the micro-batch and accumulation of now; and what `check_same_run` tells.

    Raises: as it does, and ValueError where the decoder of the run is not there any more.
    """
    folder, recorded, wanted = Path(config.output), "auto", config.data.decoder
    before, turns = run_in(config), check_same_run(config, FREE_KEYS)
    if before is not None:
        recorded = before.data.decoder  # earlier versions wrote auto
        if wanted == "auto":
            wanted = recorded
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
    config = replace(config, data=replace(config.data, decoder=decoder))
    then, optim = (before or config).optim, config.optim
    then = replace(then, micro_batch=optim.micro_batch, accumulation=optim.accumulation)
    return config, then, turns


def check_same_run(config: RunConfig, free: tuple[str, ...] = FREE_KEYS + FOUND_KEYS) -> list[str]:
    """Compares a configuration with that of the run in its folder, but for keys that are free;
    returns a line about each fact that was another when the newest checkpoint was written. By
    default that is as much as is known before lists and models are read.

    Raises: ValueError where the folder holds anything but this very run, naming all keys that were
    others, or an earlier version wrote the checkpoint in another mode.
    """
    before, folder = run_in(config), Path(config.output)
    if before is None:
        return []
    turns, done = list[str](), math.inf
    was, now = flatten(before), flatten(config)
    if "auto" in (was["data.decoder"], now["data.decoder"]):
        was["data.decoder"] = now["data.decoder"]
    if now.get("objective.negatives") != "batch":  # which come from a micro-batch
        free += ("optim.micro_batch",)
    if before.optim.schedule == "constant_cooldown":
        free, done = free + LENGTHS, steps_done(folder)
    for flat in (was, now):
        stages = flat.get("stages", {}).values()  # fine-tuning has none
        own = flat["optim.micro_batch"]
        flat["stages"] = {
            (replace(stage, micro_batch=None), (stage.micro_batch or own) / own)
            for stage in stages
            if stage.from_step < done
        }
    found = newest(folder / "checkpoints")
    if found is not None:
        place, manifest = found
        here = facts(config)
        turns = [
            f"{place}: was written with {key} = {manifest[key]}, this start has {value}"
            for key, value in here.items()
            if manifest.get(key, value) != value
        ]
        if turns and "memory" not in manifest:
            raise ValueError(
                f"{turns[0]}; an earlier version wrote it: start as before until there is a "
                "newer one, or choose another output folder"
            )
        then, optim = before.optim, config.optim
        earlier = then.micro_batch * then.accumulation * manifest["world_size"]
        was[GLOBAL_BATCH] = manifest.get("videos_per_step", earlier)
        now[GLOBAL_BATCH] = here["world_size"] * optim.micro_batch * optim.accumulation
    changed = [
        f"with {key} = {was[key]}, now it is {value}"
        for key, value in now.items()
        if value != was[key] and not key.startswith(free)
    ]
    if changed:
        raise ValueError(
            f"{folder}: this run was started {'; '.join(changed)}; set it back, or choose another "
            "output"
        )
    return turns


def check_rates(folder: Path, before: "Schedule", now: "Schedule") -> None:
    """Raises: ValueError where another schedule changes the learning rates of the steps that are
    done, or ends before them.
    """
    if now == before:
        return
    done, kept = steps_done(folder), 0
    while kept < min(done, now.total_steps) and now.lr(kept) == before.lr(kept):
        kept += 1
    if kept < done:
        raise ValueError(
            f"{folder}: {done} steps are done, of which this start would leave {kept} at their "
            "learning rates; let its cooldown begin later, or, where the run has begun to cool "
            f"down, go on in a copy of the folder without the checkpoints after step {kept}"
        )


def run_in(config: Config) -> Config | None:
    """The configuration of the run that the folder of one holds; None for a new folder. Raises:
    ValueError for any other folder.
    """
    folder = Path(config.output)
    check_folder(folder)
    # a dry run leaves one that is to be begun anew where it is
    if config.from_scratch or not folder.exists():
        return None
    # a start that came to nothing leaves what is hidden, and may have logged why
    if all(path.name[0] == "." or path.name == "log.txt" for path in folder.iterdir()):
        return None
    file = folder / "config.yaml"
    if not file.is_file():
        raise ValueError(
            f"{folder}: is not empty and not a run folder (no config.yaml); choose another output"
        )
    try:
        # Earlier versions left a part of it where a disk was full. The last section that all of
        # them wrote is `journal`.
        if "\njournal:\n" not in read_text(file):
            raise ValueError(f"{file}: is not whole")
        return load_config(file, schema=type(config))
    except ValueError as error:
        raise ValueError(
            f"{error}: damaged, or of a run of another kind; put it back, choose another output, "
            "or begin anew with --from-scratch, which renames the folder"
        ) from None


def check_shared(folder: Path) -> None:
    """Raises: StorageError on a rank that does not see what the first one has written."""
    if not (folder / "config.yaml").is_file():
        raise StorageError(
            f"{folder.absolute()}: rank {World.from_environment().rank} on {socket.gethostname()} "
            "does not see what the first rank wrote there; name an output that all nodes share"
        )


def set_aside(config: Config) -> Config:
    """With from_scratch renames the folder of an earlier run; returns the configuration without it.
    Each rank may call it, before any makes a new folder. Raises: ValueError where it is at work.
    """
    folder = Path(config.output)
    if config.dry_run:
        return config
    if config.from_scratch and (folder / "config.yaml").exists():
        with suppress(FileNotFoundError):  # another rank was first
            require_free(folder)
            folder.rename(f"{folder}.earlier_{int(time.time())}")
    return replace(config, from_scratch=False)
