"""DeepSpeed in one place: its configuration, start, step, checkpoints. The only file that imports
it.
"""

import contextlib
import difflib
import importlib.util
import io
import os
import shutil
import socket
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from video_mae.config import EngineConfig, JournalConfig, OptimConfig
from video_mae.config.world import World, ranks_here
from video_mae.training import checkpoint, device_step
from video_mae.training.optim import guard, make_optimizer
from video_mae.training.reports import Reports, filled

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


def deepspeed_config(
    engine: EngineConfig,
    optim: OptimConfig,
    journal: JournalConfig,
    *,
    clips_per_video: int,
    world_size: int,
    run_folder: Path,
) -> dict[str, Any]:
    """DeepSpeed's dictionary. Raises: ValueError where engine.extra sets a key that is ours, or one
    that DeepSpeed does not know, and for a DeepSpeed of another version.
    """
    device_step.check_version()
    micro_batch = optim.micro_batch * clips_per_video
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
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
        config["tensorboard"] = {
            "enabled": True,
            "output_path": str(run_folder),
            "job_name": "tensorboard",
        }
    if journal.wandb_project:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                f"journal.wandb_project: {journal.wandb_project} needs Weights & Biases, which is not installed; "
                "pip install wandb"
            )
        config["wandb"] = {
            "enabled": True,
            "project": journal.wandb_project,
            "group": run_folder.name,
        }
    for key in engine.extra:
        if key not in EXTRA_KEYS and key not in config:
            near = difflib.get_close_matches(key, EXTRA_KEYS, n=1)
            raise ValueError(
                f"engine.extra.{key}: DeepSpeed has no such key"
                + (f" (did you mean {near[0]}?)" if near else "")
            )
    _merge(config, engine.extra, "engine.extra")
    if zero.get("round_robin_gradients"):
        raise ValueError(
            "engine.extra.zero_optimization.round_robin_gradients: DeepSpeed then mixes up the names of weights, "
            "and saved models would be wrong; leave it out"
        )
    # it would wait for the device twice a micro-batch
    config.setdefault("timers", {"throughput": {"enabled": False}})
    if device_step.is_possible(config):
        config["gradient_clipping"] = 0.0
        config["bf16"]["check_grad_overflow"] = False
    return config


