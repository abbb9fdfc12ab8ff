"""How a model is optimised, on what, and what a run writes."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from video_mae.config.schema import knob, require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a warm-up and a cosine per step. Lengths are in epochs (passes over the list) or,
    where given, in steps.
    """

    micro_batch: int = knob(32, "videos that a rank takes through forward and backward at once")
    accumulation: int = knob(1, "micro-batches a step")
    base_lr: float = knob(
        1.5e-4, "learning rate for a global batch of 256: lr = base_lr * global batch / 256"
    )
    min_lr: float = knob(1e-5, "where the cosine ends, scaled like base_lr")
    lr_counts_clips: bool = knob(
        False, "count clips instead of videos in the global batch (times data.clips_per_video)"
    )
    epochs: float = knob(800.0, "length of the run, ignored where steps is given")
    warmup_epochs: float = knob(40.0, "linear warm-up from 0, ignored where steps is given")
    steps: int | None = knob(None, "length of the run in optimizer steps")
    warmup_steps: int = knob(0, "linear warm-up where steps is given")
    drop_last_batch: bool = knob(
        False,
        "leave out, of each epoch, the videos after its last whole step (VideoMAE, MAE); else a step may "
        "hold videos of two epochs",
    )
    weight_decay: float = knob(0.05, "of matrices; vectors, biases and tokens have none")
    decay_tokens: bool = knob(
        False, "weight decay also of class and mask tokens and learned positions (MAE, mae_st)"
    )
    betas: tuple[float, float] = knob((0.9, 0.95), "AdamW")
    eps: float = knob(1e-8, "AdamW")
    clip_grad: float = knob(0.0, "largest gradient norm; 0 does not clip")
    layer_decay: float = knob(
        1.0,
        "factor of the learning rate from a layer of the encoder to the one below it; 1 is one rate for all",
    )

    def __post_init__(self) -> None:
        for name in ("micro_batch", "accumulation"):
            require(
                getattr(self, name) >= 1, f"optim.{name}", getattr(self, name), "must be at least 1"
            )
        for name in (
            "base_lr",
            "min_lr",
            "warmup_epochs",
            "warmup_steps",
            "weight_decay",
            "clip_grad",
        ):
            require(
                0 <= getattr(self, name) < math.inf,
                f"optim.{name}",
                getattr(self, name),
                "must be at least 0, finite",
            )
        require(
            self.min_lr <= self.base_lr,
            "optim.min_lr",
            self.min_lr,
            f"is above optim.base_lr = {self.base_lr}",
        )
        require(
            0 < self.epochs < 10**9, "optim.epochs", self.epochs, "must be above 0, below 10**9"
        )
        require(
            self.steps is None or 1 <= self.steps < 10**12,
            "optim.steps",
            self.steps,
            "must be in [1, 10**12), or null to count epochs",
        )
        require(
            self.steps is None or self.warmup_steps <= self.steps,
            "optim.warmup_steps",
            self.warmup_steps,
            f"is above optim.steps = {self.steps}",
        )
        require(
            self.steps is not None or self.warmup_epochs <= self.epochs,
            "optim.warmup_epochs",
            self.warmup_epochs,
            f"is above optim.epochs = {self.epochs}",
        )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas,
            "must be in [0, 1)",
        )
        require(0 < self.eps < math.inf, "optim.eps", self.eps, "must be above 0, finite")
        require(
            0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "must be in (0, 1]"
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How a step is computed: DeepSpeed's configuration is derived from this."""

    zero_stage: Literal[0, 1, 2, 3] = knob(
        1, "what is partitioned over ranks: nothing, optimizer state, and gradients, and parameters"
    )
    offload: Literal["none", "optimizer", "parameters"] = knob(
        "none",
        "what lives in CPU memory: with zero_stage 1 to 3 the optimizer "
        "state, with zero_stage 3 also the parameters",
    )
    precision: Literal["fp32", "bf16", "fp16"] = knob(
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
        "the run stops, at most a step later, when so many steps in a row had a loss or gradient that "
        "is not finite",
    )
    extra: dict[str, Any] = knob(
        {}, "merged into DeepSpeed's dictionary as it is; a key that this program sets is an error"
    )

    def __post_init__(self) -> None:
        require(
            self.offload == "none" or self.zero_stage >= 1,
            "engine.offload",
            self.offload,
            "needs engine.zero_stage 1, 2 or 3",
        )
        require(
            self.offload != "parameters" or self.zero_stage == 3,
            "engine.offload",
            self.offload,
            "needs engine.zero_stage 3",
        )
        require(
            self.max_skipped_in_a_row >= 1,
            "engine.max_skipped_in_a_row",
            self.max_skipped_in_a_row,
            "must be at least 1",
        )


@dataclass(frozen=True, kw_only=True)
class JournalConfig:
    """What a run writes, and how often (in optimizer steps; 0 is never)."""

    log_interval: int = knob(20, "lines of metrics.jsonl and of the console")
    checkpoint_interval: int = knob(500, "resumable checkpoints; the last step always writes one")
    keep_checkpoints: int = knob(2, "newest checkpoints that are kept")
    tensorboard: bool = knob(False, "write RUN/tensorboard")
    wandb_project: str = knob("", "send metrics to this Weights & Biases project")

    def __post_init__(self) -> None:
        for name, least in (
            ("log_interval", 1),
            ("checkpoint_interval", 0),
            ("keep_checkpoints", 1),
        ):
            require(
                getattr(self, name) >= least,
                f"journal.{name}",
                getattr(self, name),
                f"must be at least {least}",
            )
