"""A step through the engine: how many operations it dispatches, that it waits for nothing, and that
no stage lets a bad gradient in.
"""

import collections
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from video_mae import ModelConfig, ObjectiveConfig, VideoMAE, tube_mask
from video_mae.config import EngineConfig, OptimConfig, PretrainConfig, RunConfig
from video_mae.data.loader import DevicePrefetcher
from video_mae.training import device_step, pretrain
from video_mae.training.deepspeed_config import deepspeed_config, zero_settings
from video_mae.training.engine import Engine
from video_mae.training.loop import Training

# ViT-B's blocks and so its 218 parameters, of few numbers each.
BASE = ModelConfig.preset(
    "base",
    num_frames=2,
    height=48,
    width=48,
    embed_dim=24,
    num_heads=2,
    decoder_embed_dim=12,
    decoder_num_heads=2,
)
SMALL = ModelConfig(
    num_frames=2,
    height=48,
    width=48,
    embed_dim=24,
    depth=1,
    num_heads=2,
    decoder_embed_dim=12,
    decoder_depth=1,
    decoder_num_heads=2,
)
MODES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]
ON_THE_HOST = (
    "prim.",
    "aten.view",
    "aten.t.",
    "aten.detach",
    "aten.slice.",
    "aten.transpose",
    "aten.unsqueeze",
    "aten._unsafe_view",
    "aten.unbind",
    "aten.expand",
    "aten.alias",
    "aten.permute",
    "aten.squeeze",
    "aten.select.",
    "aten.as_strided",
    "aten.empty",
    "aten.new_empty",
    "aten.reshape",
    "aten.split",
    "aten.is_same",
    "aten.set_",
    "profiler.",
)
WAITS = (
    "aten._local_scalar_dense",
    "aten.is_nonzero",
    "aten.equal",
    "aten.nonzero",
    "aten.masked_select",
    # the last is torch.tensor(), which a GPU's host copies from memory that is not pinned
    "aten.lift_fresh",
)
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")

pytestmark = [pytest.mark.trains_here, pytest.mark.usefixtures("quiet_process")]


class Operations(TorchDispatchMode):
    """Counts what would be sent to a device, and what would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.waits = collections.Counter[str](), collections.Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(WAITS):
            self.waits[name] += 1
        elif not name.startswith(ON_THE_HOST):
            self.sent[name] += 1
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts what a tensor of the host answers at once and one of a device does not."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = collections.Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def start(
    folder: Path,
    model: ModelConfig = SMALL,
    clip_grad: float = 0.0,
    accumulation: int = 1,
    **engine: Any,
) -> Engine:
    """An engine of one process."""
    torch.manual_seed(0)
    config = RunConfig(
        output=str(folder),
        engine=EngineConfig(**engine),
        optim=OptimConfig(micro_batch=1, accumulation=accumulation, clip_grad=clip_grad),
    )
    started = Engine(VideoMAE(model, ObjectiveConfig()), config)
    started.deepspeed.train()
    return started


def backward(engine: Engine, number: int, factor: float = 1.0, *, last: bool = True) -> float:
    clip = torch.randint(
        0,
        256,
        (1, 2, 48, 48, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(number),
    )
    loss = engine(clip, tube_mask(torch.tensor([number]), SMALL.grid, 0.75)).loss
    engine.backward(loss * factor, last=last)
    return loss.item()


def full_state(engine: Engine) -> dict[str, torch.Tensor]:
    """Weights and optimizer state; a copy."""
    states = engine.optimizer.state.values()
    moments = [state[key] for state in states for key in ("exp_avg", "exp_avg_sq", "step")]
    return engine.full_state() | {
        str(number): moment.clone() for number, moment in enumerate(moments)
    }


def is_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture
def synchronized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with DeepSpeed's waits for a whole device, which a CPU answers at once."""
    from deepspeed.accelerator import get_accelerator

    found: list[str] = []
    monkeypatch.setattr(
        type(get_accelerator()), "synchronize", lambda *_: found.append("synchronize")
    )
    return found


@pytest.mark.parametrize(("stage", "precision"), MODES)
def test_a_step_of_vit_b_is_few_operations_and_waits_for_nothing(
    stage: int, precision: str, tmp_path: Path, synchronized: list[str]
) -> None:
    engine = start(tmp_path, BASE, clip_grad=1.0, zero_stage=stage, precision=precision)
    assert sum(1 for _ in engine.deepspeed.module.parameters()) == 218
    # the first makes the optimizer's state, and DeepSpeed's timer, where it is on, waits from the
    # third on
    for number in range(3):
        backward(engine, number)
        engine.step(1e-4)
    backward(engine, 3)
    synchronized.clear()
    reads, operations = Reads(), Operations()
    with reads, operations:
        grad_norm = engine.step(1e-4)
    # 23 to 36 were seen; the issue was 3,333
    assert sum(operations.sent.values()) <= 60, operations.sent
    assert operations.sent["aten._fused_adamw_.default"] >= 1
    assert (operations.waits, reads.reads, synchronized) == ({}, {}, [])
    assert torch.as_tensor(grad_norm).isfinite()


