"""Many runs in one process group, because a launch is mostly imports: what test_launcher.py has started.

Arguments: a YAML file of [{name, stage, config, overrides, crash_after}, ...], and the folder of the runs. With `crash_after` a run
is done, then everything after that step is forgotten as if the machine had failed, and the run is started again.
"""

import shutil
import sys
from pathlib import Path

import torch
import yaml

from video_mae import finetune, pretrain
from video_mae.checkpoint import step_name
from video_mae.config import FinetuneConfig, PretrainConfig, load_config
from video_mae.engine import leave, world_from_environment

STAGES = {"pretrain": (pretrain, PretrainConfig), "finetune": (finetune, FinetuneConfig)}


def main() -> None:
    runs, folder = (Path(argument) for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
    for spec in yaml.safe_load(runs.read_text()):
        output, (stage, schema) = folder / spec["name"], STAGES[spec["stage"]]
        start = load_config(spec["config"], [*spec["overrides"], f"output={output}"], schema)
        assert stage.run(stage.prepare(start)) == 0
        if spec.get("crash_after"):
            if world_from_environment()[0] == 0:
                forget_after(output, spec["crash_after"])
            torch.distributed.barrier()
            assert stage.run(stage.prepare(start)) == 0
    leave()


def forget_after(output: Path, step: int) -> None:
    for name in ("model", "best"):
        if (output / name).is_dir():
            (output / name).rename(output / f"{name}_uninterrupted")
    shutil.copy(output / "metrics.jsonl", output / "metrics_uninterrupted.jsonl")
    for checkpoint in (output / "checkpoints").glob("step_*"):
        if checkpoint.name > step_name(step):
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    main()
