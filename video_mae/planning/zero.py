"""What DeepSpeed's ZeRO stages keep on a GPU and send in a step, and what fits beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def zero_costs(
    parameters: Sequence[Tensor],
    width: int,
    stage: int,
    num_gpus: int,
    settings: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """GB on a GPU of weights, gradients, master weights with their moments, and buckets of
    gradients; and GB of the tensors that all GPUs sum up, that each has a part of and all get, and
    that all sum up for each to have a part of: once a step, and in each micro-batch.

    width: bytes of a number in the forward pass; settings: what holds of the keys of DeepSpeed's
    zero_optimization.
    """
    numels = [p.numel() for p in parameters if p.requires_grad]
    num, most = sum(numels) / 1e9, settings["stage3_param_persistence_threshold"]
    part, weights = num / num_gpus, sum(p.numel() for p in parameters) / 1e9
    # Of ZeRO 3: what is too small to be partitioned, and what stays gathered from the forward to
    # the backward pass, as what comes between, there and back, is not too much.
    small = sum(n for n in numels if n <= most) / 1e9
    reused = min(num - small, settings["stage3_max_reuse_distance"] / 2e9)
    nothing = [0, 0, 0]
    once = ([num, 0, 0], [num, num, 0], [0, num, 0], [0, small, 0])[stage]
    each = (nothing, nothing, [num, 0, 0], [0, 2 * (num - small) - reused, num])[stage]
    if stage == 3:
        weights = weights / num_gpus + small + reused
    # one that is reduced, and one that is filled meanwhile
    buckets = (0, 1 + settings["overlap_comm"], 1 + settings["overlap_comm"], 1)[stage]
    memory = [
        width * weights,
        width * (part if stage > 1 else num),
        12 * (part if stage else num),
        width * min(num, settings["reduce_bucket_size"] / 1e9) * buckets,
    ]
    return np.array(memory), width * np.array(once), width * np.array(each)
