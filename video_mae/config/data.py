"""Which videos, and how clips are cut out of them."""

from dataclasses import dataclass
from typing import Literal

from video_mae.schema import knob, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which videos, and how a clip is cut out of one."""

    source: str = knob("", "a list file with lines `PATH LABEL` (label optional), or a folder with a folder per class")
    root: str = knob("", "where relative paths of a list start; empty: the folder of the list file")
    decoder: Literal["decord"] = knob("decord", "the library that reads videos")
    stride: int = knob(4, "video frames from one frame of the clip to the next")
    clips_per_video: int = knob(1, "crops and masks made from one decoded clip (num_sample of VideoMAE V2)")
    crop: Literal["multiscale", "random_resized", "center"] = knob("multiscale", "how a box is drawn, one for all frames: fixed places "
                                                                   "and scales (VideoMAE), random area (MAE), or the middle")
    crop_scales: tuple[float, ...] = knob((1.0, 0.875, 0.75, 0.66), "multiscale: sides over the largest box that fits; "
                                          "random_resized: smallest and largest area")
    flip: bool = knob(False, "mirror half of the clips")
    num_workers: int = knob(8, "decoding processes a rank; 0 decodes in the training process")
    prefetch_batches: int = knob(2, "micro-batches that each worker keeps ready")
    max_bad_share: float = knob(0.05, "the run stops when a larger share of the videos tried cannot be decoded")

    def __post_init__(self) -> None:
        for name, least in (("stride", 1), ("clips_per_video", 1), ("num_workers", 0), ("prefetch_batches", 1)):
            require(getattr(self, name) >= least, f"data.{name}", getattr(self, name), f"must be at least {least}")
        require(len(self.crop_scales) > 0 and all(0 < scale <= 1 for scale in self.crop_scales), "data.crop_scales", self.crop_scales,
                "must be one or more values in (0, 1]")
        require(self.crop != "random_resized" or (len(self.crop_scales) == 2 and self.crop_scales[0] <= self.crop_scales[1]),
                "data.crop_scales", self.crop_scales, "must be the smallest and the largest area for data.crop = random_resized")
        require(0 <= self.max_bad_share <= 1, "data.max_bad_share", self.max_bad_share, "must be in [0, 1]")
