"""Many runs in one process group, because a launch is mostly imports: what test_launcher.py has
started.

Arguments: a YAML file of [{name, stage, config, overrides, crash_after, poison}, ...], and the
folder of the runs. With `crash_after` a run is done, then everything after that step is forgotten
as if the machine had failed, and the run is started again. With `poison` the loss of the last rank
is not finite in step 2, and in step 4 one number of what that rank updates weights by; these change
no weight. What fills up the share of a rank in ZeRO 3 is never finite: DeepSpeed leaves there what
the memory held.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from video_mae.config import FinetuneConfig, PretrainConfig, load_config
from video_mae.config.world import World
from video_mae.training import device_step, finetune, pretrain
from video_mae.training.checkpoint import step_name
from video_mae.training.engine import Engine, leave
from video_mae.training.loop import Training

STAGES = {"pretrain": (pretrain, PretrainConfig), "finetune": (finetune, FinetuneConfig)}


def spoil_filling() -> None:
    """From now on, where a run begins only what belongs to a weight is finite."""
    healthy_begin = Training.begin

    def begin(self: Training[Any]) -> None:
        if self.config.engine.zero_stage == 3:
            masters = self.engine.masters()
            of_weights = [torch.zeros(len(master), dtype=torch.bool) for master in masters]
            for _, _, index, place in device_step.layout(self.engine.deepspeed):
                of_weights[index][place] = True
            for master, is_of_weight in zip(masters, of_weights, strict=True):
                master.detach()[~is_of_weight] = float("nan")
        healthy_begin(self)

    Training.begin = begin


def main() -> None:
    spoil_filling()
    runs, folder = (
        Path(argument) for argument in sys.argv[1:] if not argument.startswith("--local_rank")
    )
    for spec in yaml.safe_load(runs.read_text()):
        output, (stage, schema) = folder / spec["name"], STAGES[spec["stage"]]
        start = load_config(spec["config"], [*spec["overrides"], f"output={output}"], schema)
        with poisoned() if spec.get("poison") else nullcontext():
            assert stage.run(stage.prepare(start)) == 0
        if spec.get("crash_after"):
            if World.from_environment().rank == 0:
                forget_after(output, spec["crash_after"])
            torch.distributed.barrier()
            assert stage.run(stage.prepare(start)) == 0
    leave()


@contextmanager
def poisoned() -> Iterator[None]:
    healthy_backward, healthy_step = Engine.backward, Engine.step

    def backward(self: Engine, loss: torch.Tensor, *, last: bool) -> None:
        is_bad = (
            self.deepspeed.global_steps + 1 == 2 and self.rank == self.world_size - 1 and not last
        )
        healthy_backward(self, loss * float("nan") if is_bad else loss, last=last)

    def step(self: Engine, lr: float) -> torch.Tensor | float:
        number, stage = self.deepspeed.global_steps + 1, self.config.engine.zero_stage
        before = self.full_state()
        # in stage 0 ranks have the same gradients
        if number == 4 and (stage == 0 or self.rank == self.world_size - 1):
            gradients = device_step.gradients(self.deepspeed)
            next(gradient for gradient in gradients if gradient.numel()).view(-1)[0] = float("inf")
        result = healthy_step(self, lr)
        is_same = all(torch.equal(before[name], value) for name, value in self.full_state().items())
        assert self.rank != 0 or is_same == (number in (2, 4))
        return result

    Engine.backward, Engine.step = backward, step
    yield
    Engine.backward, Engine.step = healthy_backward, healthy_step


def forget_after(output: Path, step: int) -> None:
    for name in ("model", "model_ema", "best"):
        if (output / name).is_dir():
            (output / name).rename(output / f"{name}_uninterrupted")
    shutil.copy(output / "metrics.jsonl", output / "metrics_uninterrupted.jsonl")
    for checkpoint in (output / "checkpoints").glob("step_*"):
        if checkpoint.name > step_name(step):
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
