"""What a run keeps: checkpoints, and the model folders that follow from them. Nothing is kept of
steps that were skipped, and what the disk refuses is tried again when the next checkpoint is due.

Every rank must call these.
"""

import errno
import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from video_mae.convert.facts import Tensors
from video_mae.convert.model_folder import save_model_folder
from video_mae.files import StorageError, storing
from video_mae.training.saving import together

if TYPE_CHECKING:
    from video_mae.training.loop import Training


def save_run(run: "Training[Any]", done: int) -> bool:
    """Saves a run after step `done` and publishes its weights, unless they are not sound; returns
    whether they are.

    Raises: StorageError where the run folder is gone.
    """
    engine, unsound = run.engine, ""
    # a lone one at the end is not the beginning of more
    if run.skipped_in_a_row > (done == run.schedule.total_steps):
        unsound = "it was skipped; the last checkpoint is from before the skipped steps"
    elif not engine.is_finite():
        unsound = "not all weights are finite"
    if unsound:
        run.journal.say(f"step {done}: not saved, {unsound}")
        return False
    if not all(engine.gather((run.folder / "config.yaml").exists())):
        with storing(run.folder):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    run.memory["sums"] = run.journal.sums()
    finish = partial(_write, run, weights(run))
    engine.save(done, run.config.journal.keep_checkpoints, run.memory, run.tensors(), finish)
    return True


def publish(run: "Training[Any]", states: Mapping[str, Tensors]) -> bool:
    """Writes model folders of these weights, by name; returns whether that was done: the disk may
    refuse it, which is told.
    """
    try:
        together(partial(_write, run, states), run.engine.gather)
    except StorageError as error:
        run.journal.say(str(error))
        return False
    return True


def weights(run: "Training[Any]") -> dict[str, Tensors]:
    """The weights of the model folders that follow the checkpoints."""
    states = {"model": run.engine.full_state()}
    if run.average:
        with run.average.in_place():
            states["model_ema"] = run.engine.full_state()
    return states


def _write(run: "Training[Any]", states: Mapping[str, Tensors]) -> None:
    if run.engine.rank == 0:
        for name, state in states.items():
            save_model_folder(run.folder / name, run.model, state)
