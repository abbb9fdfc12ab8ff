"""Every knob: frozen keyword-only dataclasses, whose field names are the YAML keys, and `load_config`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from video_mae.schema import Schema, knob, parse, require, section

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture: the default is ViT-B of VideoMAE at 16 x 224 x 224. A still image has num_frames=tubelet_size=1."""

    in_channels: int = knob(3, "channels of a pixel")
    num_frames: int = knob(16, "frames of a clip")
    height: int = knob(224, "pixels")
    width: int = knob(224, "pixels")
    tubelet_size: int = knob(2, "frames of a tubelet")
    patch_size: int = knob(16, "pixels, height and width of a tubelet")
    embed_dim: int = knob(768, "encoder width")
    depth: int = knob(12, "encoder blocks")
    num_heads: int = knob(12, "encoder attention heads")
    mlp_ratio: float = knob(4.0, "encoder MLP width over embed_dim")
    decoder_embed_dim: int = knob(384, "decoder width")
    decoder_depth: int = knob(4, "decoder blocks")
    decoder_num_heads: int = knob(6, "decoder attention heads")
    decoder_mlp_ratio: float = knob(4.0, "decoder MLP width over decoder_embed_dim")
    drop_path: float = knob(0.0, "stochastic depth of the last encoder block, growing linearly from 0")
    mean: tuple[float, ...] = knob(IMAGENET_MEAN, "channel means of the input in [0, 1]; one value serves all channels")
    std: tuple[float, ...] = knob(IMAGENET_STD, "channel standard deviations, likewise")

    def __post_init__(self) -> None:
        for name in ("in_channels", "num_frames", "height", "width", "tubelet_size", "patch_size", "embed_dim", "depth",
                     "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        for side, unit in (("num_frames", "tubelet_size"), ("height", "patch_size"), ("width", "patch_size")):
            require(getattr(self, side) % getattr(self, unit) == 0, f"model.{side}", getattr(self, side),
                    f"is not a multiple of model.{unit} = {getattr(self, unit)}")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
            require(getattr(self, width) % getattr(self, heads) == 0, f"model.{width}", getattr(self, width),
                    f"is not a multiple of model.{heads} = {getattr(self, heads)}")
            require(getattr(self, width) % 2 == 0, f"model.{width}", getattr(self, width), "must be even (sine and cosine pairs)")
        for name, width in (("mlp_ratio", self.embed_dim), ("decoder_mlp_ratio", self.decoder_embed_dim)):
            ratio = getattr(self, name)
            require(math.isfinite(ratio) and round(ratio * width) >= 1, f"model.{name}", ratio, f"of {width} is no width of an MLP")
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "must be in [0, 1)")
        for name in ("mean", "std"):
            values = getattr(self, name)
            require(len(values) in (1, self.in_channels), f"model.{name}", values,
                    f"must have 1 value or one for each of model.in_channels = {self.in_channels}")
        require(min(self.std) > 0, "model.std", self.std, "must be above 0")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "ModelConfig":
        """A published size: small, base, large, huge (VideoMAE) or giant (VideoMAE V2), with any field changed.

        Raises: ValueError for an unknown name. Source: the official pretraining scripts.
        """
        require(name in PRESETS, "model.preset", name, f"is not one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def grid(self) -> tuple[int, int, int]:
        """(time, height, width) in tokens."""
        return self.num_frames // self.tubelet_size, self.height // self.patch_size, self.width // self.patch_size

    @property
    def tubelet(self) -> tuple[int, int, int]:
        """(frames, height, width) of a tubelet in pixels."""
        return self.tubelet_size, self.patch_size, self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def tubelet_values(self) -> int:
        """P: values of a tubelet, and outputs of the decoder's head."""
        return self.tubelet_size * self.patch_size**2 * self.in_channels


def _size(embed_dim: int, depth: int, num_heads: int, decoder: tuple[int, int, int], **more: Any) -> dict[str, Any]:
    width, heads, blocks = decoder
    return dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, decoder_embed_dim=width, decoder_num_heads=heads,
                decoder_depth=blocks, **more)


