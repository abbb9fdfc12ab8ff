"""How a run is optimized: batches, learning rates, AdamW."""

from dataclasses import replace
from typing import Literal

from video_mae.config.schema import MOST_SIZE, Knobs, knob, require


class OptimConfig(Knobs):
    """AdamW, and a learning rate per step. Lengths are in epochs (passes over the list) or, where
    given, in steps.
    """

    global_batch: int | None = knob(
        None,
        "videos a step, of all ranks: micro-batches and accumulation are cut for the ranks that "
        "there are; null: ranks x micro_batch x accumulation",
        low=1,
        high=2**22,
    )
    micro_batch: int = knob(
        32,
        "videos that a rank takes through forward and backward at once; with global_batch the most "
        "of them: the largest number that divides its share",
        low=1,
        high=MOST_SIZE,
    )
    accumulation: int = knob(1, "micro-batches a step, ignored where global_batch is given", low=1)
    base_lr: float = knob(
        1.5e-4,
        "learning rate for a global batch of 256: lr = base_lr * global batch / 256",
        low=0,
        high=1e30,
    )
    min_lr: float = knob(1e-5, "where the schedule ends, scaled like base_lr", low=0, high=1e30)
    schedule: Literal["cosine", "constant_cooldown"] = knob(
        "cosine",
        "after the warm-up: half a cosine down to min_lr; or base_lr until a cooldown of the shape "
        "1 - sqrt, whose length and that of the run may be changed until it begins",
    )
    lr_counts_clips: bool = knob(
        False, "count clips instead of videos in the global batch (times data.clips_per_video)"
    )
    epochs: float = knob(
        800.0, "length of the run, ignored where steps is given", above=0, below=10**9
    )
    warmup_epochs: float = knob(40.0, "linear warm-up from 0, ignored where steps is given", low=0)
    cooldown_epochs: float = knob(
        0.0, "end of the run that cools down to min_lr, ignored where steps is given", low=0
    )
    steps: int | None = knob(None, "length of the run in optimizer steps", low=1, below=10**8)
    warmup_steps: int = knob(0, "linear warm-up where steps is given", low=0)
    cooldown_steps: int = knob(0, "cooldown where steps is given; 0: none yet", low=0)
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
    ema: float = knob(
        0.0,
        "decay of a moving average of the weights, at step s min(ema, (1 + s) / (10 + s)), which "
        "becomes RUN/model_ema: 0.9999, say; 0 keeps none",
        low=0,
        below=1,
    )
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
        name, room = f"cooldown_{unit}", 0
        if self.schedule == "constant_cooldown":
            room = getattr(self, unit) - getattr(self, f"warmup_{unit}")
        remedy = f"is above {room}, the room that optim.schedule = {self.schedule} has for it"
        require(getattr(self, name) <= room, name, getattr(self, name), remedy)

    def cut_for(self, num_ranks: int) -> "OptimConfig":
        """With the micro_batch and accumulation that make global_batch on so many ranks.

        Raises: ValueError with the numbers that would do.
        """
        if self.global_batch is None:
            return self
        share, rest = divmod(self.global_batch, num_ranks)
        if rest:
            counts = [n for n in range(1, self.global_batch + 1) if self.global_batch % n == 0]
            counts = sorted(sorted(counts, key=lambda n: abs(n - num_ranks))[:2])
            near = max(num_ranks, self.global_batch - rest)
            raise ValueError(
                f"optim.global_batch: {self.global_batch} videos a step are no equal shares for "
                f"{num_ranks} ranks; {near} or {near + num_ranks} are, or start "
                f"{' or '.join(map(str, counts))} ranks"
            )
        size = largest_divisor(share, self.micro_batch)
        return replace(self, micro_batch=size, accumulation=share // size)


def largest_divisor(number: int, most: int) -> int:
    """The largest number up to `most` that divides another one."""
    return max(n for n in range(1, min(most, number) + 1) if number % n == 0)
