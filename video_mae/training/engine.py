"""DeepSpeed in one place: its start, step, checkpoints. The only file that imports it."""

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from video_mae.config import RunConfig
from video_mae.config.world import World
from video_mae.files import FolderError, StorageError, one_line
from video_mae.training import checkpoint, device_step, fragments
from video_mae.training.deepspeed_config import deepspeed_config, zero_settings
from video_mae.training.environment import check_devices, prepare_environment
from video_mae.training.fragments import Fragments
from video_mae.training.heartbeat import progress
from video_mae.training.optim import guard, make_optimizer
from video_mae.training.saving import CheckpointWriter
from video_mae.training.spikes import SpikeWatch
from video_mae.training.step_status import StatusQueue, filled

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS = (
    "global_steps",
    "global_samples",
    "skipped_steps",
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "cur_hysteresis",
)


class Engine:
    """A model under DeepSpeed, with or without its launcher.

    Usage: for each micro-batch `output = engine(...)`, `engine.backward(output.loss)`; then
    `engine.step(lr)` once a step, and `engine.statuses.take()` for what the host is to know of it.
    skipped_steps: how many since the start, on the device. beside_masters: what else is laid out as
    `masters`, by its name in checkpoints.
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self.device = prepare_environment()
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        world = World.from_environment()
        self.config, self.checkpoints = config, Path(config.output) / "checkpoints"
        self.dictionary = deepspeed_config(config, world.size)
        num_gradients = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for key, value in zero_settings(config.engine.zero_stage, num_gradients).items():
            self.dictionary["zero_optimization"].setdefault(key, value)
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
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, verbose=False)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.deepspeed: Any = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=self.dictionary
        )[0]
        if config.engine.compile:
            self.deepspeed.compile()
        self.is_guarded = device_step.is_possible(self.dictionary)
        self.statuses = StatusQueue(self.device)
        is_watched = config.engine.on_spike != "ignore"
        self.unusual = "not finite or a spike" if is_watched else "not finite"
        self.spikes = SpikeWatch(self.mean, self.device, is_on=is_watched)
        self.skipped_steps = filled(0, self.device)
        self.beside_masters: dict[str, list[torch.Tensor]] = {}
        self.faults: dict[Path, str] = {}
        self.writer = CheckpointWriter(self)

    def __call__(self, *inputs: Any) -> Any:
        return self.deepspeed(*inputs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulates gradients; `last` marks the last micro-batch of a step, whose update waits
        for `step`.
        """
        progress.begin("all-reduce")
        self.deepspeed.backward(self.spikes.judged(loss))
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
        progress.step = self.deepspeed.global_steps
        self.statuses.send(progress.step, self.skipped_steps)
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
        """Every rank's picklable object, in order of rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group)
        return gathered

    def together(self, work: Callable[[], Any], group: Any = None) -> list[Any]:
        """What work() returns on every rank. Raises: on all of them the first StorageError that one
        of them raises, so that all go on or all leave.
        """
        try:
            own = work()
        except StorageError as error:
            own = error
        results = self.gather(own, group)
        for result in results:
            if isinstance(result, StorageError):
                raise result
        return results

    def write_events(self, events: list[tuple[str, float, int]]) -> None:
        """To TensorBoard and Weights & Biases, where the configuration asks for them."""
        if self.deepspeed.monitor.enabled:
            self.deepspeed.monitor.write_events(events)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Every parameter in float32 on the CPU, from the master copies, whatever the stage, and
        frozen ones as they were; every rank must call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        state, whole = dict(self.frozen), {}
        # the one stage that DeepSpeed's function overlooks
        if self.config.engine.zero_stage == 0:
            masters = self.masters()
            whole = {name: masters[i] for name, _, i, _ in device_step.layout(self.deepspeed)}
        for name, parameter in self.deepspeed.module.named_parameters():
            if not parameter.requires_grad:
                continue
            value = whole[name] if whole else safe_get_full_fp32_param(parameter)
            assert value is not None
            if self.rank == 0:
                state[name] = value.detach().float().cpu().clone()
        return state

    @contextlib.contextmanager
    def whole(
        self, parameters: Iterable[nn.Parameter], writer: int | None = None
    ) -> Iterator[None]:
        """Inside, every rank has parameters of the model in full, to be read: ZeRO 3 gathers them.
        Every rank must enter. writer: a rank whose changes ZeRO 3 takes apart again.
        """
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer):
            yield

    def masters(self) -> list[torch.Tensor]:
        """The float32 weights that this rank updates, whatever their layout."""
        return device_step.master_weights(self.deepspeed)

    def is_finite(self) -> bool:
        """Whether all weights that are trained are, on this rank."""
        masters = self.masters()
        # in ZeRO 3 DeepSpeed fills up the share of a rank with whatever the memory held
        return all(
            bool(masters[index].view(-1)[place].isfinite().all())
            for _, _, index, place in device_step.layout(self.deepspeed)
        )

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
        memory: dict[str, Any],
        tensors: Mapping[str, torch.Tensor],
        finish: Callable[[], object],
    ) -> None:
        """Writes checkpoints/step_N: never half of one, `latest` never before all ranks are done.
        `resume` gives `memory` back, of what JSON has, and tensors by name, the same on all ranks.
        What the disk refuses, `writer` tells.

        finish: what the main rank does as soon as the checkpoint is there.
        """
        self.deepspeed.skipped_steps = int(self.skipped_steps)
        own, common = self._fragments(tensors)
        by_size = sorted(common, key=lambda key: len(common[key][1]))
        own |= {key: common[key] for key in by_size[self.rank :: self.world_size]}
        optim, counters = self.config.optim, {}
        for of in device_step.counters(self.deepspeed):
            counters |= {name: of[name] for name in COUNTERS if name in of}
        facts = {
            "step": step,
            **checkpoint.facts(self.config),
            "videos_per_step": optim.micro_batch * optim.accumulation * self.world_size,
            "memory": copy.deepcopy(memory),
            "updates": max(int(one["step"]) for one in self.optimizer.state.values()),
            "counters": counters,
        }
        state = {f"{key}/{start}": view.detach() for key, (start, view) in own.items()}
        self.writer.write(facts, state, finish)

    def resume(self, tensors: Mapping[str, torch.Tensor]) -> tuple[int, dict[str, Any]]:
        """Loads the newest checkpoint that is whole, `tensors` in place; returns the number of
        steps it has done and its memory, (0, {}) for a run that never had one. `faults` says what
        is wrong with those that were passed over.

        Raises: FolderError.
        """
        part = slice(self.rank, None, self.world_size)
        for folder in self.gather(checkpoint.folders(self.checkpoints))[0]:
            found = [one for one in self.gather(checkpoint.fault(folder, part)) if one]
            if not found:
                break
            self.faults[folder] = found[0]
        else:
            run_folder = self.checkpoints.parent
            has_saved = (self.checkpoints / "latest").exists() or (run_folder / "model").exists()
            if self.faults or has_saved:
                wrong = "; ".join(f"{one.name}: {fault}" for one, fault in self.faults.items())
                raise FolderError(
                    f"{run_folder}: no checkpoint can be used: {wrong or 'there was one'}; put one "
                    "back, or begin anew with --from-scratch, which renames the folder"
                )
            return 0, {}
        manifest = checkpoint.read_manifest(folder)
        if "memory" not in manifest:
            memory = self.load_deepspeed_checkpoint(folder, tensors)
        else:
            memory, (own, common) = manifest["memory"], self._fragments(tensors)
            fragments.read(folder, own | common)
            for state in self.optimizer.state.values():
                state["step"].fill_(manifest["updates"])
            named = self.deepspeed.module.named_parameters()
            frozen = {name: parameter for name, parameter in named if not parameter.requires_grad}
            with self.whole(frozen.values(), writer=0):
                fragments.read(folder, fragments.whole("weight", frozen))
            device_step.spread_masters(self.deepspeed)
            for of in device_step.counters(self.deepspeed):
                of.update({name: n for name, n in manifest["counters"].items() if name in of})
        self.skipped_steps = filled(self.deepspeed.skipped_steps, self.device)
        return manifest["step"], memory

    def load_deepspeed_checkpoint(
        self, folder: Path, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """What `resume` does of one that an earlier version had DeepSpeed write, for the same ranks
        in the same mode; returns the memory of the run. Executes pickles.
        """
        _, state = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if self.rank == 0:
            # the float32 values of what is not trained, by name
            self.frozen = state.get("frozen_weights", self.frozen)
        masters = order = self.masters()
        if self.deepspeed.optimizer is self.optimizer:  # ZeRO 0 in float32: all, frozen ones too
            order = list(self.deepspeed.module.parameters())
        numbers = {master: number for number, master in enumerate(order)}
        wanted = dict(tensors)
        for master, average in zip(masters, self.beside_masters.get("average", ()), strict=False):
            wanted[f"average.{self.rank}.{numbers[master]}"] = average
        for file in folder.glob("tensors_*.safetensors"):
            saved = load_file(file)
            for name in wanted.keys() & saved.keys():
                wanted[name].copy_(saved[name])
        return state.get("memory", {})  # still earlier ones wrote none

    def _fragments(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Fragments, Fragments]:
        """The state of training on this rank: (what it alone has, what every rank has whole)."""
        masters, state = self.masters(), self.optimizer.state
        for master in masters:
            if not state[master]:  # before the first step
                state[master]["step"] = filled(0, master.device)
                state[master].update({kind: torch.zeros_like(master) for kind in MOMENTS})
        kinds = {"weight": masters, **self.beside_masters}
        for kind in MOMENTS:
            kinds[kind] = [state[master][kind] for master in masters]
        own = fragments.whole("weight", self.frozen)
        common = fragments.whole("tensor", {**self.spikes.tensors, **tensors})
        trained = common if self.config.engine.zero_stage == 0 else own
        for name, start, index, place in device_step.layout(self.deepspeed):
            for kind, of in kinds.items():
                trained[f"{kind}/{name}"] = start, of[index].view(-1)[place]
        return own, common


def leave() -> None:
    """Leaves the process group: once, at the end of the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def check_start(config: RunConfig) -> None:
    """Checks what the engine of a run will need. Raises: ValueError for what this machine or
    DeepSpeed cannot do.
    """
    check_devices("engine.precision", config.engine.precision, config.data)
    dictionary = deepspeed_config(config, World.from_environment().size)
    if not config.engine.extra:
        return
    prepare_environment()
    from deepspeed.runtime.config import DeepSpeedConfig

    # one at a time, so that what is wrong is told by its key
    for key in config.engine.extra:
        try:
            DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, key: dictionary[key]})
        except Exception as error:  # pydantic's, and types of its own
            said = " ".join(str(error).split())
            raise ValueError(one_line(f"engine.extra.{key}: DeepSpeed: {said}")) from None
