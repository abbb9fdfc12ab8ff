"""DeepSpeed in one place: its start, step, checkpoints. The only file that imports it."""

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from video_mae.config import RunConfig
from video_mae.config.world import World
from video_mae.files import StorageError, one_line
from video_mae.training import checkpoint, device_step, fragments
from video_mae.training.deepspeed_checkpoint import load_deepspeed_checkpoint
from video_mae.training.deepspeed_config import deepspeed_config
from video_mae.training.environment import prepare_environment
from video_mae.training.fragments import Fragment
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
        self.statuses, self.unusual = StatusQueue(self.device), "not finite"
        is_watched = config.engine.on_spike != "ignore"
        if is_watched:
            self.unusual += " or a spike"
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
        `resume` gives `memory` back, of what JSON has, and tensors by name, the same on all ranks.
        What the disk refuses, `writer` tells.

        finish: what the main rank does as soon as the checkpoint is there.
        """
        self.deepspeed.skipped_steps = int(self.skipped_steps)
        own, common = self._fragments(tensors or {})
        common.sort(key=lambda fragment: len(fragment.view))
        state = fragments.named(own + common[self.rank :: self.world_size])
        optim, counters = self.config.optim, {}
        for of in device_step.counters(self.deepspeed):
            counters |= {name: of[name] for name in COUNTERS if name in of}
        facts = {
            "step": step,
            **_facts(self.config, self.world_size),
            "videos_per_step": optim.micro_batch * optim.accumulation * self.world_size,
            "memory": copy.deepcopy(memory),
            "updates": max(int(one["step"]) for one in self.optimizer.state.values()),
            "counters": counters,
        }
        self.writer.write(facts, keep, state, finish)

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
        manifest = checkpoint.read_manifest(folder)
        assert manifest is not None
        if "memory" not in manifest:
            memory = load_deepspeed_checkpoint(self, folder, tensors or {})
        else:
            memory, (own, common) = manifest["memory"], self._fragments(tensors or {})
            fragments.read(folder, own + common)
            for state in self.optimizer.state.values():
                state["step"].fill_(manifest["updates"])
            self._read_frozen(folder)
            device_step.spread_masters(self.deepspeed)
            for of in device_step.counters(self.deepspeed):
                of.update({name: n for name, n in manifest["counters"].items() if name in of})
        self.skipped_steps = filled(self.deepspeed.skipped_steps, self.device)
        return manifest["step"], memory

    def _read_frozen(self, folder: Path) -> None:
        """What the model computes with of the weights that are not trained."""
        import deepspeed

        named = self.deepspeed.module.named_parameters()
        frozen = {name: parameter for name, parameter in named if not parameter.requires_grad}
        # ZeRO 3 takes apart again what rank 0 has read
        with deepspeed.zero.GatheredParameters(list(frozen.values()), modifier_rank=0):
            fragments.read(folder, fragments.whole("weight", frozen))

    def _fragments(
        self, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[list[Fragment], list[Fragment]]:
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
        common = fragments.whole("tensor", tensors)
        trained = common if self.config.engine.zero_stage == 0 else own
        for name, start, index, place in device_step.layout(self.deepspeed):
            for kind, of in kinds.items():
                trained.append(Fragment(f"{kind}/{name}", start, of[index].view(-1)[place]))
        return own, common


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
    """What a checkpoint of earlier versions and the start that reads it have to agree about."""
    keys = ("zero_stage", "precision", "offload")
    return {"world_size": world_size, **{key: getattr(config.engine, key) for key in keys}}


def check_start(config: RunConfig) -> tuple[int, list[str]]:
    """Checks what the engine of a run will need; returns the number of ranks, and a line about each
    fact of it that was another when the newest checkpoint was written.

    Raises: ValueError for what this machine or DeepSpeed cannot do, and where an earlier version
    wrote the checkpoint for another number of ranks, stage or precision.
    """
    world_size = World.from_environment().size
    if config.engine.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("engine.precision: fp16 needs a GPU; use bf16 or fp32")
    dictionary = deepspeed_config(config, world_size)
    if config.engine.extra:
        _check_with_deepspeed(dictionary, config.engine.extra)
    found = checkpoint.newest(Path(config.output) / "checkpoints")
    if found is None:
        return world_size, []
    folder, manifest = found
    lines = [
        f"{folder}: was written with {key} = {manifest[key]}, this start has {value}"
        for key, value in _facts(config, world_size).items()
        if manifest.get(key, value) != value
    ]
    if lines and "memory" not in manifest:
        raise ValueError(
            f"{lines[0]}; an earlier version wrote it: start as before until there is a newer one, "
            "or choose another output folder"
        )
    return world_size, lines


def _check_with_deepspeed(dictionary: dict[str, Any], changed: Iterable[str]) -> None:
    """Has DeepSpeed read the keys that a user has changed, one at a time, so that what is wrong is
    told by its key. Raises: ValueError.
    """
    prepare_environment()
    from deepspeed.runtime.config import DeepSpeedConfig

    for key in changed:
        try:
            DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, key: dictionary[key]})
        except Exception as error:  # pydantic's, and types of its own
            said: Any = {"loc": (), "msg": error}
            if hasattr(error, "errors"):
                said = error.errors()[0]  # pyright: ignore[reportAttributeAccessIssue]
            where = ".".join(["engine.extra", key, *map(str, said["loc"])])
            raise ValueError(one_line(f"{where}: DeepSpeed: {said['msg']}")) from None
