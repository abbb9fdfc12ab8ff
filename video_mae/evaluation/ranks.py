"""The processes of a stage that trains nothing: who does which videos, and how the results come
together. No DeepSpeed needed.
"""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from video_mae.config.world import World
from video_mae.training.engine import leave, prepare_environment

TIMEOUT = timedelta(days=1)
"""How long a rank that is done waits for the others: theirs may be the long videos."""


class Ranks:
    """This process among those that a launcher has started (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT), or alone.

    Only picklable results travel, so gloo serves on GPUs too.
    """

    def __init__(self) -> None:
        self.rank, self.size, _ = World.from_environment()
        prepare_environment()
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if self.size > 1:
            dist.init_process_group("gloo", timeout=TIMEOUT)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, number: int) -> range:
        """Which of 0, 1, ..., number - 1 are this rank's: each belongs to exactly one."""
        return range(self.rank, number, self.size)

    def gather(self, mine: list[Any]) -> list[Any]:
        """The items of all ranks on rank 0, nothing on the others; every rank must call it."""
        if self.size == 1:
            return mine
        gathered: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(mine, gathered)
        return [item for part in gathered or [] for item in part]

    def leave(self) -> None:
        """Ends the process group."""
        if self.size > 1:
            leave()