PRESETS: dict[str, dict[str, Any]] = {
    "small": _size(384, 12, 6, (192, 3, 4)),
    "base": _size(768, 12, 12, (384, 6, 4)),
    "large": _size(1024, 24, 16, (512, 8, 12)),
    "huge": _size(1280, 32, 16, (640, 8, 12)),
    "giant": _size(1408, 40, 16, (512, 8, 4), patch_size=14, mlp_ratio=48 / 11),
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """L_total = L_rec + contrastive_weight * L_con (docs/objective.md)."""

    normalize: Literal["channel", "tubelet", "none"] = knob("channel", "statistics that normalise a target: per channel of a "
                                                            "tubelet (VideoMAE), per tubelet (MAE, mae_st), or raw [0, 1] pixels")
    contrastive_weight: float = knob(0.0, "lambda; 0 is plain VideoMAE and computes no contrastive loss")
    temperature: float = knob(0.1, "tau of the contrastive softmax (its start value where it is learned)")
    learn_temperature: bool = knob(False, "train tau, kept between 0.01 and 1")
    negatives: Literal["clip", "batch"] = knob("clip", "which masked tubelets compete: of the same clip, or of the rank's micro-batch")

    def __post_init__(self) -> None:
        require(0 <= self.contrastive_weight < math.inf, "objective.contrastive_weight", self.contrastive_weight,
                "must be at least 0, finite")
        require(0.01 <= self.temperature <= 1, "objective.temperature", self.temperature, "must be in [0.01, 1]")
        require(not self.learn_temperature or 0.01 < self.temperature < 1, "objective.temperature", self.temperature,
                "must be inside (0.01, 1) to be learned")
        require(not self.learn_temperature or self.contrastive_weight > 0, "objective.learn_temperature", self.learn_temperature,
                "needs objective.contrastive_weight above 0")


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which tokens the encoder does not see, and which of those the decoder predicts."""

    kind: Literal["tube", "random", "frame"] = knob("tube", "hide the same places in every frame, any tokens, or whole frames")
    ratio: float = knob(0.9, "share hidden: int(ratio * tokens a frame) a frame (tube), of all (random), or of the frames (frame)")
    decoder_mask_ratio: float = knob(0.0, "share of the tokens the decoder skips by a running cell (dual masking of VideoMAE V2: "
                                     "0.25, 0.5 or 0.75); 0 predicts every hidden token")

    def __post_init__(self) -> None:
        require(0 < self.ratio < 1, "mask.ratio", self.ratio, "must be between 0 and 1")
        require(self.decoder_mask_ratio in (0.0, 0.25, 0.5, 0.75), "mask.decoder_mask_ratio", self.decoder_mask_ratio,
                "must be 0, 0.25, 0.5 or 0.75")


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


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a warm-up and a cosine per step. Lengths are in epochs (passes over the list) or, where given, in steps."""

    micro_batch: int = knob(32, "videos that a rank takes through forward and backward at once")
    accumulation: int = knob(1, "micro-batches a step")
    base_lr: float = knob(1.5e-4, "learning rate for a global batch of 256: lr = base_lr * global batch / 256")
    min_lr: float = knob(1e-5, "where the cosine ends, scaled like base_lr")
    lr_counts_clips: bool = knob(False, "count clips instead of videos in the global batch (times data.clips_per_video)")
    epochs: float = knob(800.0, "length of the run, ignored where steps is given")
    warmup_epochs: float = knob(40.0, "linear warm-up from 0, ignored where steps is given")
    steps: int | None = knob(None, "length of the run in optimizer steps")
    warmup_steps: int = knob(0, "linear warm-up where steps is given")
    weight_decay: float = knob(0.05, "of matrices; vectors, biases and tokens have none")
    betas: tuple[float, float] = knob((0.9, 0.95), "AdamW")
    eps: float = knob(1e-8, "AdamW")
    clip_grad: float = knob(0.0, "largest gradient norm; 0 does not clip")

    def __post_init__(self) -> None:
        for name in ("micro_batch", "accumulation"):
            require(getattr(self, name) >= 1, f"optim.{name}", getattr(self, name), "must be at least 1")
        for name in ("base_lr", "min_lr", "warmup_epochs", "warmup_steps", "weight_decay", "clip_grad"):
            require(0 <= getattr(self, name) < math.inf, f"optim.{name}", getattr(self, name), "must be at least 0, finite")
        require(self.min_lr <= self.base_lr, "optim.min_lr", self.min_lr, f"is above optim.base_lr = {self.base_lr}")
        require(0 < self.epochs < math.inf, "optim.epochs", self.epochs, "must be above 0, finite")
        require(self.steps is None or self.steps >= 1, "optim.steps", self.steps, "must be at least 1, or null to count epochs")
        require(self.steps is None or self.warmup_steps <= self.steps, "optim.warmup_steps", self.warmup_steps,
                f"is above optim.steps = {self.steps}")
        require(self.steps is not None or self.warmup_epochs <= self.epochs, "optim.warmup_epochs", self.warmup_epochs,
                f"is above optim.epochs = {self.epochs}")
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas", self.betas, "must be in [0, 1)")
        require(0 < self.eps < math.inf, "optim.eps", self.eps, "must be above 0, finite")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed: DeepSpeed's configuration is derived from this."""

    zero_stage: Literal[0, 1, 2, 3] = knob(1, "what is partitioned over ranks: nothing, optimizer state, and gradients, and parameters")
    offload: Literal["none", "optimizer", "parameters"] = knob("none", "what lives in CPU memory: with zero_stage 1 to 3 the optimizer "
                                                              "state, with zero_stage 3 also the parameters")
    precision: Literal["fp32", "bf16", "fp16"] = knob("bf16", "of activations and gradients; parameters have a float32 master copy")
    activation_checkpointing: bool = knob(False, "recompute blocks in the backward pass instead of keeping their activations")
    compile: bool = knob(False, "torch.compile the forward and backward pass")
    kernels: Literal["auto", "reference", "triton"] = knob("auto", "which implementation of the fused operations")
    max_skipped_in_a_row: int = knob(5, "the run stops when so many steps in a row had a loss or gradient that is not finite")
    extra: dict[str, Any] = knob({}, "merged into DeepSpeed's dictionary as it is; a key that this program sets is an error")

    def __post_init__(self) -> None:
        require(self.offload == "none" or self.zero_stage >= 1, "engine.offload", self.offload, "needs engine.zero_stage 1, 2 or 3")
        require(self.offload != "parameters" or self.zero_stage == 3, "engine.offload", self.offload, "needs engine.zero_stage 3")
        require(self.max_skipped_in_a_row >= 1, "engine.max_skipped_in_a_row", self.max_skipped_in_a_row, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class JournalConfig:
    """What a run writes, and how often (in optimizer steps; 0 is never)."""

    log_interval: int = knob(20, "lines of metrics.jsonl and of the console")
    checkpoint_interval: int = knob(500, "resumable checkpoints; the last step always writes one")
    keep_checkpoints: int = knob(2, "newest checkpoints that are kept")
    picture_interval: int = knob(500, "reconstruction pictures; the last step always draws one")
    picture_clips: int = knob(4, "clips on a picture, of videos spread evenly over the list")
    tensorboard: bool = knob(False, "write RUN/tensorboard")
    wandb_project: str = knob("", "send metrics to this Weights & Biases project")

    def __post_init__(self) -> None:
        for name, least in (("log_interval", 1), ("checkpoint_interval", 0), ("keep_checkpoints", 1), ("picture_interval", 0),
                            ("picture_clips", 1)):
            require(getattr(self, name) >= least, f"journal.{name}", getattr(self, name), f"must be at least {least}")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The pretraining stage: `deepspeed --module video_mae pretrain CONFIG.yaml key=value ...`."""

    output: str = knob("runs/pretrain", "the run folder; starting the same one again resumes it")
    seed: int = knob(0, "of the weights, the order of the videos, clips, crops and masks")
    model: ModelConfig = section(ModelConfig, "architecture; model.preset = small | base | large | huge | giant sets the published sizes")
    objective: ObjectiveConfig = section(ObjectiveConfig, "losses")
    mask: MaskConfig = section(MaskConfig, "masking")
    data: DataConfig = section(DataConfig, "videos")
    optim: OptimConfig = section(OptimConfig, "optimization")
    engine: EngineConfig = section(EngineConfig, "DeepSpeed, precision and memory")
    journal: JournalConfig = section(JournalConfig, "logs, pictures and checkpoints")

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "must be in [0, 2**63)")
        require(self.output != "", "output", "(empty)", "must name the run folder")


def load_config(path: str | Path, overrides: Sequence[str] = (), schema: type[Schema] = PretrainConfig) -> Schema:
    """Reads a YAML file and dotted overrides (`optim.micro_batch=8`) into a dataclass, checked key by key.

    Precedence: defaults < `model.preset` < file < overrides.
    Raises: FileNotFoundError; ValueError with one line that names the file, the key, and the nearest valid key or the range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    return parse(path, overrides, schema, PRESETS)
