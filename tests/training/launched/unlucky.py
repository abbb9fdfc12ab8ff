"""`video_mae`, but in two of 40 steps the loss of the first rank is not finite."""

import math

import torch

from video_mae.cli import main
from video_mae.training.engine import Engine

healthy = Engine.backward


def backward(self: Engine, loss: torch.Tensor, *, last: bool) -> None:
    is_bad = self.rank == 0 and (self.deepspeed.global_steps + 1) % 40 in (7, 8)
    healthy(self, loss * math.nan if is_bad else loss, last=last)


if __name__ == "__main__":
    Engine.backward = backward
    main()
