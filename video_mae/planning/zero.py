"""What DeepSpeed's ZeRO stages keep on a GPU and send in a step, and what fits beside it."""

from collections.abc import Mapping, Sequence
from itertools import dropwhile
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

    parameters: in the order in which the forward pass takes them, those that are not trained too;
    width: bytes of a number in the forward pass; settings: what holds of the keys of DeepSpeed's
    zero_optimization, and communication_data_type where that is set.
    """
    sent_width = {None: width, "fp32": 4}.get(settings.get("communication_data_type"), 2)
    num = sum(p.numel() for p in parameters if p.requires_grad) / 1e9
    part, weights = num / num_gpus, sum(p.numel() for p in parameters) / 1e9
    # Of ZeRO 3: what is too small to be partitioned; what is gathered for the forward pass; of
    # that, what is for the backward pass, which ends at the first that is trained; and what of it
    # stays gathered in between, as what comes there and back is not too much.
    most = settings["stage3_param_persistence_threshold"]
    forward = sum(p.numel() for p in parameters if p.numel() > most) / 1e9
    small = weights - forward
    until = dropwhile(lambda p: not p.requires_grad, parameters)
    backward = sum(p.numel() for p in until if p.numel() > most) / 1e9
    reused = min(backward, settings["stage3_max_reuse_distance"] / 2e9)
    if stage == 3:
        weights = weights / num_gpus + small + reused
    # ZeRO 1 to 3 copy float32 as well; without, DeepSpeed has the optimizer update the weights
    masters = 12 if width == 2 or stage else 8
    # one that is reduced, and one that is filled meanwhile
    buckets = (0, 1 + settings["overlap_comm"], 1 + settings["overlap_comm"], 1)[stage]
    memory = [
        width * weights,
        width * (part if stage > 1 else num),
        masters * (part if stage else num),
        sent_width * min(num, settings["reduce_bucket_size"] / 1e9) * buckets,
    ]
    nothing = [0, 0, 0]
    once = ([num, 0, 0], [num, num, 0], [0, num, 0], [0, small, 0])[stage]
    each = (nothing, nothing, [num, 0, 0], [0, forward + backward - reused, num])[stage]
    widths = np.array([sent_width, width, sent_width])
    return np.array(memory), widths * once, widths * each
