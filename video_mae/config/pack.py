"""What `video-mae pack` reads."""

from typing import Literal

from video_mae.config.data import LIST_FORMATS, ListFormat
from video_mae.config.schema import MOST_SIZE, Knobs, knob, require

Form = Literal["video", "frames"]


class PackConfig(Knobs):
    """`video-mae pack LIST FOLDER key=value ...`."""

    form: Form = knob(
        "video",
        "video: H.264 that is quick to decode and to seek in; frames: uint8 pixels, ready to "
        "copy. Pictures and arrays are packed as frames only",
    )
    short_side: int = knob(
        224,
        "videos whose shorter side has more pixels are scaled down to it, none is scaled up; 0: "
        "as they are",
        low=0,
        high=MOST_SIZE,
    )
    fps: float | None = knob(None, "frames a second that are kept at most; null: all", above=0)
    frame_step: int = knob(
        1,
        "form=frames: keeps every such frame; a loader that wants its frames 4 apart then takes "
        "frame_step=4 and data.stride=1",
        low=1,
    )
    gop: int = knob(
        16,
        "form=video: frames from a key frame to the next; a clip is decoded from the key frame "
        "before it",
        low=1,
        high=10**6,
    )
    crf: int = knob(
        22, "form=video: constant quality of x264, 0 is lossless, 51 the worst", low=0, high=51
    )
    preset: Literal["veryfast", "faster", "fast", "medium", "slow"] = knob(
        "medium", "form=video: of x264; slower packs into fewer bytes"
    )
    shard_mb: int = knob(
        256, "megabytes of a shard, after which the next one is begun", low=1, high=10**6
    )
    root: str = knob("", "where relative paths of LIST start; empty: the folder of the list file")
    list_format: ListFormat = knob("auto", LIST_FORMATS)
    num_workers: int | None = knob(
        None,
        "videos that are packed at once, each in a process of its own; null: one a core",
        low=1,
    )
    decode_seconds: float = knob(
        60.0,
        "a video that makes no progress for so long is refused, and the process that hangs in it "
        "ended",
        above=0,
        high=86400,
    )
    decode_memory_gb: float = knob(4.0, "memory that packing a video may take, likewise", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frame_step > 1:
            require(
                self.form == "frames",
                "frame_step",
                self.frame_step,
                "needs form=frames; form=video takes fps",
            )
            require(
                self.fps is None,
                "frame_step",
                self.frame_step,
                "and fps both leave frames out, set one of them",
            )
