"""A moving average of the weights that a run trains, sharded over ranks as their float32 masters
are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from video_mae.training.engine import Engine


def warmed_decay(decay: float, step: int) -> float:
    """The decay of step 0, 1, ...: min(decay, (1 + step) / (10 + step)), so that the random first
    weights are soon forgotten. Source: ExponentialMovingAverage of TensorFlow (its num_updates).
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """average = d * average + (1 - d) * weights after every step, d = warmed_decay(decay, step);
    it starts as the weights are, and is part of a checkpoint as they are.

    Each rank averages what it updates: in ZeRO 1 to 3 its share, 4 bytes a weight over the number
    of ranks, and no rank tells another anything. The host does not know which steps are skipped,
    so these count too: as steps that have changed no weight.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.averages = [master.detach().clone() for master in engine.masters()]
        engine.beside_masters["average"] = self.averages

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights as step 0, 1, ... has left them."""
        weight = 1 - warmed_decay(self.decay, step)
        torch._foreach_lerp_(self.averages, self.engine.masters(), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the engine's weights are the averages; every rank must enter. Not for a step."""
        # Nothing is put back after an error: other ranks would not take part.
        self.engine.exchange(self.averages)
        yield
        self.engine.exchange(self.averages)
