"""What clips cost, stage by stage, and what to do about it where the model has to wait for them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from video_mae.config import DataConfig
from video_mae.data.workers import Workers

WAIT = 0.05
"""Share of a step spent waiting for data, above which there is something to say."""
AMPLE = 1.25
"""Where workers could make so many times what is taken, it is not they that are too slow."""


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


@dataclass(frozen=True)
class Loading:
    """How a run loads: its configuration, processes, ranks on all machines, the form in which a
    packed list is, and whether the pixels of clips are augmented by workers.
    """

    data: DataConfig
    workers: Workers
    world_size: int
    packed: str = ""
    augments_in_workers: bool = False


def advise(
    data_wait: float, milliseconds: Costs, clips_per_second: float, loading: Loading
) -> tuple[str, str] | None:
    """The stage that limits a run, and one line of what it is and what would help; None where the
    wait for data is short.

    milliseconds: of one clip; clips_per_second: of all ranks, with the wait.
    """
    if data_wait <= WAIT or clips_per_second <= 0:
        return None
    of_worker = milliseconds._replace(copying=0.0)
    demand = clips_per_second / max(1 - data_wait, 1e-3)
    supply = 1e3 * loading.world_size * max(loading.workers.num, 1) / max(sum(of_worker), 1e-6)
    copied = 1e3 * loading.world_size / max(milliseconds.copying, 1e-6)
    wait = f"data wait {data_wait:.0%}"
    if copied < min(supply, demand):
        return "copying", (
            f"{wait}: copying a clip to the device takes {milliseconds.copying:.1f} ms, so {copied:.0f} clips/s, the model "
            f"would take {demand:.0f}: {_remedies('copying', loading, 0)}"
        )
    if loading.workers.num and supply > AMPLE * demand:
        return "handing over", (
            f"{wait}, though {loading.workers.num} workers a rank make {supply:.0f} clips/s and the model would take "
            f"{demand:.0f}: batches come unevenly, data.prefetch_batches={2 * loading.data.prefetch_batches}, or a "
            "smaller optim.micro_batch with more optim.accumulation"
        )
    stage = max(of_worker._fields, key=lambda name: getattr(of_worker, name))
    needed = math.ceil(demand * sum(of_worker) / 1e3 / loading.world_size)
    cost = (
        f"{wait}: of {sum(of_worker):.1f} ms a clip {stage} takes {getattr(of_worker, stage):.1f}"
    )
    if not loading.workers.num:
        return (
            "no workers",
            f"{cost}, while the model waits: data.num_workers={min(needed, loading.workers.share)} would work beside it",
        )
    return stage, (
        f"{cost}; {loading.workers.num} workers a rank give {supply:.0f} clips/s, the model would take {demand:.0f}: "
        f"{_remedies(stage, loading, needed)}"
    )


def _remedies(stage: str, loading: Loading, needed: int) -> str:
    data, workers = loading.data, loading.workers
    remedies: list[str] = []
    most = min(workers.share // workers.threads, needed)
    if most > workers.num:
        remedies.append(f"data.num_workers={most}")
    elif workers.threads > 1 and stage != "copying":
        remedies.append("data.decoder_threads=1 with more data.num_workers")
    if needed > workers.share:
        remedies.append(f"more cores ({needed} a rank)")
    if stage in ("reading", "decoding"):
        remedies.append(f"data.clips_per_video={2 * data.clips_per_video}")
    if stage == "decoding" and not data.short_side and loading.packed != "frames":
        remedies.append("data.short_side")
    if stage == "augmenting":
        remedies += ["augment.where=device"] * loading.augments_in_workers
        remedies += ["data.crop_where=device"] * (data.crop_where == "worker")
    if stage in ("collating", "copying"):
        remedies += ["data.crop_where=worker"] * (data.crop_where == "device")
        remedies += ["data.short_side"] * (data.crop_where == "device" and not data.short_side)
        remedies += ["more data.clips_per_video"] * (data.crop_where == "device")
    if stage == "reading":
        remedies.append(
            "a faster disk"
            if loading.packed
            else "a faster disk, or `video-mae pack` (few files, read in order)"
        )
    if stage == "decoding" and loading.packed != "frames":
        remedies.append("`video-mae pack --form frames`" if loading.packed else "`video-mae pack`")
    return (
        ", ".join(remedies)
        or "smaller clips, or fewer bytes between this machine's memory and the device"
    )
