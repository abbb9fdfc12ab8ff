"""The processes that run together, as a launcher tells each of them in its environment: the one
place that reads it.
"""

import os
import re
from typing import NamedTuple

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SLURM_NAMES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
"""How srun tells each of its tasks the first three."""


class World(NamedTuple):
    """This process, number `rank` of `size`, and number `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "World":
        """What deepspeed or torchrun has set, or srun, where the job names MASTER_ADDR; alone
        without a launcher, whatever else a job script has left.

        Raises: ValueError with one line where a part is missing that several processes need, or one
        contradicts another.
        """
        found = [name for name in NAMES if os.environ.get(name)]
        tasks = [os.environ.get(name, "") for name in SLURM_NAMES]
        if found[:1] == ["MASTER_ADDR"] and all(tasks):
            # by the names that torch and DeepSpeed read
            os.environ.update(zip(NAMES, tasks, strict=False))
            found = [*NAMES[:3], *found]
        world = cls(_number("RANK"), _number("WORLD_SIZE", 1), _number("LOCAL_RANK"))
        if "RANK" not in found and world.size == 1:
            if _number("SLURM_NTASKS", 1) > 1:
                raise ValueError(
                    "SLURM_NTASKS: is above 1, and each task would work as if it were alone; set "
                    "MASTER_ADDR and MASTER_PORT in the job, have srun start torchrun, one task a "
                    "node, or unset SLURM_NTASKS for one process"
                )
            return cls()
        needed = NAMES if world.size > 1 else NAMES[:2]
        missing = [name for name in needed if name not in found]
        if missing:
            there = " ".join(f"{name}={os.environ[name]}" for name in found)
            raise ValueError(
                f"{', '.join(missing)}: not set in the environment, where {there} says that a "
                "launcher started this; start it with deepspeed or torchrun, or as one process: "
                f"unset {' '.join(found)}"
            )
        if not world.rank < world.size:
            raise ValueError(
                f"RANK: {world.rank} is not below WORLD_SIZE = {world.size}; correct the "
                "environment, or unset both for one process"
            )
        if world.size > 1:
            _number("MASTER_PORT", most=65535)
        return world


def ranks_here() -> int:
    """How many of the processes are on this machine, as torchrun or deepspeed calls it. Raises:
    ValueError.
    """
    return _number("LOCAL_WORLD_SIZE") or _number("LOCAL_SIZE") or 1


def _number(name: str, least: int = 0, most: int = 10**9) -> int:
    """A variable of the environment, `least` where it is not set."""
    text = os.environ.get(name) or str(least)
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        raise ValueError(
            f"{name}: {text[:40]} in the environment is not a number that a launcher gives; "
            "correct or unset it"
        )
    return int(text)
