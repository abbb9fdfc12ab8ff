"""How a model is optimised, on what, and what a run writes."""

from typing import Any, Literal

from video_mae.config.schema import Knobs, knob, require


class OptimConfig(Knobs):
    """AdamW with a warm-up and a cosine per step. Lengths are in epochs (passes over the list) or,
    where given, in steps.
    """

    micro_batch: int = knob(
        32, "videos that a rank takes through forward and backward at once", low=1
    )
    accumulation: int = knob(1, "micro-batches a step", low=1)
    base_lr: float = knob(
        1.5e-4, "learning rate for a global batch of 256: lr = base_lr * global batch / 256", low=0
    )
    min_lr: float = knob(1e-5, "where the cosine ends, scaled like base_lr", low=0)
    lr_counts_clips: bool = knob(
        False, "count clips instead of videos in the global batch (times data.clips_per_video)"
    )
    epochs: float = knob(
        800.0, "length of the run, ignored where steps is given", above=0, below=10**9
    )
    warmup_epochs: float = knob(40.0, "linear warm-up from 0, ignored where steps is given", low=0)
    steps: int | None = knob(None, "length of the run in optimizer steps", low=1, below=10**12)
    warmup_steps: int = knob(0, "linear warm-up where steps is given", low=0)
    drop_last_batch: bool = knob(
        False,
        "leave out, of each epoch, the videos after its last whole step (VideoMAE, MAE); else a "
        "step may hold videos of two epochs",
    )
    weight_decay: float = knob(0.05, "of matrices; vectors, biases and tokens have none", low=0)
    decay_tokens: bool = knob(
        False, "weight decay also of class and mask tokens and learned positions (MAE, mae_st)"
    )
    betas: tuple[float, float] = knob((0.9, 0.95), "AdamW", low=0, below=1)
    eps: float = knob(1e-8, "AdamW", above=0)
    clip_grad: float = knob(0.0, "largest gradient norm; 0 does not clip", low=0)
    layer_decay: float = knob(
        1.0,
        "factor of the learning rate from a layer of the encoder to the one below it; 1 is one "
        "rate for all",
        above=0,
        high=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        unit = "epochs" if self.steps is None else "steps"
        for name, most in (("min_lr", "base_lr"), (f"warmup_{unit}", unit)):
            value, limit = getattr(self, name), getattr(self, most)
            require(value <= limit, name, value, f"is above optim.{most} = {limit}")


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
        "the run stops, at most a step later, when so many steps in a row had a loss or gradient "
        "that is not finite",
        low=1,
    )
    extra: dict[str, Any] = knob(
        {}, "merged into DeepSpeed's dictionary as it is; a key that this program sets is an error"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.offload == "none" or self.zero_stage >= 1,
            "offload",
            self.offload,
            "needs engine.zero_stage 1, 2 or 3",
        )
        require(
            self.offload != "parameters" or self.zero_stage == 3,
            "offload",
            self.offload,
            "needs engine.zero_stage 3",
        )


class JournalConfig(Knobs):
    """What a run writes, and how often (in optimizer steps; 0 is never)."""

    log_interval: int = knob(20, "lines of metrics.jsonl and of the console", low=1)
    checkpoint_interval: int = knob(
        500, "resumable checkpoints; the last step always writes one", low=0
    )
    keep_checkpoints: int = knob(2, "newest checkpoints that are kept", low=1)
    tensorboard: bool = knob(False, "write RUN/tensorboard")
    wandb_project: str = knob("", "send metrics to this Weights & Biases project")
