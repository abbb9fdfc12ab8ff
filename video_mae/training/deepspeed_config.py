"""The dictionary that DeepSpeed is configured by, made of a run's configuration."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from video_mae.config import RunConfig
from video_mae.extras import require_package
from video_mae.training import device_step

# DeepSpeed takes a misspelt top-level key without a word, and any value of some, so `extra` is held
# against what it documents. Of the sections whose keys it does not check itself they are named.
EXTRA_KEYS: dict[str, Any] = {
    "aio": "block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds",
    "bf16": dict,
    "checkpoint": "checkpoint_serialization load_universal parallel_write tag_validation "
    "use_node_local_storage writer",
    "comet": dict,
    "comms_logger": dict,
    "communication_data_type": str,
    "compile": dict,
    "csv_monitor": dict,
    "data_types": "buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype",
    "dump_state": bool,
    "flops_profiler": "detailed enabled module_depth output_file profile_step "
    "recompute_fwd_factor top_modules",
    "fp16": dict,
    "gradient_predivide_factor": (int, float),
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "tensorboard": dict,
    "timers": "throughput",
    "wall_clock_breakdown": bool,
    "wandb": dict,
    "zero_optimization": dict,
}


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dictionary. Raises: ValueError where engine.extra sets a key that is ours, or one
    that DeepSpeed does not know, and for a DeepSpeed of another version.
    """
    device_step.check_version()
    engine, optim, journal = config.engine, config.optim, config.journal
    micro_batch = optim.micro_batch * config.data.clips_per_video
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    on_the_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload != "none":
        zero["offload_optimizer"] = {**on_the_host}
    if engine.offload == "parameters":
        zero["offload_param"] = {**on_the_host}
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": optim.accumulation,
        "train_batch_size": micro_batch * optim.accumulation * world_size,
        "gradient_clipping": optim.clip_grad,  # left out, DeepSpeed would clip at 1
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": engine.precision == "fp16"},
    }
    if journal.tensorboard:
        require_package("tensorboard", "journal.tensorboard")
        made["tensorboard"] = {
            "enabled": True,
            "output_path": config.output,
            "job_name": "tensorboard",
        }
    project = journal.wandb_project
    if project:
        require_package("wandb", "journal.wandb_project")
        group = Path(config.output).name
        made["wandb"] = {"enabled": True, "project": project, "group": group}
    for key, value in engine.extra.items():
        if key not in made:
            _check_name(key, EXTRA_KEYS, "engine.extra")
        known = EXTRA_KEYS.get(key, object)
        kind = dict if isinstance(known, str) else known
        if not isinstance(value, kind):
            raise ValueError(
                f"engine.extra.{key}: {value!r:.100} is not what DeepSpeed takes there"
            )
        if isinstance(known, str):
            for name in value:
                _check_name(name, known.split(), f"engine.extra.{key}")
    _merge(made, engine.extra, "engine.extra")
    if zero.get("round_robin_gradients"):
        raise ValueError(
            "engine.extra.zero_optimization.round_robin_gradients: DeepSpeed then mixes up the "
            "names of weights, and saved models would be wrong; leave it out"
        )
    # it would wait for the device twice a micro-batch
    made.setdefault("timers", {"throughput": {"enabled": False}})
    if device_step.is_possible(made):
        made["gradient_clipping"] = 0.0
        made["bf16"]["check_grad_overflow"] = False
    return made


def zero_settings(stage: int, num_gradients: int) -> dict[str, Any]:
    """What of DeepSpeed's zero_optimization follows from the size of a model, where engine.extra
    says nothing else. docs/clusters.md has the reasons, and those for what is left as it is.
    """
    return {
        # numbers that are reduced at once; there is a buffer of as many
        "reduce_bucket_size": min(num_gradients, 50_000_000),
        # Reduce during the backward pass. In ZeRO 1 and 2 DeepSpeed then waits for the device at
        # its end, which takes less time than the reduction of so many numbers alone.
        "overlap_comm": stage == 3 or (stage > 0 and num_gradients > 300_000_000),
    }


def _check_name(name: str, known: Iterable[str], where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{where}.{name}: DeepSpeed has no such key{hint}")


def _merge(ours: dict[str, Any], extra: dict[str, Any], where: str) -> None:
    for key, value in extra.items():
        if key not in ours:
            ours[key] = value
        elif isinstance(ours[key], dict) and isinstance(value, dict):
            _merge(ours[key], value, f"{where}.{key}")
        else:
            raise ValueError(
                f"{where}.{key}: is set by this program; use the keys of engine, optim or journal "
                "for it"
            )
