"""Many pretraining runs in one process group, because a launch is mostly imports: what test_launcher.py has started.

Arguments: CONFIG, a YAML file of [{name, overrides, crash_after}, ...], and the folder of the runs. With `crash_after` a run is
done, then everything after that step is forgotten as if the machine had failed, and the run is started again.
"""

import shutil
import sys
from pathlib import Path

import torch
import yaml

from video_mae.checkpoint import step_name
from video_mae.config import load_config
from video_mae.engine import leave, world_from_environment
from video_mae.pretrain import prepare, run


def main() -> None:
    config, runs, folder = (Path(argument) for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    for spec in yaml.safe_load(runs.read_text()):
        output = folder / spec["name"]
        start = load_config(config, [*spec["overrides"], f"output={output}"])
        assert run(prepare(start)) == 0
        if spec.get("crash_after"):
            if world_from_environment()[0] == 0:
                forget_after(output, spec["crash_after"])
            torch.distributed.barrier()
            assert run(prepare(start)) == 0
    leave()


def forget_after(output: Path, step: int) -> None:
    (output / "model").rename(output / "model_uninterrupted")
    shutil.copy(output / "metrics.jsonl", output / "metrics_uninterrupted.jsonl")
    for checkpoint in (output / "checkpoints").glob("step_*"):
        if checkpoint.name > step_name(step):
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