@pytest.mark.parametrize(
    ("stage", "precision", "offload"),
    [
        *((*mode, "none") for mode in MODES),
        (1, "bf16", "optimizer"),
        (2, "fp32", "optimizer"),
        (3, "bf16", "parameters"),
    ],
)
def test_a_bad_gradient_changes_nothing_and_is_counted_through_a_checkpoint(
    stage: int, precision: str, offload: str, tmp_path: Path
) -> None:
    def engine() -> Engine:
        return start(
            tmp_path,
            clip_grad=0.5,
            accumulation=2,
            zero_stage=stage,
            precision=precision,
            offload=offload,
        )

    def step(engine: Engine, number: int, factor: float = 1.0) -> float:
        loss = backward(engine, number, factor, last=False)
        backward(engine, 10 * number)
        engine.step(1e-2)
        return loss

    first = engine()
    step(first, 1)
    before = full_state(first)
    for number, factor in ((2, float("nan")), (3, float("inf"))):
        step(first, number, factor)
        assert is_same(full_state(first), before)
    step(first, 4)
    assert not is_same(full_state(first), before)
    assert [(status.step, status.skipped_steps) for status in first.statuses.take(of_all=True)] == [
        (1, 0),
        (2, 1),
        (3, 2),
        (4, 2),
    ]
    first.save(4, {}, {}, tuple)
    resumed = engine()
    assert resumed.resume({})[0] == 4
    losses = [
        [step(one, number, factor) for number, factor in ((5, 1.0), (6, float("nan")), (7, 1.0))]
        for one in (first, resumed)
    ]
    assert losses[0] == losses[1]
    assert is_same(full_state(first), full_state(resumed))
    assert [status.skipped_steps for status in resumed.statuses.take(of_all=True)] == [2, 3, 3]


@pytest.mark.parametrize("stage", [1, 3])
def test_clipping_through_the_engine_is_that_of_torch(stage: int, tmp_path: Path) -> None:
    engine = start(tmp_path, clip_grad=0.02, zero_stage=stage, precision="fp32")
    torch.manual_seed(0)
    model = VideoMAE(SMALL, ObjectiveConfig())
    groups = [
        {**group, "lr": 1e-2, "params": [model.get_parameter(name) for name in names]}
        for group, names in zip(*named_groups(engine), strict=True)
    ]
    plain = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for number in range(3):
        backward(engine, number)
        clip = torch.randint(
            0,
            256,
            (1, 2, 48, 48, 3),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(number),
        )
        model(clip, tube_mask(torch.tensor([number]), SMALL.grid, 0.75)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        assert torch.as_tensor(engine.step(1e-2)).item() == pytest.approx(norm.item(), rel=1e-4)
        assert norm > 0.04
        plain.step()
        plain.zero_grad()
    for name, tensor in engine.full_state().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-5)


