"""A loss that leaps: what counts as a spike, and how a step that sees one changes nothing."""

import math
from collections.abc import Callable

import torch

from video_mae.training.step_status import filled

LEAP, SHARE = 10.0, 0.01


class SpikeWatch:
    """Judges the loss of each micro-batch, its `mean` over ranks, on the device, where it is on.

    A spike is more than LEAP times the usual loss: the running mean of the losses before that were
    finite and no spikes, of which a new one makes SHARE. A training that goes well loses a few
    percent from one batch to the next; one that falls apart gains powers of ten. tensors: what a
    run that goes on has to remember, also where it is off: it may be on in the next start.
    """

    def __init__(
        self, mean: Callable[[torch.Tensor], torch.Tensor], device: torch.device, *, is_on: bool
    ) -> None:
        self.mean, self.is_on, self.usual = mean, is_on, filled(0, device)
        self.tensors = {"usual_loss": self.usual}

    def judged(self, loss: torch.Tensor) -> torch.Tensor:
        """What to minimise: the loss, or for a spike one that is not finite, so that all ranks skip
        the step. Every rank must call it.
        """
        if self.is_on:
            usual, now, is_known = self.usual, self.mean(loss.detach()), self.usual > 0
            is_spike = is_known & (now > LEAP * usual)
            mean = torch.where(is_known, usual.lerp(now, SHARE), now)
            usual.copy_(torch.where(now.isfinite() & ~is_spike, mean, usual))
            loss = loss * torch.where(is_spike, math.nan, 1.0)
        return loss
