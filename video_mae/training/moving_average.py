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
    it starts as the weights are.

    Each rank averages what it updates: in ZeRO 1 to 3 its share, 4 bytes a weight over the number
    of ranks, and no rank tells another anything. The host does not know which steps are skipped,
    so these count too: as steps that have changed no weight. tensors: float32, by names that no
    other rank has.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        masters = engine.masters()
        # copies in the layout of the masters, where these are
        copies = [master.detach().clone() for master in masters]
        self.tensors = {f"average.{engine.rank}.{i}": copy for i, copy in enumerate(copies)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights as step 0, 1, ... has left them."""
        weight = 1 - warmed_decay(self.decay, step)
        torch._foreach_lerp_(list(self.tensors.values()), self.engine.masters(), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the engine's weights are the averages; every rank must enter. Not for a step."""
        # Nothing is put back after an error: other ranks would not take part.
        self.engine.exchange(self.tensors.values())
        yield
        self.engine.exchange(self.tensors.values())
