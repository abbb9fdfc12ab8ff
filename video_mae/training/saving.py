"""What a run keeps: checkpoints, of which each rank writes its files, and the model folders that
follow from them. What the disk refuses to one rank is told on all.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_leaves

from video_mae.convert.facts import Tensors
from video_mae.convert.model_folder import save_model_folder
from video_mae.files import StorageError, fsync, storing
from video_mae.training.checkpoint import digest

if TYPE_CHECKING:
    from video_mae.training.loop import Training


def attempt(work: Callable[[], Any]) -> Any:
    """What work() returns, or the StorageError that it raises: to be gathered, where all ranks are
    to know.
    """
    try:
        return work()
    except StorageError as error:
        return error


def write_files(folder: Path, files: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Writes files of a checkpoint, by name: tensors by name for *.safetensors, else what
    torch.save takes; returns their digests. Raises: StorageError.
    """
    digests = {}
    tensors = filter(torch.is_tensor, tree_leaves(files))
    with storing(folder, sum(tensor.nbytes for tensor in tensors)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = folder / name
            if path.suffix == ".safetensors":
                save_file(content, path)
            else:
                torch.save(content, path)
            fsync(path)
            digests[name] = digest(path)
    return digests


def on_host(content: Any) -> Any:
    """A copy that training does not change, its tensors in page-locked memory of the host."""
    copies = {}
    for tensor in filter(torch.is_tensor, tree_leaves(content)):
        there = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        copies[id(tensor)] = there.copy_(tensor.detach())
    return copy.deepcopy(content, copies)


def save_run(run: "Training[Any]", done: int) -> bool:
    """Saves a run after step `done` and publishes its weights; returns whether they are sound:
    nothing is kept of steps that were skipped. Every rank must call it.

    What the disk refuses, `Engine.settle` tells; it is tried again when the next checkpoint is due.
    Raises: StorageError where the run folder is gone.
    """
    engine = run.engine
    # a lone one at the end is not the beginning of more
    is_bad = run.skipped_in_a_row > (done == run.schedule.total_steps)
    if is_bad or not engine.is_finite():
        why = "it was skipped" if is_bad else "weights are not finite"
        run.journal.say(f"step {done}: not saved, {why}; the last checkpoint is from before that")
        return False
    if not all(engine.gather((run.folder / "config.yaml").exists())):
        raise StorageError(f"{run.folder}: cannot be written, it was removed; the run ends")
    run.memory["sums"] = run.journal.sums()
    finish = partial(_write, run, weights(run))
    engine.save(done, run.config.journal.keep_checkpoints, run.memory, run.tensors(), finish)
    return True


def publish(run: "Training[Any]", states: Mapping[str, Tensors]) -> bool:
    """Writes model folders of these weights, by name; returns whether that was done: the disk may
    refuse it, which is told. Every rank must call it.
    """
    try:
        run.engine.gather(attempt(partial(_write, run, states)))
    except StorageError as error:
        run.journal.say(str(error))
        return False
    return True


def weights(run: "Training[Any]") -> dict[str, Tensors]:
    """The weights of the model folders that follow the checkpoints; every rank must call it."""
    states = {"model": run.engine.full_state()}
    if run.average:
        with run.average.in_place():
            states["model_ema"] = run.engine.full_state()
    return states


def _write(run: "Training[Any]", states: Mapping[str, Tensors]) -> None:
    if run.engine.rank == 0:
        for name, state in states.items():
            save_model_folder(run.folder / name, run.model, state)
