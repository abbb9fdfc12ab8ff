"""What a run tells of itself in its folder while it trains: run.json and report.html."""

import math
import time
from typing import TYPE_CHECKING, Any

import torch

from video_mae.files import write_json
from video_mae.report.page import write_report
from video_mae.report.record import FACTS_FILE, versions

if TYPE_CHECKING:
    from video_mae.training.loop import Training

FIRST_SECONDS, INTERVAL_SECONDS = 10.0, 60.0
"""Until the first page, and from one to the next."""
MOST_SHARE = 0.02
"""Of the time that pages may take: that of a long run takes long."""


class RunPage:
    """The page of a run that is at work; its main rank has one."""

    def __init__(self, run: "Training[Any]", first_step: int) -> None:
        """Writes run.json, the facts of this start. Raises: StorageError."""
        engine = run.engine
        self.folder, self.journal = run.folder, run.journal
        self.facts = {
            "started": time.time(),
            "step": first_step,
            "total_steps": run.schedule.total_steps,
            "videos": len(run.videos),
            "parameters": num_parameters(run.model),
            "ranks": engine.world_size,
            "device": f"{engine.world_size} x {device_name(engine.device)}",
            "versions": versions(),
        }
        write_json(self.folder / FACTS_FILE, self.facts)
        self._due = time.monotonic() + FIRST_SECONDS

    def update(self) -> None:
        """Writes the page anew where that is due."""
        begin = time.monotonic()
        if begin < self._due or not self.folder.is_dir():  # the next save ends a run without one
            return
        with self.journal.aside():
            write_report(self.folder, self.journal.say)
        end = time.monotonic()
        self._due = end + max(INTERVAL_SECONDS, (end - begin) / MOST_SHARE)

    def finish(self, reason: str) -> None:
        """Writes the last page, and tells what a run leaves and why it is done: only then has
        run.json `finished`, and the reason as `ended`. Raises: StorageError.
        """
        self.facts |= {"finished": time.time(), "ended": reason}
        write_json(self.folder / FACTS_FILE, self.facts)
        write_report(self.folder, self.journal.say)
        for name in ("model", "model_ema", "reconstructions", "best", "report.html"):
            if (self.folder / name).exists():
                self.journal.say(f"{name:17}{self.folder / name}")
        self.journal.say(reason)


def num_parameters(model: torch.nn.Module) -> int:
    """Of the whole model, also where DeepSpeed has taken it apart."""
    shapes = [getattr(p, "ds_shape", p.shape) for p in model.parameters()]
    return sum(math.prod(shape) for shape in shapes)


def device_name(device: torch.device) -> str:
    """What a device is called: CPU, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
