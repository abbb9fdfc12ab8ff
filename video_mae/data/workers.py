"""How many processes decode, and with how many threads: together never more than there are cores;
what clips cost there, stage by stage, and what to do about it where the model has to wait for them.
"""

import ctypes
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from video_mae.config import DataConfig
from video_mae.config.world import ranks_here

MOST_WORKERS, MOST_THREADS = 16, 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST_KEPT = 2**25  # bytes; glibc takes no more
WAIT = 0.05
"""Share of a step spent waiting for data, above which there is something to say."""
AMPLE = 1.25
"""Where workers could make so many times what is taken, it is not they that are too slow."""


@dataclass(frozen=True)
class Workers:
    """Of one rank: `num` processes that decode (0: the one that decodes for the rank itself), and
    threads of each decoder.

    cores: of all ranks on this machine. told: what was asked for and is not done, one line, or "".
    """

    num: int
    threads: int
    cores: int
    ranks: int
    told: str = ""

    @property
    def share(self) -> int:
        """Cores of one rank."""
        return max(self.cores // self.ranks, 1)

    def describe(self) -> str:
        """One line for a log."""
        what = f"{self.num} processes a rank decode" if self.num else "each rank decodes by itself"
        machine = f"{self.cores} cores, {self.ranks} ranks on this machine"
        return f"{what}, {self.threads} threads each ({machine})"


def plan_workers(num_workers: int | None, decoder_threads: int | None) -> Workers:
    """What a rank starts: as asked for (None: chosen), but not so much that ranks x workers x
    threads exceeds the cores it may use.

    Chosen are a process for each core of the rank, at most 16, and of a decoder as many threads as
    cores are left, at most 4. Threads come last: the threads of one video wait for one another
    after each seek and decode ahead what nobody wants, processes each do a video of their own. A
    rank has one process and one thread where there are more ranks than cores.
    """
    cores, ranks = len(os.sched_getaffinity(0)), ranks_here()
    share = max(cores // ranks, 1)
    threads = min(decoder_threads or 1, share)
    num = min(MOST_WORKERS if num_workers is None else num_workers, share // threads)
    told = ", ".join(
        f"{name} = {asked} is brought down to {done}"
        for name, asked, done in (
            ("num_workers", num_workers, num),
            ("decoder_threads", decoder_threads, threads),
        )
        if asked is not None and asked > done
    )
    if told:
        told += f": ranks ({ranks}) x workers x threads must not exceed the cores ({cores})"
    if decoder_threads is None:
        threads = min(share // max(num, 1), MOST_THREADS)
    return Workers(num, threads, cores, ranks, told)


def keep_memory() -> None:
    """Has this process keep what it frees, up to 32 MB at once: a worker allocates clips of the
    same sizes again and again, and memory that the system takes back costs a fault for every 4 KB
    when it comes again, more than copying a clip does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, 2**30)


class Costs(NamedTuple):
    """Seconds spent on clips: waiting for the disk, decoding with the opening of files, cropping
    and augmenting, joining clips into a batch, copying the batch to the device.
    """

    reading: float = 0.0
    decoding: float = 0.0
    augmenting: float = 0.0
    collating: float = 0.0
    copying: float = 0.0

    @classmethod
    def total(cls, costs: Iterable["Costs"]) -> "Costs":
        """The sum of several."""
        return cls(*(sum(stage) for stage in zip(*costs, strict=True)))


def advise(
    data_wait: float,
    milliseconds: Mapping[str, float],
    clips_per_second: float,
    *,
    data: DataConfig,
    workers: Workers,
    world_size: int,
    packed: str = "",
    augments_in_workers: bool = False,
) -> tuple[str, str] | None:
    """The stage that limits a run, and one line of what it is and what would help; None where the
    wait for data is short.

    milliseconds: of one clip in each stage of Costs; clips_per_second: of all ranks, with the wait.
    packed: the form in which a packed list is. augments_in_workers: whether they do more to the
    pixels of clips than to crop them.
    """
    if data_wait <= WAIT or clips_per_second <= 0:
        return None
    costs, of_ranks = Costs(**milliseconds), 1e3 * world_size
    total = sum(costs) - costs.copying
    demand = clips_per_second / max(1 - data_wait, 1e-3)
    supply = of_ranks * max(workers.num, 1) / max(total, 1e-6)
    copied = of_ranks / max(costs.copying, 1e-6)
    stage = slowest = max(Costs._fields[:-1], key=milliseconds.__getitem__)
    who = f"{workers.num} workers a rank give" if workers.num else "each rank by itself gives"
    rate = f"{who} {supply:.0f} clips/s"
    if copied < min(supply, demand):
        stage = slowest = "copying"
        rate = f"that is {copied:.0f} clips/s"
    elif not workers.num:
        stage = "no workers"
    elif supply > AMPLE * demand:
        stage = "handing over"
    needed, share = math.ceil(demand * total / of_ranks), workers.share
    most = min(share // workers.threads, needed)
    on_device, has_videos = data.crop_where == "device", packed != "frames"
    by_worker, copies = "reading decoding augmenting collating", "collating copying"
    pack = "`video-mae pack --form frames`" if packed else "`video-mae pack`"
    disk = "" if packed else ", or `video-mae pack` (few files, read in order)"
    table = (
        (
            "handing over",
            True,
            "a smaller optim.micro_batch (with more optim.accumulation, where no "
            "optim.global_batch derives it)",
        ),
        ("handing over", True, f"data.prefetch_batches={2 * data.prefetch_batches}"),
        ("no workers", True, f"data.num_workers={min(needed, share)} to work beside it"),
        (by_worker, most > workers.num, f"data.num_workers={most}"),
        (
            by_worker,
            most <= workers.num and workers.threads > 1,
            "data.decoder_threads=1 with more data.num_workers",
        ),
        (by_worker, needed > share, f"more cores ({needed} a rank)"),
        ("reading decoding", True, f"data.clips_per_video={2 * data.clips_per_video}"),
        ("decoding", has_videos and not data.short_side, "data.short_side"),
        ("augmenting", augments_in_workers, "augment.where=device"),
        ("augmenting", not on_device, "data.crop_where=device"),
        (copies, on_device, "data.crop_where=worker"),
        (copies, on_device and not data.short_side, "data.short_side"),
        (copies, on_device, "more data.clips_per_video"),
        ("reading", True, f"a faster disk{disk}"),
        ("decoding", has_videos, pack),
    )
    remedies = [remedy for stages, helps, remedy in table if stage in stages and helps]
    if not remedies:
        remedies = ["smaller clips, or fewer bytes between this machine's memory and the device"]
    return stage, (
        f"data wait {data_wait:.0%}: of {total:.1f} ms a clip {slowest} takes "
        f"{milliseconds[slowest]:.1f}; {rate}, the model would take {demand:.0f}: "
        f"{', '.join(remedies)}"
    )
