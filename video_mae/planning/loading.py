"""The files of a planned run, and what it takes to load them."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from video_mae.config.machines import FACTS
from video_mae.config.plan import PlanConfig
from video_mae.data.videos import read_lines
from video_mae.decoding import is_video
from video_mae.decoding.media import suffix
from video_mae.decoding.pictures import STILLS


class PlannedSource(NamedTuple):
    """How many files a source of `data` has, of which kind (a key of FACTS.forms), how that is
    known, and its weight beside other sources.
    """

    key: str
    num_files: int
    kind: str
    origin: str
    weight: float


def planned_sources(config: PlanConfig) -> list[PlannedSource]:
    """What each source holds, where it is here; else what a data set that its path names has, or
    what is assumed of any. Raises: ValueError for a list or a folder that cannot be read.
    """
    found = []
    for key, source in config.data.by_name.items():
        num_files, origin = FACTS.some_files, "ASSUMED (videos=N sets it)"
        kind = "videos" if config.model.num_frames > 1 else "pictures"
        if source.value_range:
            kind = "arrays"
        for word, published in FACTS.published.items():
            if word in f"{source.root}/{source.source}".lower():
                num_files, kind = published
                origin = f"ASSUMED (videos=N sets it), as {word} is published"
        if source.source and Path(source.source).exists():
            lines, *_ = read_lines(replace(source, root=""))  # the files may be elsewhere
            num_files, origin = len(lines), f"as {source.source} has"
            place, kind = lines[0].path, "videos"
            if not is_video(place):
                kind = "pictures" if suffix(place) in STILLS else "arrays"
        if config.videos:
            num_files, origin = config.videos, "by the key videos"
        weight = getattr(source, "weight", None) or num_files
        found.append(PlannedSource(key, num_files, kind, origin, weight))
    return found


def loading_rows(config: PlanConfig, sources: list[PlannedSource], rate: float) -> list[str]:
    """A table's row of each form that the files of each source have on disks. rate: clips a
    millisecond of all sources.
    """
    c, num_gpus, crops = config.model, config.gpus, config.data.clips_per_video
    megapixels = c.num_frames * c.height * c.width / 1e6
    rows = []
    for source in sources:
        clips = rate * source.weight / sum(of.weight for of in sources)
        num_frames = c.num_frames if source.kind == "videos" else 1
        for name, form in FACTS.forms[source.kind].items():
            # milliseconds of cores in a millisecond
            cores = clips * (form["decode"] * num_frames / crops + form["crop"] * megapixels)
            stored = form["stored"] * source.num_files / 1e6
            read = form["read"] * clips / crops
            share = min(1, FACTS.cores * num_gpus / cores)
            rows.append(
                f"| {source.key}: {name} | {cores:.4g} | {cores / num_gpus:.3g} | {stored:.3g} "
                f"| {read:.3g} | {share:.0%} |"
            )
        if not FACTS.forms[source.kind]:
            rows.append(f"| {source.key}: {source.kind} |{' not known |' * 5}")
    return rows