def named_groups(engine: Engine) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Decay and names of each parameter group: matrices decay."""
    names = [name for name, _ in engine.deepspeed.module.named_parameters()]
    shapes = {
        name: getattr(parameter, "ds_shape", parameter.shape)
        for name, parameter in engine.deepspeed.module.named_parameters()
    }
    matrices = [name for name in names if len(shapes[name]) >= 2]
    return [{"weight_decay": 0.05}, {"weight_decay": 0.0}], [
        matrices,
        [name for name in names if name not in matrices],
    ]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_that_deepspeed_clipped_is_resumed_and_clipped_once(
    stage: int, tmp_path: Path
) -> None:
    engine = start(tmp_path, zero_stage=stage, precision="bf16", clip_grad=1.0)
    backward(engine, 1)
    engine.step(1e-3)
    engine.deepspeed.optimizer.clip_grad = 1.0  # as earlier versions wrote it
    engine.save(1, {}, {}, tuple)
    engine.deepspeed.optimizer.clip_grad = 0.0
    resumed = start(tmp_path, zero_stage=stage, precision="bf16", clip_grad=1.0)
    assert resumed.resume({})[0] == 1
    for one in (engine, resumed):
        backward(one, 2)
        one.step(1e-3)
    assert resumed.deepspeed.optimizer.clip_grad == 0.0
    assert is_same(full_state(engine), full_state(resumed))


def test_deepspeed_guards_where_this_does_not_reach() -> None:
    def made(**engine: Any) -> dict[str, Any]:
        config = RunConfig(
            output="run", engine=EngineConfig(**engine), optim=OptimConfig(clip_grad=2.0)
        )
        return deepspeed_config(config, 1)

    for ours in (made(precision="fp32", zero_stage=0), made(precision="bf16", zero_stage=3)):
        assert device_step.is_possible(ours)
        assert (ours["gradient_clipping"], ours["bf16"]["check_grad_overflow"]) == (0.0, False)
    for theirs in (
        made(precision="fp16"),
        made(offload="optimizer"),
        made(extra={"data_types": {"grad_accum_dtype": "fp32"}}),
        made(extra={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    ):
        assert not device_step.is_possible(theirs)
        assert (theirs["gradient_clipping"], theirs["bf16"]["check_grad_overflow"]) == (2.0, True)
    assert made()["timers"] == {"throughput": {"enabled": False}}
    assert made(extra={"timers": {"throughput": {"enabled": True}}})["timers"] == {
        "throughput": {"enabled": True}
    }
    with pytest.raises(
        ValueError, match=r"engine.extra.bf16.check_grad_overflow: is set by this program"
    ):
        made(extra={"bf16": {"check_grad_overflow": True}})
    with pytest.raises(
        ValueError, match=r"round_robin_gradients: .* saved models would be wrong; leave it out"
    ):
        made(extra={"zero_optimization": {"round_robin_gradients": True}})


@pytest.mark.parametrize(
    ("version", "is_known"),
    [
        ("0.19.8", True),
        ("0.19.12+cu130", True),
        ("0.19.7", False),
        ("0.20.0", False),
        ("1.0", False),
    ],
)
def test_another_deepspeed_is_refused_before_anything_starts(
    version: str, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_step, "version", lambda package: version)
    with (
        nullcontext()
        if is_known
        else pytest.raises(
            ValueError, match=rf"deepspeed: {version} is installed.*deepspeed>=0.19.8,<0.20"
        )
    ):
        deepspeed_config(RunConfig(output="run"), 1)


@pytest.mark.parametrize("stage", range(4))
def test_a_step_of_a_run_reads_the_report_of_the_one_before_and_nothing_else(
    stage: int,
    tiny: Callable[..., PretrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    synchronized: list[str],
) -> None:
    reads, operations, step_of = Reads(), Operations(), Training._step

    def step(training: Any, batches: Any, number: int) -> int | None:
        if number != 3:
            return step_of(training, batches, number)
        synchronized.clear()
        with reads, operations:
            return step_of(training, batches, number)

    def elsewhere(work: Callable[..., Any]) -> Callable[..., Any]:
        """In a thread of its own, where nothing is counted."""

        def call(*inputs: Any) -> Any:
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(work, *inputs).result()

        return call

    monkeypatch.setattr(Training, "_step", step)
    # Batches are made by a thread on a GPU, too. On a CPU the kernels read what they are given;
    # that they do not on a GPU, tests/gpu/test_training.py sees.
    monkeypatch.setattr(DevicePrefetcher, "__next__", elsewhere(DevicePrefetcher.__next__))
    monkeypatch.setattr(Engine, "__call__", elsewhere(Engine.__call__))
    config = tiny(
        "optim.steps=5",
        "optim.accumulation=2",
        "optim.clip_grad=1",
        "objective.contrastive_weight=0.1",
        "journal.log_interval=100",
        "engine.precision=bf16",
        "engine.on_spike=skip",
        f"engine.zero_stage={stage}",
    )
    assert pretrain.run(pretrain.prepare(config)) == 0
    assert sum(operations.sent.values()) > 100
    assert (operations.waits, synchronized) == ({}, [])
    assert reads.reads == {"tolist": 1}
    line = "ZeRO 2 reduces gradients with each of the 2 micro-batches of a step"
    assert (line in (Path(config.output) / "log.txt").read_text()) == (stage == 2)


@pytest.mark.parametrize(
    ("stage", "num", "bucket", "overlaps"),
    [
        (0, 330_000_000, 50_000_000, False),
        (1, 94_211_000, 50_000_000, False),
        (2, 330_000_000, 50_000_000, True),
        (3, 1000, 1000, True),
    ],
)
def test_buckets_and_overlap_follow_the_size_of_a_model(
    stage: int, num: int, bucket: int, overlaps: bool
) -> None:
    settings = zero_settings(stage, num)
    assert settings == {"reduce_bucket_size": bucket, "overlap_comm": overlaps}


def test_a_report_comes_a_step_late_or_when_it_is_waited_for(tmp_path: Path) -> None:
    engine = start(tmp_path, zero_stage=0, precision="fp32")
    engine.statuses.listen()

    def step(number: int, factor: float = 1.0) -> None:
        backward(engine, number, factor)
        engine.step(1e-3)

    step(1)
    assert engine.statuses.take(of_all=False) == []
    step(2, float("nan"))
    assert engine.statuses.take(of_all=False) == [(1, 0, 0)]
    os.kill(os.getpid(), signal.SIGUSR1)
    step(3)
    assert engine.statuses.take(of_all=False) == [(2, 1, 0)]
    assert engine.statuses.take(of_all=True) == [(3, 1, signal.SIGUSR1)]
    assert engine.statuses.take(of_all=True) == []
