"""The dictionary that DeepSpeed is configured by, made of a run's configuration."""

import difflib
from pathlib import Path
from typing import Any

import torch

from video_mae.config import RunConfig
from video_mae.extras import require_package
from video_mae.training import device_step

# DeepSpeed takes a misspelt top-level key without a word, so `extra` is held against those it
# documents.
EXTRA_KEYS = frozenset(
    {
        "aio",
        "bf16",
        "checkpoint",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_predivide_factor",
        "memory_breakdown",
        "prescale_gradients",
        "sparse_gradients",
        "tensorboard",
        "timers",
        "wall_clock_breakdown",
        "wandb",
        "zero_optimization",
    }
)


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
    for key in engine.extra:
        if key not in EXTRA_KEYS and key not in made:
            near = difflib.get_close_matches(key, EXTRA_KEYS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"engine.extra.{key}: DeepSpeed has no such key{hint}")
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
