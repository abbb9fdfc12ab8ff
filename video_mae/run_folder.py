"""A run folder is new, or holds an earlier start of this very run: what may differ, and which decoder they share."""

from dataclasses import replace
from pathlib import Path

from video_mae.config import RunConfig, load_config
from video_mae.decoding import resolve_decoder
from video_mae.schema import flatten

# What may change when a run folder is started again; anything else would silently make it another run.
FREE_KEYS = ("output", "journal.", "data.num_workers", "data.decoder_threads", "data.prefetch_batches", "data.decode_seconds",
             "data.decode_memory_gb", "data.max_bad_share", "engine.compile", "engine.kernels", "engine.activation_checkpointing",
             "engine.max_skipped_in_a_row", "validation.batch")


def settled(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration with the decoder that auto means: that of the run in the folder, or the first that works here.

    Raises: ValueError where the folder holds anything but this very run, or its decoder is not there any more.
    """
    before = _run_in(folder, type(config))
    recorded = before.data.decoder if before is not None else "auto"  # earlier versions wrote auto
    wanted = recorded if config.data.decoder == "auto" else config.data.decoder
    if before is not None:
        before = replace(before, data=replace(before.data, decoder=wanted if recorded == "auto" else recorded))
        _check_same(before, replace(config, data=replace(config.data, decoder=wanted)), folder)
    try:
        found = resolve_decoder(wanted)
    except ValueError as error:
        if recorded == "auto":
            raise
        raise ValueError(f"{folder}: this run reads videos with {recorded}: {str(error).removeprefix('data.decoder: ').split(';')[0]}; "
                         "install it, or choose another output") from None
    return replace(config, data=replace(config.data, decoder=found))


def _run_in(folder: Path, schema: type[RunConfig]) -> RunConfig | None:
    """The configuration of the run that a folder holds; None for a new folder. Raises: ValueError for any other folder."""
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: is not empty and not a run folder (no config.yaml); choose another output")
    try:
        return load_config(folder / "config.yaml", schema=schema)
    except ValueError as error:
        raise ValueError(f"{error}: the folder holds a run of another kind; choose another output") from None


def _check_same(before: RunConfig, config: RunConfig, folder: Path) -> None:
    flat = flatten(before)
    for key, value in flatten(config).items():
        if value != flat[key] and not key.startswith(FREE_KEYS):
            raise ValueError(f"{folder}: this run was started with {key} = {flat[key]}, now it is {value}; set it back, or choose "
                             "another output")
