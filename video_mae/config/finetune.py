"""What action-recognition fine-tuning adds to a training stage: labelled clips, augmentation,
validation.
"""

import math
from dataclasses import dataclass
from typing import Literal

from video_mae.config.data import DataConfig, ListFormat
from video_mae.config.model import ClassifierConfig
from video_mae.config.schema import knob, require, section
from video_mae.config.stages import RunConfig
from video_mae.config.training import OptimConfig


@dataclass(frozen=True, kw_only=True)
class LabelledDataConfig(DataConfig):
    """As for every stage, with the crops of fine-tuning. Every video needs a label."""

    clips_per_video: int = knob(
        1, "augmented clips made from one decoded clip (repeated augmentation, num_sample)"
    )
    crop: Literal["multiscale", "random_resized", "center"] = knob(
        "random_resized",
        "how a training clip's box is drawn, one for all "
        "frames: random area (MAE), fixed places and scales, or the middle",
    )
    crop_scales: tuple[float, ...] = knob(
        (0.08, 1.0),
        "random_resized: smallest and largest area; multiscale: sides over the largest "
        "box that fits",
    )
    flip: bool = knob(
        True, "mirror half of the training clips; false where left and right are part of a label"
    )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The videos that tell, while it trains, how good the model is: the middle of each, one central
    crop.
    """

    source: str = knob(
        "", "as data.source, with the same labels; empty: no validation, and no best model"
    )
    root: str = knob(
        "", "where relative paths of the list start; empty: the folder of the list file"
    )
    list_format: ListFormat = knob("auto", "as data.list_format")
    interval: int = knob(
        0,
        "optimizer steps from one validation to the next; 0: after each epoch; the last step always validates",
    )
    batch: int = knob(16, "clips that a rank takes at once")

    def __post_init__(self) -> None:
        require(self.interval >= 0, "validation.interval", self.interval, "must be at least 0")
        require(self.batch >= 1, "validation.batch", self.batch, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What makes a training clip and its target harder, after the crop. Source: the published
    fine-tuning of VideoMAE.
    """

    randaugment_ops: int = knob(
        4,
        "operations of RandAugment (rand-m7-n4-mstd0.5-inc1), each done with probability 0.5; 0 does none",
    )
    randaugment_magnitude: float = knob(7.0, "mean strength of an operation, of 10")
    randaugment_std: float = knob(0.5, "standard deviation of the strength")
    erasing: float = knob(0.25, "probability that a random box of all frames becomes noise")
    mixup: float = knob(
        0.8,
        "alpha of Beta(alpha, alpha), from which the share of a clip in its mixture is drawn; 0 does no mixup",
    )
    cutmix: float = knob(1.0, "likewise, the share of the area that a clip keeps; 0 does no cutmix")
    mix_probability: float = knob(1.0, "probability that a micro-batch is mixed at all")
    switch_probability: float = knob(
        0.5, "probability of cutmix instead of mixup where both are on"
    )
    label_smoothing: float = knob(0.1, "share of the target that is spread over all classes")
    where: Literal["worker", "device"] = knob(
        "worker",
        "where RandAugment and erasing are done: by the processes that decode, or on the "
        "device; the numbers drawn are the same",
    )

    def __post_init__(self) -> None:
        require(
            self.randaugment_ops >= 0,
            "augment.randaugment_ops",
            self.randaugment_ops,
            "must be at least 0",
        )
        require(
            0 <= self.randaugment_magnitude <= 10,
            "augment.randaugment_magnitude",
            self.randaugment_magnitude,
            "must be in [0, 10]",
        )
        for name in ("erasing", "mix_probability", "switch_probability"):
            require(
                0 <= getattr(self, name) <= 1,
                f"augment.{name}",
                getattr(self, name),
                "must be in [0, 1]",
            )
        for name in ("mixup", "cutmix", "randaugment_std"):
            require(
                0 <= getattr(self, name) < math.inf,
                f"augment.{name}",
                getattr(self, name),
                "must be at least 0, finite",
            )
        require(
            0 <= self.label_smoothing < 1,
            "augment.label_smoothing",
            self.label_smoothing,
            "must be in [0, 1)",
        )

    @property
    def changes_pixels(self) -> bool:
        """Whether single clips are changed."""
        return self.randaugment_ops > 0 or self.erasing > 0

    @property
    def mixes(self) -> bool:
        """Whether clips of a micro-batch may be mixed."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptimConfig(OptimConfig):
    """As for every stage, with the published numbers of fine-tuning."""

    micro_batch: int = knob(8, "videos that a rank takes through forward and backward at once")
    base_lr: float = knob(
        1e-3, "learning rate for a global batch of 256: lr = base_lr * global batch / 256"
    )
    min_lr: float = knob(1e-6, "where the cosine ends, scaled like base_lr")
    epochs: float = knob(100.0, "length of the run, ignored where steps is given")
    warmup_epochs: float = knob(5.0, "linear warm-up from 0, ignored where steps is given")
    betas: tuple[float, float] = knob((0.9, 0.999), "AdamW")
    layer_decay: float = knob(
        0.75,
        "factor of the learning rate from a layer of the encoder to the one below it; 1 is one rate for all",
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """The fine-tuning stage: `deepspeed --module video_mae finetune CONFIG.yaml key=value ...`."""

    output: str = knob("runs/finetune", "the run folder; starting the same one again resumes it")
    checkpoint: str = knob(
        "",
        "the pretrained model: a model folder, a run folder, or what another project wrote; empty: random weights",
    )
    classifier: ClassifierConfig = section(
        ClassifierConfig,
        "the head, and how frames are chosen; classes are named by the folders of "
        "data.source or by the lines of a classes.txt beside its list",
    )
    data: LabelledDataConfig = section(LabelledDataConfig, "training videos")
    validation: ValidationConfig = section(ValidationConfig, "validation videos")
    augment: AugmentConfig = section(AugmentConfig, "augmentation of clips and targets")
    optim: FinetuneOptimConfig = section(FinetuneOptimConfig, "optimization")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.data.stride in (DataConfig().stride, self.classifier.stride),
            "data.stride",
            self.data.stride,
            f"is not used in fine-tuning: set classifier.stride (it is {self.classifier.stride}), which the model folder keeps",
        )
        require(
            self.data.reach_end,
            "data.reach_end",
            self.data.reach_end,
            "is for pretraining: set classifier.sampling",
        )
        require(
            not self.data.sources,
            "data.sources",
            tuple(self.data.sources),
            "are for pretraining: name one data.source here",
        )
        require(
            self.data.crop_where == "worker"
            or self.augment.where == "device"
            or not self.augment.changes_pixels,
            "augment.where",
            self.augment.where,
            "comes after the crop: set it to device as well, as data.crop_where is",
        )
        partners = self.optim.micro_batch * self.data.clips_per_video
        require(
            partners > 1 or not self.augment.mixes,
            "optim.micro_batch",
            self.optim.micro_batch,
            "clip has no other to be mixed with; raise it, or set augment.mix_probability=0",
        )
