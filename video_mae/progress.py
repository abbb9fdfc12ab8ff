"""How far a command is, and how long it will take still: a bar on a terminal, lines elsewhere."""

import os
import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 15.0
"""From one line to the next; what takes less time has none."""


class Progress(tqdm):
    """A tqdm bar of `total` units on sys.stderr, the first `initial` of which are done; `update`
    counts. desc: what stands before it. disable: nothing is shown.
    """

    # it would start a thread, and workers are forked from here
    monitor_interval = 0

    def __init__(
        self,
        total: int,
        unit: str = "video",
        *,
        desc: str = "",
        initial: int = 0,
        disable: bool = False,
    ) -> None:
        how: dict[str, Any] = {"mininterval": LINE_SECONDS, "delay": LINE_SECONDS, "leave": False}
        self.is_watched = sys.stderr.isatty()
        if self.is_watched:
            # in a terminal that does not know its size tqdm would think that nothing fits
            is_sized = os.get_terminal_size(2).columns > 0
            how = {"dynamic_ncols": is_sized, "ncols": 79, "nrows": 24}
        # else it would count so many updates before it looks at the clock again
        how["miniters"] = 1
        super().__init__(None, desc, total, unit=unit, initial=initial, disable=disable, **how)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar, or writes a line; tqdm calls it when it is time to."""
        if self.is_watched:
            return bool(super().display(msg, pos))
        if msg is None:
            print(self, file=self.fp, flush=True)
        return False
