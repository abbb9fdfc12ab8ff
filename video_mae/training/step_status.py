"""What the host learns of a step without waiting for it: how many steps were skipped, and whether
a signal asks the run to stop.
"""

import signal
from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist

from video_mae.processes import on_signals


class StepStatus(NamedTuple):
    """Of step number `step`, the same on every rank: how many steps were skipped since the start,
    and a signal of any rank or 0.
    """

    step: int
    skipped_steps: int
    signal: int


def filled(value: float, device: torch.device) -> torch.Tensor:
    """A scalar, made on the device: torch.tensor() would copy it from the host and wait."""
    return torch.full((), float(value), device=device)


class StatusQueue:
    """Statuses on their way from the device to the host, a copy a step, which is read once the
    next step is under way.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._received = device, 0
        self._under_way = deque[tuple[int, torch.Tensor, torch.Event | None]]()

    def listen(self) -> None:
        """From now on SIGTERM, SIGINT, SIGHUP and SIGUSR1 are told, so that all ranks can stop
        together at the end of a step.
        """
        on_signals(self.remember)
        signal.signal(signal.SIGUSR1, self.remember)

    def remember(self, number: int, frame: object = None) -> None:
        """A signal, or what counts as one."""
        self._received = number

    def send(self, step: int, skipped_steps: torch.Tensor) -> None:
        """Every rank must call it, after each step."""
        told = torch.stack([skipped_steps, filled(self._received, self.device)])
        dist.all_reduce(told, dist.ReduceOp.MAX)
        copy = told.to("cpu", non_blocking=True)
        arrival = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None
        self._under_way.append((step, copy, arrival))

    def take(self, *, of_all: bool) -> list[StepStatus]:
        """Those not taken yet: of all steps, or of all but the last, which the device may be busy
        with. Every rank takes alike.
        """
        taken: list[StepStatus] = []
        while len(self._under_way) > (0 if of_all else 1):
            step, copy, arrival = self._under_way.popleft()
            if arrival is not None:
                arrival.synchronize()
            skipped_steps, received = copy.tolist()
            taken.append(StepStatus(step, int(skipped_steps), int(received)))
        return taken
