"""Which files, and how clips are cut out of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from video_mae.config.schema import knob, require

Decoder = Literal["auto", "pyav", "decord", "torchcodec"]
"""A library that reads videos; auto: the first of them that works here."""
ListFormat = Literal["auto", "label", "frames_label", "start_frames", "header"]
"""What stands in a line of a list file."""
LIST_FORMATS = (
    "lines of a list: label is `PATH LABEL` or `PATH`, frames_label `PATH FRAMES LABEL` (mmaction2, VideoMAE V2), start_frames "
    "`PATH 0 -1` (VideoMAE V2's pretraining), header a first line that names columns (path, label); auto: label, or what the "
    "first line shows for certain, which is told"
)
ZYX_IS_THW = str.maketrans("ZYX", "THW")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which files, and how they are read: videos, pictures, arrays (.npy, .npz) and TIFF stacks, by
    the endings of their names.
    """

    source: str = knob(
        "",
        "a list file with lines `PATH LABEL` (label optional), a folder with a folder per class, a folder of files, one "
        "file, or a folder that `video-mae pack` made, also behind a URL (s3://..., http://...)",
    )
    root: str = knob("", "where relative paths of a list start; empty: the folder of the list file")
    list_format: ListFormat = knob("auto", LIST_FORMATS)
    stride: int = knob(
        4, "video frames (slices of a volume) from one frame of the clip to the next"
    )
    shuffle_window: int = knob(
        10_000,
        "of a packed folder so many videos at least are shuffled together, those of some shards; a smaller "
        "one is shuffled whole, as other sources are",
    )
    axes: str = knob(
        "",
        "the axes of an array in their order, THWC or ZYXC; empty: HW, THW or THWC by their number. Of a TIFF the first "
        "is that of its pages; empty: pages are frames",
    )
    array: str = knob("", "name of the array in an .npz file; empty: its only one")
    channels: tuple[int, ...] = knob((), "channels of a file that are used, from 0; empty: all")
    value_range: tuple[float, float] | None = knob(
        None,
        "stored values that become black and white, others are clipped, NaN is black; "
        "clips then have 16 bits. null: files hold 8 bits",
    )

    def __post_init__(self) -> None:
        self.check("data")

    def check(self, key: str) -> None:
        """Raises: ValueError naming `key`.field."""
        for name in ("stride", "shuffle_window"):
            require(
                getattr(self, name) >= 1, f"{key}.{name}", getattr(self, name), "must be at least 1"
            )
        axes = self.axes_thwc
        require(
            axes == "" or ({"H", "W"} <= set(axes) <= set("THWC") and len(axes) == len(set(axes))),
            f"{key}.axes",
            self.axes,
            "must hold H and W (or Y and X), may hold T (or Z) and C, each once",
        )
        require(
            all(channel >= 0 for channel in self.channels),
            f"{key}.channels",
            self.channels,
            "must be at least 0 each",
        )
        if self.value_range is not None:
            low, high = self.value_range
            require(
                math.isfinite(low) and math.isfinite(high) and low != high,
                f"{key}.value_range",
                self.value_range,
                "must be two different finite values",
            )

    @property
    def axes_thwc(self) -> str:
        """`axes` with T H W for Z Y X."""
        return self.axes.translate(ZYX_IS_THW)


@dataclass(frozen=True, kw_only=True)
class ReadConfig(SourceConfig):
    """Which files, and what decodes those that are videos, within which limits."""

    decoder: Decoder = knob(
        "auto",
        "the library that reads videos, one for a run; auto: the first that works here. A file that it cannot "
        "open, or is known to read wrongly, is left to the next, and counted",
    )
    decoder_device: Literal["cpu", "cuda"] = knob(
        "cpu", "cuda: torchcodec decodes on the GPU (NVDEC)"
    )
    decoder_threads: int | None = knob(
        None, "threads of a decoder; null: cores that the decoding processes leave over, at most 4"
    )
    short_side: int = knob(
        0,
        "videos whose shorter side has more pixels are scaled down to it as they are decoded; 0: as stored",
    )
    decode_seconds: float = knob(
        60.0, "a video whose clip takes longer is given up, and the process that hangs in it ended"
    )
    decode_memory_gb: float = knob(4.0, "memory that decoding a clip may take, likewise")

    def check(self, key: str) -> None:
        super().check(key)
        require(
            self.decoder_threads is None or self.decoder_threads >= 1,
            f"{key}.decoder_threads",
            self.decoder_threads,
            "must be at least 1, or null",
        )
        require(self.short_side >= 0, f"{key}.short_side", self.short_side, "must be at least 0")
        require(
            0 < self.decode_seconds < math.inf,
            f"{key}.decode_seconds",
            self.decode_seconds,
            "must be above 0, finite",
        )
        require(
            0 < self.decode_memory_gb < math.inf,
            f"{key}.decode_memory_gb",
            self.decode_memory_gb,
            "must be above 0, finite",
        )
        require(
            self.decoder_device == "cpu" or self.decoder == "torchcodec",
            f"{key}.decoder_device",
            self.decoder_device,
            f"needs {key}.decoder = torchcodec",
        )


