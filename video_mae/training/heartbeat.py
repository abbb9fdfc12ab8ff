"""Ranks that watch one another: where one is gone, or stands still and the others wait for it, all
leave with a line that names it, long before a collective gives up.

A thread of each rank writes into the run folder what the rank does, and reads what the others do.
"""

import os
import re
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from video_mae.config.world import World
from video_mae.files import log, say, storing

TIMED = ("reading", "forward", "all-reduce")
"""Stages that no rank stays in. The start, a save and a validation take as long as they take, if
only the rank beats.
"""


class Progress:
    """What this process is doing: its stage, since when, and for how many seconds where it is
    TIMED; how many stages it has had, all ranks the same ones; the last step that it has done.
    """

    def __init__(self) -> None:
        self.moves = self.step = 0
        self.begin("start")

    def begin(self, stage: str) -> None:
        """From now on it is at `stage`."""
        if not self.step and stage != "reading":
            stage = "start"  # up to the end of the first step, which compiles
        self.stage, self.since, self.seconds = stage, time.ctime(), 0.0
        self.moves += 1


progress = Progress()


@contextmanager
def heartbeat(run_folder: Path, stall_seconds: float) -> Iterator[None]:
    """Inside, the process ends with status 75 where one of the ranks is gone or stands still, and
    where a collective fails, whose traceback is for the log.
    """
    watch, ended = _Watch(run_folder, stall_seconds), threading.Event()

    def beat() -> None:
        while not ended.wait(watch.interval):
            with suppress(OSError):  # who is not heard hears nothing either
                watch.look()
                watch.tell()

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    except RuntimeError as error:
        if re.search("gloo|NCCL|c10d", str(error)):
            watch.details = f"\n{traceback.format_exc()}"
            watch.stall_seconds = 7 * watch.interval  # who does not beat now has died
            time.sleep(14 * watch.interval)
            watch.leave(f"a connection between ranks has broken: {str(error).splitlines()[0]}")
        raise
    finally:
        ended.set()


class _Watch:
    details, doubts = "", 0

    def __init__(self, run_folder: Path, stall_seconds: float) -> None:
        self.rank, size, _ = World.from_environment()
        self.interval = 1 + size / 16  # seconds: all read the files of all
        self.stall_seconds = stall_seconds
        self.log_file, folder = run_folder / "log.txt", run_folder / ".heartbeats"
        self.files = [folder / f"rank_{rank}" for rank in range(size)]
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.tell()
        self.begin = self.files[self.rank].stat().st_mtime

    def tell(self) -> None:
        progress.seconds += self.interval * (progress.stage in TIMED)
        self.files[self.rank].write_text(
            f"{progress.moves} {progress.seconds:.0f} "
            f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()}): {progress.stage} "
            f"since {progress.since}, after step {progress.step}"
        )

    def look(self) -> None:
        """Times are those of the file system: no machine's clock is compared with another's."""
        now, rows, teller = self.files[self.rank].stat().st_mtime, [], self.rank
        for rank, file in enumerate(self.files):
            heard, text = self.begin, f"0 0 rank {rank}: has not begun"
            # what an earlier start has left tells nothing
            if file.exists() and file.stat().st_mtime > heard:
                heard, text = file.stat().st_mtime, file.read_text() or text
            with suppress(ValueError):  # a network disk may give half of a text
                moves, seconds, line = text.split(" ", 2)
                rows.append((int(moves), heard, int(seconds), line))
            if now - heard <= self.stall_seconds:  # the first one that lives
                teller = min(teller, rank)
        # who is behind the others, of several who was heard of before them
        _, heard, seconds, line = min(rows)
        # not at first sight: clocks jump, machines are suspended; others are soon heard then
        self.doubts = (self.doubts + 1) * (now - heard > self.stall_seconds)
        if self.doubts > 1:
            self.leave(f"{line}; no sign of life since {time.ctime(heard)}", teller)
        elif seconds > self.stall_seconds:
            self.leave(line, teller)

    def leave(self, line: str, teller: int = 0) -> None:
        try:
            if self.rank == teller:
                line = f"stalled: {line}; see {self.log_file}, and start the same command again"
                log(self.log_file, line + self.details)
                say(line)
            time.sleep(2 * self.interval)  # until all know
        finally:
            os._exit(os.EX_TEMPFAIL)
