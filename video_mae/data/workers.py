"""How many processes decode, and with how many threads: together never more than there are cores."""

import ctypes
import os
from dataclasses import dataclass

from video_mae.config.world import ranks_here

MOST_WORKERS, MOST_THREADS = 16, 4
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST_KEPT = 2**25  # bytes; glibc takes no more


@dataclass(frozen=True)
class Workers:
    """Of one rank: `num` processes that decode (0: the one that decodes for the rank itself), and
    threads of each decoder.

    cores: of all ranks on this machine; told: what was asked for and is not done, one line, or "".
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
        return f"{what}, {self.threads} threads each ({self.cores} cores, {self.ranks} ranks on this machine)"


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