@dataclass(frozen=True, kw_only=True)
class WeightedSourceConfig(SourceConfig):
    """One of several sources of a run."""

    weight: float | None = knob(
        None,
        "share of the samples, relative to the other sources; null for all: their numbers of files",
    )

    def __post_init__(self) -> None:
        """Nothing: DataConfig checks it, and knows its name."""

    def check(self, key: str) -> None:
        super().check(key)
        require(
            self.weight is None or 0 < self.weight < math.inf,
            f"{key}.weight",
            self.weight,
            "must be above 0, finite",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig(ReadConfig):
    """Which files, and how a clip is cut out of one: one source, whose keys stand here, or
    `sources` instead.
    """

    sources: dict[str, WeightedSourceConfig] = knob(
        {},
        "several sources of one run, `NAME: {source: ..., weight: ...}`, instead of the keys above",
    )
    reach_end: bool = knob(
        True,
        "whether a clip may step to the last frame of its video; false: VideoMAE's pretraining, where a short "
        "video, and at stride 1 any, repeats a frame instead",
    )
    clips_per_video: int = knob(
        1, "crops and masks made from one decoded clip (num_sample of VideoMAE V2)"
    )
    crop: Literal["multiscale", "random_resized", "center"] = knob(
        "multiscale",
        "how a box is drawn, one for all frames: fixed places "
        "and scales (VideoMAE), random area (MAE), or the middle",
    )
    crop_scales: tuple[float, ...] = knob(
        (1.0, 0.875, 0.75, 0.66),
        "multiscale: sides over the largest box that fits; "
        "random_resized: smallest and largest area",
    )
    flip: bool = knob(False, "mirror half of the clips")
    crop_where: Literal["worker", "device"] = knob(
        "worker",
        "where boxes are cut and resized: by the processes that decode, or on the "
        "device, to which the whole frames are then copied (smaller with short_side); the boxes "
        "are the same, pixels within 1 level",
    )
    num_workers: int | None = knob(
        None,
        "decoding processes a rank; null: one a core that it may use, at most 16; 0 decodes in one "
        "process beside the training. More than there are cores are not started",
    )
    prefetch_batches: int = knob(2, "micro-batches that each worker keeps ready")
    allow_changed_list: bool = knob(
        False,
        "let a run go on whose list is another than before, under the same name; it is logged",
    )
    max_bad_share: float = knob(
        0.05, "the run stops when a larger share of the videos tried cannot be decoded"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clips_per_video", "prefetch_batches"):
            require(
                getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1"
            )
        require(
            self.num_workers is None or self.num_workers >= 0,
            "data.num_workers",
            self.num_workers,
            "must be at least 0, or null",
        )
        require(
            len(self.crop_scales) > 0 and all(0 < scale <= 1 for scale in self.crop_scales),
            "data.crop_scales",
            self.crop_scales,
            "must be one or more values in (0, 1]",
        )
        require(
            self.crop != "random_resized"
            or (len(self.crop_scales) == 2 and self.crop_scales[0] <= self.crop_scales[1]),
            "data.crop_scales",
            self.crop_scales,
            "must be the smallest and the largest area for data.crop = random_resized",
        )
        require(
            0 <= self.max_bad_share <= 1,
            "data.max_bad_share",
            self.max_bad_share,
            "must be in [0, 1]",
        )
        self._check_sources()

    def _check_sources(self) -> None:
        for name, source in self.sources.items():
            source.check(f"data.sources.{name}")
        for f in fields(SourceConfig):
            require(
                not self.sources or getattr(self, f.name) == f.default,
                f"data.{f.name}",
                getattr(self, f.name),
                "does not reach data.sources; write it into those that it is for",
            )
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        for name in self.sources:
            require(
                len(weighted) in (0, len(self.sources)),
                f"data.sources.{name}.weight",
                self.sources[name].weight,
                "give every source a weight, or none",
            )

    @property
    def by_name(self) -> Mapping[str, SourceConfig]:
        """The sources with their keys (`data.sources.NAME`), sorted, so that their order in a file
        means nothing; or {"data": self}.
        """
        return {f"data.sources.{name}": self.sources[name] for name in sorted(self.sources)} or {
            "data": self
        }

    @property
    def sixteen_bit(self) -> bool:
        """Whether clips are uint16: where the values of one source are scaled, those of all are."""
        return any(source.value_range is not None for source in self.by_name.values())
