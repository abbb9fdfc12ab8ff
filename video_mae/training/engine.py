"""DeepSpeed in one place: its start, step, checkpoints. The only file that imports it."""

import contextlib
import io
import math
import os
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from video_mae.config import RunConfig
from video_mae.config.world import World, ranks_here
from video_mae.files import StorageError, storing
from video_mae.training import checkpoint, device_step
from video_mae.training.deepspeed_config import deepspeed_config
from video_mae.training.optim import guard, make_optimizer
from video_mae.training.saving import attempt, on_host, write_files
from video_mae.training.step_status import StatusQueue, filled

FROZEN = "frozen_weights"
"""Of a checkpoint of rank 0: the float32 values of what is not trained, by name."""


class Engine:
    """A model under DeepSpeed, with or without its launcher.

    Usage: for each micro-batch `output = engine(...)`, `engine.backward(output.loss)`; then
    `engine.step(lr)` once a step, and `engine.statuses.take()` for what the host is to know of it.
    skipped_steps: how many since the start, on the device.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        prepare_environment()
        import deepspeed

        world = World.from_environment()
        self.config, self.checkpoints = config, Path(config.output) / "checkpoints"
        self.dictionary = deepspeed_config(config, world.size)
        # DeepSpeed would keep room for half a billion gradients, however many there are.
        num_gradients = sum(parameter.numel() for parameter in model.parameters())
        zero = self.dictionary["zero_optimization"]
        zero.setdefault("reduce_bucket_size", min(num_gradients, 500_000_000))
        self.device, backend = torch.device("cpu"), "gloo"
        if torch.cuda.is_available():
            self.device, backend = torch.device("cuda", world.local_rank), "nccl"
            torch.cuda.set_device(self.device)
        fused = config.engine.offload == "none"
        self.optimizer: Any = make_optimizer(model, config.optim, fused=fused)
        # DeepSpeed rounds them to the precision of the run, and no optimizer has a master of them.
        self.frozen = {
            name: parameter.detach().cpu().clone()
            for name, parameter in model.named_parameters()
            if not parameter.requires_grad and world.rank == 0
        }
        # Its collectives for CPUs wait in a loop that keeps the cores from the other ranks and the
        # decoders, and are compiled on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(backend, verbose=False)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deepspeed: Any = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=self.dictionary
        )[0]
        if config.engine.compile:
            self.deepspeed.compile()
        self.is_guarded = device_step.is_possible(self.dictionary)
        self.statuses = StatusQueue(self.device)
        self.skipped_steps = filled(0, self.device)
        self.faults: dict[Path, str] = {}
        self._writing: Future[str] | str = ""
        self._thread, self._group = ThreadPoolExecutor(1), None
        if config.journal.checkpoint_async:
            # what the threads tell one another must not get between the collectives of training
            self._group = dist.new_group(backend="gloo")

    def __call__(self, *inputs: Any) -> Any:
        return self.deepspeed(*inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulates gradients; `last` marks the last micro-batch of a step, whose update waits
        for `step`.
        """
        self.deepspeed.backward(loss)
        if not last:
            self.deepspeed.step()  # counts the micro-batch

    def step(self, lr: float) -> torch.Tensor | float:
        """Updates the weights, unless a gradient of any rank is not finite; returns the gradient
        norm before clipping. Waits for the device only where DeepSpeed has to.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.is_guarded:
            norm = guard(
                self.optimizer,
                device_step.gradients(self.deepspeed),
                self.config.optim.clip_grad,
                partitioned=self.config.engine.zero_stage > 0,
            )
            self.skipped_steps = self.skipped_steps + self.optimizer.found_inf
            # Not once at the start: a checkpoint that is resumed brings its own settings, and is
            # refused by a wrapper without them.
            device_step.relieve(self.deepspeed)
            self.deepspeed.step()
        else:
            self.deepspeed.step()
            norm = self.deepspeed.get_global_grad_norm()
            self.skipped_steps = filled(self.deepspeed.skipped_steps, self.device)
        self.statuses.send(self.deepspeed.global_steps, self.skipped_steps)
        return math.nan if norm is None else norm

    def set_micro_batch(self, num_clips: int) -> None:
        """Tells DeepSpeed of micro-batches of another size. It counts samples by it, for monitors
        and checkpoints; gradients are means over a micro-batch, whatever its size.
        """
        self.deepspeed.set_train_micro_batch_size(num_clips)

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

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        """Every rank's picklable object, in order of rank. Raises: the first StorageError of
        these, on all ranks.
        """
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group)
        for one in gathered:
            if isinstance(one, StorageError):
                raise one
        return gathered

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """To TensorBoard and Weights & Biases, where the configuration asks for them."""
        if self.deepspeed.monitor.enabled:
            self.deepspeed.monitor.write_events(events)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Every parameter in float32 on the CPU, from the master copies, whatever the stage, and
        frozen ones as they were; every rank must call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        masters: dict[int, torch.Tensor] = {}
        # the one wrapper that DeepSpeed's function overlooks
        if self.config.engine.zero_stage == 0 and self.config.engine.precision != "fp32":
            wrapper = self.deepspeed.optimizer
            for lows, highs in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
                masters.update((id(low), high) for low, high in zip(lows, highs, strict=True))
        state = dict(self.frozen)
        for name, parameter in self.deepspeed.module.named_parameters():
            if not parameter.requires_grad:
                continue
            value = masters.get(id(parameter), parameter)
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):  # partitioned
                value = safe_get_full_fp32_param(parameter)
            assert value is not None
            if self.rank == 0:
                state[name] = value.detach().float().cpu().clone()
        return state

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[None]:
        """Inside, every rank has the parameters of a part of the model in full, to be read: ZeRO 3
        gathers them. Every rank must enter.
        """
        import deepspeed

        with deepspeed.zero.GatheredParameters(module.parameters()):
            yield

    def masters(self) -> list[torch.Tensor]:
        """The float32 weights that this rank updates, whatever their layout."""
        return device_step.master_weights(self.deepspeed)

    @torch.no_grad()
    def exchange(self, others: Iterable[torch.Tensor]) -> None:
        """Exchanges the weights for `others`, laid out as `masters`; every rank must call it."""
        for master, other in zip(self.masters(), others, strict=True):
            kept = master.clone()
            master.copy_(other)
            other.copy_(kept)
        device_step.spread_masters(self.deepspeed)

    def save(
        self,
        step: int,
        keep: int,
        memory: dict[str, Any],
        tensors: Mapping[str, torch.Tensor] | None = None,
        finish: Callable[[], object] = tuple,
    ) -> None:
        """Writes checkpoints/step_N: never half of one, `latest` never before all ranks are done.
        `resume` gives `memory` back, and tensors by name: those that several ranks have are
        written once. What the disk refuses, `settle` tells.

        finish: what the main rank does as soon as the checkpoint is there.
        """
        files = self._files({"step": step, "memory": memory, FROZEN: self.frozen}, tensors or {})
        if self._group is None:
            self._writing = self._write(step, keep, files, finish)
        else:
            self._writing = self._thread.submit(self._write, step, keep, on_host(files), finish)

    def settle(self, *, wait: bool) -> str:
        """What the disk refused of the last save, once, as soon as it is known; else ""."""
        writing = self._writing
        if isinstance(writing, Future):
            if not (wait or writing.done()):
                return ""
            writing = writing.result()
        self._writing = ""
        return writing

    def _write(
        self, step: int, keep: int, files: dict[str, Any], finish: Callable[[], object]
    ) -> str:
        final = self.checkpoints / checkpoint.step_name(step)
        building = final.with_name(f".{final.name}")

        def publish() -> None:
            if self.rank == 0:
                facts = {"step": step, **_facts(self.config, self.world_size)}
                every = self.config.journal.keep_every
                with storing(final):
                    checkpoint.publish(
                        building, final, dict(ChainMap(*digests)), facts, keep, every
                    )
                finish()

        try:
            written = attempt(partial(write_files, building, files))
            digests = self.gather(written, self._group)
            self.gather(attempt(publish), self._group)
        except StorageError as error:
            shutil.rmtree(building, ignore_errors=True)
            return str(error)
        return ""

    def _files(self, state: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What this rank has to write, by the names of the files; every rank must call it."""
        files: dict[str, Any] = {}

        def save(state_dict: Any, path: str) -> None:
            files[Path(path).name] = state_dict

        # DeepSpeed is asked what it would write, and where.
        writer = self.deepspeed.checkpoint_engine
        writer.save = save
        writer.makedirs = self.deepspeed._copy_recovery_script = lambda *_, **__: None
        self.deepspeed.skipped_steps = int(self.skipped_steps)
        self.deepspeed.save_checkpoint(
            str(self.checkpoints),
            tag="unnamed",
            client_state=state,
            save_latest=False,
            exclude_frozen_parameters=False,
        )
        written: set[str] = set()
        for names in self.gather(list(tensors))[: self.rank]:
            written.update(names)
        own = {name: tensors[name] for name in tensors if name not in written}
        if own:
            files[f"tensors_{self.rank}.safetensors"] = own
        return files

    def is_finite(self) -> bool:
        """Whether all weights are, on all ranks; every rank must call it."""
        return all(self.gather(all(bool(one.isfinite().all()) for one in self.masters())))

    def resume(
        self, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Loads the newest checkpoint that is whole, `tensors` in place; returns the number of
        steps it has done and its memory, (0, {}) for a run that never had one. `faults` says what
        is wrong with those that were passed over.

        Raises: DamagedRunError.
        """
        part = slice(self.rank, None, self.world_size)
        for folder in self.gather(checkpoint.folders(self.checkpoints))[0]:
            found = [one for one in self.gather(checkpoint.fault(folder, part)) if one]
            if not found:
                break
            self.faults[folder] = found[0]
        else:
            checkpoint.require_new(self.checkpoints.parent, self.faults)
            return 0, {}
        _, state = self.deepspeed.load_checkpoint(str(self.checkpoints), tag=folder.name)
        self.skipped_steps = filled(self.deepspeed.skipped_steps, self.device)
        if self.rank == 0:
            self.frozen = state.get(FROZEN, self.frozen)
        tensors = tensors or {}
        for file in folder.glob("tensors_*.safetensors"):
            with safe_open(file, framework="pt") as saved:
                for name in tensors.keys() & saved.keys():
                    tensors[name].copy_(saved.get_tensor(name))
        return state["step"], state.get("memory", {})  # earlier versions wrote none


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


def _facts(config: RunConfig, world_size: int) -> dict[str, Any]:
    """What a checkpoint and the start that reads it have to agree about."""
    keys = ("zero_stage", "precision", "offload")
    return {"world_size": world_size, **{key: getattr(config.engine, key) for key in keys}}


def check_start(config: RunConfig) -> int:
    """Checks what the engine of a run will need; returns the number of ranks.

    Raises: ValueError for what this machine or DeepSpeed cannot do, and where the newest checkpoint
    was written by another number of ranks, stage or precision.
    """
    world_size = World.from_environment().size
    if config.engine.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("engine.precision: fp16 needs a GPU; use bf16 or fp32")
    deepspeed_config(config, world_size)
    found = checkpoint.newest(Path(config.output) / "checkpoints")
    if found is None:
        return world_size
    folder, manifest = found
    for key, value in _facts(config, world_size).items():
        if manifest.get(key, value) != value:
            remedy = f"set engine.{key} back"
            if key == "world_size":
                remedy = "start it with as many ranks as before"
            raise ValueError(
                f"{folder}: was written with {key} = {manifest[key]}, this start has {value}; "
                f"{remedy}, or choose another output folder"
            )
    return world_size


def prepare_environment() -> None:
    """Without a launcher DeepSpeed would look for MPI; on a CPU each rank takes its share of the
    cores. Raises: ValueError.
    """
    world = World.from_environment()
    given = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if os.environ.get(name)]
    if "RANK" not in given:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    if len(given) < 3:  # one process, then: on any port that is free
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank)
    )
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for others, and warn
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here()))
    elif world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK: {world.local_rank} has no GPU, there are {torch.cuda.device_count()} "
            "here; start as many processes"
        )
