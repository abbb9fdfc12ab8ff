"""What the training stages read: losses and masks, engine, what a run writes, and `load_config`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from video_mae.config.data import DataConfig, ListFormat
from video_mae.config.model import ModelConfig
from video_mae.config.optim import OptimConfig
from video_mae.config.schema import Knobs, Schema, knob, parse, require, section
from video_mae.config.world import World

Precision = Literal["fp32", "bf16", "fp16"]
MaskKind = Literal["tube", "random", "random_kept", "frame"]
CHECKPOINTS = "step_" + "[0-9]" * 8
"""Of the folders in OUTPUT/checkpoints, those of the run: what a person has copied is none."""


class ObjectiveConfig(Knobs):
    """L_total = L_rec + contrastive_weight * L_con (docs/objective.md)."""

    normalize: Literal["channel", "tubelet", "none"] = knob(
        "channel",
        "statistics that normalise a target: per channel of a "
        "tubelet (VideoMAE), per tubelet (MAE, mae_st), or raw [0, 1] pixels",
    )
    pixels: Literal["unit", "normalized"] = knob(
        "unit",
        "what a target is made of before that: pixels in [0, 1] (VideoMAE), or as the "
        "encoder sees them, normalised by model.mean and model.std (MAE, mae_st)",
    )
    target: Literal["pixels", "features"] = knob(
        "pixels", "what hidden tubelets are predicted as: pixels, or features of a teacher"
    )
    teacher: str = knob(
        "",
        "whose features: ema, a moving average of the encoder that is trained; or those of a "
        "model as `checkpoint` names it, or one of transformers: hf://OWNER/NAME, hf:FOLDER (CLIP, "
        "SigLIP, DINOv2, DINOv3, ViTMAE, VideoMAE)",
    )
    teacher_momentum: float = knob(
        0.998,
        "of teacher = ema, at the first step; it grows in a line to 1 at the last (I-JEPA, V-JEPA)",
        low=0,
        high=1,
    )
    min_rank: float = knob(
        2.0,
        "the run stops where features of teacher = ema have a lower effective rank in 5 logged "
        "lines in a row; 0 does not watch for it",
        low=0,
    )
    feature_loss: Literal["smooth_l1", "squared"] = knob(
        "smooth_l1", "error of a predicted feature; smooth_l1 is squared up to 1, linear from there"
    )
    contrastive_weight: float = knob(0.0, "lambda; 0 is plain VideoMAE, without that loss", low=0)
    temperature: float = knob(
        0.1,
        "tau of the contrastive softmax (its start value where it is learned)",
        low=0.01,
        high=1,
    )
    learn_temperature: bool = knob(False, "train tau, kept between 0.01 and 1")
    negatives: Literal["clip", "batch"] = knob(
        "clip",
        "which masked tubelets compete: of the same clip, or of the rank's micro-batch, so that "
        "the loss depends on how a step is cut",
    )
    contrastive_memory: Literal["fast", "least"] = knob(
        "fast",
        "how the kernels compute it: with the similarities of some tubelets at a "
        "time in memory, or streamed and computed twice",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        is_features = self.target == "features"
        require(
            is_features == (self.teacher != ""),
            "teacher",
            self.teacher or "(empty)",
            "belongs to objective.target = features",
        )
        require(
            not is_features or (self.normalize, self.pixels) == ("channel", "unit"),
            "target",
            self.target,
            "leaves nothing for objective.normalize and objective.pixels to say: leave them out",
        )
        if self.learn_temperature:
            require(
                0.01 < self.temperature < 1,
                "temperature",
                self.temperature,
                "must be inside (0.01, 1) to be learned",
            )
            require(
                self.contrastive_weight > 0,
                "learn_temperature",
                self.learn_temperature,
                "needs objective.contrastive_weight above 0",
            )


class MaskConfig(Knobs):
    """Which tokens the encoder does not see, and which of those the decoder predicts."""

    kind: MaskKind = knob(
        "tube",
        "hide the same places in every frame, any tokens, any tokens "
        "counted by those that are kept (MAE, mae_st), or whole frames",
    )
    ratio: float = knob(
        0.9,
        "share hidden: int(ratio * tokens a frame) a frame (tube), of all (random), or of the "
        "frames (frame); random_kept keeps int((1 - ratio) * tokens)",
        above=0,
        below=1,
    )
    decoder_mask_ratio: float = knob(
        0.0,
        "share of the tokens the decoder skips by a running cell (dual masking of VideoMAE V2: "
        "0.25, 0.5 or 0.75); 0 predicts every hidden token",
        low=0,
        high=0.75,
        multiple_of=0.25,
    )


class EngineConfig(Knobs):
    """How a step is computed: DeepSpeed's configuration is derived from this."""

    zero_stage: Literal[0, 1, 2, 3] = knob(
        1, "what is partitioned over ranks: nothing, optimizer state, and gradients, and parameters"
    )
    offload: Literal["none", "optimizer", "parameters"] = knob(
        "none",
        "what lives in CPU memory: with zero_stage 1 to 3 the optimizer "
        "state, with zero_stage 3 also the parameters",
    )
    precision: Precision = knob(
        "bf16", "of activations and gradients; parameters have a float32 master copy"
    )
    activation_checkpointing: bool = knob(
        False, "recompute blocks in the backward pass instead of keeping their activations"
    )
    compile: bool = knob(
        False, "torch.compile the forward and backward pass: one graph in ZeRO 0 to 2"
    )
    kernels: Literal["auto", "reference", "triton"] = knob(
        "auto", "which implementation of the fused operations"
    )
    max_skipped_in_a_row: int = knob(
        5,
        "the run stops, at most a step later, when so many steps in a row had a loss or gradient "
        "that is not finite",
        low=1,
    )
    on_spike: Literal["ignore", "skip", "stop", "rollback"] = knob(
        "ignore",
        "what a loss does that is 10 times the running mean of those before: nothing; skip its "
        "step, as one that is not finite; stop the run with status 3, as one that is not finite; "
        "or likewise with status 75, to go back to its last checkpoint without the steps since",
    )
    stall_seconds: float = knob(
        300.0,
        "all ranks leave with status 75 when one of them has given no sign of life for so long, or "
        "has been reading, computing or waiting for others in one and the same micro-batch",
        low=10,
        high=86400,
    )
    extra: dict[str, Any] = knob(
        {}, "merged into DeepSpeed's dictionary as it is; a key that this program sets is an error"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        stage = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        remedy = f"needs engine.zero_stage {stage} or more"
        require(self.zero_stage >= stage, "offload", self.offload, remedy)
        require(
            self.precision != "fp16" or self.on_spike in ("ignore", "skip"),
            "on_spike",
            self.on_spike,
            "does not fit fp16, which skips by itself",
        )


class JournalConfig(Knobs):
    """What a run writes, and how often (in optimizer steps; 0 is never)."""

    log_interval: int = knob(20, "lines of metrics.jsonl and of the console", low=1)
    checkpoint_interval: int = knob(
        500, "resumable checkpoints; the last step always writes one", low=0
    )
    keep_checkpoints: int = knob(2, "newest checkpoints that are kept", low=1)
    keep_every: int = knob(0, "those of multiples of so many steps are kept too; 0: none", low=0)
    checkpoint_async: bool = knob(
        False, "a thread writes checkpoints from a copy in host memory, and training does not wait"
    )
    tensorboard: bool = knob(False, "write RUN/tensorboard")
    wandb_project: str = knob("", "send metrics to this Weights & Biases project")


class RunConfig(Knobs):
    """What every training stage has."""

    output: str
    seed: int = knob(
        0,
        "of the weights, the order of the videos, and everything that is drawn for them",
        low=0,
        below=2**63,
    )
    checkpoint: str = knob(
        "",
        "the model to start from: a model folder, a run folder, a file of another project, or "
        "hf://OWNER/NAME@REVISION; empty: random weights; a run that goes on reads it no more",
    )
    from_scratch: bool = knob(
        False,
        "begin with the first step, where output holds a run as well: its folder is renamed to "
        "OUTPUT.earlier_TIME",
    )
    dry_run: bool = knob(False, "check all that a start checks, tell of it, and begin nothing")
    model: ModelConfig = section(
        ModelConfig,
        "architecture; model.preset = small | base | large | huge | giant sets the published sizes",
    )
    data: DataConfig = section(DataConfig, "videos")
    optim: OptimConfig = section(OptimConfig, "optimization")
    engine: EngineConfig = section(EngineConfig, "DeepSpeed, precision and memory")
    journal: JournalConfig = section(JournalConfig, "logs and checkpoints")

    @property
    def has_begun(self) -> bool:
        """Whether the run goes on from a checkpoint: its lists were read before."""
        return not self.from_scratch and any(Path(self.output, "checkpoints").glob(CHECKPOINTS))

    def cut(self) -> Self:
        """With the batches of the ranks that there are. Raises: ValueError."""
        return replace(self, optim=self.optim.cut_for(World.from_environment().size))


class PretrainJournalConfig(JournalConfig):
    """As for every stage, and pictures."""

    picture_interval: int = knob(500, "reconstruction pictures; the last step draws one", low=0)
    picture_clips: int = knob(4, "clips on it, of videos spread over the list", low=1, high=1000)


class ClipStageConfig(Knobs):
    """What a clip is from a step on; what is null stays as the rest of the configuration has it."""

    from_step: int = knob(0, "steps done before it begins", low=0)
    num_frames: int | None = knob(None, "as model.num_frames", low=1)
    height: int | None = knob(None, "as model.height", low=1)
    width: int | None = knob(None, "as model.width", low=1)
    stride: int | None = knob(None, "as data.stride", low=1)
    mask_ratio: float | None = knob(None, "as mask.ratio", above=0, below=1)
    micro_batch: int | None = knob(
        None, "as optim.micro_batch, which alone decides on the learning rate", low=1
    )


class FeatureProbeConfig(Knobs):
    """What tells, while an encoder is pretrained, how good it is: the loss on videos that it does
    not learn from, and what its features, frozen, know of labels.
    """

    train: str = knob(
        "",
        "as data.source, every video with a label: what the read-outs learn from; empty: what "
        "needs no labels is measured",
    )
    validation: str = knob(
        "",
        "likewise: what is measured; labels are needed where probe.train is given; both empty: no "
        "probe",
    )
    root: str = knob(
        "", "where relative paths of the lists start; empty: the folder of the list file"
    )
    list_format: ListFormat = knob("auto", "as data.list_format")
    interval: int = knob(
        0,
        "optimizer steps from one probe to the next; 0: after each epoch; the last step always "
        "probes",
        low=0,
    )
    num_videos: int = knob(512, "videos of each list that are used, spread evenly over it", low=2)
    max_share: float = knob(
        0.02,
        "share of the run's time that probes may take: one is left out as long as the time of the "
        "one before is more of the time since then. The last step always probes",
        above=0,
        high=1,
    )


class PretrainConfig(RunConfig):
    """The pretraining stage: `deepspeed --module video_mae pretrain CONFIG.yaml key=value ...`."""

    first_keys = (
        "output checkpoint data.num_workers data.source mask.ratio "
        "optim.global_batch optim.micro_batch optim.base_lr optim.epochs engine.precision"
    )
    output: str = knob(
        "runs/pretrain", "the run folder; starting the same one again resumes it", filled=True
    )
    objective: ObjectiveConfig = section(ObjectiveConfig, "losses")
    mask: MaskConfig = section(MaskConfig, "masking")
    journal: PretrainJournalConfig = section(PretrainJournalConfig, "logs, pictures, checkpoints")
    stages: dict[str, ClipStageConfig] = knob(
        {},
        "clips of another size, mask or number from a step on, `NAME: {from_step: ..., height: "
        "...}`; each holds until the next. The model folder and pictures have the size of model.*",
    )
    probe: FeatureProbeConfig = section(
        FeatureProbeConfig, "how good the encoder is, measured while it trains; changes no weight"
    )


def load_config(
    path: str | Path, overrides: Sequence[str] = (), schema: type[Schema] = PretrainConfig
) -> Schema:
    """Reads a YAML file and dotted overrides (`optim.micro_batch=8`) into a dataclass, checked key
    by key.

    Precedence: defaults < `model.preset` < file < overrides.
    Raises: FileNotFoundError; ValueError with one line that names the file, the key, and the
    nearest valid key or the range.
    """
    return parse(path, overrides, schema)
