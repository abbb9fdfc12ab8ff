"""DeepSpeed's step without what it asks of every parameter and what it waits for; `optim.guard`
does in its place what these are for.

Of a ViT-B's 218 parameters DeepSpeed 0.19.8 asks, in bf16, 13 operations each whether its gradient
is finite, then a norm each, and waits for the answers: 3,333 operations and 4 waits a step in ZeRO
1 and 2, 4,153 and 224 in ZeRO 0, 495 and 3 in ZeRO 3.
"""

import re
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch


def check_version() -> None:
    """Raises: ValueError for a DeepSpeed whose step may do what is not known here; ImportError
    where there is none.
    """
    found = version("deepspeed")
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    if not (0, 19, 8) <= numbers < (0, 20):
        raise ValueError(
            f"deepspeed: {found} is installed, whose training step is not known here; "
            "pip install 'deepspeed>=0.19.8,<0.20'"
        )


def is_possible(config: dict[str, Any]) -> bool:
    """Whether DeepSpeed's dictionary leaves gradients on the device, finite unless something is
    wrong, and in wrappers known here.
    """
    elsewhere = {"offload_optimizer", "offload_param", "zenflow"}
    return not (
        config["fp16"]["enabled"]
        or elsewhere & config["zero_optimization"].keys()
        or "data_types" in config
    )


def gradients(deepspeed: Any) -> list[torch.Tensor]:
    """What this rank updates the weights by, after the last backward pass of a step: in ZeRO 1 to 3
    its share of it.
    """
    if deepspeed.zero_optimization_stage() == 0:
        return [p.grad for p in deepspeed.module.parameters() if p.grad is not None]
    shares = deepspeed.optimizer.averaged_gradients.values()
    return [gradient for share in shares for gradient in share]


def master_weights(deepspeed: Any) -> list[torch.Tensor]:
    """The float32 weights that this rank updates: all of them, in ZeRO 1 to 3 its share in a few
    flat tensors.
    """
    wrapper = deepspeed.optimizer
    if deepspeed.zero_optimization_stage() == 3:
        return list(wrapper.fp32_partitioned_groups_flat)
    return [master for group in wrapper.param_groups for master in group["params"]]


def layout(deepspeed: Any) -> Iterator[tuple[str, int, int, slice]]:
    """Where the parameters that are trained are in `master_weights` of this rank: (name, the first
    of its numbers that is there, index of the master, place in it).
    """
    wrapper, stage = deepspeed.optimizer, deepspeed.zero_optimization_stage()
    own = [group["params"] for group in wrapper.param_groups]  # in float32 their own masters
    order = {p: i for i, p in enumerate(chain(*getattr(wrapper, "fp16_groups", own)))}
    for name, parameter in deepspeed.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 3:
            index, offset, size = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = size * deepspeed.global_rank
            size = max(0, min(size, parameter.ds_numel - start))  # without what fills it up
        elif stage > 0:
            mapping = parameter._hp_mapping
            if mapping is None:  # it is with other ranks
                continue
            index, start = mapping.param_group_index, mapping.lp_fragment_address.start
            offset, size = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        else:
            index, start, offset, size = order[parameter], 0, 0, parameter.numel()
        yield name, start, index, slice(offset, offset + size)


def counters(deepspeed: Any) -> list[dict[str, Any]]:
    """The attributes themselves of what counts: the engine, and in fp16 its loss scale."""
    if not deepspeed.fp16_enabled():
        return [vars(deepspeed)]
    wrapper = deepspeed.optimizer
    scale = getattr(wrapper, "loss_scaler", None) or wrapper.loss_scale_config
    return [vars(deepspeed), vars(scale)]


@torch.no_grad()
def spread_masters(deepspeed: Any) -> None:
    """Has the model compute with what the masters are now, as the end of a step does; every rank
    must call it.
    """
    wrapper, stage = deepspeed.optimizer, deepspeed.zero_optimization_stage()
    if stage == 3:
        wrapper._partition_all_parameters()
        for sub_group in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        wrapper._post_step(set())
    elif stage > 0:
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp16_groups"):
        weights = [weight for group in wrapper.fp16_groups for weight in group]
        torch._foreach_copy_(weights, master_weights(deepspeed))


def relieve(deepspeed: Any) -> None:
    """Takes norm, clipping and checks out of the step of DeepSpeed's wrapper of the optimizer."""
    wrapper, stage = deepspeed.optimizer, deepspeed.zero_optimization_stage()
    if stage == 0 and deepspeed.bfloat16_enabled():
        wrapper.step = partial(_step_of_masters, wrapper)
    elif stage in (1, 2):
        # Not by the dictionary, in which it would refuse the checkpoints of runs that DeepSpeed
        # clipped; these bring their clip_grad back.
        wrapper.compute_grad_norm, wrapper.clip_grad = False, 0.0
    elif stage == 3:
        wrapper.step = partial(_step_of_partitions, wrapper)


@torch.no_grad()
def _step_of_masters(wrapper: Any) -> None:
    """ZeRO 0 in bf16: float32 masters of all weights."""
    weights = [weight for group in wrapper.fp16_groups for weight in group]
    masters = [master for group in wrapper.fp32_groups for master in group]
    # Not kept between steps: by then activations take their place.
    for master in masters:
        master.grad = torch.empty_like(master)
    torch._foreach_copy_([master.grad for master in masters], [weight.grad for weight in weights])
    wrapper.optimizer.step()
    torch._foreach_copy_(weights, masters)
    for master in masters:
        master.grad = None


@torch.no_grad()
def _step_of_partitions(wrapper: Any) -> None:
    """ZeRO 3: DeepSpeedZeroOptimizer_Stage3.step, whose norm no key of the dictionary can switch
    off.
    """
    wrapper._pre_step()
    wrapper._partition_all_parameters()
    wrapper.zero_grad(set_to_none=True)
    for sub_group in range(len(wrapper.fp16_groups)):
        wrapper._prepare_sub_group(sub_group, set())
        wrapper._optimizer_step(sub_group)
        wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        wrapper._release_sub_group(sub_group, set())
    wrapper._post_step(set())
