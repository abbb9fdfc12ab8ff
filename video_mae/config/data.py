"""Which files, and how clips are cut out of them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Literal

from video_mae.config.schema import MOST_SIZE, Knobs, knob, require

DecoderName = Literal["auto", "pyav", "decord", "torchcodec"]
"""A library that reads videos; auto: the first of them that works here."""
ListFormat = Literal["auto", "label", "frames_label", "start_frames", "header"]
"""What stands in a line of a list file."""
LIST_FORMATS = (
    "lines of a list: label is `PATH LABEL` or `PATH`, frames_label `PATH FRAMES LABEL` "
    "(mmaction2, VideoMAE V2), start_frames `PATH 0 -1` (VideoMAE V2's pretraining), header a "
    "first line that names columns (path, label); auto: label, or what the first line shows for "
    "certain, which is told"
)
ZYX_IS_THW = str.maketrans("ZYX", "THW")


class FileConfig(Knobs):
    """How files are read: videos, pictures, arrays (.npy, .npz) and TIFF stacks, by the endings of
    their names.
    """

    root: str = knob("", "where relative paths of a list start; empty: the folder of the list file")
    list_format: ListFormat = knob("auto", LIST_FORMATS)
    stride: int = knob(
        4, "video frames (slices of a volume) from one frame of the clip to the next", low=1
    )
    shuffle_window: int = knob(
        10_000,
        "of a packed folder so many videos at least are shuffled together, those of some shards; "
        "a smaller one is shuffled whole, as other sources are",
        low=1,
    )
    axes: str = knob(
        "",
        "the axes of an array in their order, THWC or ZYXC; empty: HW, THW or THWC by their "
        "number. Of a TIFF the first is that of its pages; empty: pages are frames",
    )
    array: str = knob("", "name of the array in an .npz file; empty: its only one")
    channels: tuple[int, ...] = knob(
        (), "channels of a file that are used, from 0; empty: all", low=0
    )
    value_range: tuple[float, float] | None = knob(
        None,
        "stored values that become black and white, others are clipped, NaN is black; "
        "clips then have 16 bits. null: files hold 8 bits",
        high=1e30,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        axes = self.axes_thwc
        is_known = {"H", "W"} <= set(axes) <= set("THWC") and len(axes) == len(set(axes))
        require(
            axes == "" or is_known,
            "axes",
            self.axes,
            "must hold H and W (or Y and X), may hold T (or Z) and C, each once",
        )
        if self.value_range is not None:
            low, high = self.value_range
            require(low != high, "value_range", self.value_range, "must be two different values")

    @property
    def axes_thwc(self) -> str:
        """`axes` with T H W for Z Y X."""
        return self.axes.translate(ZYX_IS_THW)


class SourceConfig(FileConfig):
    """Which files, and how they are read."""

    source: str = knob(
        "",
        "a list file with lines `PATH LABEL` (label optional), a folder with a folder per class, "
        "a folder of files, one file, or a folder that `video-mae pack` made, also behind a URL "
        "(s3://..., http://...)",
    )


class WeightedSourceConfig(SourceConfig):
    """One of several sources of a run."""

    weight: float | None = knob(
        None,
        "share of the samples, relative to the other sources; null for all: their numbers of files",
        above=0,
    )


class ReadConfig(FileConfig):
    """How files are read, and what decodes those that are videos, within which limits."""

    decoder: DecoderName = knob(
        "auto",
        "the library that reads videos, one for a run; auto: the first that works here. A file "
        "that it cannot open, or is known to read wrongly, is left to the next, and counted",
    )
    decoder_device: Literal["cpu", "cuda"] = knob(
        "cpu", "cuda: torchcodec decodes on the GPU (NVDEC)"
    )
    decoder_threads: int | None = knob(
        None,
        "threads of a decoder; null: cores that the decoding processes leave over, at most 4",
        low=1,
    )
    short_side: int = knob(
        0,
        "videos whose shorter side has more pixels are scaled down to it as they are decoded; 0: "
        "as stored",
        low=0,
        high=MOST_SIZE,
    )
    decode_seconds: float = knob(
        60.0,
        "a video whose clip takes longer is given up, and the process that hangs in it ended",
        above=0,
        high=86400,
    )
    decode_memory_gb: float = knob(4.0, "memory that decoding a clip may take, likewise", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.decoder_device == "cpu" or self.decoder == "torchcodec",
            "decoder_device",
            self.decoder_device,
            "needs data.decoder = torchcodec",
        )


class GivenReadConfig(ReadConfig):
    """Likewise, for a model that knows how its clips are chosen."""

    stride: int | None = knob(  # pyright: ignore[reportIncompatibleVariableOverride]
        None,
        "video frames (slices of a volume) from one frame of the clip to the next; null: as the "
        "model was trained",
        low=1,
    )


class DataConfig(ReadConfig, SourceConfig):
    """Which files, and how a clip is cut out of one: one source, whose keys stand here, or
    `sources` instead.
    """

    sources: dict[str, WeightedSourceConfig] = knob(
        {},
        "several sources of one run, `NAME: {source: ..., weight: ...}`, instead of the keys above",
    )
    reach_end: bool = knob(
        True,
        "whether a clip may step to the last frame of its video; false: VideoMAE's pretraining, "
        "where a short video, and at stride 1 any, repeats a frame instead",
    )
    clips_per_video: int = knob(
        1,
        "crops and masks made from one decoded clip (num_sample of VideoMAE V2)",
        low=1,
        high=1000,
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
        filled=True,
        above=0,
        high=1,
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
        low=0,
    )
    prefetch_batches: int = knob(2, "micro-batches that each worker keeps ready", low=1, high=1000)
    allow_changed_list: bool = knob(
        False,
        "let a run go on whose list is another than before, under the same name; it is logged",
    )
    max_bad_share: float = knob(
        0.05,
        "the run stops when a larger share of the videos tried cannot be decoded",
        low=0,
        high=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop == "random_resized":
            areas = self.crop_scales
            require(
                len(areas) == 2 and areas[0] <= areas[1],
                "crop_scales",
                areas,
                "must be the smallest and the largest area for data.crop = random_resized",
            )
        if self.sources:
            for f in fields(SourceConfig):
                value = getattr(self, f.name)
                remedy = "does not reach data.sources; write it into those that it is for"
                require(value == f.default, f.name, value, remedy)
            weights = [source.weight for source in self.sources.values()]
            name = next(iter(self.sources))
            require(
                None not in weights or weights == [None] * len(weights),
                f"sources.{name}.weight",
                weights[0],
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
