"""Checkpoints that earlier versions had DeepSpeed write: they are resumed as they were, by the same
ranks in the same mode.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

FROZEN = "frozen_weights"
"""Of rank 0: the float32 values of what is not trained, by name."""


def load_deepspeed_checkpoint(
    engine: Any, folder: Path, tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Loads an engine, and `tensors` in place; returns the memory of the run. Executes pickles."""
    _, state = engine.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
    if engine.rank == 0:
        engine.frozen = state.get(FROZEN, engine.frozen)
    masters = order = engine.masters()
    if engine.deepspeed.optimizer is engine.optimizer:  # ZeRO 0 in float32: all, frozen ones too
        order = list(engine.deepspeed.module.parameters())
    numbers = {master: number for number, master in enumerate(order)}
    wanted = dict(tensors)
    for master, average in zip(masters, engine.beside_masters.get("average", ()), strict=False):
        wanted[f"average.{engine.rank}.{numbers[master]}"] = average
    for file in folder.glob("tensors_*.safetensors"):
        with safe_open(file, framework="pt") as saved:
            for name in wanted.keys() & saved.keys():
                wanted[name].copy_(saved.get_tensor(name))
    return state.get("memory", {})  # still earlier ones wrote none
