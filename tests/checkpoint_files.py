"""What checkpoints hold, read in another way than a run does; and checkpoints as earlier versions
wrote them.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from video_mae.training import checkpoint
from video_mae.training.engine import Engine


def saved_state(folder: Path) -> dict[str, torch.Tensor]:
    """{KIND/NAME: all its numbers} of a checkpoint, whatever ranks wrote it. Each number is to be
    there once.
    """
    parts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for file in sorted(folder.glob("state_*.safetensors")):
        for key, tensor in load_file(file).items():
            name, start = key.rsplit("/", 1)
            if len(tensor):
                assert int(start) not in parts[name], key
                parts[name][int(start)] = tensor
    state = {}
    for name, of in parts.items():
        starts = sorted(of)
        sizes = [len(of[start]) for start in starts]
        assert starts == [sum(sizes[:i]) for i in range(len(sizes))], name
        state[name] = torch.cat([of[start] for start in starts])
    return state


def losses(folder: Path) -> list[float]:
    """Those of its steps, in their order."""
    lines = map(json.loads, (folder / "metrics.jsonl").open())
    return [line["loss"] for line in lines if "loss" in line]


def forgotten(folder: Path, copy: Path, step: int) -> Path:
    """A copy of a run that knows nothing of what came after a step."""
    shutil.copytree(folder, copy)
    for found in (copy / "checkpoints").glob("step_*"):
        if found.name > checkpoint.step_name(step):
            shutil.rmtree(found)
    return copy


def saved_memory(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "MANIFEST.json").read_text())["memory"]


def save_as_before(
    self: Engine,
    step: int,
    memory: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    finish: Callable[[], object],
) -> None:
    """Engine.save of the versions in which DeepSpeed wrote the state."""
    averages = self.beside_masters.get("average", [])
    if self.deepspeed.optimizer is self.optimizer:  # it averaged what was not trained, too
        numbers = {id(p): i for i, p in enumerate(self.deepspeed.module.parameters())}
        order = [numbers[id(master)] for master in self.masters()]
    else:
        order = range(len(averages))
    own = {f"average.{self.rank}.{i}": average for i, average in zip(order, averages, strict=False)}
    if self.rank == 0:
        own |= tensors
    building = self.checkpoints / f".{checkpoint.step_name(step)}"
    if self.rank == 0:
        shutil.rmtree(building, ignore_errors=True)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    self.deepspeed.skipped_steps = int(self.skipped_steps)
    self.deepspeed.save_checkpoint(
        str(self.checkpoints),
        tag=building.name,
        client_state={"step": step, "memory": memory, "frozen_weights": self.frozen},
        save_latest=False,
        exclude_frozen_parameters=False,
    )
    if own:
        save_file(own, building / f"tensors_{self.rank}.safetensors")
    torch.distributed.barrier()
    if self.rank == 0:
        paths = [path for path in building.rglob("*") if path.is_file()]
        files = {str(path.relative_to(building)): checkpoint.digest(path) for path in paths}
        manifest = {"step": step, **checkpoint.facts(self.config), "files": files}
        checkpoint.publish(building, manifest, self.config.journal.keep_checkpoints)
        finish()
    torch.distributed.barrier()
