"""What a run keeps: checkpoints, of which each rank writes its files, and the model folders that
follow from them. What the disk refuses to one rank is told on all.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from video_mae.convert.facts import Tensors
from video_mae.convert.model_folder import allow_readers, save_model_folder
from video_mae.files import StorageError, fsync, storing, write_whole
from video_mae.training import checkpoint
from video_mae.training.heartbeat import progress

if TYPE_CHECKING:
    from video_mae.training.engine import Engine
    from video_mae.training.loop import Training


def write_state(file: Path, state: Tensors) -> tuple[str, dict[str, int]]:
    """Writes a file of a checkpoint; returns its name and digest. Raises: StorageError."""
    with storing(file, sum(tensor.nbytes for tensor in state.values())):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, file)
        allow_readers(file)
        fsync(file)
        return file.name, checkpoint.digest(file)


def on_host(state: Tensors) -> Tensors:
    """A copy that training does not change, in page-locked memory of the host."""
    return {
        name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)
        for name, tensor in state.items()
    }


class CheckpointWriter:
    """Writes the checkpoints of an engine, of which each rank writes a file; a thread does it where
    journal.checkpoint_async says so. What the disk refuses to one is told on all.
    """

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self._writing: Future[str] | str = ""
        self._thread, self._group = ThreadPoolExecutor(1), None
        if engine.config.journal.checkpoint_async:
            # what the threads tell one another must not get between the collectives of training
            self._group = dist.new_group(backend="gloo")

    def write(self, facts: dict[str, Any], state: Tensors, finish: Callable[[], object]) -> None:
        """Writes or begins to write checkpoints/step_N with these facts in its manifest; then the
        main rank does finish().
        """
        engine, config = self.engine, self.engine.config.journal
        building = engine.checkpoints / f".{checkpoint.step_name(facts['step'])}"
        file = building / f"state_{engine.rank:05d}.safetensors"

        def publish(files: Iterable[tuple[str, Any]]) -> None:
            if engine.rank == 0:
                manifest = {**facts, "files": dict(files)}
                with storing(building):
                    checkpoint.publish(
                        building, manifest, config.keep_checkpoints, config.keep_every
                    )
                finish()

        def work() -> str:
            try:
                files = engine.together(partial(write_state, file, state), self._group)
                engine.together(partial(publish, files), self._group)
            except StorageError as error:
                shutil.rmtree(building, ignore_errors=True)
                return str(error)
            return ""

        if self._group is None:
            self._writing = work()
        else:
            state = on_host(state)
            self._writing = self._thread.submit(work)

    def settle(self, *, wait: bool) -> str:
        """What the disk refused of the last save, once, as soon as it is known; else "". It waits
        before a save, and for one.
        """
        if wait:
            progress.begin("saving")
        writing = self._writing
        if isinstance(writing, Future):
            if not (wait or writing.done()):
                return ""
            writing = writing.result()
        self._writing = ""
        return writing

    def close(self) -> None:
        """Waits for the last save. Raises: StorageError where the disk refused it."""
        refusal = self.settle(wait=True)
        if refusal:
            raise StorageError(refusal)


def save_run(run: "Training[Any]", done: int) -> bool:
    """Saves a run after step `done` and publishes its weights; returns whether they are sound:
    nothing is kept of steps that were skipped. Every rank must call it.

    What the disk refuses, `CheckpointWriter.settle` tells; it is tried again when the next
    checkpoint is due. Raises: StorageError where the run folder is gone.
    """
    engine = run.engine
    # a lone one at the end is not the beginning of more
    is_bad = run.skipped_in_a_row > bool(run.reason_to_end(done))
    if is_bad or not all(engine.gather(engine.is_finite())):
        why = "it was skipped" if is_bad else "weights are not finite"
        run.journal.say(f"step {done}: not saved, {why}; the last checkpoint is from before that")
        return False
    if not all(engine.gather((run.folder / "config.yaml").exists())):
        raise StorageError(f"{run.folder}: cannot be written, it was removed; the run ends")
    with suppress(StorageError):
        run.journal.flush()  # lines of steps that will not be done again
    run.memory["sums"] = run.journal.sums()
    finish = partial(_write, run, weights(run))
    engine.save(done, run.memory, run.tensors(), finish)
    return True


def roll_back(run: "Training[Any]", done: int) -> bool:
    """Where engine.on_spike=rollback, and steps have just been skipped: the newest checkpoint
    becomes that of step `done`, so that the next start leaves out the steps between them. Every
    rank must call it.

    Returns whether it does: there is a checkpoint, and it was not gone back to
    engine.max_skipped_in_a_row times before, without another one since. Raises: StorageError.
    """
    engine, config = run.engine, run.config
    if config.engine.on_spike != "rollback" or not run.skipped_in_a_row:
        return False

    def copy() -> bool:
        found = checkpoint.newest(engine.checkpoints) if engine.rank == 0 else None
        if found is None or "counters" not in found[1]:  # DeepSpeed wrote it
            return False
        folder, facts = found
        counters = facts["counters"]
        counters["skipped_steps"] += done - facts["step"]
        counters["global_steps"] = facts["step"] = done
        facts["rollbacks"] = facts.get("rollbacks", 0) + 1
        if facts["rollbacks"] > config.engine.max_skipped_in_a_row:
            return False
        building = folder.with_name(f".{checkpoint.step_name(done)}")
        write_whole(building, partial(shutil.copytree, folder))
        with storing(building):
            checkpoint.publish(building, facts, keep=done)  # the next save sees to what is kept
        run.journal.say(
            f"goes back to {folder.name} and leaves out the steps since then; start the same "
            "command again"
        )
        return True

    run.journal.say(engine.writer.settle(wait=True))
    return engine.together(copy)[0]


def publish(run: "Training[Any]", states: Mapping[str, Tensors]) -> bool:
    """Writes model folders of these weights, by name; returns whether that was done: the disk may
    refuse it, which is told. Every rank must call it.
    """
    try:
        run.engine.together(partial(_write, run, states))
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
