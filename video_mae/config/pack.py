"""What `video-mae pack` reads."""

import math
from dataclasses import dataclass
from typing import Literal

from video_mae.config.data import LIST_FORMATS, ListFormat
from video_mae.config.schema import knob, require

Form = Literal["video", "frames"]


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """`video-mae pack LIST FOLDER key=value ...`."""

    form: Form = knob(
        "video",
        "video: H.264 that is quick to decode and to seek in; frames: uint8 pixels, ready to copy. Pictures and "
        "arrays are packed as frames only",
    )
    short_side: int = knob(
        224,
        "videos whose shorter side has more pixels are scaled down to it, none is scaled up; 0: as they are",
    )
    fps: float | None = knob(None, "frames a second that are kept at most; null: all")
    frame_step: int = knob(
        1,
        "form=frames: keeps every such frame; a loader that wants its frames 4 apart then takes frame_step=4 and "
        "data.stride=1",
    )
    gop: int = knob(
        16,
        "form=video: frames from a key frame to the next; a clip is decoded from the key frame before it",
    )
    crf: int = knob(22, "form=video: constant quality of x264, 0 is lossless, 51 the worst")
    preset: Literal["veryfast", "faster", "fast", "medium", "slow"] = knob(
        "medium", "form=video: of x264; slower packs into fewer bytes"
    )
    shard_mb: int = knob(256, "megabytes of a shard, after which the next one is begun")
    root: str = knob("", "where relative paths of LIST start; empty: the folder of the list file")
    list_format: ListFormat = knob("auto", LIST_FORMATS)
    num_workers: int | None = knob(
        None, "videos that are packed at once, each in a process of its own; null: one a core"
    )
    decode_seconds: float = knob(
        60.0,
        "a video that makes no progress for so long is refused, and the process that hangs in it ended",
    )
    decode_memory_gb: float = knob(4.0, "memory that packing a video may take, likewise")

    def __post_init__(self) -> None:
        require(self.short_side >= 0, "short_side", self.short_side, "must be at least 0")
        require(
            self.fps is None or 0 < self.fps < math.inf,
            "fps",
            self.fps,
            "must be above 0, finite, or null",
        )
        for name in ("frame_step", "gop", "shard_mb"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(
            self.frame_step == 1 or self.form == "frames",
            "frame_step",
            self.frame_step,
            "needs form=frames; form=video takes fps",
        )
        require(
            self.frame_step == 1 or self.fps is None,
            "frame_step",
            self.frame_step,
            "and fps both leave frames out, set one of them",
        )
        require(0 <= self.crf <= 51, "crf", self.crf, "must be in [0, 51]")
        require(
            self.num_workers is None or self.num_workers >= 1,
            "num_workers",
            self.num_workers,
            "must be at least 1, or null",
        )
        require(
            0 < self.decode_seconds < math.inf,
            "decode_seconds",
            self.decode_seconds,
            "must be above 0, finite",
        )
        require(
            0 < self.decode_memory_gb < math.inf,
            "decode_memory_gb",
            self.decode_memory_gb,
            "must be above 0, finite",
        )
