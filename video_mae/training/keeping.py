"""What a run keeps: checkpoints, and the model folders that follow from them. Nothing is kept of
steps that were skipped, and what the disk refuses is tried again when the next checkpoint is due.

Every rank must call these.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from video_mae.convert.facts import Tensors
from video_mae.convert.model_folder import save_model_folder
from video_mae.files import StorageError
from video_mae.training.saving import attempt

if TYPE_CHECKING:
    from video_mae.training.loop import Training


def save_run(run: "Training[Any]", done: int) -> bool:
    """Saves a run after step `done` and publishes its weights, unless they are not sound; returns
    whether they are.

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
    refuse it, which is told.
    """
    try:
        run.engine.gather(attempt(partial(_write, run, states)))
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
