"""The processes of a stage that trains nothing: who does which videos, and how the results come
together. No DeepSpeed needed.
"""

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from video_mae.config.evaluation import EncodingConfig
from video_mae.config.world import World
from video_mae.files import say
from video_mae.progress_bar import ProgressBar
from video_mae.training.engine import leave
from video_mae.training.environment import check_devices, prepare_environment

TIMEOUT = timedelta(days=1)
"""How long a rank that is done waits for the others: theirs may be the long videos."""


def check_start(config: EncodingConfig) -> World:
    """The processes, before any of them does a thing. Raises: ValueError for a launcher's
    environment that lacks a part, and for what needs a GPU where there is none.
    """
    check_devices("precision", config.precision, config.data)
    return World.from_environment()


class Ranks:
    """This process among those that a launcher has started (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT), or alone; `with Ranks() as ranks` ends with the process group.

    Only picklable results travel, so gloo serves on GPUs too.
    """

    def __init__(self) -> None:
        self.device = prepare_environment()
        self.rank, self.size, _ = World.from_environment()
        self.is_main = self.rank == 0
        if self.size > 1:
            dist.init_process_group("gloo", timeout=TIMEOUT)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        if self.size > 1:
            leave()

    def share(self, number: int) -> range:
        """Which of 0, 1, ..., number - 1 are this rank's: each belongs to exactly one."""
        return range(self.rank, number, self.size)

    def say(self, *lines: str) -> None:
        """Prints lines, once for all ranks, without the empty ones."""
        for line in filter(None, lines):
            if self.is_main:
                say(line)

    def progress(self, total: int) -> ProgressBar:
        """How far the main rank is with its videos, or parts of them."""
        shown = "{percentage:3.0f}%|{bar}| {n:.1f}/{total} videos [{elapsed}<{remaining}{postfix}]"
        return ProgressBar(total, disable=not self.is_main, bar_format=shown)

    def gather(self, mine: list[Any]) -> list[Any]:
        """The items of all ranks on rank 0, nothing on the others; every rank must call it."""
        if self.size == 1:
            return mine
        gathered: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(mine, gathered)
        return [item for part in gathered or [] for item in part]
