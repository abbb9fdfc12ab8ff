"""What is optimized and how fast: parameter groups, the learning rate of a step, the guard against
gradients that are not finite.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from video_mae.config import OptimConfig


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float = 1.0, *, decay_tokens: bool = False
) -> list[dict[str, Any]]:
    """Matrices decay; vectors, biases and scalars do not, nor do class and mask tokens and learned
    positions (VideoMAE) unless `decay_tokens` (the pretraining of MAE and mae_st, where they have
    more than one dimension). Each group has an `lr_scale`.

    lr_scale of layer l of an encoder of L blocks is layer_decay ** (L + 1 - l): the tubelet
    embedding is layer 0, block i is layer i + 1, what comes after the blocks L + 1. Source: BEiT
    (Bao et al., 2021), as MAE and VideoMAE fine-tune.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    top = max((_layer(name, 0) for name, _ in named), default=0) + 1
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        layer = top if layer_decay == 1 else _layer(name, top)
        decays = parameter.ndim >= 2
        if name.endswith((".class_token", ".mask_token")) or ".positions." in name:
            decays = decay_tokens
        members.setdefault((layer, not decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_free else weight_decay,
            "lr_scale": layer_decay ** (top - layer),
        }
        for (layer, is_free), parameters in sorted(members.items())
    ]


def _layer(name: str, top: int) -> int:
    """The layer that a parameter belongs to; `top` for what is no part of an encoder, or comes
    after its blocks.
    """
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if name.startswith("encoder.") and not name.startswith("encoder.norm.") else top


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then half a cosine from `peak_lr` to `final_lr`, or, with
    `cooldown_steps`, `peak_lr` until they begin; computed for any step.

    The warm-up reaches `peak_lr` in its last step, as the official table does; its first step is
    not wasted on a rate of 0. Source of warm-up, constant rate and cooldown: Hu et al., 2024
    (MiniCPM, arXiv 2404.06395); of its shape, 1 - sqrt, better there than a linear one: Haegele
    et al., 2024 (arXiv 2405.18392).
    """

    peak_lr: float
    final_lr: float
    warmup_steps: int
    total_steps: int
    cooldown_steps: int | None = None

    def lr(self, step: int) -> float:
        """The learning rate of step 0, 1, ... total_steps - 1."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        if self.cooldown_steps is not None:
            cooled = max(0, step - (self.total_steps - self.cooldown_steps))
            share = math.sqrt(min(1.0, cooled / max(1, self.cooldown_steps)))
            return self.peak_lr - (self.peak_lr - self.final_lr) * share
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        cosine = 1 + math.cos(math.pi * min(1.0, progress))
        return self.final_lr + 0.5 * (self.peak_lr - self.final_lr) * cosine


def videos_of_epoch(config: OptimConfig, num_videos: int, world_size: int) -> int:
    """How many of its videos an epoch trains on: all, or with optim.drop_last_batch as many as fill
    whole steps.

    Raises: ValueError where they do not fill one.
    """
    if not config.drop_last_batch:
        return num_videos
    videos = config.micro_batch * config.accumulation * world_size
    if num_videos < videos:
        raise ValueError(
            f"optim.drop_last_batch: {num_videos} videos do not fill one step of {videos}; lower "
            "optim.global_batch (micro_batch, accumulation), or set optim.drop_last_batch=false"
        )
    return num_videos // videos * videos


def make_schedule(
    config: OptimConfig, num_videos: int, world_size: int, clips_per_video: int
) -> tuple[Schedule, str]:
    """The schedule, and one line that tells its factors: lr = base_lr * global batch / 256."""
    videos = config.micro_batch * config.accumulation * world_size
    batch, clips = videos, ""
    if config.lr_counts_clips:
        batch, clips = videos * clips_per_video, f" x {clips_per_video} clips a video"
    epoch_videos = videos_of_epoch(config, num_videos, world_size)
    total, warmup, cooldown = config.steps, config.warmup_steps, config.cooldown_steps
    if total is None:
        total = int(config.epochs * epoch_videos / videos)
        warmup = int(config.warmup_epochs * epoch_videos / videos)
        cooldown = int(config.cooldown_epochs * epoch_videos / videos)
    if total < 1:
        raise ValueError(
            f"optim.epochs: {config.epochs} epochs of {num_videos} videos are less than one step "
            f"of {videos} videos; raise it, or lower optim.global_batch (micro_batch, accumulation)"
        )
    peak_lr, final_lr = config.base_lr * batch / 256, config.min_lr * batch / 256
    if config.schedule == "cosine":
        cooldown, rest = None, f"a cosine to {final_lr:.4g}"
    elif cooldown == 0:
        rest = "constant, without a cooldown"
    else:
        rest = f"constant, the last {cooldown} a cooldown (1 - sqrt) to {final_lr:.4g}"
    line = (
        f"learning rate {peak_lr:.4g} = {config.base_lr:.4g} x global batch {batch} / 256; "
        f"global batch = micro-batch {config.micro_batch} x {world_size} ranks x "
        f"{config.accumulation} accumulated{clips}; {warmup} warm-up steps of {total}, then "
        f"{rest}"
    )
    if videos > num_videos:
        line += (
            f"; a step takes {videos} videos, and there are {num_videos}, so that some come more "
            "than once in it: lower optim.global_batch (micro_batch, accumulation)"
        )
    if config.drop_last_batch:
        line += (
            f"; an epoch is {epoch_videos // videos} steps, {num_videos - epoch_videos} of its "
            "videos are left out"
        )
    return Schedule(peak_lr, final_lr, warmup, total, cooldown), line


def make_optimizer(model: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.AdamW:
    """torch's AdamW (nothing to compile at run time)."""
    groups = parameter_groups(
        model, config.weight_decay, config.layer_decay, decay_tokens=config.decay_tokens
    )
    return torch.optim.AdamW(
        groups, lr=config.base_lr, betas=config.betas, eps=config.eps, fused=fused
    )


@torch.no_grad()
def guard(
    optimizer: Any, gradients: list[torch.Tensor], clip_grad: float, *, partitioned: bool
) -> torch.Tensor:
    """Prepares the next update of a fused AdamW: skipped where a gradient is not finite, clipped
    otherwise. Returns the norm of all.

    The host waits for nothing: the kernel itself reads `found_inf` (1: leave weights and state
    alone) and `grad_scale` (divide gradients by it), which torch's loss scaler sets too.
    partitioned: every rank has other gradients, and all are to decide alike.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
    if partitioned:
        square = norm.square()
        dist.all_reduce(square)
        norm = square.sqrt()
    optimizer.found_inf = norm.isfinite().logical_not().float()
    optimizer.grad_scale = ((norm + 1e-6) / clip_grad).clamp(min=1) if clip_grad > 0 else None
    return norm
