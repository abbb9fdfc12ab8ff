"""How far a command is, and how long it will take still: a bar on a terminal, lines elsewhere."""

import shutil
import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 15.0
"""From one line to the next; what takes less time has none."""


class ProgressBar(tqdm):
    """A tqdm bar of `total` units on sys.stderr; `update` counts. options: of tqdm, such as
    `initial`, those that are done, `desc`, what stands before it, and `disable`.
    """

    # it would start a thread, and workers are forked from here
    monitor_interval = 0

    def __init__(self, total: int, unit: str = "video", **options: Any) -> None:
        self.is_watched = sys.stderr.isatty()
        seconds = 0.0 if self.is_watched else LINE_SECONDS
        super().__init__(
            total=total,
            unit=unit,
            leave=self.is_watched,
            mininterval=max(seconds, 0.1),
            delay=seconds,
            miniters=1,  # else it would count so many updates before it looks at the clock again
            **options,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draws the bar, or writes a line; tqdm calls it when it is time to."""
        if self.is_watched:
            # 80 x 24 of one that does not know its size, in which tqdm would draw nothing
            self.ncols, self.nrows = shutil.get_terminal_size()
            return super().display(msg, pos)
        if msg is None:
            print(self, file=self.fp, flush=True)
