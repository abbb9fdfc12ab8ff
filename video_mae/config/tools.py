"""What the stages read that a person runs beside training."""

from typing import Literal

from video_mae.config.data import ReadConfig
from video_mae.config.schema import Knobs, knob, require, section

ACTIONS = {
    "people": (
        "backflip",
        "cartwheel",
        "crawl",
        "dance_a",
        "dance_b",
        "getup_facedown",
        "getup_faceup",
        "jump",
        "kick",
        "punch",
        "roll",
        "run",
        "spin",
        "spinkick",
        "walk",
    ),
    "cutouts": (
        "left",
        "right",
        "up",
        "down",
        "roll_clockwise",
        "roll_counterclockwise",
        "orbit_clockwise",
        "orbit_counterclockwise",
    ),
}
"""What is done in the videos of the demo, by who moves."""


class DemoConfig(Knobs):
    """What `make_demo_data` renders."""

    seed: int = knob(0, "of the poses, speeds and photographs drawn", low=0, below=2**63)
    subject: Literal["people", "cutouts"] = knob(
        "cutouts",
        "what moves: people in 15 actions (needs pybullet), or cut-outs of photographs in 8",
    )
    train_clips: int = knob(960, "training videos, of all actions the same number", low=8)
    validation_clips: int = knob(240, "validation videos, of other photographs, likewise", low=8)
    num_frames: int = knob(32, "frames of a video", low=2)
    height: int = knob(64, "pixels (4:2:0 video)", low=32, high=8192, multiple_of=2)
    width: int = knob(64, "pixels (4:2:0 video)", low=32, high=8192, multiple_of=2)
    fps: int = knob(16, "frames a second", low=1)
    difficulty: Literal["easy", "medium", "hard"] = knob(
        "easy",
        "of cut-outs: a bright cut-out of a photograph over another, dimmed and "
        "still; the same, both as bright as they are; or the whole picture",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        num = len(self.actions)
        for name in ("train_clips", "validation_clips"):
            clips = getattr(self, name)
            remedy = f"must be a multiple of the {num} actions of subject = {self.subject}"
            require(clips % num == 0, name, clips, remedy)

    @property
    def actions(self) -> tuple[str, ...]:
        """The classes, by their labels."""
        return ACTIONS[self.subject]


class DoctorConfig(Knobs):
    """`video-mae doctor LIST key=value ...`: exit status 0 where all is good, 1 where something is
    bad, 2 for a mistake in the command.
    """

    check: Literal["quick", "full"] = knob(
        "quick",
        "quick: the first, the middle and the last frame are decoded, each by a jump; full: "
        "also all of them in order, and counted",
    )
    num_frames: int = knob(
        16, "frames of a clip, data.stride apart: what is shorter is told", low=1
    )
    num_workers: int | None = knob(
        None, "processes that decode; null: as many as there are cores", low=1
    )
    worst: int = knob(10, "how many bad files the console names; videos.jsonl has all", low=0)
    output: str = knob(
        "",
        "folder for videos.jsonl, summary.json and clean.txt; empty: LIST_doctor beside the list",
    )
    data: ReadConfig = section(ReadConfig, "how the files are read; their list is LIST")


class SplitConfig(Knobs):
    """`video-mae split LIST_OR_FOLDER key=value ...`."""

    shares: tuple[float, float, float] = knob(
        (0.8, 0.1, 0.1),
        "ratios of the videos in the lists to train, validate and test on; [8, 1, 1] is the same",
        low=0,
    )
    group: str = knob(
        ".*",
        "regular expression for what must not be in two of the lists, a person or a recording: the "
        r"part in brackets of each line of the list, or path of the folder. _g(\d+)_ is that of "
        "UCF101, ,([^,]*)$ the last column of a CSV file",
    )
    seed: int = knob(0, "another one is another split", low=0)
    output: str = knob("", "a new folder for the lists; empty: LIST_OR_FOLDER_split")


class PushConfig(Knobs):
    """`video-mae push MODEL_OR_RUN_FOLDER OWNER/NAME key=value ...`."""

    data: str = knob("", "for the card: what the model was trained on")
    licence: str = knob(
        "unknown", "for the card: of the weights, as the hub spells it (mit, other)"
    )
    private: bool = knob(False, "a new repository can be seen by its owner alone")
    revision: str = knob("main", "the branch of the repository to send to")
    output: str = knob("", "a folder to write all of it into, instead of sending it")


class NoKeys(Knobs):
    """Of the stages that have none."""