def _merge(ours: dict[str, Any], extra: dict[str, Any], where: str) -> None:
    for key, value in extra.items():
        if key not in ours:
            ours[key] = value
        elif isinstance(ours[key], dict) and isinstance(value, dict):
            _merge(ours[key], value, f"{where}.{key}")
        else:
            raise ValueError(
                f"{where}.{key}: is set by this program; use the keys of engine, optim or journal for it"
            )


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) as the launcher tells it; (0, 1) without one. Raises: ValueError for half
    an environment.
    """
    world = World.from_environment()
    return world.rank, world.size


class StepResult(NamedTuple):
    """Of a step, on the device: the gradient norm before clipping, and how many steps were skipped
    since the start.
    """

    grad_norm: torch.Tensor | float
    skipped_steps: torch.Tensor


class Engine:
    """A model under DeepSpeed, with or without its launcher.

    Usage: for each micro-batch `output = engine(...)`, `engine.backward(output.loss)`; then
    `engine.step(lr)` once a step, and `engine.reports.take()` for what the host is to know of it.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: EngineConfig,
        optim: OptimConfig,
        config: dict[str, Any],
        run_folder: Path,
    ) -> None:
        prepare_environment()
        import deepspeed

        self.checkpoints = run_folder / "checkpoints"
        self.facts = {
            "world_size": world_from_environment()[1],
            "zero_stage": engine.zero_stage,
            "precision": engine.precision,
            "offload": engine.offload,
        }
        on_cuda = torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
        )
        self.optimizer: Any = make_optimizer(model, optim, fused=engine.offload == "none")
        # Its collectives for CPUs wait in a loop that keeps the cores from the other ranks and the
        # decoders, and are compiled on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if on_cuda else "gloo", verbose=False)
        self.deepspeed: Any = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=config
        )[0]
        if engine.compile:
            self.deepspeed.compile()
        self.is_guarded, self.clip_grad = device_step.is_possible(config), optim.clip_grad
        self.skipped_steps = filled(0, self.device)
        self.reports = Reports(self.device)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    def __call__(self, *inputs: Any) -> Any:
        return self.deepspeed(*inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulates gradients; `last` marks the last micro-batch of a step, whose update waits
        for `step`.
        """
        self.deepspeed.backward(loss)
        if not last:
            self.deepspeed.step()  # counts the micro-batch

    def step(self, lr: float) -> StepResult:
        """Updates the weights, unless a gradient of any rank is not finite. Waits for the device
        only where DeepSpeed has to.
        """
        wrapper, stage = self.deepspeed.optimizer, self.facts["zero_stage"]
        for group in wrapper.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.is_guarded:
            gradients = device_step.gradients(
                wrapper, list(self.deepspeed.module.parameters()), stage
            )
            norm = guard(self.optimizer, gradients, self.clip_grad, partitioned=stage > 0)
            self.skipped_steps = self.skipped_steps + self.optimizer.found_inf
            device_step.relieve(wrapper, stage, low_precision=self.facts["precision"] != "fp32")
            self.deepspeed.step()
        else:
            self.deepspeed.step()
            norm = self.deepspeed.get_global_grad_norm()
            self.skipped_steps = filled(self.deepspeed.skipped_steps, self.device)
        self.reports.send(self.deepspeed.global_steps, self.skipped_steps)
        return StepResult(float("nan") if norm is None else norm, self.skipped_steps)

    def evaluate(self, *inputs: Any) -> Any:
        """The model's output without gradients; every rank must call it (ZeRO 3 gathers
        parameters).
        """
        self.deepspeed.eval()
        with torch.no_grad():
            output = self.deepspeed(*inputs)
        self.deepspeed.train()
        return output

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        value = value.clone()
        dist.all_reduce(value)
        return value

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over ranks."""
        return self.sum(value) / self.world_size

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable object, in order of rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """To TensorBoard and Weights & Biases, where the configuration asks for them."""
        if self.deepspeed.monitor.enabled:
            self.deepspeed.monitor.write_events(events)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Every parameter in float32 on the CPU, from the master copies, whatever the stage; every
        rank must call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        optimizer, state = self.deepspeed.optimizer, {}
        masters: dict[int, torch.Tensor] = {}
        # the one wrapper that DeepSpeed's function overlooks
        if self.facts["zero_stage"] == 0 and self.facts["precision"] != "fp32":
            for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                masters.update((id(low), high) for low, high in zip(lows, highs, strict=True))
        for name, parameter in self.deepspeed.module.named_parameters():
            is_partitioned = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
            value = (
                safe_get_full_fp32_param(parameter)
                if is_partitioned
                else masters.get(id(parameter), parameter)
            )
            assert value is not None
            if self.rank == 0:
                state[name] = value.detach().float().cpu().clone()
        return state

    def save(self, step: int, keep: int, memory: dict[str, Any]) -> None:
        """Writes checkpoints/step_N: never half of one, `latest` never before all ranks are done.
        `resume` gives `memory` back.
        """
        building = self.checkpoints / f".{checkpoint.step_name(step)}"
        if self.rank == 0:
            shutil.rmtree(building, ignore_errors=True)
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        self.deepspeed.skipped_steps = int(self.skipped_steps)
        self.deepspeed.save_checkpoint(
            str(self.checkpoints),
            tag=building.name,
            client_state={"step": step, "memory": memory},
            save_latest=False,
            exclude_frozen_parameters=False,
        )
        dist.barrier()
        mine = checkpoint.files_of(building)[self.rank :: self.world_size]
        for path in mine:
            checkpoint.fsync(path)
        files = {str(path.relative_to(building)): checkpoint.digest(path) for path in mine}
        gathered = self.gather(files)
        if self.rank == 0:
            everything = {name: facts for part in gathered for name, facts in part.items()}
            checkpoint.publish(
                building,
                self.checkpoints / checkpoint.step_name(step),
                everything,
                {"step": step, **self.facts},
                keep,
            )
        dist.barrier()

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Loads the newest complete checkpoint; returns the number of steps it has done and its
        memory, (0, {}) where there is none.
        """
        found = checkpoint.newest(self.checkpoints)
        found = self.gather(found)[0]  # all ranks follow rank 0
        while found is not None:
            folder, manifest = found
            mine = sorted(manifest["files"])[self.rank :: self.world_size]
            if not any(self.gather(bool(checkpoint.damaged_files(folder, manifest, mine)))):
                _, state = self.deepspeed.load_checkpoint(str(self.checkpoints), tag=folder.name)
                self.skipped_steps = filled(self.deepspeed.skipped_steps, self.device)
                return manifest["step"], state.get("memory", {})  # earlier versions wrote none
            if self.rank == 0:
                folder.rename(folder.with_name(f".damaged_{folder.name}"))
            dist.barrier()
            found = self.gather(checkpoint.newest(self.checkpoints))[0]
        return 0, {}


def partitioned_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The float32 weights of a checkpoint of ZeRO 1 to 3, of any number of ranks; its pickles are
    executed.
    """
    prepare_environment()
    # it talks
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return dict(
            get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name) or {}
        )


def leave() -> None:
    """Leaves the process group: once, at the end of the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_resumable(run_folder: Path, engine: EngineConfig, world_size: int) -> None:
    """Raises: ValueError where the newest checkpoint was written by another number of ranks, stage
    or precision.
    """
    found = checkpoint.newest(run_folder / "checkpoints")
    if found is None:
        return
    folder, manifest = found
    for key, value, remedy in (
        ("world_size", world_size, "start it with as many ranks as before"),
        ("zero_stage", engine.zero_stage, "set engine.zero_stage back"),
        ("precision", engine.precision, "set engine.precision back"),
        ("offload", engine.offload, "set engine.offload back"),
    ):
        if manifest[key] != value:
            raise ValueError(
                f"{folder}: was written with {key} = {manifest[key]}, this start has {value}; {remedy}, or choose another "
                "output folder"
            )


def prepare_environment() -> None:
    """Without a launcher DeepSpeed would look for MPI; on a CPU each rank takes its share of the
    cores. Raises: ValueError.
    """
    world = World.from_environment()
    if not os.environ.get("RANK"):
        os.environ.update(LOCAL_WORLD_SIZE="1")
    # one process, then
    if not os.environ.get("RANK") or not (
        os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank)
    )
    if torch.cuda.is_available() and world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK: {world.local_rank} has no GPU, there are {torch.cuda.device_count()} here; start as many processes"
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for others, and warn
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here()))
