"""What action-recognition fine-tuning adds to a training stage: labelled clips, augmentation,
validation.
"""

from typing import Literal

from video_mae.config.data import DataConfig, ListFormat
from video_mae.config.model import ClassifierConfig
from video_mae.config.optim import OptimConfig
from video_mae.config.schema import MOST_SIZE, Knobs, knob, require, section
from video_mae.config.training import RunConfig


class ValidationConfig(Knobs):
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
        "optimizer steps from one validation to the next; 0: after each epoch; the last step "
        "always validates",
        low=0,
    )
    patience: int | None = knob(
        None,
        "validations without a better one (more top-1, or as much and less loss) after which the "
        "training ends; null: it goes on to its last step",
        low=1,
    )
    batch: int = knob(16, "clips that a rank takes at once", low=1, high=MOST_SIZE)


class AugmentConfig(Knobs):
    """What makes a training clip and its target harder, after the crop. Source: the published
    fine-tuning of VideoMAE.
    """

    randaugment_ops: int = knob(
        4,
        "operations of RandAugment (rand-m7-n4-mstd0.5-inc1), each done with probability 0.5; 0 "
        "does none",
        low=0,
        high=100,
    )
    randaugment_magnitude: float = knob(7.0, "mean strength of an operation, of 10", low=0, high=10)
    randaugment_std: float = knob(0.5, "standard deviation of the strength", low=0)
    erasing: float = knob(
        0.25, "probability that a random box of all frames becomes noise", low=0, high=1
    )
    mixup: float = knob(
        0.8,
        "alpha of Beta(alpha, alpha), from which the share of a clip in its mixture is drawn; 0 "
        "does no mixup",
        low=0,
    )
    cutmix: float = knob(
        1.0, "likewise, the share of the area that a clip keeps; 0 does no cutmix", low=0
    )
    mix_probability: float = knob(
        1.0, "probability that a micro-batch is mixed at all", low=0, high=1
    )
    switch_probability: float = knob(
        0.5, "probability of cutmix instead of mixup where both are on", low=0, high=1
    )
    label_smoothing: float = knob(
        0.1, "share of the target that is spread over all classes", low=0, below=1
    )
    where: Literal["worker", "device"] = knob(
        "worker",
        "where RandAugment and erasing are done: by the processes that decode, or on the "
        "device; the numbers drawn are the same",
    )

    @property
    def changes_pixels(self) -> bool:
        """Whether single clips are changed."""
        return self.randaugment_ops > 0 or self.erasing > 0

    @property
    def mixes(self) -> bool:
        """Whether clips of a micro-batch may be mixed."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)


class LoraConfig(Knobs):
    """Low-rank updates of matrices of the encoder, which stay as they are. Source: LoRA (Hu et al.,
    2021).
    """

    rank: int = knob(
        0,
        "rank of the update of each matrix, those of query, key and value apart; 0 has no updates "
        "and trains the matrices",
        low=0,
    )
    alpha: float = knob(16.0, "an update counts alpha / rank times", above=0)
    targets: Literal["attention", "attention_mlp"] = knob(
        "attention",
        "which matrices have one: query, key, value and projection (as the paper), or those of the "
        "MLP too",
    )


class FinetuneConfig(RunConfig):
    """The fine-tuning stage: `deepspeed --module video_mae finetune CONFIG.yaml key=value ...`."""

    first_keys = (
        "output checkpoint lora.rank classifier.num_classes data.source validation.source "
        "optim.global_batch optim.micro_batch optim.base_lr optim.epochs"
    )
    output: str = knob(
        "runs/finetune", "the run folder; starting the same one again resumes it", filled=True
    )
    freeze_blocks: int = knob(
        0,
        "how many of the encoder's first blocks stay as they are, and with them all that comes "
        "before; model.depth of them: the head and its norm alone are trained",
        low=0,
    )
    lora: LoraConfig = section(
        LoraConfig, "low-rank updates in place of a training of the whole encoder"
    )
    classifier: ClassifierConfig = section(
        ClassifierConfig,
        "the head, and how frames are chosen; classes are named by the folders of data.source, by "
        "the lines of a classes.txt beside its list, or by the folders that its videos lie in",
    )
    data: DataConfig = section(
        DataConfig,
        "training videos; every one needs a label",
        crop="random_resized",
        crop_scales=(0.08, 1.0),
        flip=True,
    )
    validation: ValidationConfig = section(ValidationConfig, "validation videos")
    augment: AugmentConfig = section(AugmentConfig, "augmentation of clips and targets")
    # the published numbers of fine-tuning
    optim: OptimConfig = section(
        OptimConfig,
        "optimization",
        micro_batch=8,
        base_lr=1e-3,
        min_lr=1e-6,
        epochs=100.0,
        warmup_epochs=5.0,
        betas=(0.9, 0.999),
        layer_decay=0.75,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        frozen, rank, model = self.freeze_blocks, self.lora.rank, self.model
        require(
            frozen <= model.depth - (rank > 0),
            "freeze_blocks",
            frozen,
            f"is too many: there are model.depth = {model.depth}, of which lora.rank needs one",
        )
        remedy = f"is more than a matrix can have: model.embed_dim = {model.embed_dim}"
        require(rank <= model.embed_dim, "lora.rank", rank, remedy)
        require(
            bool(self.checkpoint) or frozen == rank == 0,
            "checkpoint",
            "(empty)",
            "would freeze random weights: name a model, or leave out freeze_blocks and lora.rank",
        )
        require(
            self.data.stride in (DataConfig().stride, self.classifier.stride),
            "data.stride",
            self.data.stride,
            f"is not used in fine-tuning: set classifier.stride (it is {self.classifier.stride}), "
            "which the model folder keeps",
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
